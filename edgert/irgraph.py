"""An `ov.Model` as plain dictionaries, and the few questions about it that partitioning asks again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import openvino as ov

from edgert.errors import BundleError, ConversionError

# Inputs that look at a tensor's shape or type, not at its data, so nothing of the residual stream flows through them.
_SHAPE_ONLY = {("ShapeOf", 0), ("ConvertLike", 1), ("RandomUniform", 0)}
# Operations through which a weight stays recognisably the same weight: decompression and layout. Port of the data.
_WEIGHT_CHAIN = {
    "Convert": 0, "Multiply": None, "Subtract": 0, "Reshape": 0, "Transpose": 0, "Squeeze": 0, "Unsqueeze": 0,
    "Slice": 0, "StridedSlice": 0, "Gather": 0, "Broadcast": 0, "VariadicSplit": 0, "Split": 0, "ConvertLike": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operation: its OpenVINO node and, by port, `(producer, port)` of each input."""

    name: str
    type: str
    op: ov.Node
    inputs: tuple[tuple[str, int], ...]

    @property
    def data_inputs(self) -> Iterator[str]:
        """Producers whose *values* this operation uses."""
        return (source for port, (source, _) in enumerate(self.inputs) if (self.type, port) not in _SHAPE_ONLY)


@dataclass(frozen=True)
class Product:
    """A matrix product of activations with a weight.

    Attributes:
        node: the product.
        weight: the constant, compressed or not, that its weight is made of.
        stacked: whether it enters as more than one matrix, like a stack of experts. A constant with more than two
            dimensions need not: compressed groups are joined to a matrix first.
    """

    node: Node
    weight: Node
    stacked: bool


