"""Cut a language model at its residual stream.

Between two residual additions lies one block. The points where a model can be cut are found from the graph itself: the
*dominators* of the paths from the embedding to the result, that is the operations through which all data flow. Names
play no part, so a new family of models needs no code here. What all blocks share and no residual data flow into (RoPE
tables, attention masks) is computed by the first submodel that needs it and passed on; the shapes in it are cloned.

`annotate` says what the blocks are, `cut` makes submodels of any grouping of neighbouring blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import openvino as ov
import openvino.opset13 as ops

from edgert.errors import PlanError
from edgert.graph import BOUNDARY, Block, BlockGraph, BlockKind, Edge
from edgert.irgraph import IrGraph, Node

PRELUDE = "prelude."  # names of what submodels share beside it begin so


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
        stream = _Stream(graph)
        blocks = _group(stream)
        blocks = _join_crossings(stream, blocks)
    except _Uncuttable as reason:
        return whole(model, str(reason))
    counters: dict[BlockKind, int] = {}
    annotated = []
    for index, (first, last) in enumerate(blocks):
        block = _describe(stream, first, last, index, len(blocks))
        number = counters[block.kind] = counters.get(block.kind, -1) + 1
        name = str(block.kind) if block.kind in {BlockKind.EMBED, BlockKind.HEAD} else f"{block.kind}.{number}"
        annotated.append(Block(**{**block.__dict__, "name": name}))
    edges = tuple(
        Edge(b.index, b.index + 1, b.output, 4 * _width(graph[b.output.rpartition(":")[0]])) for b in annotated[:-1]
    )
    return BlockGraph(tuple(annotated), edges)


def whole(model: ov.Model, reason: str) -> BlockGraph:
    """The graph of a model that stays in one piece, and why."""
    return BlockGraph((_whole(IrGraph(model)),), (), reason)


def cut(model: ov.Model, graph: BlockGraph, groups: Sequence[tuple[int, int]]) -> list[ov.Model]:
    """Cut a model into submodels.

    Args:
        model: the model that `graph` was made from; it is not changed.
        groups: for each submodel its first and last block, in order, without gaps.

    Returns:
        One submodel a group; a single group gives `[model]`. Each takes those of the model's own inputs that it needs,
        and all but the first take `hidden`, the output of the one before (f32 or f16, `[batch, tokens, width]`).
        Outputs `prelude.N` of one are inputs of later ones. The last one has the model's own result.

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
        stream = _Stream(index)
        segments = [stream.segment_of_boundary(graph.blocks[last].output) for _, last in groups[:-1]]
        ranges = list(zip([0, *(s + 1 for s in segments)], [*segments, stream.last], strict=True))
        for shape_of in _crossings(stream, ranges)[0]:
            _shape_from_inputs(index, shape_of)
        state_owners = stream.state_owners
    except _Uncuttable as error:
        raise PlanError(f"cut: the block graph does not belong to this model: {error}") from error

    owner = {s: number for number, (first, last) in enumerate(ranges) for s in range(first, last + 1)}
    assigns = {index.variable_id(n): n.op for n in index.of_type("Assign")}
    boundaries: list[tuple[ov.Node, ov.Output]] = []  # parameter of the next submodel, tensor it stands for
    for number, (_, last) in enumerate(groups[:-1]):
        tensor = index.tensor(graph.blocks[last].output)
        parameter = ops.parameter(tensor.get_partial_shape(), tensor.get_element_type(), BOUNDARY)
        parameter.output(0).set_names({BOUNDARY})
        for consumer in tensor.get_target_inputs():
            consumer_name = consumer.get_node().get_friendly_name()
            # Only residual data crosses here: shapes that crossed were rewritten above.
            if owner.get(stream.segment.get(consumer_name, -1), number) > number:
                consumer.replace_source_output(parameter.output(0))
        boundaries.append((parameter, tensor))

    shared = _share_prelude(stream, ranges)
    submodels = []
    for number, (first, last) in enumerate(groups):
        sinks = [assigns[variable] for variable, s in state_owners.items() if owner[s] == number]
        outputs = {BOUNDARY: boundaries[number][1]} if number < len(boundaries) else {}
        outputs |= {s.name: s.tensor for s in shared if s.producer == number}
        results = [ops.result(tensor) for tensor in outputs.values()] or list(clone.get_results())
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


