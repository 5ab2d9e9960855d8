"""What the weights of a model take, by one rule for all formats: its matrices and tables, with their scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Weights:
    """The matrices and tables of a model, tied ones once, without norms.

    Attributes:
        count: weights.
        bytes: what they take with scales and zero points.
        formats: weights by the type they are stored in.
    """

    count: int
    bytes: int
    formats: dict[str, int]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.count


def counted(tensors: Iterable[tuple[str, int, int]]) -> Weights:
    """Add up tensors, each given as format, weights and bytes."""
    formats: dict[str, int] = {}
    total = 0
    for name, count, size in tensors:
        formats[name] = formats.get(name, 0) + count
        total += size
    return Weights(sum(formats.values()), total, formats)


def of_ir(path: Path) -> Weights:
    """What the matrices of an OpenVINO IR file take."""
    import openvino as ov
    from edgert.converters.compress import precision_table

    rows = [row for row in precision_table(ov.Core().read_model(path)) if row["role"] != "norms+other"]
    return counted((row["precision"], row["elements"], row["bytes"]) for row in rows)
