"""Placements on a GPU, real or emulated: the same text as the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.session import Model

pytestmark = pytest.mark.skipif(
    not any(device.name.startswith("GPU") for device in edgert.devices()), reason="no GPU here"
)
PROMPT = "It was a dark night, and the old man"


@pytest.mark.parametrize(
    ("place", "limit"),
    [("*=GPU@f32", 1e-3), ("ffn=GPU@f16,attention=CPU@f32", 2e-2), ("attention=GPU@f16,ffn=CPU@f32", 2e-2)],
)
def test_gpu_partitions(demo_path: Path, demo: Model, place: str, limit: float) -> None:
    model = edgert.load(demo_path, place=place)
    tokens = demo.tokenizer.encode(PROMPT)
    expected = demo.score(tokens)
    assert np.abs(model.score(tokens) - expected).max() <= limit * np.abs(expected).max()
    first = model.generate(PROMPT, max_tokens=12)
    again = model.generate(PROMPT, max_tokens=12)  # from the reused cache
    assert again.timings.reused_tokens == len(tokens) - 1
    assert again.tokens == first.tokens
    if limit < 1e-2:
        assert first.tokens == demo.generate(PROMPT, max_tokens=12).tokens