def _share_prelude(stream: _Stream, ranges: Sequence[tuple[int, int]]) -> list[_Shared]:
    """Let the first submodel that needs RoPE tables or masks give them to the later ones.

    Computing them again in every submodel costs nothing in bytes and, in decode, half as much time as the block
    itself: some seventy tiny operations. Integers stay: they are shapes, which compilers want to see.
    """
    graph = stream.graph
    users: dict[str, set[int]] = {}
    for number, (first, last) in enumerate(ranges):
        for name in stream.side(range(first, last + 1)):
            users.setdefault(name, set()).add(number)
    owner = {s: number for number, (first, last) in enumerate(ranges) for s in range(first, last + 1)}

    def is_shared(name: str) -> bool:
        return len(users.get(name, ())) > 1 and name not in stream.live and name not in graph.constant_only

    found: list[_Shared] = []
    for node in [n for n in graph.nodes.values() if n.type != "Parameter" and is_shared(n.name)]:
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
            if len(consumers) < 2:
                continue
            name, producer = f"{PRELUDE}{len(found)}", min(consumers)
            parameter = ops.parameter(tensor.get_partial_shape(), tensor.get_element_type(), name)
            parameter.output(0).set_names({name})
            for number, inputs in consumers.items():
                for consumer in inputs if number != producer else ():
                    consumer.replace_source_output(parameter.output(0))
            found.append(_Shared(name, tensor, parameter, producer, frozenset(consumers) - {producer}))
    return found


class _Uncuttable(Exception):
    """Why a model stays in one piece."""


class _Stream:
    """The residual stream of a model: who is on it, and where everything passes through one tensor.

    Attributes:
        main: operations on a path of data from embedding to result, in topological order.
        live: operations that depend on the residual data or on a state.
        segment: for each operation of `main` the number of the piece between two dominators that it lies in.
        ends: the dominators, i.e. the last operation of each piece.
    """

    def __init__(self, graph: IrGraph) -> None:
        self.graph = graph
        if len(graph.model.get_results()) != 1:
            raise _Uncuttable(f"{len(graph.model.get_results())} results, expected one")
        embedding = _embedding(graph)
        result = graph.model.get_results()[0].get_friendly_name()
        states = {node.name for node in graph.of_type("ReadValue")}
        flow = graph.reached_from({embedding})
        if result not in flow:
            raise _Uncuttable("no data flow from the embedding to the first result")
        on_path = graph.leading_to(result)
        self.live = graph.reached_from({embedding} | states)
        self.main = [node for node in graph.nodes.values() if node.name in flow and node.name in on_path]
        self.result = result
        self._find_segments()

    @property
    def last(self) -> int:
        return len(self.ends) - 1

    def _find_segments(self) -> None:
        position = {node.name: i for i, node in enumerate(self.main)}
        furthest = [0] * len(self.main)  # the last operation that uses this one
        ports: list[set[int]] = [set() for _ in self.main]
        for node in self.main:
            for source, source_port in node.inputs:
                if source in position and source in node.data_inputs:
                    furthest[position[source]] = max(furthest[position[source]], position[node.name])
                    ports[position[source]].add(source_port)
        self.segment: dict[str, int] = {}
        self.ends: list[Node] = []
        reach = 0
        for i, node in enumerate(self.main):
            # All data pass through `node` if no earlier operation feeds a later one past it.
            self.segment[node.name] = len(self.ends)
            if reach <= i and len(ports[i]) <= 1:
                self.ends.append(node)
            reach = max(reach, furthest[i])
        if self.ends[-1].name != self.result:
            raise _Uncuttable("the first result is no single end of the residual stream")

    def tensor(self, segment: int) -> str:
        """`node:port` of the tensor that leaves a segment."""
        name = self.ends[segment].name
        for consumer in self.main:
            for source, port in consumer.inputs:
                if source == name:
                    return f"{name}:{port}"
        return f"{name}:0"

    def segment_of_boundary(self, tensor: str) -> int:
        name = tensor.rpartition(":")[0]
        number = self.segment.get(name)
        if number is None or self.ends[number].name != name:
            raise _Uncuttable(f"no boundary at {tensor}")
        return number

    def side(self, segments: range) -> dict[str, Node]:
        """What the operations of `segments` need beside the residual stream: weights, states, prelude."""
        graph, found = self.graph, dict[str, Node]()
        stack = [node for node in self.main if self.segment[node.name] in segments]
        while stack:
            for source, _ in stack.pop().inputs:
                if source not in found and source not in self.segment:
                    found[source] = graph[source]
                    stack.append(graph[source])
        return found

    @cached_property
    def state_owners(self) -> dict[str, int]:
        """For each state variable the segment whose data it stores."""
        owners = {}
        for assign in self.graph.of_type("Assign"):
            stored = self.graph.leading_to(assign.inputs[0][0])
            numbers = [self.segment[name] for name in stored if name in self.segment]
            if not numbers:
                raise _Uncuttable(f"state {self.graph.variable_id(assign)} stores nothing of the residual stream")
            owners[self.graph.variable_id(assign)] = max(numbers)
        return owners


