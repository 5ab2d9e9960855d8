"""What the kernels' INT8 activations and caches cost: perplexity, beside the same weights computed in f32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert import native
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.likelihood import Losses
from edgert.placement import Plan
from edgert.scorers import bundle_scorer

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo model at INT4."""
    out = tmp_path_factory.mktemp("quality") / "int4.edge"
    edgert.compile(ROOT / "examples" / "models" / "bookworm", out, weights="int4")
    return Bundle.open(out)


def perplexity(bundle: Bundle, tokens: list[int], config: str) -> float:
    """Of the tokens but the first; later ones read from the cache what earlier ones wrote."""
    assert bundle.graph is not None
    scorer, losses = bundle_scorer(bundle, Plan.single(bundle.graph, DeviceConfig.parse(config))), Losses()
    losses.add(scorer.logits(tokens)[:-1], np.array(tokens[1:]))
    return losses.perplexity


@pytest.mark.parametrize("config", ["CPU@kernels", "CPU@kernels+f16"])
def test_perplexity_stays_within_three_thousandths_of_f32(bundle: Bundle, book: list[int], config: str) -> None:
    prose = edgert.load(bundle.path).tokenizer.encode((ROOT / "tests" / "data" / "prose.txt").read_text("utf-8"))
    tokens = (prose + book)[: min(1600, bundle.facts.context_length)]
    exact, own = perplexity(bundle, tokens, "CPU@f32"), perplexity(bundle, tokens, config)
    assert own != exact  # or these would not be the kernels
    assert own == pytest.approx(exact, rel=3e-3)
