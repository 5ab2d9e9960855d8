"""Small patterns that attention and linear layers have in common: RMSNorm, RoPE, columns of a tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from edgert.kernel_lowering.view import Item, Tensor, dims_of, integers, last_dim, operands, scalar, vector
from edgert.packing import Array


@dataclass(frozen=True)
class RmsNorm:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension.

    Attributes:
        data: x.
        weight: f32 `[width]`, or None where it is 1.
    """

    data: Tensor
    epsilon: float
    weight: Array | None

    @property
    def ones_or_weight(self) -> Array:
        return np.ones(last_dim(self.data) or 0, np.float32) if self.weight is None else self.weight


def rms_norm(tensor: Tensor) -> RmsNorm | None:
    """The RMSNorm whose result a tensor is."""
    item = tensor[0]
    width = last_dim(tensor)
    if item.type not in {"Multiply", "Divide"} or width is None or item.element() != "f32":
        return None
    bare = _bare_norm(item)
    if bare is not None:
        return RmsNorm(*bare, None)
    for inner, other in operands(item, "Multiply"):
        weight = vector(other, width) if width > 1 else None
        bare = None if weight is None else _bare_norm(inner[0])
        if bare is not None:
            return RmsNorm(*bare, weight)
    return None


def _bare_norm(item: Item) -> tuple[Tensor, float] | None:
    """x and epsilon where `item` is x / sqrt(mean(x^2) + epsilon)."""
    if item.type == "Divide":
        x, root = item.inputs
        return _mean_square(root[0].inputs[0], x) if root[0].type == "Sqrt" else None
    for x, inverse in operands(item, "Multiply"):
        squares = _inverse_root_of(inverse[0])
        found = None if squares is None else _mean_square(squares, x)
        if found is not None:
            return found
    return None


def _inverse_root_of(item: Item) -> Tensor | None:
    """y where `item` is 1 / sqrt(y)."""
    if item.type == "Divide" and item.source(1).type == "Sqrt" and scalar(item.inputs[0]) == 1:
        return item.source(1).inputs[0]
    if item.type == "Power" and scalar(item.inputs[1]) == -0.5:
        return item.inputs[0]
    if item.type == "Power" and scalar(item.inputs[1]) == -1 and item.source(0).type == "Sqrt":
        return item.source(0).inputs[0]
    return None


def _mean_square(tensor: Tensor, x: Tensor) -> tuple[Tensor, float] | None:
    """x and epsilon where `tensor` is mean(x^2) + epsilon."""
    for mean, other in operands(tensor[0], "Add"):
        epsilon, item = scalar(other), mean[0]
        if epsilon is None or epsilon < 0 or item.type != "ReduceMean" or not item.attribute("keep_dims"):
            continue
        rank = len(dims_of(x) or ())
        if integers(item.inputs[1]) not in ([-1], [rank - 1]):
            continue
        square = item.source(0)
        squared = square.type == "Power" and square.inputs[0] == x and scalar(square.inputs[1]) == 2
        if squared or (square.type == "Multiply" and square.inputs == (x, x)):
            return x, epsilon
    return None


@dataclass(frozen=True)
class Columns:
    """Neighbouring columns (of the last dimension) of a tensor."""

    tensor: Tensor
    first: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.first


def columns(tensor: Tensor) -> Columns | None:
    """Of which tensor's columns a tensor is a slice, through any number of slices; of itself, where it is none.

    None where its last dimension is not known.
    """
    width = last_dim(tensor)
    if width is None:
        return None
    first, end = 0, width
    while (found := _one_slice(tensor)) is not None:
        tensor, offset = found
        first, end = first + offset, end + offset
    return Columns(tensor, first, end)


def _one_slice(tensor: Tensor) -> tuple[Tensor, int] | None:
    """What a tensor is cut from along the last dimension, and where it begins there."""
    item, port = tensor
    source = item.inputs[0] if item.inputs else None
    width, total = last_dim(tensor), last_dim(source) if source else None
    if source is None or width is None or total is None:
        return None
    last = len(dims_of(source) or ()) - 1
    if item.type == "Slice" and len(item.inputs) == 5:
        start, stop, step, axis = (integers(item.inputs[i]) for i in (1, 2, 3, 4))
        if start is None or stop is None or step != [1] or axis not in ([-1], [last]):
            return None
        first, end = (_wrapped(value[0], total) for value in (start, stop))
        return (source, first) if end - first == width else None
    if item.type == "VariadicSplit" and integers(item.inputs[1]) in ([-1], [last]):
        lengths = integers(item.inputs[2])
        if lengths is None:
            return None
        sizes = [size if size >= 0 else total - sum(s for s in lengths if s >= 0) for size in lengths]
        return source, sum(sizes[:port])
    if item.type == "Split" and integers(item.inputs[1]) in ([-1], [last]):
        return source, port * width
    if item.type == "StridedSlice":
        return _strided(item, source, width, total, last)
    return None


