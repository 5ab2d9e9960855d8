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
        columns_first: it is stored as `[in_features, rows]`, as in models from ONNX.
    """

    codes: Item
    scales: Item
    zero_points: Item | None
    rows: int
    in_features: int
    groups: int
    columns_first: bool = False

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.codes.element() in {"u4", "i4"} else 8

    @property
    def signed(self) -> bool:
        return self.codes.element() in {"i4", "i8"}

    @property
    def matrix(self) -> Matrix:
        """What the constants hold, by rows; raises `Unsuitable` as `scaling`."""
        return Matrix(self._codes(), *self.scaling, self.bits, self.signed)

    @cached_property
    def scaling(self) -> tuple[Array, Array | None]:
        """Scales and zero points, `[rows, groups]`, as `Matrix` wants them.

        Raises:
            Unsuitable: the kernels cannot hold them exactly enough.
        """
        scales = self._by_row(self.scales)
        if fault := scale_fault(scales):
            raise Unsuitable(fault)
        if self.zero_points is None:
            return scales, None if self.signed else np.zeros(scales.shape, np.uint8)
        zeros = self._by_row(self.zero_points).astype(np.float32)
        zeros += (1 << (self.bits - 1)) if self.signed else 0
        if (zeros != np.rint(zeros)).any() or zeros.min() < 0 or zeros.max() > 255:
            raise Unsuitable(f"zero points from {zeros.min():g} to {zeros.max():g}, expected integers from 0 to 255")
        return scales, zeros.astype(np.uint8)

    def _by_row(self, constant: Item) -> Array:
        """What scales or zero points are: `[rows, groups]`, all the same where the constant is one number."""
        numbers, shape = _numbers(constant), (self.rows, self.groups)
        if numbers.size == 1:
            return np.broadcast_to(numbers.reshape(()), shape)
        by_row: Array = numbers.reshape(shape[::-1]).T if self.columns_first else numbers.reshape(shape)
        return by_row

    def _codes(self) -> Array:
        """Codes by rows, u8 `[rows, bytes]`: the constant's own memory, if it is stored so."""
        data: Array = self.codes.op.data.view(np.uint8).reshape(-1)
        if not self.columns_first:
            return data.reshape(self.rows, -1)
        codes = data if self.bits == 8 else _nibbles(data)
        codes = np.ascontiguousarray(codes.reshape(self.in_features, self.rows).T)
        packed: Array = codes if self.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        return packed


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
        """The packed bytes; raises `Unsuitable` as `Weight.scaling`."""
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
        stored = (weight.in_features, weight.rows) if weight.columns_first else (weight.rows, weight.in_features)
        if dims != stored or joined != (len(weight.codes.dims() or ()) == 3):
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
        if len(dims) in (2, 3):
            sizes = [_known(item.dims()) or () for item in (scales, zeros) if item is not None]
            sizes = [size for size in sizes if set(size) - {1}]  # one number is for all
            if all(size == (*dims[:-1], 1) for size in sizes):
                return Weight(codes, scales, zeros, dims[0], int(np.prod(dims[1:])), dims[1] if dims[2:] else 1)
            if all(size == (*dims[:-2], 1, dims[-1]) for size in sizes):
                columns = int(np.prod(dims[:-1]))
                return Weight(codes, scales, zeros, dims[-1], columns, dims[0] if dims[2:] else 1, columns_first=True)
        return Weight(codes, scales, zeros, 0, 0, 1)
    return None


def _known(dims: Dims | None) -> tuple[int, ...] | None:
    if dims is None:
        return None
    known = tuple(size for size in dims if size is not None)
    return known if len(known) == len(dims) else None


def _numbers(constant: Item) -> Array:
    """What scales or zero points are, one after the other."""
    kind = constant.element()
    data: Array = constant.op.data.reshape(-1)
    if kind in {"u4", "i4"}:
        data = _nibbles(data.view(np.uint8))[: int(np.prod(_known(constant.dims()) or ()))]
        data = (data ^ 8).astype(np.int8) - np.int8(8) if kind == "i4" else data
    elif kind == "bf16":
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data


def _nibbles(data: Array) -> Array:
    """Codes of four bits, two a byte, the first in the low half."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(-1)


def _through(item: Item, kind: str) -> Item:
    return item.source(0) if item.type == kind else item


def _place(constant: Item) -> tuple[int, tuple[int | None, ...] | None]:
    return int(constant.op.data.ctypes.data), constant.dims()
