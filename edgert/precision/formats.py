"""The formats that a weight matrix can be stored in, and the bytes that each takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import UsageError

GROUP_SIZES = (32, 64, 128)  # of INT4, besides the whole channel
CHANNEL = -1  # as a group size: one scale for a whole channel
NPU_GROUP_SIZES = (CHANNEL, 128)  # of symmetric INT4, as in `edgert.npu.recipe`, which needs OpenVINO


@dataclass(frozen=True)
class Format:
    """One way to store a matrix; `FORMATS` has them all.

    Attributes:
        name: `f16`, `int8`, or `int4-sym-` or `int4-asym-` and then `g32`, `g64`, `g128` or `pc` (per channel).
        bits: of one weight, scales not included.
        symmetric: no zero points. INT8 has them, as NNCF's INT8_ASYM, the default of `edgert compile`, stores it.
        group_size: weights along the input dimension that share a scale, -1 for a whole channel; None for no scales.
    """

    name: str
    bits: int
    symmetric: bool
    group_size: int | None

    @property
    def npu(self) -> bool:
        """Whether an NPU's compiler keeps it as it is (`edgert.npu.recipe.check` finds nothing)."""
        return self.bits != 4 or (self.symmetric and self.group_size in NPU_GROUP_SIZES)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a matrix `[out, in]`, or experts `[n, out, in]`, can be stored so.

        A group divides the input dimension and is smaller: one as large is a channel.
        """
        return self.group_size in (None, CHANNEL) or (shape[-1] % self.group_size == 0 and shape[-1] > self.group_size)

    def weight_bytes(self, shape: Sequence[int]) -> dict[str, int]:
        """Bytes by element type, as `Block.weight_bytes` counts them: weights, f16 scales, zero points.

        Raises:
            UsageError: it does not fit the shape.
        """
        if not self.fits(shape):
            raise UsageError(f"format {self.name}: a matrix of shape {list(shape)} cannot be stored so")
        elements, rows = math.prod(shape), math.prod(shape[:-1])  # experts have a scale for each of their rows
        if self.group_size is None:
            return {"f16": 2 * elements}
        if self.bits == 8:
            return {"u8": elements + rows, "f16": 2 * rows}
        scales = rows if self.group_size == CHANNEL else elements // self.group_size
        packed = (elements + 1) // 2
        if self.symmetric:
            return {"i4": packed, "f16": 2 * scales}
        return {"u4": packed + (scales + 1) // 2, "f16": 2 * scales}

    def total_bytes(self, shape: Sequence[int]) -> int:
        """The sum of `weight_bytes`."""
        return sum(self.weight_bytes(shape).values())


def _int4(symmetric: bool) -> tuple[Format, ...]:
    kind = "sym" if symmetric else "asym"
    groups = tuple(Format(f"int4-{kind}-g{size}", 4, symmetric, size) for size in GROUP_SIZES)
    return (*groups, Format(f"int4-{kind}-pc", 4, symmetric, CHANNEL))


FORMATS: tuple[Format, ...] = (
    Format("f16", 16, True, None),
    Format("int8", 8, False, CHANNEL),
    *_int4(False),
    *_int4(True),
)


def named(name: str) -> Format:
    """The format of that name; `UsageError` lists them where there is none."""
    found = next((one for one in FORMATS if one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in FORMATS)
        raise UsageError(f"format {name[:40]!r} is not known; known: {known}")
    return found
