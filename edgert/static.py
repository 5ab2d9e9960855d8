"""Submodels with static shapes: what an NPU's compiler accepts, and other devices can run too.

A submodel that `edgert.cutting` made for static shapes takes the residual stream, masks and RoPE tables as inputs. Here
its keys and values become inputs and outputs as well, and every dimension a number: `query` rows of new tokens, the
last of which may be padding, and `past` slots for keys and values, of which a mask hides those that are empty. New rows
stand behind all slots, so what a query may see is decided by the mask alone; positions were applied before.

The same form with buckets of past tokens is what OpenVINO's NPU pipeline uses (NPUW's static LLM pipeline,
https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai/inference-with-genai-on-npu.html).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import openvino as ov
import openvino.opset13 as ops

from edgert.errors import PlanError
from edgert.graph import BOUNDARY
from edgert.irgraph import IrGraph, Node
from edgert.lowering import halve
from edgert.shapes import CARRIED, KEEP, NEW, PAST, PRELUDE, QUERY, TOTAL, Axes, StaticShape

LOGITS = "logits"


def shared_axes(submodels: Sequence[ov.Model]) -> dict[str, Axes]:
    """What the dimensions of the tensors are that submodels give to others than the next.

    Args:
        submodels: of one model, all of them, in order.

    Returns:
        For each output `prelude.N` or `carried.N` its dimensions: a number, `query` (rows of new tokens) or `total`
        (past and new).

    Raises:
        PlanError: a dimension is neither, or a state has no static shape.
    """
    trials = []
    for query, total in ((5, 16), (7, 20)):  # no two of these numbers, nor their differences, are alike
        shapes: dict[str, ov.PartialShape] = {}
        for submodel in submodels:
            if any(_is_shared(port.get_any_name()) for port in submodel.outputs):
                trial = submodel.clone()
                _states_to_tensors(trial, total - query)
                _give_sizes(trial, query, total, shapes)
                trial.validate_nodes_and_infer_types()
                shapes |= {port.get_any_name(): port.get_partial_shape() for port in trial.outputs}
        trials.append(shapes)
    found: dict[str, Axes] = {}
    for name in (name for name in trials[0] if _is_shared(name)):
        axes: list[int | str] = []
        for a, b in zip(trials[0][name], trials[1][name], strict=True):
            sizes = (a.get_max_length(), b.get_max_length()) if a.is_static and b.is_static else None
            meaning = {(5, 7): QUERY, (16, 20): TOTAL}.get(sizes or (0, 0))
            if meaning is None and (sizes is None or sizes[0] != sizes[1]):
                raise PlanError(f"static shapes: dimension {a} of {name} follows neither new nor all tokens")
            axes.append(meaning or a.get_length())
        found[name] = tuple(axes)
    return found


def _is_shared(name: str) -> bool:
    return name.startswith((PRELUDE, CARRIED))


def _give_sizes(model: ov.Model, query: int, total: int, shapes: Mapping[str, ov.PartialShape]) -> None:
    """Set the shapes of a submodel's inputs: those in `shapes`, and for the model's own what the tokens are."""
    for parameter in model.get_parameters():
        name, shape = parameter.output(0).get_any_name(), parameter.get_partial_shape()
        if name in shapes:
            parameter.set_partial_shape(shapes[name])
        elif name in _own_inputs(query, total):
            parameter.set_partial_shape(ov.PartialShape(_sized(_own_inputs(query, total)[name], shape)))
        elif name == BOUNDARY:
            parameter.set_partial_shape(ov.PartialShape(_sized([1, query], shape)))


def _own_inputs(query: int, total: int) -> dict[str, list[int]]:
    """The first dimensions of a decoder's own inputs; what follows them is static in the model."""
    rows = [1, query]
    return {
        "input_ids": rows, "position_ids": rows, "token_type_ids": rows, "image_ids": rows, "features": rows,
        "feature_mask": rows, "attention_mask": [1, total], "beam_idx": [1], KEEP: [1],
    }  # fmt: skip


