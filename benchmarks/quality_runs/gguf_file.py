"""What is in a GGUF file."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader
from quality_runs.weights import Weights, counted


def weights(path: Path) -> Weights:
    """What the matrices of a GGUF file take, scales included."""
    matrices = (tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
    return counted((tensor.tensor_type.name, int(tensor.n_elements), int(tensor.n_bytes)) for tensor in matrices)