@dataclass(frozen=True)
class _Content:
    """What lies in a range of segments."""

    products: list[tuple[Node, Node]]  # matrix product and its weight
    attention: list[Node]  # SDPA, or products of activations with activations
    routers: list[Node]
    states: tuple[str, ...]
    growing: bool


def _content(stream: _Stream, first: int, last: int, owners: dict[str, int]) -> _Content:
    graph = stream.graph
    nodes = [n for n in stream.main if first <= stream.segment[n.name] <= last]
    products, attention = [], []
    for node in nodes:
        weight = graph.weight_matmul(node)
        if weight is not None:
            products.append((node, weight))
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


def _group(stream: _Stream) -> list[tuple[int, int]]:
    """Join segments to blocks: a block has attention, states or two products, and what follows up to the next one."""
    owners = stream.state_owners
    contents = [_content(stream, s, s, owners) for s in range(len(stream.ends))]
    cores = [s for s, c in enumerate(contents) if c.attention or c.states or len(c.products) >= 2]
    if not cores:
        raise _Uncuttable("no block with attention, a state or two matrix products on the residual stream")
    starts = [0] if cores[0] == 0 else [0, cores[0]]
    starts += cores[1:]
    tail = range(cores[-1] + 1, len(stream.ends))
    if any(contents[s].products for s in tail):
        starts.append(tail.start)
    return list(zip(starts, [*(s - 1 for s in starts[1:]), stream.last], strict=True))


def _crossings(stream: _Stream, ranges: Sequence[tuple[int, int]]) -> tuple[list[Node], list[tuple[int, int]]]:
    """Shapes and values that one range takes from another past the boundary between them.

    Returns:
        ShapeOf operations that can be computed from the model's inputs instead; and pairs of ranges that must stay
        together because what crosses cannot.
    """
    graph = stream.graph
    owner = {s: number for number, (first, last) in enumerate(ranges) for s in range(first, last + 1)}
    states = {variable: owner[s] for variable, s in stream.state_owners.items()}
    shapes: dict[str, Node] = {}
    joined: list[tuple[int, int]] = []
    for number, (first, last) in enumerate(ranges):
        for node in stream.side(range(first, last + 1)).values():
            for source, _ in node.inputs:
                home = owner.get(stream.segment.get(source, -1))
                if home is None and source in stream.live:
                    origin = [graph[n] for n in graph.leading_to(source)]
                    homes = [states[graph.variable_id(n)] for n in origin if n.type == "ReadValue"]
                    homes += [owner[stream.segment[n.name]] for n in origin if n.name in stream.segment]
                    home = next((h for h in homes if h != number), number)
                if home is None or home == number:
                    continue
                if node.type == "ShapeOf" and _dimension_sources(graph, node) is not None:
                    shapes[node.name] = node
                elif node.name not in stream.live or source in stream.segment:
                    joined.append((min(home, number), max(home, number)))
    return list(shapes.values()), joined


