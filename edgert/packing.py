"""Weights as the CPU kernels take them: packed from codes, scales and zero points, and unpacked again for checks.

One array of bytes a matrix, the same for every instruction set: rows (out features) go in blocks of 16 so that one
vector holds the same columns of 16 rows. `kernels/src/packed_weights.hpp` is the same in C++.

    codes        4 bits: [blocks][columns / 8][16 rows][4], byte j: columns 8v + j (low half) and 8v + 4 + j (high half)
                 8 bits: [blocks][columns / 4][16 rows][4], byte j: column 4v + j
    scales       f16 [blocks][groups][16]
    zero points  u8 [blocks][groups][16], only if asymmetric; otherwise 8 or 128 is meant

A weight is `(code - zero point) * scale`. Columns are padded to a multiple of 32 with codes that mean zero, rows to
whole blocks with scales that are zero. A gated pair alternates: a block of gate rows, the same block of up rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 16  # rows
COLUMNS = 32  # that columns are padded to a multiple of
MAX_LOSS = 2.0**-10  # relative, of a scale in f16
_LIMIT = 2**31  # of each dimension, as in the kernels
_CHUNK_BYTES = 1 << 19  # of codes packed at once, so that they stay in a core's cache


@dataclass(frozen=True)
class PackedShape:
    """What the kernels must know of a packed matrix to read it.

    Attributes:
        out_features: columns of the product: of a gated pair those of one matrix.
        in_features: columns of the matrix.
        bits: of a code, 4 or 8.
        group: columns that share a scale: all of them, or a multiple of 32 that divides them.
        asymmetric: zero points are stored.
        gated: two matrices of the same shape, gate and up.

    Raises:
        ValueError: the numbers fit no matrix; the message names the first that does not, its value and its limit.
    """

    out_features: int
    in_features: int
    bits: Literal[4, 8]
    group: int
    asymmetric: bool
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features"):
            if not 0 < getattr(self, name) < _LIMIT:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to 2^31 - 1")
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, expected 4 or 8")
        if self.in_features % (multiple := 32 // self.bits):
            raise ValueError(f"in_features is {self.in_features}, expected a multiple of {multiple}")
        whole = self.group == self.in_features
        if not whole and (self.group <= 0 or self.group % COLUMNS or self.in_features % self.group):
            expected = f"in_features ({self.in_features}) or a multiple of {COLUMNS} that divides it"
            raise ValueError(f"group is {self.group}, expected {expected}")

    @property
    def groups(self) -> int:
        return self.in_features // self.group

    @property
    def blocks(self) -> int:
        return -(-self.out_features // BLOCK) * (2 if self.gated else 1)

    @property
    def vectors(self) -> int:
        """Vectors of codes of one block, each four bytes of 16 rows."""
        return -(-self.in_features // COLUMNS) * self.bits

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return self.blocks * BLOCK * (4 * self.vectors + self.groups * (3 if self.asymmetric else 2))

    def sections(self, packed: Array) -> tuple[Array, Array, Array | None]:
        """Views of codes u32 `[blocks, vectors, 16]`, scales f16 and zero points u8 `[blocks, groups, 16]`."""
        first = self.blocks * self.vectors * BLOCK * 4
        second = first + self.blocks * self.groups * BLOCK * 2
        shape = (self.blocks, self.groups, BLOCK)
        zeros = packed[second:].reshape(shape) if self.asymmetric else None
        codes = packed[:first].view(np.uint32).reshape(self.blocks, self.vectors, BLOCK)
        return codes, packed[first:second].view(np.float16).reshape(shape), zeros


@dataclass(frozen=True)
class Matrix:
    """A compressed matrix as it lies in a model.

    Attributes:
        codes: u8 `[rows, bytes]`, with 4 bits two codes a byte, the even column in the low half.
        scales: real numbers `[rows, groups]`.
        zero_points: u8 `[rows, groups]`, in the kernels' numbers (not negative); None if 8 or 128 everywhere.
        bits: of a code.
        signed: codes are two's complement.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: Literal[4, 8]
    signed: bool

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1]) * 8 // self.bits


def scale_fault(scales: Array) -> str | None:
    """Why f16 cannot hold some scales; None if it can."""
    if scales.dtype == np.float16:
        return None if np.isfinite(scales).all() else "a scale is not finite"
    wide = scales.astype(np.float64)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16).astype(np.float64)
    if not np.isfinite(half).all():
        return "a scale is not finite in f16"
    loss = np.abs(half - wide) > MAX_LOSS * np.abs(wide)
    return f"scale {wide[loss][0]:.3g} loses more than 2^-10 in f16" if loss.any() else None


def shape_of(matrices: Sequence[Matrix], *, gated: bool = False) -> PackedShape:
    """The shape of matrices packed one below the other, or of gate and up.

    Raises:
        ValueError: they do not fit each other, or the kernels.
    """
    first = matrices[0]
    for other in matrices[1:]:
        for name in ("bits", "in_features"):
            one, another = getattr(first, name), getattr(other, name)
            if one != another:
                raise ValueError(f"{name} is {one} of one matrix and {another} of another")
        if other.scales.shape[1] != first.scales.shape[1]:
            raise ValueError("groups differ")
        if (other.zero_points is None) != (first.zero_points is None):
            raise ValueError("only some have zero points")
    rows = [matrix.rows for matrix in matrices]
    if gated and (len(rows) != 2 or rows[0] != rows[1]):
        raise ValueError(f"gate and up have {rows} rows, expected two matrices of the same size")
    if not gated and any(count % BLOCK for count in rows[:-1]):
        raise ValueError(f"matrices of {rows} rows, expected multiples of {BLOCK} before the last")
    columns = first.in_features
    return PackedShape(
        rows[0] if gated else sum(rows),
        columns,
        first.bits,
        columns // first.scales.shape[1],
        first.zero_points is not None,
        gated,
    )