def _strided(item: Item, source: Tensor, width: int, total: int, last: int) -> tuple[Tensor, int] | None:
    """The same of a StridedSlice that takes all of the other dimensions."""
    begin, end = integers(item.inputs[1]), integers(item.inputs[2])
    steps = integers(item.inputs[3]) if len(item.inputs) == 4 else [1]
    given = item.op.get_attributes()
    masks = [given[name] for name in ("new_axis_mask", "shrink_axis_mask", "ellipsis_mask")]
    if begin is None or end is None or steps is None or len(begin) != last + 1 or set(steps) != {1}:
        return None
    if any(any(mask) for mask in masks):
        return None

    def open_at(name: str, axis: int) -> bool:
        return bool(len(given[name]) > axis and given[name][axis])

    whole = all(
        (open_at("begin_mask", axis) or begin[axis] == 0) and (open_at("end_mask", axis) or end[axis] >= sys.maxsize)
        for axis in range(last)
    )
    first = 0 if open_at("begin_mask", last) else _wrapped(begin[last], total)
    stop = total if open_at("end_mask", last) else _wrapped(end[last], total)
    return (source, first) if whole and stop - first == width else None


def _wrapped(position: int, size: int) -> int:
    return max(0, position + size) if position < 0 else min(position, size)


@dataclass(frozen=True)
class Rope:
    """Rotation of the first `size` dimensions of each row, halves against each other.

    Attributes:
        data: what is rotated.
        cos, sin: tables with `size` columns, or with half of them for both halves.
        size: dimensions that are rotated.
    """

    data: Tensor
    cos: Tensor
    sin: Tensor
    size: int


def rope(tensor: Tensor) -> Rope | None:
    """The rotation whose result a tensor is."""
    whole = _rotation(tensor)
    if whole is not None:
        return whole
    item = tensor[0]
    if item.type != "Concat" or len(item.inputs) != 2 or not _along_last(item):
        return None
    rotated = _rotation(item.inputs[0])
    if rotated is None:
        return None
    turned, rest, width = columns(rotated.data), columns(item.inputs[1]), last_dim(tensor)
    if turned is None or rest is None or turned.tensor != rest.tensor or turned.end != rest.first:
        return None
    # A slice that begins later, or ends earlier, is not the whole head.
    data = _cut(turned.tensor, turned.first, rest.end)
    return None if data is None or last_dim(data) != width else Rope(data, rotated.cos, rotated.sin, rotated.size)


def _cut(tensor: Tensor, first: int, end: int) -> Tensor | None:
    """The tensor that holds just these columns of another, where there is one."""
    if (first, end) == (0, last_dim(tensor)):
        return tensor
    for users in tensor[0].users.get(tensor[1], ()):
        item = users[0]
        for port in range(item.op.get_output_size()):
            found = columns((item, port))
            if found is not None and (found.tensor, found.first, found.end) == (tensor, first, end):
                return item, port
    return None


def _along_last(concat: Item) -> bool:
    return int(concat.attribute("axis")) in (-1, len(concat.dims() or ()) - 1)


def _rotation(tensor: Tensor) -> Rope | None:
    return _rotate_half(tensor[0]) or _rotated_halves(tensor[0])


def _rotate_half(item: Item) -> Rope | None:
    """x * cos + concat(-x2, x1) * sin."""
    for left, right in operands(item, "Add"):
        for x, cos in operands(left[0], "Multiply"):
            size = last_dim(x)
            if size is None or size % 2 or last_dim(cos) != size:
                continue
            for turned, sin in operands(right[0], "Multiply"):
                if last_dim(sin) == size and _is_turned(turned[0], x, size):
                    return Rope(x, cos, sin, size)
    return None


def _is_turned(item: Item, x: Tensor, size: int) -> bool:
    """Whether `item` is concat(-x2, x1)."""
    if item.type != "Concat" or len(item.inputs) != 2 or not _along_last(item):
        return False
    second = _negated(item.inputs[0])
    return second is not None and _is_half(second, x, 1, size) and _is_half(item.inputs[1], x, 0, size)


def _negated(tensor: Tensor) -> Tensor | None:
    if tensor[0].type == "Negative":
        return tensor[0].inputs[0]
    return next((value for value, factor in operands(tensor[0], "Multiply") if scalar(factor) == -1), None)


def _is_half(tensor: Tensor, x: Tensor, number: int, size: int) -> bool:
    found = _one_slice(tensor)
    return found == (x, number * size // 2) and last_dim(tensor) == size // 2


def _rotated_halves(item: Item) -> Rope | None:
    """concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), the tables half as wide as x."""
    if item.type != "Concat" or len(item.inputs) != 2 or not _along_last(item):
        return None
    high, size = item.source(1), last_dim((item, 0))
    low = _difference(item.source(0))
    if low is None or high.type != "Add" or size is None or size % 2:
        return None
    products = high.source(0), high.source(1)
    if any(product.type != "Multiply" for product in products):
        return None
    for first, cos in operands(low[0], "Multiply"):
        halves = _one_slice(first)
        if halves is None or halves[1] != 0 or last_dim(halves[0]) != size or last_dim(cos) != size // 2:
            continue
        x = halves[0]
        for second, sin in operands(low[1], "Multiply"):
            expected = {frozenset({second, cos}), frozenset({first, sin})}
            same = {frozenset(product.inputs) for product in products} == expected
            if same and _is_half(second, x, 1, size) and last_dim(sin) == size // 2:
                return Rope(x, cos, sin, size)
    return None


def _difference(item: Item) -> tuple[Item, Item] | None:
    """a and b where `item` is a - b."""
    if item.type == "Subtract":
        return item.source(0), item.source(1)
    for left, right in operands(item, "Add"):
        other = _negated(right)
        if other is not None:
            return left[0], other[0]
    return None
