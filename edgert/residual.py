"""Find the residual stream of a model: where it can be cut.

Between two residual additions lies one block. The points where a model can be cut are found from the graph itself, see
`edgert.boundaries`; names play no part, so a new family of models needs no code here. What passes such a point is the
stream, and whatever else is still used behind it: *carried* tensors, such as per-layer embeddings, keys and values that
later layers share, or the conditioning of a diffusion model. What the blocks share and no residual data flow into (RoPE
tables, attention masks, shapes) is the *prelude*.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from edgert.boundaries import find
from edgert.graph import BlockGraph
from edgert.irgraph import IrGraph, Node

# Operations that lay a tensor out otherwise, or repeat it: the data enter at port 0.
_COPIES = frozenset({"Broadcast", "Convert", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
# Operations that leave most integers as they are, and the ports of those.
_SAME_TOKENS = {
    "Convert": (0,), "Reshape": (0,), "Squeeze": (0,), "Unsqueeze": (0,), "Select": (1, 2), "ScatterNDUpdate": (0,),
    "ScatterElementsUpdate": (0,), "ScatterUpdate": (0,),
}  # fmt: skip
_FEATURES = "features"  # input with rows in place of embeddings, and what is added later: no stream begins there


class Uncuttable(Exception):
    """Why a model stays in one piece."""


class ResidualStream:
    """The residual stream of a model: who is on it, and where it can be cut.

    Args:
        graph: of the model.
        boundaries: for each boundary the tensors that pass it, as `node:port`; None to find them.

    Attributes:
        main: operations on a path of data from the model's data to a result, in topological order. Data are token
            embeddings, or real-valued inputs.
        live: operations that depend on that data or on a state.
        segment: for each operation of `main` the number of the piece between two boundaries that it lies in: the first
            one behind which it is needed.
        boundaries: for each the tensors that pass it, the residual stream first.
    """

    def __init__(self, graph: IrGraph, boundaries: Sequence[Sequence[str]] | None = None) -> None:
        self.graph = graph
        sources = _sources(graph)
        results = [result.get_friendly_name() for result in graph.model.get_results()]
        flow = graph.reached_from(sources)
        if results[0] not in flow:
            raise Uncuttable("no data flow from the model's data to the first result")
        on_path = graph.leading_to(*results)
        self.live = graph.reached_from(sources | {node.name for node in graph.of_type("ReadValue")})
        self.main = [
            node
            for node in graph.nodes.values()
            if node.name in flow and node.name in on_path and node.type != "Parameter"
        ]
        self.result = results[0]
        self.boundaries = [tuple(tensors) for tensors in boundaries or find(graph, self.main)]
        self.segment = self._segments()

    @classmethod
    def of(cls, graph: IrGraph, blocks: BlockGraph) -> ResidualStream:
        """The stream of a model cut as its block graph says: each block is one segment."""
        return cls(graph, [(edge.tensor, *edge.carried) for edge in blocks.edges])

    @property
    def last(self) -> int:
        return len(self.boundaries)

    def _segments(self) -> dict[str, int]:
        on_stream = {node.name: node for node in self.main}
        found: dict[str, int] = {}
        for number, tensors in enumerate(self.boundaries):
            stack = [name.rpartition(":")[0] for name in tensors]
            for name in stack:
                if name not in on_stream:
                    raise Uncuttable(f"no boundary at {name}")
            while stack:
                name = stack.pop()
                if name in on_stream and name not in found:
                    found[name] = number
                    stack += on_stream[name].data_inputs
        return {node.name: found.get(node.name, self.last) for node in self.main}

    def tensor(self, segment: int) -> str:
        """`node:port` of the tensor of the residual stream that leaves a segment."""
        return self.boundaries[segment][0] if segment < self.last else f"{self.result}:0"

    def crossing(self, segment: int) -> list[str]:
        """All tensors on the stream that are made up to `segment` and used behind it, as `node:port`."""
        found: dict[str, None] = {}
        for node in self.main:
            if self.segment[node.name] > segment:
                for tensor in node.inputs:
                    if tensor[0] in node.data_inputs:
                        source, port = self.source(tensor)
                        if self.segment.get(source, segment + 1) <= segment:
                            found[f"{source}:{port}"] = None
        return list(found)

    def source(self, tensor: tuple[str, int]) -> tuple[str, int]:
        """The cache that a tensor is but a copy of, for more heads or laid out otherwise; else the tensor itself."""
        return (self.copied[tensor[0]], 0) if tensor[0] in self.copied else tensor

    @cached_property
    def copied(self) -> dict[str, str]:
        """For each such copy of a cache the operation that gives the cache."""
        found: dict[str, str] = {}
        for node in self.main:
            if node.type in _COPIES:
                source = self.graph[node.inputs[0][0]]
                cache = source.name if self.graph.is_cache(source) else found.get(source.name)
                if cache is not None:
                    found[node.name] = cache
        return found

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
                raise Uncuttable(f"state {self.graph.variable_id(assign)} stores nothing of the residual stream")
            owners[self.graph.variable_id(assign)] = max(numbers)
        return owners

    def homes(self) -> dict[str, int]:
        """For each operation that only one segment can compute, the segment: those of the stream and what reads states.

        A shape of one of them is among these, where it cannot be had from the model's inputs.
        """
        found, owners = dict(self.segment), self.state_owners
        for node in self.graph.nodes.values():
            if node.name in found or node.type in {"Result", "Assign"}:
                continue
            if node.type == "ReadValue":
                found[node.name] = owners[self.graph.variable_id(node)]
            elif node.type == "ShapeOf":
                if node.inputs[0][0] in found and dimension_sources(self.graph, node) is None:
                    found[node.name] = found[node.inputs[0][0]]
            elif node.name in self.live:
                before = [found[source] for source in node.data_inputs if source in found]
                found[node.name] = max(before, default=0)
        return found


def backward(stream: ResidualStream, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of ranges that must stay together: the earlier one takes what only the later one can compute."""
    homes = stream.homes()
    owner = {s: number for number, (first, last) in enumerate(ranges) for s in range(first, last + 1)}
    joined = []
    for number, (first, last) in enumerate(ranges):
        stack = [node for node in stream.main if first <= stream.segment[node.name] <= last]
        seen: set[str] = set()
        while stack:
            node = stack.pop()
            for source, _ in node.inputs if dimension_sources(stream.graph, node) is None else ():
                home = owner[homes[source]] if source in homes else number
                if home > number:
                    joined.append((number, home))
                elif source not in homes and source not in seen:
                    seen.add(source)
                    stack.append(stream.graph[source])
    return joined