def pack(matrices: Sequence[Matrix], out: Array | None = None, *, gated: bool = False) -> Array:
    """Matrices that share their input, one below the other, or gate and up in turns; see the head of this module.

    Args:
        out: where to, u8 of `shape_of(...).bytes`; by default new memory.

    Raises:
        ValueError: they do not fit each other, or the kernels.
    """
    shape = shape_of(matrices, gated=gated)
    packed = np.empty(shape.bytes, np.uint8) if out is None else out
    codes, scales, zeros = shape.sections(packed)
    start = 0
    for number, matrix in enumerate(matrices):
        count = -(-matrix.rows // BLOCK)
        chosen = slice(number, None, 2) if gated else slice(start, start + count)
        start += count
        _pack_rows(scales[chosen], matrix.scales.astype(np.float16))
        if zeros is not None and matrix.zero_points is not None:
            _pack_rows(zeros[chosen], matrix.zero_points)
        _pack_codes(codes[chosen], matrix)
    return packed


def unpack(packed: Array, shape: PackedShape) -> NDArray[np.float32]:
    """The weights `[rows, in_features]`; of a gated pair gate above up."""
    codes, scales, zeros = shape.sections(packed)
    wide = np.ascontiguousarray(codes.transpose(0, 2, 1)).reshape(-1, shape.vectors)
    if shape.bits == 4:
        wide = _sorted(wide).view(np.uint8)
        wide = np.stack([wide & 15, wide >> 4], axis=-1).reshape(wide.shape[0], -1)
    else:
        wide = wide.view(np.uint8)

    def each_column(section: Array) -> Array:
        return section.transpose(0, 2, 1).reshape(-1, shape.groups).astype(np.float32).repeat(shape.group, axis=1)

    zero: Array | float = float(1 << (shape.bits - 1)) if zeros is None else each_column(zeros)
    rows: Array = (wide[:, : shape.in_features].astype(np.float32) - zero) * each_column(scales)
    if shape.gated:
        rows = rows.reshape(-1, 2, BLOCK, shape.in_features).swapaxes(0, 1).reshape(2, -1, shape.in_features)
        return rows[:, : shape.out_features].reshape(-1, shape.in_features)
    return rows[: shape.out_features]


def _pack_rows(into: Array, rows: Array) -> None:
    """Numbers `[rows, groups]` to `[blocks, groups, 16]`; zeros fill the last block."""
    whole = rows.shape[0] // BLOCK
    into[:whole] = rows[: whole * BLOCK].reshape(whole, BLOCK, rows.shape[1]).transpose(0, 2, 1)
    if whole < into.shape[0]:
        into[whole] = 0
        into[whole, :, : rows.shape[0] - whole * BLOCK] = rows[whole * BLOCK :].T


def _pack_codes(into: Array, matrix: Matrix) -> None:
    """Codes to `[blocks, vectors, 16]`, some blocks at a time."""
    row_bytes = matrix.codes.shape[1]
    step = max(1, _CHUNK_BYTES // (BLOCK * row_bytes))
    sign = np.uint32(0x88888888 if matrix.bits == 4 else 0x80808080) if matrix.signed else None
    middle = np.uint8(0x88 if matrix.bits == 4 else 0x80)
    vectors = row_bytes // 4
    for first in range(0, into.shape[0], step):
        blocks = into[first : first + step]
        rows = matrix.codes[first * BLOCK : (first + step) * BLOCK]
        words = np.empty((blocks.shape[0] * BLOCK, vectors), np.uint32)
        words[: rows.shape[0]] = np.ascontiguousarray(rows).view(np.uint32)  # rows in a mapped file are not aligned
        words[rows.shape[0] :] = middle * np.uint32(0x01010101)
        if sign is not None:
            words[: rows.shape[0]] ^= sign
        if matrix.bits == 4:
            words = _interleaved(words)
        blocks[:, :vectors] = words.reshape(blocks.shape[0], BLOCK, vectors).transpose(0, 2, 1)
        if vectors < blocks.shape[1]:
            blocks[:, vectors:] = _padding(matrix, first * BLOCK, blocks.shape[0], middle)[:, None]


def _padding(matrix: Matrix, first: int, blocks: int, middle: np.uint8) -> Array:
    """What means zero beyond the last column: words `[blocks, 16]`."""
    codes = np.full(blocks * BLOCK, middle, np.uint32)
    if matrix.zero_points is not None:
        last = matrix.zero_points[first : first + blocks * BLOCK, -1]
        codes[: last.size] = last * (17 if matrix.bits == 4 else 1)
    return (codes * np.uint32(0x01010101)).reshape(blocks, BLOCK)


def _interleaved(words: Array) -> Array:
    """Eight nibbles in order to four bytes that hold nibbles j and 4 + j."""
    interleaved: Array = _spread(words & 0xFFFF) | (_spread(words >> 16) << 4)
    return interleaved


def _spread(words: Array) -> Array:
    """Four nibbles to the low halves of four bytes."""
    words = (words | (words << 8)) & 0x00FF00FF
    spread: Array = (words | (words << 4)) & 0x0F0F0F0F
    return spread


def _sorted(words: Array) -> Array:
    """The inverse of `_interleaved`."""
    ordered: Array = _gathered(words) | (_gathered(words >> 4) << 16)
    return ordered


def _gathered(words: Array) -> Array:
    """The inverse of `_spread`; high halves of bytes do not count."""
    words = words & 0x0F0F0F0F
    words = (words | (words >> 4)) & 0x00FF00FF
    gathered: Array = (words | (words >> 8)) & 0x0000FFFF
    return gathered
