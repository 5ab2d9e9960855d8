"""The matrices of a block to be, and the bytes that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgert.graph import BlockKind

Weights = Literal["int4", "int8", "fp16"]
PRECISIONS: tuple[Weights, ...] = get_args(Weights)
SMALLEST_GROUP = 32  # below it NNCF takes INT8


@dataclass(frozen=True)
class Matrix:
    """`count` matrices `[rows, columns]`, of which a token uses `used`; columns are the input dimension.

    One in the role `shift` is added to activations, or scales them, and multiplies nothing; `conv` are the weights of a
    short convolution, which a compiled model has as vectors; a `router` chooses experts.
    """

    rows: int
    columns: int
    count: int = 1
    used: int = 1
    role: Literal["linear", "table", "head", "conv", "shift", "router"] = "linear"

    @property
    def elements(self) -> int:
        return self.rows * self.columns * self.count

    @property
    def used_elements(self) -> int:
        return self.rows * self.columns * self.used

    def bytes(self, weights: Weights, group_size: int) -> dict[str, int]:
        """Bytes by element type as `edgert compile` stores it, scales (f16) and zero points included."""
        if self.role == "shift":  # which NNCF does not compress
            return {"f16": 2 * self.elements}
        if self.role == "conv":
            return {"f32": 4 * self.elements}
        if weights == "fp16" or self.role == "router":  # compression leaves routers alone
            exact = min(self.rows * self.count, self.columns) == 1  # a single row or column is no matrix
            return {"f32": 4 * self.elements} if exact else {"f16": 2 * self.elements}
        group = _group(self.columns, group_size) if weights == "int4" and self.role == "linear" else None
        if group is not None:
            groups = self.elements // group
            return {"u4": (self.elements + groups + 1) // 2, "f16": 2 * groups}
        scales = self.rows * self.count
        return {"u8": self.elements + scales, "f16": 2 * scales}


def _group(columns: int, group_size: int) -> int | None:
    """The size of an INT4 group in rows of so many columns; None where they stay at INT8."""
    if group_size == -1:
        return columns
    if columns % group_size == 0:
        return group_size
    largest = columns & -columns  # the largest power of two that divides it
    return min(largest, 1 << group_size.bit_length() - 1) if largest >= SMALLEST_GROUP else None


@dataclass
class Part:
    """A block to be: its matrices, and elements of what else it holds."""

    kind: BlockKind
    matrices: list[Matrix]
    vectors: int = 0  # norms and biases, which stay at f32
    constants: int = 0  # numbers that are no parameters, at f32
    kv: int = 0  # keys and values of one token
    recurrent: int = 0  # elements of the states that do not grow
    fixed_states: tuple[str, ...] = ()  # their names
    score_flops: int = 0
    window: int | None = None

    @property
    def parameters(self) -> int:
        return sum(m.elements for m in self.matrices) + self.vectors
