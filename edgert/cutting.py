"""Make submodels of a model and a grouping of its blocks.

RoPE tables and masks are computed by the first submodel that needs them and passed on; so is what else is used behind a
boundary, see `edgert.residual`. Shapes are cloned into each submodel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import openvino as ov
import openvino.opset13 as ops

from edgert.errors import PlanError
from edgert.graph import BOUNDARY, BlockGraph
from edgert.irgraph import IrGraph, Node, name_new
from edgert.residual import ResidualStream, Uncuttable, dimension_sources
from edgert.shapes import CARRIED, PRELUDE


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
        Outputs `prelude.N` and `carried.N` of one are inputs of later ones, N being the same for the same tensor
        however the model is cut. The last one has the model's own results.

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
        parts = _Parts(ResidualStream.of(index, graph), groups, frozenset(static))
    except Uncuttable as error:
        raise PlanError(f"cut: the block graph does not belong to this model: {error}") from error
    for shape_of in parts.from_inputs:
        _shape_from_inputs(index, shape_of)

    exports = parts.exports()
    stand_in: dict[str, ov.Output] = {}  # for a tensor that an earlier submodel gave, the parameter to take it from
    taken: dict[str, ov.Node] = {}
    submodels = []
    entering: ov.Node | None = None
    for number, (first, last) in enumerate(groups):
        leaving = graph.blocks[last].output if number < len(groups) - 1 else None
        given = [export for export in exports if export.producer == number]
        outputs = {export.name: index.tensor(export.tensor) for export in given}
        if leaving is not None:
            before = entering.output(0) if entering is not None and leaving == graph.blocks[first].input else None
            outputs = {BOUNDARY: before or stand_in.get(leaving, index.tensor(leaving)), **outputs}
        results = [ops.result(tensor) for tensor in outputs.values()]
        name_new(results, "result")
        results = results or list(clone.get_results())
        needed = _parameters([*results, *parts.sinks(number)])
        parameters = [p for p in clone.get_parameters() if p.get_friendly_name() in needed]
        parameters += [entering] if entering is not None else []
        parameters += [p for name, p in taken.items() if name in needed]
        name = f"{clone.get_friendly_name()}[{first}-{last}]"
        submodel = ov.Model(results, parts.sinks(number), parameters, name).clone()
        for port, output in enumerate(outputs):
            submodel.output(port).set_names({output})
        submodels.append(submodel)
        if leaving is None:
            break
        # From here on nobody computes what this submodel gives: who uses it takes it.
        if entering is not None:
            tensor = graph.blocks[first].input
            assert tensor is not None
            _replace(entering.output(0), stand_in.get(tensor))
        for export in given:
            parameter = _parameter(index.tensor(export.tensor), export.name, export.name)
            taken[parameter.get_friendly_name()] = parameter
            stand_in[export.tensor] = parameter.output(0)
            _replace(index.tensor(export.tensor), stand_in[export.tensor])
        tensor_now = stand_in.get(leaving, index.tensor(leaving))
        entering = _parameter(tensor_now, BOUNDARY, f"{BOUNDARY}{number}")
        _replace(tensor_now, entering.output(0))
    return submodels


def _parameter(tensor: ov.Output, name: str, unique: str) -> ov.Node:
    parameter = ops.parameter(tensor.get_partial_shape(), tensor.get_element_type(), name)
    parameter.output(0).set_names({name})
    name_new([parameter], unique)
    return parameter


def _replace(tensor: ov.Output, other: ov.Output | None) -> None:
    """Let all consumers of a tensor take another one."""
    for consumer in list(tensor.get_target_inputs()) if other is not None else ():
        consumer.replace_source_output(other)


@dataclass(frozen=True)
class _Export:
    """A tensor that one submodel computes and later ones take as an input, by name."""

    name: str
    tensor: str
    producer: int


class _Parts:
    """What each submodel computes itself, and what it takes from others.

    Attributes:
        from_inputs: shapes that are computed from the model's inputs, because not only the submodel that has the tensor
            wants them, or because with static shapes the prelude moves away from the caches that it takes a shape of.
    """

    def __init__(self, stream: ResidualStream, groups: Sequence[tuple[int, int]], static: frozenset[int]) -> None:
        graph = self.graph = stream.graph
        self._stream, self._groups, self._static = stream, groups, static
        owner = {block: number for number, (first, last) in enumerate(groups) for block in range(first, last + 1)}
        self.home = {name: owner[block] for name, block in stream.homes().items()}
        self._assigns = [
            (owner[stream.state_owners[graph.variable_id(node)]], node) for node in graph.of_type("Assign")
        ]
        known = {n.name for n in graph.of_type("ShapeOf") if dimension_sources(graph, n) is not None}
        self._rewritten = set(known) if static else set[str]()
        self._users: dict[str, set[int]] = {}  # of what depends on the model's inputs alone, or is a shape
        self._taken: dict[tuple[str, int], set[int]] = {}
        for number in range(len(groups)):
            self._collect(number, known)
        self.from_inputs = [graph[name] for name in sorted(self._rewritten)]

    def sinks(self, number: int) -> list[ov.Node]:
        return [node.op for home, node in self._assigns if home == number]

    def _collect(self, number: int, known: Collection[str]) -> None:
        """Go back from what a submodel has to compute to what it is given."""
        graph = self.graph
        stack = [node for node in self._stream.main if self.home[node.name] == number]
        stack += [node for home, node in self._assigns if home == number]
        seen = {node.name for node in stack}
        while stack:
            node = stack.pop()
            if node.name in self._rewritten:
                continue
            for source, port in node.inputs:
                home = self.home.get(source, number)
                if home != number and node.name in known:
                    self._rewritten.add(node.name)
                elif home != number and source not in self._stream.copied:
                    self._taken.setdefault((source, port), set()).add(number)
                elif source not in seen and source not in graph.constant_only:
                    seen.add(source)
                    stack.append(graph[source])
                    if source not in self.home:
                        self._users.setdefault(source, set()).add(number)

    def exports(self) -> list[_Export]:
        """What submodels give to others than the next, and to that beside `hidden`."""
        numbers = {name: number for number, name in enumerate(self.graph.nodes)}
        boundaries = {number: self._stream.tensor(last) for number, (_, last) in enumerate(self._groups[:-1])}
        found = []
        for (name, port), users in self._taken.items():
            tensor, home = f"{name}:{port}", self.home[name]
            if self.graph[name].type == "Parameter":  # an input of the model, which every submodel can take itself
                continue
            if early := [number for number in users if number < home]:
                raise PlanError(
                    f"cut: blocks {self._groups[early[0]]} take {tensor}, which blocks {self._groups[home]} compute"
                )
            if any(boundaries[number - 1] != tensor for number in users):
                found.append((CARRIED, name, port, home))
        found += [(PRELUDE, name, port, home) for name, port, home in self._prelude()]
        return [
            _Export(f"{kind}{numbers[name]}" + (f".{port}" if port else ""), f"{name}:{port}", home)
            for kind, name, port, home in sorted(found, key=lambda each: numbers[each[1]])
        ]

    def _prelude(self) -> list[tuple[str, int, int]]:
        """RoPE tables and masks that the first submodel to need them gives to the later ones.

        Computing them again in every submodel costs nothing in bytes but, in decode, nearly as much time as the
        attention itself (docs/benchmarks.md). Integers stay: they are shapes, which compilers want to see. With static
        shapes a submodel cannot compute them: it does not know how many of its rows are padding, so the first does.
        """
        graph = self.graph
        inner: set[str] = set()  # takes at least the shape of something on the stream, or of a state
        for node in graph.nodes.values():
            below = node.name in self.home or any(source in inner for source, _ in node.inputs)
            if below and node.name not in self._rewritten:
                inner.add(node.name)

        def sharers(name: str) -> set[int]:
            users = self._users.get(name, set())
            return users | {0} if users & self._static and name not in inner else users

        shared = {name for name in self._users if len(sharers(name)) > 1}
        found = []
        for node in graph.nodes.values():
            if node.name not in shared or node.type == "Parameter":
                continue
            for tensor in node.op.outputs():
                if not (tensor.get_element_type().is_real() or tensor.get_element_type() == ov.Type.boolean):
                    continue
                users: set[int] = set()
                for consumer in tensor.get_target_inputs():
                    name = consumer.get_node().get_friendly_name()
                    if name in self.home and graph[name].type != "ReadValue":
                        users.add(self.home[name])
                    elif name not in shared and name in self._users:
                        users |= self._users[name]
                producer = 0 if users & self._static else min(users, default=0)
                if users - {producer}:
                    found.append((node.name, tensor.get_index(), producer))
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


def _parameters(nodes: Sequence[ov.Node]) -> set[str]:
    """The names of the parameters that nodes depend on."""
    found: set[str] = set()
    seen: set[str] = set()
    stack = list(nodes)
    while stack:
        for port in stack.pop().inputs():
            source = port.get_source_output().get_node()
            name = source.get_friendly_name()
            if name not in seen:
                seen.add(name)
                stack.append(source)
                if source.get_type_name() == "Parameter":
                    found.add(name)
    return found