def _sized(sizes: list[int], shape: ov.PartialShape) -> list[int]:
    """`sizes` and the static dimensions that stand before them (three rows of positions) or behind them (a width)."""
    extra = len(shape) - len(sizes)
    if extra == 0:
        return sizes
    if shape[-1].is_static:
        return [*sizes, *(d.get_length() for d in list(shape)[-extra:])]
    return [*(d.get_length() for d in list(shape)[:extra]), *sizes]


def caches(submodel: ov.Model) -> dict[str, tuple[int, int]]:
    """Heads and head size of each cache of a submodel that grows by one row a token, by state id.

    Raises:
        PlanError: a state is neither such a cache nor of a fixed size.
    """
    graph = IrGraph(submodel)
    found = {}
    for assign in graph.of_type("Assign"):
        if _fixed_shape(graph, assign) is None:
            shape = _concat(graph, assign).op.get_output_partial_shape(0)
            found[graph.variable_id(assign)] = (shape[1].get_length(), shape[3].get_length())
    return found


def fixed_states(submodel: ov.Model) -> dict[str, tuple[int, ...]]:
    """The shapes of the states of a submodel that do not grow, for one sequence, by state id."""
    graph = IrGraph(submodel)
    shapes = {graph.variable_id(assign): _fixed_shape(graph, assign) for assign in graph.of_type("Assign")}
    return {state: shape for state, shape in shapes.items() if shape is not None}


def _fixed_shape(graph: IrGraph, assign: Node) -> tuple[int, ...] | None:
    read = _read_value(graph, assign)
    shape = list(read.op.get_output_partial_shape(0))
    return (1, *(d.get_length() for d in shape[1:])) if all(d.is_static for d in shape[1:]) else None


def _read_value(graph: IrGraph, assign: Node) -> Node:
    state = graph.variable_id(assign)
    return next(node for node in graph.of_type("ReadValue") if graph.variable_id(node) == state)


def lower(submodel: ov.Model, shape: StaticShape, axes: Mapping[str, Axes], *, half: bool) -> ov.Model:
    """A static copy of a submodel.

    Args:
        submodel: one of `edgert.cutting.cut` that was cut for static shapes.
        axes: of the tensors that it shares with others; see `shared_axes`.
        half: whether all real inputs and outputs, keys and values included, are f16; logits and carried tensors stay
            f32.

    Returns:
        A model with inputs `hidden` `[1, query, width]`, the shared tensors that it needs, and for each state
        `past.STATE`; and with outputs `new.hidden`, or `logits` for the head, those `carried.N` that others need, and
        for each state `new.STATE`. Of a cache the two are `[1, heads, past, head_dim]` and `[1, heads, query,
        head_dim]`. A state that does not grow has its own shape in both, and padding would change it: such a model is
        to be called with as many tokens as it has rows.

    Raises:
        PlanError: a state is no cache, or a dimension depends on data.
    """
    model = submodel.clone()
    new_rows = _states_to_tensors(model, shape.past)
    known = _own_inputs(shape.query, shape.past + shape.query)
    sizes = {QUERY: shape.query, TOTAL: shape.query + shape.past}
    for parameter in model.get_parameters():
        name = parameter.output(0).get_any_name()
        if name == BOUNDARY:
            width = parameter.get_partial_shape()[2].get_length()
            parameter.set_partial_shape(ov.PartialShape([1, shape.query, width]))
        elif name in axes:
            sizes_of = [sizes[axis] if isinstance(axis, str) else axis for axis in axes[name]]
            parameter.set_partial_shape(ov.PartialShape(sizes_of))
        elif name in known:
            _fix(parameter, _sized(known[name], parameter.get_partial_shape()))
    # OpenVINO gives one of two tensors of a name another name when it reads them from a file.
    names = [f"{NEW}{n}" if n == BOUNDARY else n for n in (port.get_any_name() for port in model.outputs)]
    names += new_rows
    model.add_results([ops.result(tensor) for tensor in new_rows.values()])
    _make_masks_additive(model)
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    for port, name in zip(model.outputs, names, strict=True):
        port.set_names({name})
    if half:
        halve(model, lambda name: name != LOGITS and not name.startswith(CARRIED))
    dynamic = next((op for op in model.get_ordered_ops() for out in op.outputs() if out.partial_shape.is_dynamic), None)
    if dynamic is not None:
        raise PlanError(
            f"static shapes: {dynamic.get_type_name()} {dynamic.get_friendly_name()!r} has a dimension that depends on "
            "data; place its block on CPU or GPU@f16"
        )
    return model


