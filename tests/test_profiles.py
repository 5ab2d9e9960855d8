"""The profiles that come with edgert, what they were fitted to, and what is simulated with them."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from edgert import catalogue
from edgert.cost import Costs
from edgert.prediction import predict
from edgert.profile import PROVENANCES, Profile, shipped

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no package: its modules find each other beside the one that runs
claims, validation = import_module("claims"), import_module("validation")
NUMBERS = ("bandwidth_gbps", "compute_gops", "launch_us", "transfer_gbps", "active_w", "idle_w")
REFERENCES = {"meteorlake", "arrowlake", "lunarlake", "pantherlake", "nseries"}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_profile_says_where_its_numbers_come_from(name: str) -> None:
    profile = shipped()[name]
    assert profile.base_provenance in PROVENANCES
    assert profile.base_w is None or profile.source
    for model in profile.devices:
        assert model.config, model.name
        for number in NUMBERS:
            provenance = model.provenance_of(number)
            assert PROVENANCES.index(provenance) <= PROVENANCES.index(model.provenance), (model.name, number)
            if provenance == "modelled" and getattr(model, number) is not None:
                assert number in model.source.partition("ssumption")[2] + model.source.partition("assumption")[0], (
                    f"{model.name}: its source does not say that {number} is an assumption"
                )
            if provenance == "published":
                assert "published_runs.json" in model.source or "https://" in model.source


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_reference_profile_is_sure_of_nothing(name: str) -> None:
    profile = shipped()[name]
    assert profile.base_provenance == "modelled"
    assert profile.base_w is not None
    assert profile.base_range[0] < profile.base_w < profile.base_range[1]
    peak = validation.PEAKS_GBPS[name]
    assert profile.shared_gbps is not None
    assert 0.80 * peak <= profile.shared_gbps <= 0.88 * peak
    assert profile.memory_bytes is not None
    for model in profile.devices:
        assert model.name.startswith(f"{name}-")
        assert model.provenance_of("active_w") == model.provenance_of("launch_us") == "modelled"
        for number in ("bandwidth_gbps", "compute_gops", "launch_us", "transfer_gbps", "active_w"):
            low, high = model.ranges[number]
            assert low < high, (model.name, number)
        assert model.ranges["bandwidth_gbps"][1] < profile.shared_gbps or model.device.device == "GPU"


def test_newer_socs_and_larger_units_are_faster() -> None:
    def of(soc: str, unit: str, number: str = "bandwidth_gbps") -> float:
        value = getattr(next(m for m in shipped()[soc].devices if m.name == f"{soc}-{unit}"), number)
        assert isinstance(value, float)
        return value

    igpus = [of(soc, "igpu") for soc in ("arrowlake", "meteorlake", "lunarlake", "pantherlake")]
    assert igpus == sorted(igpus)
    prefill = [of(soc, "igpu", "compute_gops") for soc in ("meteorlake", "arrowlake", "lunarlake", "pantherlake")]
    assert prefill == sorted(prefill)
    for soc in REFERENCES - {"nseries"}:
        assert of(soc, "igpu") > of(soc, "npu") > of("nseries", "cpu")
        gops = [of(soc, unit, "compute_gops") for unit in ("cpu", "npu", "igpu")]
        assert gops == sorted(gops)
        assert of(soc, "npu", "active_w") < of(soc, "igpu", "active_w")


def test_the_published_runs_have_sources_and_shapes() -> None:
    sources, runs = validation.read()
    assert {run.source for run in runs} == set(sources)
    assert all(address.startswith("https://") for address in sources.values())
    assert {run.shape for run in runs} <= {model.name for model in catalogue.models()}
    rows = [(run.machine, run.unit, run.model, run.precision, run.source) for run in runs]
    assert len(rows) == len(set(rows))
    for run in runs:
        assert run.soc in validation.PEAKS_GBPS
        assert run.unit in validation.CONFIGS
        assert len(run.prompt_tokens) == len(run.ttft_ms) == len(run.tpot_ms) in {1, 2}
        assert all(t > 0 for t in run.tpot_ms)
        assert all(t is None or t > 0 for t in (*run.prompt_tokens, *run.ttft_ms))


def test_which_rows_are_fitted_follows_from_their_weights_alone() -> None:
    _, runs = validation.read()
    for own in validation.by_device(runs).values():
        sizes = [run.read_bytes for run in own]
        assert sizes == sorted(sizes, reverse=True)
        half, rest = validation.split(own)
        usual = [run for run in own if not run.foreign]
        assert half == usual[::2]
        assert set(rest) == set(own) - set(half)
        slow = [replace(run, tpot_ms=tuple(7 * t for t in run.tpot_ms)) for run in own]
        assert [run.model for run in validation.split(slow)[0]] == [run.model for run in half]
    foreign = [run for run in runs if run.foreign]
    assert [(run.unit, run.precision) for run in foreign] == [("NPU", "INT4")]


def test_a_fit_finds_the_rates_that_made_the_runs() -> None:
    _, runs = validation.read()
    gpu = [run for run in runs if run.machine == "Core Ultra 7 258V" and len(run.tpot_ms) == 2]
    made = validation.Rates(71.0, 23_000.0)
    again = [
        replace(run, ttft_ms=tuple(t[0] for t in times), tpot_ms=tuple(t[1] for t in times))
        for run in gpu
        if (times := [validation.times_ms(run, p, made) for p in run.prompt_tokens])
    ]
    found = validation.fit(again)
    assert found.bandwidth_gbps == pytest.approx(made.bandwidth_gbps, rel=1e-3)
    assert found.compute_gops == pytest.approx(made.compute_gops, rel=1e-3)


def test_reference_profiles_hold_what_was_fitted() -> None:
    _, runs = validation.read()
    looked_at = 0
    for (soc, unit), own in validation.by_device(runs).items():
        model = next(m for m in shipped()[soc].devices if m.device.device == unit)
        fitted = validation.fit([run for run in own if not run.foreign])
        if model.provenance_of("bandwidth_gbps") == "published":
            assert model.bandwidth_gbps == pytest.approx(fitted.bandwidth_gbps, rel=0.02), model.name
            looked_at += 1
        if model.provenance_of("compute_gops") == "published":
            assert model.compute_gops == pytest.approx(fitted.compute_gops, rel=0.02), model.name
        spreads = validation.spreads([run for run in own if not run.foreign])
        for number, spread in zip(("bandwidth_gbps", "compute_gops"), spreads, strict=True):
            if model.provenance_of(number) == "published":
                low, high = model.ranges[number]
                assert low <= spread[0], (model.name, number)
                assert spread[1] <= high, (model.name, number)
    assert looked_at == 9


def test_what_is_predicted_and_what_is_missed() -> None:
    _, runs = validation.read()
    found = []
    devices = validation.by_device(runs)
    for own in devices.values():
        half, rest = validation.split(own)
        found += validation.checks(rest, validation.fit(half))
    decode = [check for check in found if check.what == "decode"]
    missed = {(c.run.machine, c.run.unit, c.run.model, c.run.precision) for c in decode if c.missed}
    assert missed == {
        ("Core Ultra 7 155H", "GPU", "qwen2-7b", "INT8"),
        ("Core Ultra 7 155H", "GPU", "qwen2-1.5b", "INT8"),
        ("Core Ultra 9 285H", "GPU", "Qwen2.5-Coder-7B int4", "INT4"),
        ("Core Ultra X7 358H", "GPU", "gemma-3-1b-it", "INT4"),
        ("Core Ultra 7 155H", "NPU", "DeepSeek-R1-Distill-Qwen-7B-ov-int4", "INT4"),
        ("Core Ultra 7 258V", "NPU", "Qwen3-0.6B INT4 symmetric", "INT4-CW"),
    }
    shares = {
        (unit, phase): np.mean([not c.missed for c in found if (c.run.unit, c.phase) == (unit, phase)])
        for unit, phase in {(c.run.unit, c.phase) for c in found}
    }
    assert shares["GPU", "decode"] > 0.9
    assert shares["GPU", validation.PHASES[1]] > 0.45
    assert shares["NPU", "decode"] == 0.5
    unpredicted = [c for c in found if c.predicted_ms is None]
    assert [(c.run.machine, c.published_ms, c.missed) for c in unpredicted] == [
        ("Core Ultra 9 185H", 4860, True),
        ("Core Ultra 7 155H", 8790, True),
    ]
    published = sum(len(run.tpot_ms) + len(run.prompts) for o in devices.values() for run in validation.split(o)[1])
    assert len(found) == published  # none is left out


def test_what_one_soc_says_of_the_next_rests_on_usual_runs() -> None:
    _, runs = validation.read()
    usual = [run for run in runs if not run.foreign]
    key = ("NPU", "meteorlake", "arrowlake")
    assert validation.carried(runs)[key] == validation.carried(usual)[key]


def test_the_page_is_what_the_runs_say() -> None:
    text, svg = validation.page()
    assert (ROOT / "docs" / "validation.md").read_text("utf-8") == text, "run benchmarks/validation.py again"
    assert (ROOT / "docs" / "validation.svg").read_text("utf-8") == svg


def test_draws_stay_in_their_ranges_and_repeat() -> None:
    profile = shipped()["lunarlake"]

    def draws() -> list[Profile]:
        random = np.random.default_rng(1)
        return [claims.drawn(profile, random) for _ in range(20)]

    first = draws()
    assert first == draws()
    for drawn in first:
        assert profile.base_range[0] <= drawn.base_w <= profile.base_range[1]
        for before, after in zip(profile.devices, drawn.devices, strict=True):
            assert before.idle_w == after.idle_w
            for number, (low, high) in before.ranges.items():
                assert low <= getattr(after, number) <= high
    assert len({drawn.devices[0].bandwidth_gbps for drawn in first}) == 20


def test_a_simulation_starts_with_the_profile_itself_and_repeats() -> None:
    blocks, profile = claims.graph("int4"), shipped()["pantherlake"]
    plans = claims.plans(blocks)
    load = {"chat": claims.LOADS["chat"]}
    found = claims.simulate(profile, blocks, plans, load, 3)["chat"]
    again = claims.simulate(profile, blocks, plans, load, 3)["chat"]
    assert set(found) == {*claims.SINGLE, *claims.RULES}
    for name, plan in plans.items():
        assert (found[name].total_us == again[name].total_us).all()
        assert (found[name].energy_uj > found[name].above_uj).all()
        expected = predict(Costs(blocks, profile, claims.SHAPES), plan, load["chat"])
        assert found[name].total_us[0] == pytest.approx(expected.total_us)
        assert found[name].energy_uj[0] == pytest.approx(expected.energy_uj)
    best = claims.best(found, "total_us")
    assert all((best <= found[name].total_us).all() for name in claims.SINGLE)
    # All three shares of a single device's energy are between those of its phases.
    prefill, decode, whole, _ = claims.energies(found)
    assert ((np.minimum(prefill, decode) <= whole) & (whole <= np.maximum(prefill, decode))).all()


def test_half_of_the_layers_at_int8() -> None:
    blocks = claims.mixed()
    kinds = ["u4" in block.weight_bytes for block in blocks.blocks[1:-1]]
    assert kinds == [False, True, True] + [False, False, True, True] * 15 + [False]
    low, high = claims.graph("int4"), claims.graph("int8")
    total = sum(block.total_weight_bytes for block in blocks.blocks)
    between = sum(b.total_weight_bytes for graph in (low, high) for b in graph.blocks) / 2
    assert total == pytest.approx(between, rel=0.01)


def test_the_page_of_the_claims_says_that_all_is_modelled() -> None:
    text = (ROOT / "docs" / "claims.md").read_text("utf-8")
    assert "**Everything here is modelled.**" in text.split("##")[0]
    assert f"median of {claims.DRAWS} draws" in text
    assert (ROOT / "docs" / "claims.svg").exists()
    for part in (claims.scheduled(), claims.published_precision()):  # no draws in these
        assert part in text, "run benchmarks/claims.py again"
