"""Say what the blocks of a model are: `annotate`.

Where a model can be cut is found in `edgert.residual`; what a block is follows from what is inside it: attention, two
products with weights, a router, a state. `edgert.cutting` makes submodels of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import openvino as ov

from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.irgraph import IrGraph, Node, Product
from edgert.residual import ResidualStream, Uncuttable, backward


def annotate(model: ov.Model) -> BlockGraph:
    """Find the blocks of a decoder, an encoder or a diffusion transformer.

    Args:
        model: with an input `input_ids` or real-valued inputs; with several outputs the first is the one that blocks
            are named by. Read from a file, so that the names of its operations are unique.

    Returns:
        A chain of blocks. A model that cannot be cut is one block, and `reason` says why.
    """
    graph = IrGraph(model)
    try:
        stream = ResidualStream(graph)
        blocks = _group(stream)
        blocks = _join(stream, blocks)
    except Uncuttable as reason:
        return whole(model, str(reason))
    counters: dict[BlockKind, int] = {}
    annotated = []
    for index, (first, last) in enumerate(blocks):
        block = _describe(stream, first, last, index, len(blocks))
        number = counters[block.kind] = counters.get(block.kind, -1) + 1
        name = str(block.kind) if block.kind in {BlockKind.EMBED, BlockKind.HEAD} else f"{block.kind}.{number}"
        annotated.append(replace(block, name=name))
    edges = tuple(_edge(stream, b, last) for b, (_, last) in zip(annotated[:-1], blocks, strict=False))
    return BlockGraph(tuple(annotated), edges)


def whole(model: ov.Model, reason: str) -> BlockGraph:
    """The graph of a model that stays in one piece, and why."""
    return BlockGraph((_whole(IrGraph(model)),), (), reason)


def _edge(stream: ResidualStream, block: Block, last: int) -> Edge:
    """What passes the boundary behind a block, whose last segment is `last`."""
    graph = stream.graph
    carried = [name for name in stream.crossing(last) if name != block.output]
    shape = graph.tensor(block.output).get_partial_shape()
    tokens = math.prod(shape[:-1].to_shape()) if shape.is_static else None
    per_token = per_past = 0
    for name in carried:
        node, size = graph[name.rpartition(":")[0]], 4 * _static_elements(graph.tensor(name).get_partial_shape())
        if tokens:
            per_token += -(-size // tokens)
        elif graph.is_cache(node):
            per_past += size
        elif sum(d.is_dynamic for d in graph.tensor(name).get_partial_shape()) > 1:  # else it has no rows of tokens
            per_token += size
    width = 4 * _size(shape, -1)
    return Edge(block.index, block.index + 1, block.output, width, tuple(carried), per_token, per_past)


@dataclass(frozen=True)
class _Content:
    """What lies in a range of segments."""

    products: list[Product]
    attention: list[Node]  # SDPA, or products of activations with activations
    routers: list[Node]
    states: tuple[str, ...]
    growing: bool
    fixed: bool  # some state does not grow

    @property
    def recurs(self) -> bool:
        """Whether all its states have a fixed size."""
        return self.fixed and not self.growing

    @property
    def scores(self) -> list[Node]:
        """The attention alone: a recurrence, too, multiplies activations."""
        return [n for n in self.attention if not self.fixed or n.type == "ScaledDotProductAttention"]

    @property
    def mixes_tokens(self) -> bool:
        """Whether there is attention: one operation, or a product for the scores and one for their use."""
        return len(self.attention) > 1 or any(n.type == "ScaledDotProductAttention" for n in self.attention)


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
        any(_grows(shape) for shape in shapes), not all(_grows(shape) for shape in shapes),
    )  # fmt: skip


def _group(stream: ResidualStream) -> list[tuple[int, int]]:
    """Join segments to blocks: a block has attention, states or two products, and what follows up to the next one."""
    owners = stream.state_owners
    contents = [_content(stream, s, s, owners) for s in range(stream.last + 1)]
    cores = [s for s, c in enumerate(contents) if _is_core(stream, s, c)]
    if not cores:
        raise Uncuttable("no block with attention, a state or two matrix products on the residual stream")
    starts = [0] if cores[0] == 0 else [0, cores[0]]
    starts += cores[1:]
    tail = range(cores[-1] + 1, stream.last + 1)
    gates = [s for s in tail[:-1] if len(contents[s].products) > 1]  # small ones of the last block
    tail = range(gates[-1] + 1, stream.last + 1) if gates else tail
    if any(contents[s].products for s in tail):
        starts.append(tail.start)
    return list(zip(starts, [*(s - 1 for s in starts[1:]), stream.last], strict=True))


def _is_core(stream: ResidualStream, segment: int, content: _Content) -> bool:
    """Whether a segment is a block of its own, not something small that goes with the block before it.

    Small are what two products do that are far narrower than the stream: adapters, gates of per-layer embeddings.
    """
    if content.states or content.mixes_tokens or content.routers:
        return True
    return _are_large(stream, segment, content.products)


def _are_large(stream: ResidualStream, segment: int, products: Sequence[Product]) -> bool:
    """Whether two or more products are together as large as one of the stream's width squared."""
    width = _size(stream.graph.tensor(stream.tensor(max(segment - 1, 0))).get_partial_shape(), -1)
    elements = sum(math.prod(p.weight.op.get_output_shape(0)) for p in products)
    return len(products) >= 2 and elements >= width * width


