"""Products with compressed weights, and what the kernels do on the way: bias, norm, gate, residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgert.kernel_lowering.patterns import RmsNorm, columns, rms_norm
from edgert.kernel_lowering.view import Item, Tensor, View, dims_of, element_of, operands, scalar, sole_user, vector
from edgert.kernel_lowering.weights import Packable, Part, Unsuitable, Weight, Weights, join
from edgert.packing import Array


@dataclass(eq=False)
class Linear:
    """One or several products with the same data, and what is computed with them at once.

    Attributes:
        weights: of the products.
        products: the MatMuls.
        data: what the weights are multiplied with; with a norm what is normalized first.
        end: the tensor that it gives; None where it gives an attention its queries, keys and values.
        norm, bias, residual: None where there is none.
        activation: of the gate, where the weights are gated.
    """

    weights: Packable
    products: tuple[Item, ...]
    data: Tensor
    end: Tensor | None
    norm: RmsNorm | None = None
    bias: Array | None = None
    residual: Tensor | None = None
    activation: str = ""

    @property
    def bias_or_zeros(self) -> Array:
        return np.zeros(self.weights.shape.out_features, np.float32) if self.bias is None else self.bias

    @property
    def part(self) -> Part | None:
        """The rows of its one weight; None where there are several."""
        return self.weights.parts[0] if len(self.weights.parts) == 1 else None


@dataclass(frozen=True)
class Lookup:
    """Rows of a compressed table."""

    weights: Packable
    ids: Tensor
    end: Tensor


@dataclass
class Linears:
    """All products and lookups of a model that the kernels take.

    Attributes:
        by_end: products by the tensor that they give.
        inner: products that give an attention its input.
        lookups: of embeddings.
        left: why other products stay as they are, by name.
    """

    by_end: dict[Tensor, Linear] = field(default_factory=dict)
    inner: list[Linear] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> list[Linear]:
        return [*self.by_end.values(), *self.inner]

    @property
    def packables(self) -> list[Packable]:
        """In the order in which they are needed."""
        placed = [(linear.products[0].number, linear.weights) for linear in self.all]
        placed += [(lookup.end[0].number, lookup.weights) for lookup in self.lookups]
        return [weights for _, weights in sorted(placed, key=lambda pair: pair[0])]

    def put(self, linear: Linear) -> None:
        if linear.end is None:
            self.inner.append(linear)
        else:
            self.by_end[linear.end] = linear

    def take(self, linears: Sequence[Linear], joined: Linear) -> None:
        """Put one in the place of several."""
        for linear in linears:
            if linear.end is not None:
                self.by_end.pop(linear.end, None)
        self.put(joined)


def find(view: View, weights: Weights, refused: Mapping[str, str]) -> Linears:
    """Products and lookups, with biases and gates; `finish` adds the rest when attention has taken its own.

    Args:
        refused: names of constants that are not to be taken, and why.
    """
    found = Linears()
    for item in view.of_type("MatMul", "Gather"):
        product = item.type == "MatMul"
        try:
            weight = weights.behind(item.inputs[1 if product else 0])
            if weight is not None and weight.codes.name in refused:
                raise Unsuitable(refused[weight.codes.name])
            if weight is None:
                if product and (kind := _uncompressed(item.inputs[1])):
                    found.left[item.name] = f"its weight is {kind}"
            elif product:
                found.put(_product(item, weight))
            else:
                found.lookups.append(_lookup(item, weight))
        except Unsuitable as reason:
            found.left[item.name] = str(reason)
    for item in view.of_type("Multiply"):
        _gate(item, found)
    return found


def side_by_side(linears: Linears, parts: Sequence[Linear]) -> Linear | None:
    """Products of the same data as one that gives all their columns; None where they do not fit."""
    first = parts[0]
    if len({id(part) for part in parts}) != len(parts):
        return None
    if any(part.data != first.data or part.weights.gated for part in parts):
        return None
    weights = join([rows for linear in parts for rows in linear.weights.parts])
    if weights is None:
        return None
    bias = None
    if any(part.bias is not None for part in parts):
        bias = np.concatenate([part.bias_or_zeros for part in parts])
    joined = Linear(weights, tuple(item for part in parts for item in part.products), first.data, None, bias=bias)
    linears.take(parts, joined)
    return joined


def finish(linears: Linears) -> None:
    """Let products take residuals that are added to them, and the norms before them."""
    for end, linear in list(linears.by_end.items()):
        added = _added(end)
        if added is not None and (added[0], 0) not in linears.by_end:
            linear.end, linear.residual = (added[0], 0), added[1]
            linears.take([], linear)
            del linears.by_end[end]
    products = {id(product) for linear in linears.all for product in linear.products}
    norms: dict[Tensor, RmsNorm | None] = {}
    for linear in linears.all:
        data = linear.data
        if data not in norms:
            users = [user for user, _ in data[0].users.get(data[1], ()) if user.type != "ShapeOf"]
            norms[data] = rms_norm(data) if all(id(user) in products for user in users) else None
        norm = norms[data]
        if norm is not None:
            linear.data, linear.norm = norm.data, norm


def _product(item: Item, weight: Weight) -> Linear:
    if item.attribute("transpose_a") or bool(item.attribute("transpose_b")) == weight.columns_first:
        raise Unsuitable("what it multiplies is transposed")
    if element_of(item.inputs[0]) != "f32":
        raise Unsuitable("its data is not f32")
    end: Tensor = (item, 0)
    bias = None
    user = sole_user(end)
    if user is not None and user[0].type == "Add":
        bias = vector(user[0].inputs[1 - user[1]], weight.rows)
        end = end if bias is None else (user[0], 0)
    return Linear(Packable((Part(weight, 0, weight.rows),)), (item,), item.inputs[0], end, bias=bias)


def _lookup(item: Item, weight: Weight) -> Lookup:
    ids, axis = item.inputs[1], scalar(item.inputs[2])
    if axis != 0 or weight.columns_first:
        raise Unsuitable(f"its table is looked up along axis {axis}")
    if ids[0].type == "Convert" and element_of(ids[0].inputs[0]) in {"i32", "i64"}:
        ids = ids[0].inputs[0]
    if element_of(ids) not in {"i32", "i64"}:
        raise Unsuitable(f"its ids are {element_of(ids)}")
    return Lookup(Packable((Part(weight, 0, weight.rows),)), ids, (item, 0))


def _uncompressed(tensor: Tensor) -> str | None:
    """The element type of a weight that is not compressed."""
    item = tensor[0].source(0) if tensor[0].type == "Convert" else tensor[0]
    dims = item.dims()
    matrix = item.type == "Constant" and dims is not None and len(dims) == 2 and all((size or 0) > 1 for size in dims)
    return item.element() if matrix else None


def _gate(multiply: Item, linears: Linears) -> None:
    """Join gate and up where `multiply` is act(gate) * up."""
    for activated, up in operands(multiply, "Multiply"):
        found = _activation(activated)
        if found is None or sole_user(up) is None:
            continue
        gate, activation = found
        gate_rows, up_rows = _rows(gate, linears), _rows(up, linears)
        if gate_rows is None or up_rows is None:
            continue
        (first, gate_part), (second, up_part) = gate_rows, up_rows
        if first.data != second.data or first.bias is not None or second.bias is not None:
            continue
        if first is second and gate_part.rows + up_part.rows != gate_part.weight.rows:  # others use the rest
            continue
        if first is not second and (gate, up) != (first.end, second.end):
            continue
        weights = join([gate_part, up_part], gated=True)
        if weights is not None:
            products = tuple(dict.fromkeys((*first.products, *second.products)))
            joined = Linear(weights, products, first.data, (multiply, 0), activation=activation)
            linears.take([first, second], joined)
            return


def _activation(tensor: Tensor) -> tuple[Tensor, str] | None:
    """What an activation is taken of and which one, where nothing else uses either."""
    item = tensor[0]
    if sole_user(tensor) is None:
        return None
    if item.type == "Swish" and (len(item.inputs) == 1 or scalar(item.inputs[1]) == 1):
        return (item.inputs[0], "silu") if sole_user(item.inputs[0]) else None
    if item.type == "Gelu":
        tanh = str(item.op.get_attributes().get("approximation_mode", "ERF")).upper() == "TANH"
        return (item.inputs[0], "gelu_tanh" if tanh else "gelu") if sole_user(item.inputs[0]) else None
    for inner, sigmoid in operands(item, "Multiply"):
        if sigmoid[0].type == "Sigmoid" and sigmoid[0].inputs[0] == inner and sole_user(sigmoid):
            return (inner, "silu") if len(inner[0].users[inner[1]]) == 2 else None
    return None


def _rows(tensor: Tensor, linears: Linears) -> tuple[Linear, Part] | None:
    """The product that gives a tensor, or columns of it, and the rows of its weight that they come from."""
    found = columns(tensor)
    linear = linears.by_end.get(found.tensor) if found else None
    part = linear.part if linear else None
    if found is None or linear is None or part is None:
        return None
    return linear, Part(part.weight, part.first + found.first, part.first + found.end)


def _added(end: Tensor) -> tuple[Item, Tensor] | None:
    """The Add that alone takes a tensor, and what of the same shape it adds."""
    user = sole_user(end)
    if user is None or user[0].type != "Add":
        return None
    other = user[0].inputs[1 - user[1]]
    same = dims_of(other) == dims_of(end) == user[0].dims()
    return (user[0], other) if same and other != end and other[0].value is None else None
