"""Say what the blocks of a model are: `annotate`.

Where a model can be cut is found in `edgert.residual`; what a block is follows from what is inside it: attention, two
products with weights, a router, a state. `edgert.cutting` makes submodels of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import openvino as ov

from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.irgraph import IrGraph, Node, Product
from edgert.residual import ResidualStream, Uncuttable, crossings


def annotate(model: ov.Model) -> BlockGraph:
    """Find the blocks of a decoder or encoder.

    Args:
        model: with an input `input_ids` and its result first among the outputs; read from a file, so that the names
            of its operations are unique.

    Returns:
        A chain of blocks. A model that cannot be cut is one block, and `reason` says why.
    """
    graph = IrGraph(model)
    try:
        stream = ResidualStream(graph)
        blocks = _group(stream)
        blocks = _join_crossings(stream, blocks)
    except Uncuttable as reason:
        return whole(model, str(reason))
    counters: dict[BlockKind, int] = {}
    annotated = []
    for index, (first, last) in enumerate(blocks):
        block = _describe(stream, first, last, index, len(blocks))
        number = counters[block.kind] = counters.get(block.kind, -1) + 1
        name = str(block.kind) if block.kind in {BlockKind.EMBED, BlockKind.HEAD} else f"{block.kind}.{number}"
        annotated.append(replace(block, name=name))
    edges = tuple(
        Edge(b.index, b.index + 1, b.output, 4 * _width(graph[b.output.rpartition(":")[0]])) for b in annotated[:-1]
    )
    return BlockGraph(tuple(annotated), edges)


def whole(model: ov.Model, reason: str) -> BlockGraph:
    """The graph of a model that stays in one piece, and why."""
    return BlockGraph((_whole(IrGraph(model)),), (), reason)


@dataclass(frozen=True)
class _Content:
    """What lies in a range of segments."""

    products: list[Product]
    attention: list[Node]  # SDPA, or products of activations with activations
    routers: list[Node]
    states: tuple[str, ...]
    growing: bool


def _content(stream: ResidualStream, first: int, last: int, owners: dict[str, int]) -> _Content:
    graph = stream.graph
    nodes = [n for n in stream.main if first <= stream.segment[n.name] <= last]
    products, attention = [], []
    for node in nodes:
        product = graph.product(node)
        if product is not None:
            products.append(product)
        elif node.type == "ScaledDotProductAttention" or (
            node.type == "MatMul" and all(source in stream.live for source, _ in node.inputs)
        ):
            attention.append(node)
    states = tuple(sorted((v for v, s in owners.items() if first <= s <= last), key=_natural))
    shapes = [_state_shape(graph, v) for v in states]
    return _Content(
        products, attention, [n for n in nodes if n.type == "TopK"], states,
        any(_grows(shape) for shape in shapes),
    )  # fmt: skip


def _group(stream: ResidualStream) -> list[tuple[int, int]]:
    """Join segments to blocks: a block has attention, states or two products, and what follows up to the next one."""
    owners = stream.state_owners
    contents = [_content(stream, s, s, owners) for s in range(len(stream.ends))]
    cores = [s for s, c in enumerate(contents) if c.attention or c.states or len(c.products) >= 2]
    if not cores:
        raise Uncuttable("no block with attention, a state or two matrix products on the residual stream")
    starts = [0] if cores[0] == 0 else [0, cores[0]]
    starts += cores[1:]
    tail = range(cores[-1] + 1, len(stream.ends))
    if any(contents[s].products for s in tail):
        starts.append(tail.start)
    return list(zip(starts, [*(s - 1 for s in starts[1:]), stream.last], strict=True))


def _join_crossings(stream: ResidualStream, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    _, joined = crossings(stream, blocks)
    if not joined:
        return blocks
    merged: list[tuple[int, int]] = []
    for number, (first, last) in enumerate(blocks):
        if merged and any(low < number <= high for low, high in joined):
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _describe(stream: ResidualStream, first: int, last: int, index: int, count: int) -> Block:
    graph = stream.graph
    content = _content(stream, first, last, stream.state_owners)
    weights: dict[str, int] = {}
    for node in stream.side(range(first, last + 1)).values():
        if node.type == "Constant" and _only_weight(stream, node, range(first, last + 1)):
            _count(weights, node)
    state_shapes = [(_state_shape(graph, v), _state_bytes(graph, v)) for v in content.states]
    return Block(
        index=index,
        kind=_kind(stream, content, index, count),
        name="",
        input=stream.tensor(first - 1) if first else None,
        output=stream.tensor(last),
        states=content.states,
        weight_bytes=weights,
        flops_per_token=_flops(content.products, content.routers),
        kv_bytes_per_token=sum(size * _static_elements(shape) for shape, size in state_shapes if _grows(shape)),
        recurrent_bytes=sum(size * _static_elements(shape) for shape, size in state_shapes if not _grows(shape)),
        score_flops=sum(_score_flops(graph, node) for node in content.attention),
    )


def _flops(products: Iterable[Product], routers: Iterable[Node]) -> int:
    """Operations of products with weights for one token; of a stack of experts those of the experts it uses."""
    used = {}  # by the number of experts that there are to choose from
    for router in routers:
        axis = router.op.get_attributes()["axis"]
        experts = _size(router.op.get_input_partial_shape(0), axis)
        used[experts] = _size(router.op.get_output_partial_shape(0), axis) or experts
    total = 0
    for product in products:
        shape = [int(d) for d in product.weight.op.get_output_shape(0)]
        if product.stacked:
            shape[0] = used.get(shape[0], shape[0])
        total += 2 * math.prod(shape)
    return total


def _score_flops(graph: IrGraph, node: Node) -> int:
    """Operations of an attention for one query token and one key token; 0 where its shapes do not tell.

    Decomposed attention is two products of activations, with the number of key tokens once in the result and once in
    what is summed over. A Reshape may have joined heads and batch before it.
    """
    query, output = node.op.get_input_partial_shape(0), node.op.get_output_partial_shape(0)
    source = graph[node.inputs[0][0]]
    by_head = source.op.get_input_partial_shape(0) if source.type == "Reshape" and query.rank == 3 else query
    heads = _size(by_head, 1) if by_head.rank == 4 else 0
    widths = [width for width in (_size(query, -1), _size(output, -1)) if width]
    known = len(widths) == (2 if node.type == "ScaledDotProductAttention" else 1)
    return 2 * heads * sum(widths) if known else 0


def _kind(stream: ResidualStream, content: _Content, index: int, count: int) -> BlockKind:
    core = bool(content.attention or content.states or len(content.products) >= 2)
    if index == 0 and not (content.attention or content.states):
        return BlockKind.EMBED
    if index == count - 1 and not core:
        return BlockKind.HEAD
    if content.states and not content.growing:
        return BlockKind.SSM
    if content.growing or any(n.type == "ScaledDotProductAttention" for n in content.attention):
        return BlockKind.BLOCK if _has_parallel_ffn(stream, content) else BlockKind.ATTENTION
    if content.routers and content.products:
        return BlockKind.MOE
    if content.attention:
        return BlockKind.ATTENTION
    return BlockKind.FFN if len(content.products) >= 2 else BlockKind.BLOCK


def _has_parallel_ffn(stream: ResidualStream, content: _Content) -> bool:
    """Whether two products lie beside the attention, neither before nor after it."""
    cores = [n.name for n in content.attention]
    after = stream.graph.reached_from(set(cores))
    before = set().union(*(stream.graph.leading_to(name) for name in cores))
    beside = [p for p in content.products if p.node.name not in after and p.node.name not in before]
    return len(beside) >= 2


def _only_weight(stream: ResidualStream, constant: Node, segments: range) -> bool:
    """Whether a constant reaches the residual stream directly, not through what depends on the model's inputs."""
    graph, seen, stack = stream.graph, set[str](), [constant]
    while stack:
        for consumer in stack.pop().op.output(0).get_target_inputs():
            name = consumer.get_node().get_friendly_name()
            if stream.segment.get(name, -1) in segments:
                return True
            if name in graph.constant_only and name not in seen:
                seen.add(name)
                stack.append(graph[name])
    return False