class IrGraph:
    """Index of a model's operations by friendly name, in topological order.

    Raises:
        ConversionError: two operations share a name; `make_names_unique` helps before the model is saved.
    """

    def __init__(self, model: ov.Model) -> None:
        self.model = model
        self.nodes: dict[str, Node] = {}
        for op in model.get_ordered_ops():
            name = op.get_friendly_name()
            if name in self.nodes:
                raise ConversionError(f"model: two operations are called {name!r}, so a block graph cannot name them")
            inputs = []
            for port in op.inputs():
                source = port.get_source_output()
                inputs.append((source.get_node().get_friendly_name(), source.get_index()))
            self.nodes[name] = Node(name, op.get_type_name(), op, tuple(inputs))

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def of_type(self, kind: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.type == kind]

    @cached_property
    def constant_only(self) -> frozenset[str]:
        """Operations that depend on constants alone, so on no input and no state."""
        found: set[str] = set()
        for node in self.nodes.values():
            if node.type == "Constant" or (node.inputs and all(source in found for source, _ in node.inputs)):
                found.add(node.name)
        return frozenset(found)

    def reached_from(self, sources: set[str]) -> set[str]:
        """`sources` and every operation their values flow into."""
        reached = set(sources)
        for node in self.nodes.values():
            if node.name not in reached and any(source in reached for source in node.data_inputs):
                reached.add(node.name)
        return reached

    def leading_to(self, *targets: str) -> set[str]:
        """`targets` and every operation whose values flow into one of them."""
        found, stack = set(targets), [*targets]
        while stack:
            for source in self[stack.pop()].data_inputs:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return found

    def weight_behind(self, node: Node, port: int) -> Node | None:
        """The constant that input `port` of `node` is a decompressed, reshaped or gathered view of, if it is one."""
        source = self[node.inputs[port][0]]
        while source.type in _WEIGHT_CHAIN:
            data_port = _WEIGHT_CHAIN[source.type]
            if data_port is None:  # scale times weight: follow the larger side
                sides = [self[name] for name, _ in source.inputs]
                if not all(side.name in self.constant_only for side in sides):  # a norm: activations times a weight
                    return None
                source = max(sides, key=lambda side: _elements(side.op.output(0).get_partial_shape()))
            else:
                source = self[source.inputs[data_port][0]]
        return source if source.type == "Constant" else None

    def product(self, node: Node) -> Product | None:
        """The matrix product of activations with a weight that `node` is; None for any other operation."""
        if node.type not in {"MatMul", "Convolution", "GroupConvolution", "GroupedMatMul"}:
            return None
        for port in (1, 0):
            weight = self.weight_behind(node, port)
            if weight is not None and _elements(weight.op.output(0).get_partial_shape()) > 1:
                shape = node.op.get_input_partial_shape(port)
                matrices = node.type.endswith("MatMul") and (shape.rank.is_dynamic or len(shape) > 2)
                return Product(node, weight, stacked=matrices)
        return None

    def constants_within(self, node: Node) -> list[ov.Node]:
        """The constants in the body of a loop; none for other operations."""
        if node.type not in {"Loop", "TensorIterator"}:
            return []
        return [op for op in node.op.get_function().get_ordered_ops() if op.get_type_name() == "Constant"]

    def tensor(self, name: str) -> ov.Output:
        """The output `node:port`; raises `BundleError` where the model has none of that name."""
        node = self.nodes.get(name.rpartition(":")[0])
        return _output(None if node is None else node.op, name)

    def variable_id(self, node: Node) -> str:
        """The id of the state that a ReadValue or Assign belongs to."""
        return str(node.op.get_attributes()["variable_id"])

    def is_cache(self, node: Node) -> bool:
        """Whether a tensor is a cache with its new rows, so that it grows with the past."""
        return node.name in self._cache_concats

    @cached_property
    def _cache_concats(self) -> frozenset[str]:
        found = (self.cache_concat(assign) for assign in self.of_type("Assign"))
        return frozenset(concat.name for concat in found if concat is not None)

    def cache_concat(self, assign: Node) -> Node | None:
        """Where new rows join the cache `[batch, heads, tokens, head_dim]` that an Assign stores: past first, then new.

        None where the state is no such cache. Its past may be reordered for beam search on the way.
        """
        concat = self[assign.inputs[0][0]]
        if concat.type != "Concat" or len(concat.inputs) != 2 or concat.op.get_attributes()["axis"] not in (2, -2):
            return None
        source = self[concat.inputs[0][0]]
        while source.type in {"Gather", "Convert"}:
            source = self[source.inputs[0][0]]
        shape = concat.op.get_output_partial_shape(0)
        same = source.type == "ReadValue" and self.variable_id(source) == self.variable_id(assign)
        return concat if same and len(shape) == 4 and shape[1].is_static and shape[3].is_static else None


def find_tensor(model: ov.Model, name: str) -> ov.Output:
    """As `IrGraph.tensor`, for one tensor that is not worth an index."""
    wanted = name.rpartition(":")[0]
    return _output(next((op for op in model.get_ordered_ops() if op.get_friendly_name() == wanted), None), name)


def _output(op: ov.Node | None, name: str) -> ov.Output:
    port = name.rpartition(":")[2]
    if op is None or not port.isdecimal() or int(port) >= op.get_output_size():
        raise BundleError(f"block graph: the model has no tensor {name!r}")
    return op.output(int(port))


def make_names_unique(model: ov.Model) -> None:
    """Give operations that share a name names of their own, in place."""
    seen: set[str] = set()
    for op in model.get_ordered_ops():
        name, number = op.get_friendly_name(), 1
        while op.get_friendly_name() in seen:
            number += 1
            op.set_friendly_name(f"{name}/{number}")
        seen.add(op.get_friendly_name())


def name_new(nodes: Sequence[ov.Node], prefix: str) -> None:
    """Name operations that were added to a model. OpenVINO numbers them, and a file may use the same numbers."""
    for number, node in enumerate(nodes):
        node.set_friendly_name(f"{prefix}/{number}")


def _elements(shape: ov.PartialShape) -> int:
    """Number of elements, an unknown dimension counting as one."""
    total = 1
    for dimension in shape:
        total *= dimension.get_length() if dimension.is_static else 1
    return total
