"""Which plan a worker takes, and which others it offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgert.bundle import Bundle
from edgert.choice import choose_plan, quickest_plan
from edgert.errors import PlanError, UsageError
from edgert.placement import Plan
from edgert.service.contract import PlacedBlocks
from edgert.service.protocol import Load
from edgert.service.worker.plans import blocks_of, chosen, offers, unit_of_logits, units, without


@pytest.fixture
def bundle(demo_path: Path) -> Bundle:
    return Bundle.open(demo_path)


def configs(plan: Plan) -> list[str]:
    return [str(config) for config in plan.configs]


def test_what_is_asked_is_taken(bundle: Bundle, known: Callable[..., None]) -> None:
    load = Load(str(bundle.path))
    assert chosen(load, bundle) == quickest_plan(bundle)
    assert configs(chosen(replace(load, device="CPU@f32"), bundle)) == ["CPU@f32"]
    given = choose_plan(bundle, place="attention=CPU@f32,ffn=CPU@f32+dq")
    assert chosen(replace(load, plan=given.to_json()), bundle) == given
    fallback = chosen(replace(load, objective="latency"), bundle)
    assert fallback.placements == quickest_plan(bundle).placements
    assert "no profile" in fallback.warnings[-1]
    known()
    assert configs(chosen(replace(load, objective="tokens_per_joule"), bundle)) == ["CPU@f32"]
    known(watts=False)
    assert "active_w" in chosen(replace(load, objective="tokens_per_joule"), bundle).warnings[-1]


def test_kernels_where_they_load(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.choice._lacking", lambda configs: {})
    assert configs(quickest_plan(bundle)) == ["CPU@kernels"]
    monkeypatch.setattr("edgert.choice._lacking", lambda configs: {"CPU@kernels": "not built"})
    assert configs(quickest_plan(bundle)) == ["CPU@f32+dq"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "CPU", "objective": "latency"}, UsageError, "device and objective exclude each other"),
        ({"objective": "speed"}, UsageError, "objective is 'speed'"),
        ({"plan": {}}, PlanError, "placements"),
    ],
)
def test_what_cannot_be_asked(bundle: Bundle, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chosen(Load(str(bundle.path), **options), bundle)


def test_hardware_to_avoid_is_replaced(bundle: Bundle) -> None:
    plan = choose_plan(bundle, place="attention=NPU,ffn=GPU,head=CPU@f32")
    left = without(plan, {"NPU": "it hung", "CPU": "no matter", "GPU.1": "not in it"}, bundle)
    assert units(left) == ["CPU", "GPU"]
    assert [warning for warning in left.warnings if "it hung" in warning] == [
        "NPU is not used, CPU@f32+dq runs its blocks: it hung"
    ]
    assert unit_of_logits(plan) == "CPU"


def test_the_library_is_offered_where_there_is_a_profile(bundle: Bundle, known: Callable[..., None]) -> None:
    plan = choose_plan(bundle, device="CPU@f32+static")
    assert [offer.name for offer, _ in offers(plan, bundle, {}).values()] == [plan.rationale]
    known()
    found = offers(plan, bundle, {})
    assert next(iter(found)) == plan.rationale
    assert 2 <= len(found) <= 4
    others = [offer for offer, _ in found.values()][1:]
    assert all(offer.latency_us and offer.energy_uj and offer.watts for offer in others)
    assert min(others, key=lambda o: o.latency_us or 0).name != min(others, key=lambda o: o.energy_uj or 0).name
    fast = choose_plan(bundle, device="CPU@f32+dq")
    own, *_ = (offer for offer, _ in offers(fast, bundle, {}).values())
    assert own.latency_us == min(offer.latency_us for offer in others if offer.latency_us)


def test_blocks_are_told_by_phase(bundle: Bundle) -> None:
    plan = choose_plan(bundle, place="prefill:*=CPU@f32,decode:*=CPU@f32,decode:ffn=CPU@f32+dq")
    found = blocks_of(plan, bundle)
    assert found[0] == PlacedBlocks("prefill", 0, 9, "CPU@f32", {"embed": 1, "attention": 4, "ffn": 4, "head": 1})
    assert {placed.phase for placed in found[1:]} == {"decode"}
    assert sum(sum(placed.kinds.values()) for placed in found[1:]) == 10
