"""Compressed weights in a model: the constants behind a matrix, and what they are packed to.

The pattern is NNCF's, which other compressors follow: codes, converted to real numbers, less zero points, times scales;
groups of columns are a dimension of their own until a Reshape joins them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from edgert.kernel_lowering.view import Dims, Item, Tensor, dims_of
from edgert.packing import Array, Matrix, PackedShape, pack, scale_fault

_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}
_REAL = {"f16", "bf16", "f32"}


class Unsuitable(Exception):
    """Something cannot be lowered; the message says why, in a few words."""


@dataclass(frozen=True)
class Weight:
    """A compressed matrix `[rows, in_features]` of a model.

    Attributes:
        codes, scales, zero_points: the constants; zero points None where the model has none.
        rows, in_features: its size; no rows where it is no such matrix.
        groups: scales of a row.
    """

    codes: Item
    scales: Item
    zero_points: Item | None
    rows: int
    in_features: int
    groups: int

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.codes.element() in {"u4", "i4"} else 8

    @property
    def signed(self) -> bool:
        return self.codes.element() in {"i4", "i8"}

    @cached_property
    def matrix(self) -> Matrix:
        """What the constants hold; reads them.

        Raises:
            Unsuitable: the kernels cannot hold it exactly enough.
        """
        codes = self.codes.op.data.view(np.uint8).reshape(self.rows, self.in_features * self.bits // 8)
        scales = _numbers(self.scales, self.rows, self.groups)
        if fault := scale_fault(scales):
            raise Unsuitable(fault)
        return Matrix(codes, scales, self._zeros(), self.bits, self.signed)

    def _zeros(self) -> Array | None:
        if self.zero_points is None:
            return None if self.signed else np.zeros((self.rows, self.groups), np.uint8)
        zeros = _numbers(self.zero_points, self.rows, self.groups).astype(np.float32)
        zeros += (1 << (self.bits - 1)) if self.signed else 0
        if (zeros != np.rint(zeros)).any() or zeros.min() < 0 or zeros.max() > 255:
            raise Unsuitable(f"zero points from {zeros.min():g} to {zeros.max():g}, expected integers from 0 to 255")
        return zeros.astype(np.uint8)


@dataclass(frozen=True)
class Part:
    """Some rows of a weight."""

    weight: Weight
    first: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.first

    @property
    def name(self) -> str:
        """The constant's name; with the rows, where they are not all."""
        whole = self.rows == self.weight.rows
        return self.weight.codes.name + ("" if whole else f"[{self.first}:{self.end}]")

    @property
    def matrix(self) -> Matrix:
        own, rows = self.weight.matrix, slice(self.first, self.end)
        zeros = None if own.zero_points is None else own.zero_points[rows]
        return Matrix(own.codes[rows], own.scales[rows], zeros, own.bits, own.signed)


