"""A model read once into plain Python objects, with the users of every tensor: what patterns are looked for in.

OpenVINO gives the same Python object for a node as long as one is held, so identity tells nodes apart without names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

Dims = tuple[int | None, ...]
"""Sizes of a tensor's dimensions; None for one that is not known."""
Tensor = tuple["Item", int]
"""An output of a node, by its number."""


class Item:
    """One operation.

    Attributes:
        op: OpenVINO's node.
        type: its type's name.
        number: its place in a topological order.
        inputs: where each input comes from.
        users: for each output the operations that take it, and at which input.
    """

    __slots__ = ("_dims", "_value", "inputs", "number", "op", "type", "users")

    def __init__(self, op: ov.Node, number: int) -> None:
        self.op = op
        self.type = str(op.get_type_name())
        self.number = number
        self.inputs: tuple[Tensor, ...] = ()
        self.users: dict[int, list[tuple[Item, int]]] = {}
        self._dims: dict[int, Dims | None] = {}
        self._value: NDArray[Any] | None = None

    @property
    def name(self) -> str:
        return str(self.op.get_friendly_name())

    @property
    def all_users(self) -> list[Item]:
        return [user for users in self.users.values() for user, _ in users]

    def source(self, port: int) -> Item:
        return self.inputs[port][0]

    def attribute(self, name: str) -> Any:
        return self.op.get_attributes()[name]

    def dims(self, port: int = 0) -> Dims | None:
        """Sizes of an output; None where not even their number is known."""
        if port not in self._dims:
            # One call; asking for every dimension by itself takes a third of the time that a model is lowered in.
            text = str(self.op.get_output_partial_shape(port))
            sizes = text[1:-1].split(",") if len(text) > 2 else []
            self._dims[port] = None if text == "[...]" else tuple(int(s) if s.isdigit() else None for s in sizes)
        return self._dims[port]

    def element(self, port: int = 0) -> str:
        return str(self.op.get_output_element_type(port).get_type_name())

    @property
    def value(self) -> NDArray[Any] | None:
        """What a small constant holds, converted or not; None for anything else."""
        if self._value is None:
            if self.type == "Constant":
                self._value = self.op.data
            elif self.type == "Convert" and self.source(0).type == "Constant":
                inner = self.source(0).value
                self._value = None if inner is None else inner.astype(self.op.get_output_element_type(0).to_dtype())
        return self._value


class View:
    """The operations of a model in topological order."""

    def __init__(self, model: ov.Model) -> None:
        self.model = model
        self.items = [Item(op, number) for number, op in enumerate(model.get_ordered_ops())]
        self._by_op = {id(item.op): item for item in self.items}
        for item in self.items:
            inputs = []
            for port, output in enumerate(item.op.input_values()):
                source, index = self._by_op[id(output.get_node())], output.get_index()
                source.users.setdefault(index, []).append((item, port))
                inputs.append((source, index))
            item.inputs = tuple(inputs)

    def of_type(self, *kinds: str) -> list[Item]:
        return [item for item in self.items if item.type in kinds]

    def close(self) -> None:
        """Let go of all nodes, so that those the model no longer has disappear now, and their inputs with them."""
        for item in self.items:
            item.inputs, item.users, item.op = (), {}, None
        self._by_op.clear()
        self.items.clear()


def sole_user(tensor: Tensor) -> tuple[Item, int] | None:
    """The one operation that takes a tensor, and at which input; None where there are others or none."""
    users = tensor[0].users.get(tensor[1], [])
    return users[0] if len(users) == 1 else None


def dims_of(tensor: Tensor) -> Dims | None:
    return tensor[0].dims(tensor[1])


def element_of(tensor: Tensor) -> str:
    return tensor[0].element(tensor[1])


def last_dim(tensor: Tensor) -> int | None:
    dims = dims_of(tensor)
    return dims[-1] if dims else None


def scalar(tensor: Tensor) -> float | None:
    """The number that a constant of one element holds."""
    if tensor[0].type not in {"Constant", "Convert"}:
        return None
    dims = dims_of(tensor)
    if dims is None or any(d != 1 for d in dims):
        return None
    value = tensor[0].value
    return None if value is None else float(value.reshape(-1)[0])


def integers(tensor: Tensor) -> list[int] | None:
    """What a constant of at most a few integers holds."""
    if tensor[0].type not in {"Constant", "Convert"}:
        return None
    dims = dims_of(tensor)
    if dims is None or len(dims) > 1 or (dims and (dims[0] or 0) > 8):
        return None
    value = tensor[0].value
    return None if value is None else [int(v) for v in value.reshape(-1)]


def vector(tensor: Tensor, size: int) -> NDArray[np.float32] | None:
    """What a constant `[1, …, size]` holds, as f32 `[size]`."""
    if tensor[0].type not in {"Constant", "Convert"}:
        return None
    dims = dims_of(tensor)
    if not dims or dims[-1] != size or any(d != 1 for d in dims[:-1]):
        return None
    value = tensor[0].value
    return None if value is None else np.ascontiguousarray(value, np.float32).reshape(size)


def operands(item: Item, kind: str) -> Sequence[tuple[Tensor, Tensor]]:
    """Both orders of the two inputs of a commutative operation of a type; none for another type."""
    if item.type != kind or len(item.inputs) != 2:
        return ()
    a, b = item.inputs
    return ((a, b), (b, a))
