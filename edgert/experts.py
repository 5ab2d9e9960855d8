"""Experts for devices without GroupedMatMul, which is the GPU plugin without XMX and the NPU compiler (2026.4.1)."""

from __future__ import annotations

import openvino as ov
import openvino.opset13 as ops

# What lies between the tokens' rows and the rows of a later product.
_ROW_BY_ROW = {
    "Abs", "Add", "Clamp", "Convert", "Divide", "Elu", "Erf", "Exp", "Gelu", "GroupedMatMul", "HSigmoid", "HSwish",
    "Maximum", "Minimum", "Multiply", "Power", "Relu", "Select", "Sigmoid", "Slice", "SoftPlus", "Split", "Sqrt",
    "StridedSlice", "Subtract", "Swish", "Tanh", "VariadicSplit",
}  # fmt: skip


def without_grouped_products(model: ov.Model) -> ov.Model:
    """Let every expert take as many rows as there are tokens, in products that every device has.

    GroupedMatMul(rows `[n, in]` sorted by expert, weights `[experts, out, in]`, ends `[experts]`) becomes a Gather to
    `[experts, tokens, in]`, a MatMul with the weights as they are, compressed or not, and a Gather back. What an expert
    has no row for it computes of some other one, and nothing takes that. All experts are read and computed for
    all tokens: experts / k times the cost of the chosen ones.

    No expert has more rows than there are tokens, as a token chooses an expert once. Where the tokens' rows are not
    found in the graph, the number of rows, k times as many, takes their place.

    Returns:
        The model itself where it has no such products, else a copy. States are kept.
    """
    if not any(_is_grouped(node) for node in model.get_ops()):
        return model
    model = model.clone()
    places: dict[tuple[str, int, str], tuple[ov.Output, ov.Output]] = {}  # one for both products of a layer
    found = [(node, _tokens(node.input_value(0))) for node in model.get_ordered_ops() if _is_grouped(node)]
    for node, tokens in found:
        _replace(node, tokens, places)
    model.validate_nodes_and_infer_types()
    return model


def _is_grouped(node: ov.Node) -> bool:
    ranks = [node.get_input_partial_shape(index).rank for index in range(node.get_input_size())]
    return node.get_type_name() == "GroupedMatMul" and [r.is_static and r.get_length() for r in ranks] == [2, 3, 1]


def _replace(node: ov.Node, tokens: ov.Output, places: dict[tuple[str, int, str], tuple[ov.Output, ov.Output]]) -> None:
    rows, weights, ends = node.input_values()
    key = (ends.get_node().get_friendly_name(), ends.get_index(), tokens.get_node().get_friendly_name())
    if key not in places:
        places[key] = _places(rows, weights, ends, tokens)
    taken, given = places[key]
    spread = ops.gather(rows, taken, _number(0))
    products = ops.matmul(spread, weights, False, True)
    width = ops.constant([-1, weights.get_partial_shape()[1].get_length()], ov.Type.i64)
    result = ops.gather(ops.reshape(products, width, False), given, _number(0))
    result.set_friendly_name(node.get_friendly_name())
    for consumer in list(node.output(0).get_target_inputs()):
        consumer.replace_source_output(result.output(0))


def _places(rows: ov.Output, weights: ov.Output, ends: ov.Output, tokens: ov.Output) -> tuple[ov.Output, ov.Output]:
    """Which row each expert takes for each token, `[experts, tokens]`, and which of these products is each row's."""
    count, number = _length(tokens), _length(rows)
    experts = ops.constant(list(range(weights.get_partial_shape()[0].get_length())), ov.Type.i64)
    behind = ops.convert(ends, "i64")
    first = ops.concat([_numbers(0), ops.slice(behind, _numbers(0), _numbers(-1), _numbers(1), _numbers(0))], 0)
    slots = ops.range(_number(0), count, _number(1), "i64")
    taken = ops.minimum(ops.add(ops.unsqueeze(first, _number(1)), slots), ops.subtract(number, _number(1)))
    order = ops.range(_number(0), number, _number(1), "i64")
    # By comparisons, as the NPU compiler has no SearchSorted.
    passed = ops.convert(ops.less_equal(ops.unsqueeze(behind, _number(0)), ops.unsqueeze(order, _number(1))), "i64")
    expert = ops.reduce_sum(passed, _number(1))
    # Where its expert's products begin, less where its expert's rows do.
    shift = ops.subtract(ops.multiply(experts, count), first)
    return taken.output(0), ops.add(order, ops.gather(shift, expert, _number(0))).output(0)


def _tokens(rows: ov.Output) -> ov.Output:
    """The tensor `[tokens, width]` that rows were taken of; the rows themselves where that is not found."""
    seen: set[str] = set()
    open_nodes = [rows.get_node()]
    while open_nodes:
        node = open_nodes.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        if node.get_type_name() == "Gather":
            data = node.input_value(0)
            shape, picked = data.get_partial_shape(), node.get_input_partial_shape(1)
            axis = node.input_value(2).get_node()
            by_row = axis.get_type_name() == "Constant" and int(axis.data) == 0
            fits = [s.rank.is_static and s.rank.get_length() for s in (shape, picked)] == [2, 1]
            if by_row and fits and not _is_constant(data.get_node()):  # a constant is an expert's bias
                return data
        elif node.get_type_name() in _ROW_BY_ROW:
            open_nodes += [port.get_source_output().get_node() for port in node.inputs()]
    return rows


def _is_constant(node: ov.Node) -> bool:
    while node.get_type_name() in {"Convert", "Multiply", "Subtract", "Reshape"}:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _length(tensor: ov.Output) -> ov.Output:
    """The first dimension, as a number: a constant where it is known, as shapes are for an NPU."""
    size = tensor.get_partial_shape()[0]
    if size.is_static:
        return _number(size.get_length())
    return ops.gather(ops.shape_of(tensor, "i64"), _number(0), _number(0)).output(0)


def _number(value: int) -> ov.Output:
    return ops.constant(value, ov.Type.i64).output(0)


def _numbers(value: int) -> ov.Output:
    return ops.constant([value], ov.Type.i64).output(0)