@dataclass(frozen=True)
class Packable:
    """What is packed as one matrix: rows of weights with one input, one below the other, or gate and up.

    Raises:
        ValueError: the kernels take no such matrix.
    """

    parts: tuple[Part, ...]
    gated: bool = False

    @property
    def key(self) -> str:
        """What tells it from the others of a model."""
        return ("gated:" if self.gated else "") + "+".join(part.name for part in self.parts)

    @cached_property
    def shape(self) -> PackedShape:
        first = self.parts[0].weight
        rows = [part.rows for part in self.parts]
        out_features = rows[0] if self.gated else sum(rows)
        columns = first.in_features
        asymmetric = first.zero_points is not None or not first.signed
        return PackedShape(out_features, columns, first.bits, columns // first.groups, asymmetric, self.gated)

    def pack(self) -> Array:
        """The packed bytes; raises `Unsuitable` as `Weight.matrix`."""
        return pack([part.matrix for part in self.parts], gated=self.gated)

    @property
    def content(self) -> Hashable:
        """Equal where all constants lie at the same place, as those of tied weights do."""
        constants = [(p.weight.codes, p.weight.scales, p.weight.zero_points, p.first, p.end) for p in self.parts]
        return self.gated, tuple(
            (_place(codes), _place(scales), None if zeros is None else _place(zeros), first, end)
            for codes, scales, zeros, first, end in constants
        )


def join(parts: Sequence[Part], *, gated: bool = False) -> Packable | None:
    """Rows packed as one matrix; None where the kernels cannot take them as one."""
    weights = [part.weight for part in parts]
    if len({(w.codes.element(), w.in_features, w.groups, w.zero_points is None) for w in weights}) != 1:
        return None
    if gated:
        return Packable(tuple(parts), gated=True) if len(parts) == 2 and parts[0].rows == parts[1].rows else None
    return Packable(tuple(parts)) if all(part.rows % 16 == 0 for part in parts[:-1]) else None


class Weights:
    """Finds the weight behind a tensor; each once, so that two users of it share it."""

    def __init__(self) -> None:
        self._found: dict[int, Weight | None] = {}

    def behind(self, tensor: Tensor) -> Weight | None:
        """The compressed matrix that a tensor is; None where it is none.

        Raises:
            Unsuitable: it is one that the kernels do not take.
        """
        item = tensor[0]
        dims = dims_of(tensor)
        joined = False
        while item.type in {"Convert", "Reshape"}:
            joined |= item.type == "Reshape"
            item = item.source(0)
        if item.type != "Multiply" or item.element() not in _REAL:
            return None
        if item.number not in self._found:
            self._found[item.number] = _weight(item)
        weight = self._found[item.number]
        if weight is None:
            return None
        if dims is None or len(dims) != 2:
            raise Unsuitable(f"its weight has {len(dims or ())} dimensions")
        if not weight.rows:
            raise Unsuitable(f"its weight is {weight.codes.dims()}, its scales are {weight.scales.dims()}")
        if dims != (weight.rows, weight.in_features) or joined != (len(weight.codes.dims() or ()) == 3):
            raise Unsuitable(f"its weight is reshaped to {list(dims)}")
        try:
            _ = Packable((Part(weight, 0, weight.rows),)).shape
        except ValueError as error:
            raise Unsuitable(str(error)) from error
        return weight


def _weight(multiply: Item) -> Weight | None:
    """The weight that a Multiply makes of codes and scales; None where it does something else.

    It has no rows where scales are neither of rows nor of groups in them.
    """
    for (codes, _), (scales, _) in (multiply.inputs, multiply.inputs[::-1]):
        scales = _through(scales, "Convert")
        if scales.type != "Constant" or scales.element() not in _REAL:
            continue
        zeros = None
        if codes.type == "Subtract":
            zeros = _through(codes.source(1), "Convert")
            if zeros.type != "Constant":
                return None
            codes = codes.source(0)
        codes = _through(codes, "Convert")
        if codes.type != "Constant" or codes.element() not in _BITS:
            continue
        dims = _known(codes.dims()) or ()
        rows, groups = (dims[0], dims[1] if len(dims) == 3 else 1) if len(dims) in (2, 3) else (0, 1)
        fits = all(_fits(item, rows, groups, len(dims)) for item in (scales, zeros) if item is not None)
        return Weight(codes, scales, zeros, rows if fits else 0, int(np.prod(dims[1:])), groups)
    return None


def _fits(item: Item, rows: int, groups: int, rank: int) -> bool:
    """Whether scales or zero points are one number a group, or one for all."""
    dims = _known(item.dims())
    if dims is None:
        return False
    full = (rows, groups, 1) if rank == 3 else (rows, 1)
    return dims == full or all(size == 1 for size in dims)


def _known(dims: Dims | None) -> tuple[int, ...] | None:
    if dims is None:
        return None
    known = tuple(size for size in dims if size is not None)
    return known if len(known) == len(dims) else None


def _numbers(constant: Item, rows: int, groups: int) -> Array:
    """What scales or zero points are: `[rows, groups]`, all the same where the constant is one number."""
    data, kind = constant.op.data, constant.element()
    count = int(np.prod(_known(constant.dims()) or ()))
    if kind in {"u4", "i4"}:  # two a byte, the first in the low half
        packed = data.view(np.uint8).reshape(-1)
        data = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
        if kind == "i4":
            data = (data ^ 8).astype(np.int8) - np.int8(8)
    elif kind == "bf16":
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.broadcast_to(data.reshape(()), (rows, groups)) if count == 1 else data.reshape(rows, groups)


def _through(item: Item, kind: str) -> Item:
    return item.source(0) if item.type == kind else item


def _place(constant: Item) -> tuple[int, tuple[int | None, ...] | None]:
    return int(constant.op.data.ctypes.data), constant.dims()
