"""The search itself, where what is measured follows a law: within the budget, near it, and with few measurements."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import expm1
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from edgert.converters.mixed import search as module
from edgert.converters.mixed.matrices import Matrix
from edgert.converters.mixed.measure import F16, Chosen, Quality, Sensitivity
from edgert.converters.mixed.search import Proposal, Search, Target
from test_cost import block, chain

from edgert.graph import BlockGraph, BlockKind
from edgert.precision import FORMATS, Mix, fill, named
from edgert.profile import shipped

SHAPES = ((64, 256), (256, 64), (96, 96), (512, 256))
COARSENESS = {"int8": 0.004, "g32": 0.8, "g64": 1.0, "g128": 1.3, "pc": 2.0}  # squared errors, as fractions


def matrices() -> list[Matrix]:
    table = Matrix("embed/table", "table", "embedding+head", (0, 9), (1000, 256))
    return [table, *(Matrix(f"{n}/linear", f"c{n}", "linear", (1 + n // 2,), SHAPES[n % 4]) for n in range(16))]


def graph() -> BlockGraph:
    sizes = Counter[int]()
    for matrix in matrices():
        for index in matrix.blocks:
            sizes[index] += 2 * matrix.elements
    kinds = [BlockKind.EMBED, *[BlockKind.FFN] * 8, BlockKind.HEAD]
    return chain([block(n, kind, weight_bytes={"f16": sizes[n], "f32": 64}) for n, kind in enumerate(kinds)], 512)


def sensitivities(harm: float) -> dict[str, Sensitivity]:
    """`harm` nats a token if all are at their anchors."""
    draw = np.random.default_rng(0)
    found = {}
    shares = draw.lognormal(0, 1, len(matrices()))
    for matrix, share in zip(matrices(), shares / shares.sum(), strict=True):
        fitting = [kind for kind in FORMATS[1:] if kind.fits(matrix.shape) and "-sym" not in kind.name]
        anchor = next(kind for kind in fitting if kind.name.rpartition("-")[2] in ("g64", "g32", "pc"))
        errors = {kind.name: COARSENESS[kind.name.rpartition("-")[2]] for kind in fitting}
        metrics = {"share": float(share), "noise": float(draw.random())}
        methods: Any = dict.fromkeys(errors, "rtn")
        kl = harm * float(share)
        found[matrix.name] = Sensitivity(anchor.name, kl, kl, methods, errors, metrics)
    return found


class Law:
    """Instead of measurements: the loss is that which is predicted times `slope`, and more of it the more there is.

    Args:
        noise: nats a token, of the increase at a loss of 1 %; the standard error says so.
        wrong: added to the slope on the text that random mixes are measured on.
    """

    def __init__(self, harm: float = 0.2, slope: float = 1.3, noise: float = 0.0005, wrong: float = 0.0) -> None:
        self.known, self.slope, self.noise, self.wrong = sensitivities(harm), slope, noise, wrong
        self.chain = SimpleNamespace(matrices=matrices())
        self.asked: list[tuple[str, tuple[tuple[str, str], ...]]] = []

    def sensitivities(self, report: Callable[[float], None], *, npu: bool = False) -> dict[str, Sensitivity]:
        report(1.0)
        return self.known

    def loss(self, mix: Mix) -> float:
        predicted = sum(self.known[name].predicted(kind) for name, kind in mix.items())
        return self.slope * predicted * (1 + 2 * predicted)

    def quality(self, chosen: Chosen, part: str = "search") -> Quality:
        mix = tuple(sorted((name, kind.name) for name, (kind, _) in chosen.items()))
        self.asked.append((part, mix))
        loss = self.loss({name: kind for name, (kind, _) in chosen.items()})
        loss *= 1 + (self.wrong / self.slope if part == "search" else 0)
        error = self.noise * (abs(loss) / 0.01) ** 0.5
        luck = np.random.default_rng(crc32(f"{part} {mix}".encode())).normal()
        return Quality(20 * np.exp(loss), expm1(loss + error * luck), error, loss, 0.9)

    def reference_perplexity(self, part: str) -> float:
        return 20.0

    @property
    def verified(self) -> int:
        """How many mixes were measured for verification, each counted once."""
        return len({mix for part, mix in self.asked if part == "verify"})


def searched(law: Law, budget: float, target: Target | None = None, seed: int = 0) -> Search:
    measurements: Any = law
    found = Search(
        measurements, graph(), budget, target, seed=seed, stage=lambda name: None, advance=lambda share: None
    )
    found.prepare()
    return found


def best(law: Law, budget: float) -> tuple[Search, Proposal, int]:
    """And how many mixes were measured for it."""
    search = searched(law, budget)
    before = law.verified
    return search, search.best(), law.verified - before


@pytest.mark.parametrize("budget", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("slope", [0.5, 1.3, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.0005])
def test_the_best_mix_is_near_the_budget_and_within(budget: float, slope: float, noise: float) -> None:
    law = Law(slope=slope, noise=noise)
    search, found, measured = best(law, budget)
    assert found.quality.bound <= budget
    assert 3 <= measured <= 9
    mixes = (fill(search.problem, wanted) for wanted in np.geomspace(budget / 50, budget * 5, 200))
    within = [one.bytes for one in mixes if expm1(law.loss(one.mix)) + 1.645 * noise <= budget]
    assert found.solution.bytes <= min(within) * (1.02 if not noise else 1.05)
    assert found.solution.loss == pytest.approx(search._predicted(found.solution.mix))


@pytest.mark.parametrize("harm", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("wrong", [-2.0, 5.0])
def test_a_slope_that_is_far_off_is_made_up_for(wrong: float, harm: float) -> None:
    """As noise on a short text may have it: the search begins far beyond the smallest mix then, or at next to none."""
    law = Law(harm=harm, noise=0.0, wrong=wrong)
    search, found, measured = best(law, 0.01)
    mixes = (fill(search.problem, wanted) for wanted in np.geomspace(1e-5, 1, 300))
    within = [one.bytes for one in mixes if expm1(law.loss(one.mix)) <= 0.01]
    assert found.quality.bound <= 0.01
    assert found.solution.bytes <= 1.03 * min(within)
    assert measured <= 9


def test_the_same_seed_is_the_same_search() -> None:
    laws = [Law(), Law(), Law()]
    mixes = [best(laws[0], 0.01)[1].solution.mix, best(laws[1], 0.01)[1].solution.mix]
    assert mixes[0] == mixes[1]
    assert laws[0].asked == laws[1].asked
    searched(laws[2], 0.01, seed=1)
    assert laws[2].asked[0] != laws[0].asked[0]  # other random mixes


def test_a_budget_that_only_f16_keeps() -> None:
    law = Law(harm=10.0)
    search, found, measured = best(law, 1e-6)
    assert set(found.solution.mix.values()) == {F16}
    assert (found.quality.bound, found.solution.loss, found.solution.bytes) == (
        0,
        0,
        2 * sum(m.elements for m in matrices()),
    )
    assert measured <= 9
    assert search.most_exact().solution.mix == found.solution.mix


def test_a_budget_that_all_the_smallest_formats_keep() -> None:
    law = Law(harm=0.001)
    search, found, measured = best(law, 0.1)
    least = {
        la.name: min((o.format for o in la.options), key=lambda k: k.total_bytes(la.shape))
        for la in search.problem.layers
    }
    assert found.solution.mix == least
    assert measured <= 4


def test_noise_beyond_the_budget_ends_at_what_is_sure() -> None:
    """Where the error alone is above the budget, little is as good as f16, and nothing above the budget is taken."""
    law = Law(noise=0.05)
    _, found, measured = best(law, 0.01)
    assert found.quality.bound <= 0.01
    assert measured <= 9


def test_part_of_the_budget_may_be_taken() -> None:
    law = Law(noise=0.0)
    search = searched(law, 0.01)
    whole, half = search.best(), search.best(reserve=0.005)
    assert 0.004 < half.quality.bound <= 0.005 < whole.quality.bound <= 0.01
    assert half.solution.bytes > whole.solution.bytes
    assert search.bytes_within(whole, 1.0) <= whole.solution.bytes
    assert search.bytes_within(whole, 0.5) > whole.solution.bytes
    names = [row["name"] for row in search.record(half)["measured"]]
    assert len(names) == len(set(names))


def test_random_mixes_say_how_far_predictions_can_be_trusted() -> None:
    law = Law(noise=0.0, slope=1.7)
    search = searched(law, 0.01)
    random = [mix for part, mix in law.asked if part == "search"]
    assert len(random) == len(set(random)) == module.MIXES
    proxy = search.record(search.most_exact())["proxy"]
    assert proxy["mixes"] == module.MIXES
    assert proxy["rank_correlation"] == proxy["kl_rank_correlation"] == 1.0
    assert proxy["slope"] == pytest.approx(1.7, rel=0.5)
    assert proxy["metrics"]["share"] == 1.0
    assert abs(proxy["metrics"]["noise"]) < 0.9
    losses = sorted(row["predicted"] for row in search.record(search.most_exact())["measured"] if row["value"] is None)
    assert losses[1] < 0.002
    assert losses[-1] > 0.03


def test_matrices_that_lose_nothing_are_as_small_as_can_be() -> None:
    law = Law(harm=0.0)
    search, found, _ = best(law, 0.01)
    assert found.quality.increase == 0
    assert all(kind != F16 for kind in found.solution.mix.values())
    assert search.record(found)["proxy"]["rank_correlation"] == 0


def test_losses_that_fall_do_not_lead_astray() -> None:
    """On an odd text compressed models may happen to be better; the search ends then too."""
    law = Law(slope=-0.5, noise=0.0)
    _, found, measured = best(law, 0.01)
    assert found.quality.increase < 0
    assert found.solution.bytes < 0.3 * 2 * sum(m.elements for m in matrices())
    assert measured <= 9


def test_the_record_has_all_of_it() -> None:
    law = Law()
    search, found, _ = best(law, 0.01)
    record = json.loads(json.dumps(search.record(found)))
    assert (record["version"], record["budget"], record["unit"], record["target"]) == (1, 0.01, "bytes", None)
    result = record["result"]
    assert result["bound"] == found.quality.bound
    assert result["bytes"] == result["value"] == sum(row["bytes"] for row in record["layers"])
    assert result["f16_bytes"] == 2 * sum(m.elements for m in matrices())
    assert result["bits_per_weight"] == pytest.approx(16 * result["bytes"] / result["f16_bytes"])
    assert [row["name"] for row in record["layers"]] == [m.name for m in matrices()]
    for row in record["layers"]:
        assert row["format"] in {option["format"] for option in row["options"]}
        assert named(row["format"]).total_bytes(row["shape"]) == row["bytes"]
        assert row["method"] == (None if row["format"] == "f16" else "rtn")
        at_anchor = next(option for option in row["options"] if option["format"] == row["anchor"])
        assert at_anchor["loss"] == pytest.approx(row["measured"])
    front = [(point["predicted"], point["bytes"]) for point in record["front"]]
    assert front == sorted(front)
    assert [size for _, size in front] == sorted((size for _, size in front), reverse=True)
    own = [row for row in record["measured"] if row["value"] is not None]
    assert (
        min(row["value"] for row in own if row["increase"] + 1.645 * row["standard_error"] <= 0.01) == result["value"]
    )


def test_with_a_target_its_value_counts_and_blocks_on_the_npu_follow_its_recipe() -> None:
    target = Target(shipped()["lunarlake"], "latency")
    assert target.npu
    law = Law()
    # Symmetric formats, which the law leaves out, are as good: an NPU's block must have them.
    for name, one in law.known.items():
        shape = next(matrix.shape for matrix in matrices() if matrix.name == name)
        extra = {
            k.name: one.errors.get(k.name.replace("sym", "asym"), 2.0)
            for k in FORMATS
            if "-sym" in k.name and k.fits(shape)
        }
        errors = one.errors | extra
        law.known[name] = replace(one, errors=errors, methods=dict.fromkeys(errors, "rtn"))
    search = searched(law, 0.01, target)
    found = search.best()
    assert found.quality.bound <= 0.01
    record = search.record(found)
    assert record["unit"] == "us"
    assert record["target"]["objective"] == "latency"
    assert record["target"]["plan"] is not None
    assert found.solution.value < search.most_exact().solution.value
    assert all(found.solution.mix[name].npu for name in found.solution.recipe)
    price = search.price_of_recipe()
    assert price is not None
    assert price["bytes_free"] <= price["bytes_recipe"]
    assert max(price["increase_free"], price["increase_recipe"]) <= 0.01
    others = tuple(config for config in target.profile.configs if config.kind != "NPU")
    assert searched(Law(), 0.01, replace(target, configs=others)).price_of_recipe() is None
