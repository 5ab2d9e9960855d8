"""Find the residual stream of a language model: where it can be cut.

Between two residual additions lies one block. The points where a model can be cut are found from the graph itself: the
*dominators* of the paths from the embedding to the result, that is the operations through which all data flow. Names
play no part, so a new family of models needs no code here. What the blocks share and no residual data flow into (RoPE
tables, attention masks, shapes) is the *prelude*.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from edgert.irgraph import IrGraph, Node


class Uncuttable(Exception):
    """Why a model stays in one piece."""


class ResidualStream:
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
            raise Uncuttable(f"{len(graph.model.get_results())} results, expected one")
        embedding = _embedding(graph)
        result = graph.model.get_results()[0].get_friendly_name()
        states = {node.name for node in graph.of_type("ReadValue")}
        flow = graph.reached_from({embedding})
        if result not in flow:
            raise Uncuttable("no data flow from the embedding to the first result")
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
            raise Uncuttable("the first result is no single end of the residual stream")

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
            raise Uncuttable(f"no boundary at {tensor}")
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
                raise Uncuttable(f"state {self.graph.variable_id(assign)} stores nothing of the residual stream")
            owners[self.graph.variable_id(assign)] = max(numbers)
        return owners


def crossings(stream: ResidualStream, ranges: Sequence[tuple[int, int]]) -> tuple[list[Node], list[tuple[int, int]]]:
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
                if node.type == "ShapeOf" and dimension_sources(graph, node) is not None:
                    shapes[node.name] = node
                elif node.name not in stream.live or source in stream.segment:
                    joined.append((min(home, number), max(home, number)))
    return list(shapes.values()), joined


def dimension_sources(graph: IrGraph, shape_of: Node) -> list[int | str] | None:
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
    raise Uncuttable("no lookup of a constant table by input_ids")