def dimension_sources(graph: IrGraph, shape_of: Node) -> list[int | str] | None:
    """The dimensions that a ShapeOf yields, each a number or one of `batch`, `query`, `past`, `total`.

    Known are the tensors that decoders take the shape of: `[batch, query, width]` on the residual stream, the same
    turned round, a cache `[batch, heads, past, head_dim]`, the cache with the new rows appended, and a state that does
    not grow. None for anything else.
    """
    if shape_of.type != "ShapeOf":
        return None
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
    if len(dims) == 3 and dynamic == [0, 2] and "input_ids" in inputs and _is_turned(graph, source):
        return ["batch", dims[1], "query"]
    state = source
    while state.type in {"Gather", "Convert"}:
        state = graph[state.inputs[0][0]]
    if dynamic == [0] and "input_ids" in inputs and state.type == "ReadValue":
        return ["batch", *dims[1:]]
    if len(dims) == 4 and dynamic == [0, 2] and "attention_mask" in inputs:
        if state.type == "ReadValue":
            return ["batch", dims[1], "past", dims[3]]
        if source.type == "Concat" and any(a.inputs[0][0] == source.name for a in graph.of_type("Assign")):
            return ["batch", dims[1], "total", dims[3]]
    return None


def _is_turned(graph: IrGraph, node: Node) -> bool:
    """Whether `[batch, channels, tokens]` is `[batch, tokens, channels]` turned round for a convolution."""
    while node.type in {"Add", "Convert", "Multiply", "Split", "Swish", "VariadicSplit"}:
        data = [source for source, _ in node.inputs if source not in graph.constant_only]
        if not data:
            return False
        node = graph[data[0]]
    if node.type != "Transpose":
        return False
    shape = node.op.get_input_partial_shape(0)
    return len(shape) == 3 and shape[1].is_dynamic and shape[2].is_static


def _sources(graph: IrGraph) -> set[str]:
    """Where data begin: lookups of token embeddings, and real-valued inputs such as pixels."""
    found = {
        node.name
        for node in graph.of_type("Parameter")
        if node.op.get_output_element_type(0).is_real() and _FEATURES not in node.op.output(0).get_names()
    }
    for node in graph.of_type("Gather"):
        if graph.weight_behind(node, 0) is not None and _are_tokens(graph, graph[node.inputs[1][0]]):
            found.add(node.name)
    if not found:
        raise Uncuttable("no lookup of a constant table by input_ids, and no real-valued input")
    return found


def _are_tokens(graph: IrGraph, node: Node) -> bool:
    """Whether integers are those of `input_ids`, some of them perhaps replaced: images have no token of their own."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.type == "Parameter" and "input_ids" in node.op.output(0).get_names():
            return True
        stack += [graph[node.inputs[port][0]] for port in _SAME_TOKENS.get(node.type, ())]
    return False
