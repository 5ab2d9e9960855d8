"""What the kernels' INT8 activations and caches cost: perplexity, beside the same weights computed in f32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert import native
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.executor import Executor
from edgert.placement import Plan

ROOT = Path(__file__).parents[1]
CHUNK = 200  # tokens at once: later ones read from the cache what earlier ones wrote

pytestmark = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo model at INT4."""
    out = tmp_path_factory.mktemp("quality") / "int4.edge"
    edgert.compile(ROOT / "examples" / "models" / "bookworm", out, weights="int4")
    return Bundle.open(out)


def perplexity(bundle: Bundle, tokens: list[int], config: str) -> float:
    assert bundle.graph is not None
    run = Executor(bundle, Plan.single(bundle.graph, DeviceConfig.parse(config))).open()
    losses = []
    for first in range(0, len(tokens) - 1, CHUNK):
        part, following = tokens[first : first + CHUNK], tokens[first + 1 : first + CHUNK + 1]
        logits = run.forward(part, keep=len(part))[: len(following)].astype(np.float64)
        highest = logits.max(axis=-1)
        total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
        losses.append(total - logits[np.arange(len(following)), following])
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.mark.parametrize("config", ["CPU@kernels", "CPU@kernels+f16"])
def test_perplexity_stays_within_three_thousandths_of_f32(bundle: Bundle, book: list[int], config: str) -> None:
    prose = edgert.load(bundle.path).tokenizer.encode((ROOT / "tests" / "data" / "prose.txt").read_text("utf-8"))
    tokens = (prose + book)[: min(1600, bundle.facts.context_length)]
    exact, own = perplexity(bundle, tokens, "CPU@f32"), perplexity(bundle, tokens, config)
    assert own != exact  # or these would not be the kernels
    assert own == pytest.approx(exact, rel=3e-3)