def _join_crossings(stream: _Stream, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    _, joined = _crossings(stream, blocks)
    if not joined:
        return blocks
    merged: list[tuple[int, int]] = []
    for number, (first, last) in enumerate(blocks):
        if merged and any(low < number <= high for low, high in joined):
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _dimension_sources(graph: IrGraph, shape_of: Node) -> list[int | str] | None:
    """The dimensions that a ShapeOf yields, each a number or one of `batch`, `query`, `past`, `total`.

    Known are the tensors that decoders take the shape of: `[batch, query, width]` on the residual stream, a cache
    `[batch, heads, past, head_dim]` and the cache with the new rows appended. None for anything else.
    """
    name, port = shape_of.inputs[0]
    source = graph[name]
    shape = source.op.output(port).get_partial_shape()
    if shape.rank.is_dynamic:
        return None
    dims: list[int | str] = [d.get_length() if d.is_static else "?" for d in shape]
    dynamic = [i for i, d in enumerate(dims) if d == "?"]
    inputs = {name for i in graph.model.inputs for name in i.get_names()}
    if len(dims) == 3 and dynamic == [0, 1] and "input_ids" in inputs:
        return ["batch", "query", dims[2]]
    if len(dims) == 4 and dynamic == [0, 2] and "attention_mask" in inputs:
        state = source
        while state.type in {"Gather", "Convert"}:
            state = graph[state.inputs[0][0]]
        if state.type == "ReadValue":
            return ["batch", dims[1], "past", dims[3]]
        if source.type == "Concat" and any(a.inputs[0][0] == source.name for a in graph.of_type("Assign")):
            return ["batch", dims[1], "total", dims[3]]
    return None


def _shape_from_inputs(graph: IrGraph, shape_of: Node) -> None:
    """Let the consumers of a ShapeOf take the shape from the model's inputs instead."""
    dims = _dimension_sources(graph, shape_of)
    assert dims is not None
    kind = shape_of.op.get_output_element_type(0)

    def size(input_name: str, axis: int) -> ov.Output:
        shape = ops.shape_of(graph.model.input(input_name), kind)
        return ops.gather(shape, ops.constant([axis], ov.Type.i64), ops.constant(0, ov.Type.i64)).output(0)

    query = size("input_ids", 1)
    known = {"batch": size("input_ids", 0), "query": query}
    if "past" in dims or "total" in dims:
        known["total"] = size("attention_mask", 1)
        known["past"] = ops.subtract(known["total"], query).output(0)
    parts = [known[d] if isinstance(d, str) else ops.constant([d], kind).output(0) for d in dims]
    shape = ops.concat([p.get_node() for p in parts], 0)
    for consumer in list(shape_of.op.output(0).get_target_inputs()):
        consumer.replace_source_output(shape.output(0))


def _describe(stream: _Stream, first: int, last: int, index: int, count: int) -> Block:
    graph = stream.graph
    content = _content(stream, first, last, stream.state_owners)
    weights: dict[str, int] = {}
    for node in stream.side(range(first, last + 1)).values():
        if node.type == "Constant" and _only_weight(stream, node, range(first, last + 1)):
            _count(weights, node)
    active = _experts_per_token(content)
    flops = 0
    for _, weight in content.products:
        shape = [int(d) for d in weight.op.get_output_shape(0)]
        elements = math.prod(shape)
        # A rank-3 weight is a stack of experts, or, when compressed, groups of a matrix: the router tells them apart.
        if content.routers and len(shape) >= 3 and shape[0] >= active:
            elements = elements // shape[0] * active
        flops += 2 * elements
    state_shapes = [(_state_shape(graph, v), _state_bytes(graph, v)) for v in content.states]
    return Block(
        index=index,
        kind=_kind(stream, content, index, count),
        name="",
        input=stream.tensor(first - 1) if first else None,
        output=stream.tensor(last),
        states=content.states,
        weight_bytes=weights,
        flops_per_token=flops,
        kv_bytes_per_token=sum(size * _static_elements(shape) for shape, size in state_shapes if _grows(shape)),
        recurrent_bytes=sum(size * _static_elements(shape) for shape, size in state_shapes if not _grows(shape)),
    )


def _kind(stream: _Stream, content: _Content, index: int, count: int) -> BlockKind:
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


def _has_parallel_ffn(stream: _Stream, content: _Content) -> bool:
    """Whether two products lie beside the attention, neither before nor after it."""
    cores = [n.name for n in content.attention]
    after = stream.graph.reached_from(set(cores))
    before = set().union(*(stream.graph.leading_to(name) for name in cores))
    beside = [node for node, _ in content.products if node.name not in after and node.name not in before]
    return len(beside) >= 2


def _only_weight(stream: _Stream, constant: Node, segments: range) -> bool:
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


def _experts_per_token(content: _Content) -> int:
    if not content.routers:
        return 1
    k = content.routers[-1].op.input_value(1).get_node()
    return int(k.get_data().item()) if k.get_type_name() == "Constant" else 1


def _embedding(graph: IrGraph) -> str:
    """The lookup of token embeddings: a Gather from a constant table by `input_ids`, nothing computed between."""
    for node in graph.of_type("Gather"):
        if graph.weight_behind(node, 0) is None:
            continue
        source = graph[node.inputs[1][0]]
        while source.type in {"Convert", "Reshape", "Squeeze", "Unsqueeze"}:
            source = graph[source.inputs[0][0]]
        if source.type == "Parameter" and "input_ids" in source.op.output(0).get_names():
            return node.name
    raise _Uncuttable("no lookup of a constant table by input_ids")


def _whole(graph: IrGraph) -> Block:
    weights: dict[str, int] = {}
    for node in graph.of_type("Constant"):
        _count(weights, node)
    states = tuple(sorted((graph.variable_id(n) for n in graph.of_type("ReadValue")), key=_natural))
    shapes = [(_state_shape(graph, v), _state_bytes(graph, v)) for v in states]
    products = [w for n in graph.nodes.values() if (w := graph.weight_matmul(n)) is not None]
    result = graph.model.get_results()[0].input_value(0)
    return Block(
        index=0,
        kind=BlockKind.BLOCK,
        name="block.0",
        input=None,
        output=f"{result.get_node().get_friendly_name()}:{result.get_index()}",
        states=states,
        weight_bytes=weights,
        flops_per_token=sum(2 * math.prod(int(d) for d in w.op.get_output_shape(0)) for w in products),
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
    shape = node.op.output(0).get_partial_shape()
    last = shape[len(shape) - 1]
    return last.get_length() if last.is_static else 0


def _natural(text: str) -> tuple[object, ...]:
    """Sort key that puts layer 2 before layer 10."""
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return (*map(int, digits), text)


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