def _whole(graph: IrGraph) -> Block:
    weights: dict[str, int] = {}
    for node in graph.of_type("Constant"):
        _count(weights, node)
    states = tuple(sorted((graph.variable_id(n) for n in graph.of_type("ReadValue")), key=_natural))
    shapes = [(_state_shape(graph, v), _state_bytes(graph, v)) for v in states]
    products = [p for node in graph.nodes.values() if (p := graph.product(node)) is not None]
    result = graph.model.get_results()[0].input_value(0)
    return Block(
        index=0,
        kind=BlockKind.BLOCK,
        name="block.0",
        input=None,
        output=f"{result.get_node().get_friendly_name()}:{result.get_index()}",
        states=states,
        weight_bytes=weights,
        flops_per_token=_flops(products, graph.of_type("TopK")),
        kv_bytes_per_token=sum(size * _static_elements(shape) for shape, size in shapes if _grows(shape)),
        recurrent_bytes=sum(size * _static_elements(shape) for shape, size in shapes if not _grows(shape)),
    )


def _count(weights: dict[str, int], constant: Node) -> None:
    kind = str(constant.op.get_output_element_type(0).get_type_name())
    if kind not in {"i32", "i64", "boolean"}:  # axes and shapes, no weights
        weights[kind] = weights.get(kind, 0) + constant.op.get_byte_size()


def _state_node(graph: IrGraph, variable: str) -> Node:
    return next(n for n in graph.of_type("ReadValue") if graph.variable_id(n) == variable)


def _state_shape(graph: IrGraph, variable: str) -> ov.PartialShape:
    return _state_node(graph, variable).op.get_output_partial_shape(0)


def _state_bytes(graph: IrGraph, variable: str) -> int:
    return int(_state_node(graph, variable).op.get_output_element_type(0).size)


def _grows(shape: ov.PartialShape) -> bool:
    """A cache grows with every token; its batch dimension comes first."""
    return any(d.is_dynamic for d in list(shape)[1:])


def _static_elements(shape: ov.PartialShape) -> int:
    return math.prod(d.get_length() for d in shape if d.is_static)


def _width(node: Node) -> int:
    return _size(node.op.get_output_partial_shape(0), -1)


def _size(shape: ov.PartialShape, axis: int) -> int:
    """A dimension, 0 where it is unknown."""
    known = shape.rank.is_static and shape[axis].is_static
    return int(shape[axis].get_length()) if known else 0


def _natural(text: str) -> tuple[object, ...]:
    """Sort key that puts layer 2 before layer 10."""
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return (*map(int, digits), text)