def _join(stream: ResidualStream, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined = backward(stream, blocks)
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
            _count(weights, node.op)
    for node in stream.main:
        if first <= stream.segment[node.name] <= last:
            for constant in graph.constants_within(node):
                _count(weights, constant)
    state_shapes = [(_state_shape(graph, v), _state_bytes(graph, v)) for v in content.states]
    return Block(
        index=index,
        kind=_kind(stream, content, first, index, count, core=_is_core(stream, first, content)),
        name="",
        input=stream.tensor(first - 1) if first else None,
        output=stream.tensor(last),
        states=content.states,
        weight_bytes=weights,
        flops_per_token=_flops(content.products, content.routers),
        kv_bytes_per_token=sum(size * _static_elements(shape) for shape, size in state_shapes if _grows(shape)),
        recurrent_bytes=sum(size * _static_elements(shape) for shape, size in state_shapes if not _grows(shape)),
        score_flops=sum(_score_flops(graph, node) for node in content.scores),
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


def _kind(stream: ResidualStream, content: _Content, first: int, index: int, count: int, *, core: bool) -> BlockKind:
    if index == 0 and not (content.mixes_tokens or content.states):
        return BlockKind.EMBED
    if index == count - 1 and not core:
        return BlockKind.HEAD
    if content.recurs:
        return BlockKind.SSM
    if content.growing and content.fixed:  # attention and a recurrence beside each other
        return BlockKind.BLOCK
    if content.growing or content.mixes_tokens:
        return BlockKind.BLOCK if _has_parallel_ffn(stream, first, content) else BlockKind.ATTENTION
    if content.routers and content.products:
        return BlockKind.MOE
    return BlockKind.FFN if len(content.products) >= 2 else BlockKind.BLOCK


def _has_parallel_ffn(stream: ResidualStream, first: int, content: _Content) -> bool:
    """Whether an FFN lies beside the attention, neither before nor after it."""
    cores = [n.name for n in content.attention]
    after = stream.graph.reached_from(set(cores))
    before = set().union(*(stream.graph.leading_to(name) for name in cores))
    beside = [p for p in content.products if p.node.name not in after and p.node.name not in before]
    return _are_large(stream, first, beside)


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
    for node in graph.nodes.values():
        for constant in [node.op] if node.type == "Constant" else graph.constants_within(node):
            _count(weights, constant)
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


def _count(weights: dict[str, int], constant: ov.Node) -> None:
    kind = str(constant.get_output_element_type(0).get_type_name())
    if kind not in {"i32", "i64", "boolean"}:  # axes and shapes, no weights
        weights[kind] = weights.get(kind, 0) + constant.get_byte_size()


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


def _size(shape: ov.PartialShape, axis: int) -> int:
    """A dimension, 0 where it is unknown."""
    known = shape.rank.is_static and len(shape) > 0 and shape[axis].is_static
    return int(shape[axis].get_length()) if known else 0


def _natural(text: str) -> tuple[object, ...]:
    """Sort key that puts layer 2 before layer 10."""
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return (*map(int, digits), text)