def _fix(parameter: ov.Node, shape: Sequence[int]) -> None:
    """Replace what is taken of a model input by numbers: its shape, or, of the head's rows to keep, that it is one.

    Not by constant folding, which would unpack compressed weights too.
    """
    for consumer in list(parameter.output(0).get_target_inputs()):
        node = consumer.get_node()
        if node.get_type_name() == "ShapeOf":
            number = ops.constant(list(shape), node.get_output_element_type(0))
            for user in list(node.output(0).get_target_inputs()):
                user.replace_source_output(number.output(0))
        elif parameter.output(0).get_any_name() == KEEP:
            consumer.replace_source_output(ops.constant([1], ov.Type.i64).output(0))


def _states_to_tensors(model: ov.Model, slots: int) -> dict[str, ov.Output]:
    """Make the states inputs; gives the tensors of caches' new rows, and what the others become, by name.

    What reorders the past for beam search is dropped, as there is one beam.
    """
    graph = IrGraph(model)
    found: dict[str, ov.Output] = {}
    assigns = graph.of_type("Assign")
    for assign in assigns:
        state = graph.variable_id(assign)
        fixed = _fixed_shape(graph, assign)
        if fixed is not None:
            read = _read_value(graph, assign).op
            users = [port.get_node() for port in read.output(0).get_target_inputs()]
            reordered = len(users) == 1 and users[0].get_type_name() == "Gather"
            past = users[0].output(0) if reordered else read.output(0)
            kind = read.get_output_element_type(0)
            _stand_in(model, past, f"{PAST}{state}", fixed, kind)
            found[f"{NEW}{state}"] = assign.op.input_value(0)
            continue
        concat = _concat(graph, assign).op
        past, shape = concat.input_value(0), concat.get_output_partial_shape(0)
        sizes = (1, shape[1].get_length(), slots, shape[3].get_length())
        _stand_in(model, past, f"{PAST}{state}", sizes, ov.Type.f32)
        found[f"{NEW}{state}"] = concat.input_value(1)
    for assign in assigns:
        model.remove_sink(assign.op)
    for variable in list(model.get_variables()):
        model.remove_variable(variable)
    return found


def _stand_in(model: ov.Model, tensor: ov.Output, name: str, shape: Sequence[int], kind: ov.Type) -> None:
    """Let a new input of a model take the place of a tensor."""
    parameter = ops.parameter(list(shape), kind, name)
    parameter.output(0).set_names({name})
    for consumer in list(tensor.get_target_inputs()):
        consumer.replace_source_output(parameter.output(0))
    model.add_parameters([parameter])


def _make_masks_additive(model: ov.Model) -> None:
    """Let attention take what is added to its scores, where it took what is allowed.

    The NPU compiler (2026.4.1) rejects a boolean mask of more than one row: `Compilation failed`, and nothing else.
    """
    for parameter in model.get_parameters():
        consumers = list(parameter.output(0).get_target_inputs())
        attention = [c.get_node().get_type_name() == "ScaledDotProductAttention" for c in consumers]
        if parameter.get_element_type() == ov.Type.boolean and all(attention):
            parameter.set_element_type(ov.Type.f32)


def _concat(graph: IrGraph, assign: Node) -> Node:
    concat = graph.cache_concat(assign)
    if concat is None:
        state = graph.variable_id(assign)
        raise PlanError(
            f"static shapes: state {state!r} is no cache [batch, heads, tokens, head_dim] that new rows join"
        )
    return concat
