"""Placements on a GPU, real or emulated: the logits and the greedy tokens of the CPU at f32, wherever the cut is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_partition import Case
from tiny_models import DECODERS

import edgert
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.executor import Executor
from edgert.graph import BlockKind
from edgert.placement import Plan
from edgert.session import Model
from edgert.shapes import StaticShapes

pytestmark = pytest.mark.skipif(
    not any(device.name.startswith("GPU") for device in edgert.devices()), reason="no GPU here"
)
CPU = DeviceConfig("CPU", "f32")
PROMPT = "It was a dark night, and the old man"
PROMPT_TOKENS, STEPS = 12, 6
SHAPES = StaticShapes(chunks=(16,), buckets=(32,))
CORRELATION = 0.9999
CLOSE = 1e-2  # two logits nearer than this may change places


class Reference:
    """What a model writes on the CPU at f32, and its logits for the prompt and for all it wrote."""

    def __init__(self, bundle: Bundle, prompt: list[int]) -> None:
        assert bundle.graph is not None
        self.bundle, self.graph, self.prompt = bundle, bundle.graph, prompt
        run = Executor(bundle, Plan.single(self.graph, CPU)).open()
        rows = [run.forward(prompt, keep=len(prompt)).copy()]
        self.written: list[int] = []
        for _ in range(STEPS):
            self.written.append(int(rows[-1][-1].argmax()))
            rows.append(run.forward(self.written[-1:]).copy())
        self.logits = np.concatenate(rows)

    def check(self, plan: Plan) -> None:
        """The plan gives the same logits for the same tokens, and would have chosen the same ones."""
        run = Executor(self.bundle, plan, shapes=SHAPES).open()
        rows = [run.forward(self.prompt, keep=len(self.prompt)).copy()]
        rows += [run.forward([token]).copy() for token in self.written]
        found = np.concatenate(rows)
        correlation = np.corrcoef(found.ravel(), self.logits.ravel())[0, 1]
        assert correlation >= CORRELATION, f"correlation {correlation:.6f}: {plan.explain()}"
        best = self.logits.max(axis=1)
        chosen = self.logits[np.arange(len(found)), found.argmax(axis=1)]
        second = np.partition(self.logits, -2, axis=1)[:, -2]
        others = (chosen < best) & (best - second >= CLOSE)
        assert not others.any(), f"other tokens chosen at {np.flatnonzero(others)}: {plan.explain()}"

    def plans(self) -> Iterator[Plan]:
        """Whole; cut at every boundary, with the GPU before it and after it; another device for each phase."""
        # Random experts: at f16 a router's near tie goes the other way, and that is no fault of the placement.
        precision = "f32" if any(block.kind is BlockKind.MOE for block in self.graph.blocks) else "f16"
        gpu = DeviceConfig("GPU", precision)
        count = len(self.graph.blocks)
        yield Plan.from_configs([gpu] * count, "whole")
        for pair in ((gpu, CPU), (CPU, gpu)):
            yield Plan.from_configs([pair[i % 2] for i in range(count)], "cut everywhere")
        yield Plan.explicit(self.graph, f"prefill:*={gpu}+static,decode:*={CPU}")
        yield Plan.explicit(self.graph, f"prefill:*={CPU},decode:*={gpu}")

    def halves(self) -> Iterator[Plan]:
        """In two at every third boundary, so between layers and inside them, either part first."""
        gpu, count = DeviceConfig("GPU", "f16"), len(self.graph.blocks)
        for first, second in ((CPU, gpu), (gpu, CPU)):
            for cut in range(1, count, 3):
                yield Plan.from_configs([first] * cut + [second] * (count - cut), f"cut before block {cut}")


@pytest.mark.parametrize("family", DECODERS)
def test_every_family(family: str, tmp_path: Path) -> None:
    case = Case(family, tmp_path)
    reference = Reference(case.bundle, case.tokens[:PROMPT_TOKENS])
    for plan in reference.plans():
        reference.check(plan)


def test_demo_model(demo: Model) -> None:
    reference = Reference(demo.bundle, demo.tokenizer.encode(PROMPT)[:PROMPT_TOKENS])
    for plan in (*reference.plans(), *reference.halves()):
        reference.check(plan)
    # At f32: without optimisation the emulated device miscompiles the f16 kernel for products with one static row
    # (fully_connected_gpu_bs_f_bsv16_b1); with it the kernel is right, but takes a minute to compile.
    assert demo.bundle.graph is not None
    reference.check(Plan.explicit(demo.bundle.graph, f"prefill:*={CPU},decode:*=GPU@f32+static"))


def test_generation(demo_path: Path, demo: Model) -> None:
    """Through the API: what is written, that its cache goes on, and that no speed is told of an emulated device."""
    model = edgert.load(demo_path, device="GPU@f32")
    first = model.generate(PROMPT, max_tokens=12)
    assert first.tokens == demo.generate(PROMPT, max_tokens=12).tokens
    tokens = demo.tokenizer.encode(PROMPT)
    continued = model.generate([*tokens, *first.tokens[:-1], 300], max_tokens=4)
    assert continued.timings.reused_tokens == len(tokens) + 11
    assert continued.timings.provenance == "emulated" or continued.timings.tpot_us


@pytest.mark.parametrize("place", ["*=GPU@f32", "0-4=CPU@f32,5-9=GPU@f32", "*=GPU@f32+static"])
def test_sequences_do_not_mix(demo_path: Path, demo: Model, place: str) -> None:
    """The plugin alone gives a second prompt of the same length the first one's cache; see backends/gpustate.py."""
    model = edgert.load(demo_path, place=place, static_shapes=SHAPES)
    one = demo.tokenizer.encode(PROMPT)
    other = one[::-1]
    for tokens in (one, other, one, one[:1], other[:1], one[:5], other[:5]):
        assert np.abs(model.score(tokens) - demo.score(tokens)).max() <= 1e-2
    for tokens in (one, other, one[:4], one):  # the cache of one is cut back for the next
        assert model.generate(tokens, max_tokens=5).tokens == demo.generate(tokens, max_tokens=5).tokens
    streams = [model.stream(tokens, max_tokens=6) for tokens in (one, other)]
    together = [[piece.token for piece in pair] for pair in zip(*streams, strict=True)]  # both alive, in turns
    expected = [demo.generate(tokens, max_tokens=6).tokens for tokens in (one, other)]
    assert [list(row) for row in zip(*together, strict=True)] == [list(tokens) for tokens in expected]
