"""Make submodels of a model and a grouping of its blocks.

RoPE tables and masks are computed by the first submodel that needs them and passed on; shapes are cloned into each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import openvino as ov
import openvino.opset13 as ops

from edgert.errors import PlanError
from edgert.graph import BOUNDARY, BlockGraph
from edgert.irgraph import IrGraph, Node, name_new
from edgert.residual import ResidualStream, Uncuttable, crossings, dimension_sources

PRELUDE = "prelude."  # names of what submodels share beside the residual stream begin so


def cut(
    model: ov.Model, graph: BlockGraph, groups: Sequence[tuple[int, int]], static: Collection[int] = ()
) -> list[ov.Model]:
    """Cut a model into submodels.

    Args:
        model: the model that `graph` was made from; it is not changed.
        groups: for each submodel its first and last block, in order, without gaps.
        static: numbers of the groups that will have static shapes, not the first. All that depends on the model's
            inputs reaches them as tensors that the first submodel computes.

    Returns:
        One submodel a group; a single group gives `[model]`. Each takes those of the model's own inputs that it needs,
        and all but the first take `hidden`, the output of the one before (f32 or f16, `[batch, tokens, width]`).
        Outputs `prelude.N` of one are inputs of later ones, N being the same for the same tensor however the model is
        cut. The last one has the model's own result.

    Raises:
        PlanError: the groups do not cover the blocks in order, or the graph belongs to another model.
    """
    expected = [index for first, last in groups for index in range(first, last + 1)]
    if not groups or expected != list(range(len(graph.blocks))):
        raise PlanError(f"cut: groups {list(groups)} do not cover blocks 0-{len(graph.blocks) - 1} in order")
    if len(groups) == 1:
        return [model]
    clone = model.clone()
    index = IrGraph(clone)
    try:
        stream = ResidualStream(index)
        segments = [stream.segment_of_boundary(graph.blocks[last].output) for _, last in groups[:-1]]
        ranges = list(zip([0, *(s + 1 for s in segments)], [*segments, stream.last], strict=True))
        shapes = crossings(stream, ranges)[0]
        if static:  # the prelude moves to the first submodel, away from the caches that it may take a shape of
            shapes = [n for n in index.of_type("ShapeOf") if dimension_sources(index, n) is not None]
        for shape_of in shapes:
            _shape_from_inputs(index, shape_of)
        state_owners = stream.state_owners
    except Uncuttable as error:
        raise PlanError(f"cut: the block graph does not belong to this model: {error}") from error

    owner = {s: number for number, (first, last) in enumerate(ranges) for s in range(first, last + 1)}
    assigns = {index.variable_id(n): n.op for n in index.of_type("Assign")}
    boundaries: list[tuple[ov.Node, ov.Output]] = []  # parameter of the next submodel, tensor it stands for
    for number, (_, last) in enumerate(groups[:-1]):
        tensor = index.tensor(graph.blocks[last].output)
        parameter = ops.parameter(tensor.get_partial_shape(), tensor.get_element_type(), BOUNDARY)
        parameter.output(0).set_names({BOUNDARY})
        name_new([parameter], f"{BOUNDARY}{number}")
        for consumer in tensor.get_target_inputs():
            consumer_name = consumer.get_node().get_friendly_name()
            # Only residual data crosses here: shapes that crossed were rewritten above.
            if owner.get(stream.segment.get(consumer_name, -1), number) > number:
                consumer.replace_source_output(parameter.output(0))
        boundaries.append((parameter, tensor))

    shared = _share_prelude(stream, ranges, frozenset(static))
    submodels = []
    for number, (first, last) in enumerate(groups):
        sinks = [assigns[variable] for variable, s in state_owners.items() if owner[s] == number]
        outputs = {BOUNDARY: boundaries[number][1]} if number < len(boundaries) else {}
        outputs |= {s.name: s.tensor for s in shared if s.producer == number}
        results = [ops.result(tensor) for tensor in outputs.values()]
        name_new(results, "result")
        results = results or list(clone.get_results())
        needed = _ancestors([*results, *sinks])
        parameters = [p for p in clone.get_parameters() if p.get_friendly_name() in needed]
        parameters += [boundaries[number - 1][0]] if number else []
        parameters += [s.parameter for s in shared if number in s.users]
        submodel = ov.Model(results, sinks, parameters, f"{clone.get_friendly_name()}[{first}-{last}]").clone()
        for port, name in enumerate(outputs):
            submodel.output(port).set_names({name})
        submodels.append(submodel)
    return submodels


@dataclass(frozen=True)
class _Shared:
    """A tensor of the prelude that one submodel computes and later ones take as an input."""

    name: str
    tensor: ov.Output
    parameter: ov.Node
    producer: int
    users: frozenset[int]


def _share_prelude(stream: ResidualStream, ranges: Sequence[tuple[int, int]], static: frozenset[int]) -> list[_Shared]:
    """Let the first submodel that needs RoPE tables or masks give them to the later ones.

    Computing them again in every submodel costs nothing in bytes but, in decode, nearly as much time as the attention
    itself (docs/benchmarks.md). Integers stay: they are shapes, which compilers want to see. With static shapes a
    submodel cannot compute them: it does not know how many of its rows are padding, so the first submodel does.
    """
    graph = stream.graph
    users: dict[str, set[int]] = {}
    for number, (first, last) in enumerate(ranges):
        for name in stream.side(range(first, last + 1)):
            users.setdefault(name, set()).add(number)
    inner: set[str] = set()  # takes at least the shape of something on the stream, or of a state
    for node in graph.nodes.values():
        rewritten = node.type == "ShapeOf" and dimension_sources(graph, node) is not None
        below = node.name in stream.segment or node.type == "ReadValue" or any(s in inner for s, _ in node.inputs)
        if below and not rewritten:
            inner.add(node.name)
    sharers = {
        name: numbers | ({0} if numbers & static and name not in inner else set()) for name, numbers in users.items()
    }
    owner = {s: number for number, (first, last) in enumerate(ranges) for s in range(first, last + 1)}

    def is_shared(name: str) -> bool:
        return len(sharers.get(name, ())) > 1 and name not in stream.live and name not in graph.constant_only

    found: list[_Shared] = []
    for number, node in enumerate(graph.nodes.values()):
        if node.type == "Parameter" or not is_shared(node.name):
            continue
        for tensor in node.op.outputs():
            if not (tensor.get_element_type().is_real() or tensor.get_element_type() == ov.Type.boolean):
                continue
            consumers: dict[int, list[ov.Input]] = {}
            for consumer in tensor.get_target_inputs():
                name = consumer.get_node().get_friendly_name()
                if name in stream.segment:
                    consumers.setdefault(owner[stream.segment[name]], []).append(consumer)
                elif not is_shared(name) and name in users and graph[name].type != "ReadValue":
                    consumers.setdefault(min(users[name]), []).append(consumer)
            producer = 0 if consumers.keys() & static else min(consumers, default=0)
            if not consumers.keys() - {producer}:
                continue
            name = f"{PRELUDE}{number}" + (f".{tensor.get_index()}" if tensor.get_index() else "")
            parameter = ops.parameter(tensor.get_partial_shape(), tensor.get_element_type(), name)
            parameter.output(0).set_names({name})
            name_new([parameter], name)
            for user, inputs in consumers.items():
                for consumer in inputs if user != producer else ():
                    consumer.replace_source_output(parameter.output(0))
            found.append(_Shared(name, tensor, parameter, producer, frozenset(consumers) - {producer}))
    return found


def _shape_from_inputs(graph: IrGraph, shape_of: Node) -> None:
    """Let the consumers of a ShapeOf take the shape from the model's inputs instead."""
    dims = dimension_sources(graph, shape_of)
    assert dims is not None
    kind = shape_of.op.get_output_element_type(0)

    new: list[ov.Node] = []

    def size(input_name: str, axis: int) -> ov.Output:
        shape = ops.shape_of(graph.model.input(input_name), kind)
        which, zero = ops.constant([axis], ov.Type.i64), ops.constant(0, ov.Type.i64)
        chosen = ops.gather(shape, which, zero)
        new.extend((shape, which, zero, chosen))
        return chosen.output(0)

    query = size("input_ids", 1)
    known = {"batch": size("input_ids", 0), "query": query}
    if "past" in dims or "total" in dims:
        known["total"] = size("attention_mask", 1)
        new.append(ops.subtract(known["total"], query))
        known["past"] = new[-1].output(0)
    parts = [known[d].get_node() if isinstance(d, str) else ops.constant([d], kind) for d in dims]
    shape = ops.concat(parts, 0)
    name_new([*new, *(n for n in parts if n.get_type_name() == "Constant"), shape], f"{shape_of.name}/from_inputs")
    for consumer in list(shape_of.op.output(0).get_target_inputs()):
        consumer.replace_source_output(shape.output(0))


def _ancestors(nodes: Sequence[ov.Node]) -> set[str]:
    found: set[str] = set()
    stack = list(nodes)
    while stack:
        for port in stack.pop().inputs():
            source = port.get_source_output().get_node()
            if source.get_friendly_name() not in found:
                found.add(source.get_friendly_name())
                stack.append(source)
    return found
