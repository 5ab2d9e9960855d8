"""Quality of the demo model: it knows English, and what quantization takes away can be seen."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import edgert
from edgert.session import Model

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "models" / "bookworm"
TEXT = (Path(__file__).parent / "data" / "prose.txt").read_text("utf-8")  # written for this test


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def bits_per_byte(model: Model) -> float:
    tokens = model.tokenizer.encode(TEXT)
    scores = log_probabilities(model.score(tokens))[np.arange(len(tokens) - 1), tokens[1:]]
    return -scores.sum() / math.log(2) / len(TEXT.encode("utf-8"))


@pytest.fixture(scope="module")
def compressed(packed_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    int4 = tmp_path_factory.mktemp("compressed") / "int4.edge"
    edgert.compile(DEMO_MODEL, int4, weights="int4", sym=True)
    return {name: edgert.load(path, device="CPU@f32") for name, path in (("int8", packed_path), ("int4", int4))}


def test_the_bundle_scores_what_the_source_scores(demo: Model) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokens = demo.tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = source(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(demo.score(tokens) - expected).max() <= 1e-3 * np.abs(expected).max()


def test_the_demo_model_knows_english(demo: Model) -> None:
    shuffled = "".join(np.random.default_rng(0).permutation(list(TEXT)))
    tokens = demo.tokenizer.encode(shuffled)
    chance = math.log2(demo.facts.vocab_size) * len(tokens) / len(shuffled.encode("utf-8"))
    assert bits_per_byte(demo) < 1.9 < chance


def test_quantization_visibly_matters(demo: Model, compressed: dict[str, Model]) -> None:
    """Mean KL divergence of the next-token distributions from the f16 model's, in nats."""
    tokens = demo.tokenizer.encode(TEXT)
    reference = log_probabilities(demo.score(tokens))

    def divergence(model: Model) -> float:
        found = log_probabilities(model.score(tokens))
        return float((np.exp(reference) * (reference - found)).sum(axis=-1).mean())

    int8, int4 = divergence(compressed["int8"]), divergence(compressed["int4"])
    assert 0 <= int8 < 1e-3
    assert 5e-3 < int4 < 0.2


def test_compressed_models_still_know_english(demo: Model, compressed: dict[str, Model]) -> None:
    reference = bits_per_byte(demo)
    assert abs(bits_per_byte(compressed["int8"]) - reference) < 0.005 * reference
    assert bits_per_byte(compressed["int4"]) < 1.05 * reference
