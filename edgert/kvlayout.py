"""How the CPU kernels lay out keys and values: blocks of 16 tokens, and rows packed into them and read back.

A cache is one array of bytes `[blocks, heads, block_bytes]` a layer. In every block the keys of 16 tokens come first,
their values after; with INT8 then the scales, one of each token's key and value. Tokens are the innermost dimension of
keys, so that one vector holds the same dimensions of 16 tokens; values have theirs the other way round, because there
dimensions are what results have side by side. `kernels/src/attention_layout.hpp` is the same in C++.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Precision = Literal["i8", "f16", "bf16"]

# Inputs of a submodel: each layer's cache by number, and the tokens that are in them, or which sequence has which.
CACHE, PAST, SEQUENCES = "cache.", "past", "sequences"
BLOCK_TOKENS = 16
_ALIGNMENT = 64  # of a cache in memory: one vector of the widest kernels, one line of the CPU's caches
_WINDOW_TOKENS = 8 * BLOCK_TOKENS  # that are converted at a time
_SCALES_BYTES = 4 * BLOCK_TOKENS
_ZERO = 128  # what is added to a signed code
_LARGEST, _SMALLEST = np.float32(127), np.finfo(np.float32).tiny
# Added to a number of at most 127 it rounds that to a whole one, ties to even, and leaves the code in the lowest byte.
_SHIFT = np.float32(1.5 * 2**23 + _ZERO)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is not below `count`."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class KvLayout:
    """The layout of one layer's cache.

    Attributes:
        precision: of an element: `i8` with one f32 scale a token and head for the key and one for the value, or `f16`,
            `bf16`.
        heads: of keys and values.
        key_dim, value_dim: elements of one head's row, multiples of 4.
    """

    precision: Precision
    heads: int
    key_dim: int
    value_dim: int

    @property
    def value_width(self) -> int:
        """Elements of a value's row with padding."""
        return round_up(self.value_dim, 16)

    @property
    def scales_at(self) -> int:
        """Bytes of keys and values in a block; with INT8 the scales follow."""
        return BLOCK_TOKENS * (self.key_dim + self.value_width) * (1 if self.precision == "i8" else 2)

    @property
    def block_bytes(self) -> int:
        """Bytes of one head's block."""
        return self.scales_at + (2 * _SCALES_BYTES if self.precision == "i8" else 0)

    def empty(self, blocks: int) -> Array:
        """A cache of so many blocks, all zero: u8 `[blocks, heads, block_bytes]`, aligned for the kernels."""
        size = blocks * self.heads * self.block_bytes
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + size].reshape(blocks, self.heads, self.block_bytes)

    def write_keys(self, cache: Array, rows: Array) -> None:
        """Put keys `[1, heads, tokens, key_dim]` at the beginning of a cache that has room for them.

        Raises:
            ValueError: the rows are of another size.
        """
        self._check(rows, self.key_dim, "keys")
        for first, part in _parts(rows):
            blocks = cache[first : first + part.shape[1]]
            if self.precision == "i8":
                codes, scales = _quantize(part)
                quads = np.ascontiguousarray(codes).view(np.uint32)  # four dimensions each
                self._view(blocks, "keys", np.uint32, self.key_dim // 4, BLOCK_TOKENS)[:] = quads.transpose(1, 0, 3, 2)
                self._view(blocks, "key scales", np.float32, BLOCK_TOKENS)[:] = scales.transpose(1, 0, 2)
            else:
                halves = _narrow(part, self.precision).transpose(1, 0, 3, 2)
                self._view(blocks, "keys", np.uint16, self.key_dim, BLOCK_TOKENS)[:] = halves

    def write_values(self, cache: Array, rows: Array) -> None:
        """The same for values `[1, heads, tokens, value_dim]`."""
        self._check(rows, self.value_dim, "values")
        for first, part in _parts(rows):
            blocks = cache[first : first + part.shape[1]]
            if self.precision == "i8":
                codes, scales = _quantize(part)
                quads = codes.reshape(*codes.shape[:2], BLOCK_TOKENS // 4, 4, self.value_dim)
                into = self._view(blocks, "values", np.uint8, BLOCK_TOKENS // 4, self.value_width, 4)
                into[..., : self.value_dim, :] = quads.transpose(1, 0, 2, 4, 3)
                into[..., self.value_dim :, :] = _ZERO
                self._view(blocks, "value scales", np.float32, BLOCK_TOKENS)[:] = scales.transpose(1, 0, 2)
            else:
                into = self._view(blocks, "values", np.uint16, BLOCK_TOKENS, self.value_width)
                into[..., : self.value_dim] = _narrow(part, self.precision).transpose(1, 0, 2, 3)
                into[..., self.value_dim :] = 0

    def read_keys(self, cache: Array, tokens: int) -> Array:
        """The first keys of a cache: f32 `[1, heads, tokens, key_dim]`."""
        rows = np.empty((1, self.heads, tokens, self.key_dim), np.float32)
        for first, into in _windows(rows):
            blocks = cache[first : first + blocks_of(into.shape[1])]
            if self.precision == "i8":
                codes = self._view(blocks, "keys", np.uint32, self.key_dim // 4, BLOCK_TOKENS).transpose(1, 0, 3, 2)
                scales = self._view(blocks, "key scales", np.float32, BLOCK_TOKENS).transpose(1, 0, 2)
                wide = _dequantize(np.ascontiguousarray(codes).view(np.uint8), scales)
            else:
                halves = self._view(blocks, "keys", np.uint16, self.key_dim, BLOCK_TOKENS)
                wide = _widen(halves.transpose(1, 0, 3, 2), self.precision)
            into[:] = wide.reshape(self.heads, -1, self.key_dim)[:, : into.shape[1]]
        return rows

    def read_values(self, cache: Array, tokens: int) -> Array:
        """The first values of a cache: f32 `[1, heads, tokens, value_dim]`."""
        rows = np.empty((1, self.heads, tokens, self.value_dim), np.float32)
        for first, into in _windows(rows):
            blocks = cache[first : first + blocks_of(into.shape[1])]
            if self.precision == "i8":
                quads = self._view(blocks, "values", np.uint8, BLOCK_TOKENS // 4, self.value_width, 4)
                codes = quads[..., : self.value_dim, :].transpose(1, 0, 2, 4, 3)
                scales = self._view(blocks, "value scales", np.float32, BLOCK_TOKENS).transpose(1, 0, 2)
                wide = _dequantize(codes.reshape(*codes.shape[:2], BLOCK_TOKENS, self.value_dim), scales)
            else:
                halves = self._view(blocks, "values", np.uint16, BLOCK_TOKENS, self.value_width)
                wide = _widen(halves[..., : self.value_dim].transpose(1, 0, 2, 3), self.precision)
            into[:] = wide.reshape(self.heads, -1, self.value_dim)[:, : into.shape[1]]
        return rows

    def _check(self, rows: Array, width: int, what: str) -> None:
        if rows.ndim != 4 or rows.shape[:2] != (1, self.heads) or rows.shape[3] != width:
            raise ValueError(f"{what} are {list(rows.shape)}, expected [1, {self.heads}, tokens, {width}]")

    def _view(self, blocks: Array, section: str, kind: type[np.generic], *shape: int) -> Array:
        """One section of every block: `[blocks, heads, *shape]`, the same memory."""
        codes_at = {"keys": 0, "values": BLOCK_TOKENS * self.key_dim * (1 if self.precision == "i8" else 2)}
        scales_at = {"key scales": self.scales_at, "value scales": self.scales_at + _SCALES_BYTES}
        start = (codes_at | scales_at)[section]
        size = math.prod(shape) * np.dtype(kind).itemsize
        return blocks[:, :, start : start + size].view(kind).reshape(*blocks.shape[:2], *shape)


def blocks_of(tokens: int) -> int:
    """How many blocks so many tokens fill."""
    return round_up(tokens, BLOCK_TOKENS) // BLOCK_TOKENS


def _windows(rows: Array) -> Iterator[tuple[int, Array]]:
    """Rows `[1, heads, tokens, width]` piece by piece, as many as stay in a core's cache: first block, and a view."""
    for start in range(0, rows.shape[2], _WINDOW_TOKENS):
        yield start // BLOCK_TOKENS, rows[0, :, start : start + _WINDOW_TOKENS]


def _parts(rows: Array) -> Iterator[tuple[int, Array]]:
    """The same as whole blocks, f32 `[heads, blocks, 16, width]`; zeros fill the last one."""
    for first, window in _windows(rows):
        heads, tokens, width = window.shape
        blocks = blocks_of(tokens)
        if tokens < blocks * BLOCK_TOKENS:
            whole = np.zeros((heads, blocks * BLOCK_TOKENS, width), np.float32)
            whole[:, :tokens] = window
        else:
            whole = window.astype(np.float32, copy=False)
        yield first, whole.reshape(heads, blocks, BLOCK_TOKENS, width)


def _quantize(rows: Array) -> tuple[Array, Array]:
    """INT8 codes of rows, plus 128 so that they are not negative, and a scale for each.

    A row of zeros, or one so small that its scale is no normal number, becomes zeros. One that holds NaN or Inf gets
    NaN for a scale, so that whatever is computed with it is NaN.
    """
    largest = np.maximum(rows.max(axis=-1), -rows.min(axis=-1))
    scales = largest / _LARGEST
    divisors, odd = scales, ~((scales >= _SMALLEST) & np.isfinite(scales))
    if odd.any():
        rows = np.where(odd[..., None], np.float32(0), rows)
        divisors = np.where(odd, np.float32(1), scales)
        scales = np.where(odd, np.where(np.isfinite(largest), np.float32(0), np.float32(np.nan)), scales)
    shifted = rows / divisors[..., None]
    shifted += _SHIFT
    return shifted.view(np.uint8)[..., ::4], scales


def _dequantize(codes: Array, scales: Array) -> Array:
    wide = codes.astype(np.float32)
    wide -= np.float32(_ZERO)
    wide *= scales[..., None]
    return wide


def _narrow(rows: Array, precision: Precision) -> Array:
    """The 16 bits of each element, rounded to nearest, ties to even."""
    if precision == "f16":
        with np.errstate(over="ignore"):  # beyond 65504 it is Inf, as in the kernels
            return rows.astype(np.float16).view(np.uint16)
    bits = rows.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    # Rounding could carry a NaN over to 0.
    return np.where(np.isnan(rows), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)


def _widen(halves: Array, precision: Precision) -> Array:
    halves = np.ascontiguousarray(halves)
    if precision == "f16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)
