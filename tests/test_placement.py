"""Plans as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgert.device import DeviceConfig
from edgert.errors import PlanError, UnknownDeviceError
from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.placement import Placement, Plan

KINDS = [BlockKind.EMBED, BlockKind.ATTENTION, BlockKind.FFN, BlockKind.ATTENTION, BlockKind.FFN, BlockKind.HEAD]
NAMES = ["embed", "attention.0", "ffn.0", "attention.1", "ffn.1", "head"]
GRAPH = BlockGraph(
    tuple(Block(i, k, n, None, f"n{i}:0", (), {}, 0, 0, 0) for i, (k, n) in enumerate(zip(KINDS, NAMES, strict=True))),
    tuple(Edge(i, i + 1, f"n{i}:0", 4) for i in range(5)),
)
A, B = DeviceConfig("CPU", "bf16"), DeviceConfig("CPU", "f32")


def configs(plan: Plan) -> list[DeviceConfig]:
    return [p.config for p in plan.placements for _ in range(p.first, p.last + 1)]


def test_single_device_is_one_submodel() -> None:
    assert Plan.single(GRAPH, A).placements == (Placement(0, 5, A),)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("attention=CPU@bf16,ffn=CPU@f32", [A, A, B, A, B, B]),
        ("*=CPU@f32,ffn.1=CPU@bf16", [B, B, B, B, A, B]),
        ("*=CPU@f32, 1-3=CPU@bf16", [B, A, A, A, B, B]),
        ("head=CPU@bf16,0=CPU@f32", [B, B, B, B, B, A]),
    ],
)
def test_explicit_rules(rules: str, expected: list[DeviceConfig]) -> None:
    plan = Plan.explicit(GRAPH, rules)
    plan.check(GRAPH)
    assert configs(plan) == expected
    assert all(a.config != b.config for a, b in zip(plan.placements, plan.placements[1:], strict=False))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("", "no rule"),
        ("attention", r"expected \[prefill:|decode:\]SELECTOR=DEVICE"),
        ("=CPU", "expected .*SELECTOR=DEVICE"),
        ("moe=CPU", "matches no block"),
        ("attention.7=CPU", "matches no block"),
        ("2-9=CPU", "matches no block"),
        ("9=CPU", "matches no block"),
        ("3-2=CPU", "matches no block"),
        ("0-99999999999=CPU", "matches no block"),
        ("0-999999=CPU", "matches no block"),
        ("²=CPU", "matches no block"),
        ("1-²=CPU", "matches no block"),
        ("٣=CPU", "matches no block"),
        (f"{'1' * 5000}=CPU", "matches no block"),
    ],
)
def test_bad_rules(rules: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.explicit(GRAPH, rules)


@pytest.mark.parametrize("text", ["TPU", "cpu", "CPU@", "CPU@bf16@x", "", "CPU.x@f32", "CPU; rm -rf /"])
def test_unknown_device_names(text: str) -> None:
    with pytest.raises(UnknownDeviceError, match="device"):
        DeviceConfig.parse(text)


def test_device_names_are_read_back() -> None:
    for text in ("CPU@f32+dq", "GPU.1@f16", "ORT@OpenVINO"):
        assert str(DeviceConfig.parse(text)) == text
    assert str(DeviceConfig.parse("CPU")) == "CPU@f32+dq"


def test_json_round_trip(tmp_path: Path) -> None:
    plan = Plan.explicit(GRAPH, "attention=CPU@bf16,ffn=CPU@f32")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.read(tmp_path / "plan.json") == plan
    assert "blocks 0-1 on CPU@bf16" in plan.explain()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"placements": 3, "rationale": ""}', '{"placements": [{}]}'])
def test_damaged_plan_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="plan"):
        Plan.read(tmp_path / "plan.json")


def with_first(first: str) -> str:
    row = f'{{"first": {first}, "last": 5, "config": "CPU@f32"}}'
    return f'{{"placements": [{row}], "rationale": "by hand"}}'


def test_the_plan_that_the_next_tests_damage() -> None:
    assert Plan.from_json(json.loads(with_first("0"))) == Plan((Placement(0, 5, B),), "by hand")


@pytest.mark.parametrize("first", ["NaN", "1e999", '"x"', '"0"', "0.9", "0.0", "true", "null", "[]", "9" * 30])
def test_block_numbers_are_whole_numbers(tmp_path: Path, first: str) -> None:
    (tmp_path / "plan.json").write_text(with_first(first))
    with pytest.raises(PlanError, match="first"):
        Plan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "text",
    [
        with_first("9" * 5000),
        with_first("[" * 200_000 + "]" * 200_000),
        with_first("[" * 900 + "]" * 900),
        with_first("0").replace('"rationale"', '"warnings": "abc", "rationale"'),
        with_first("0").replace('"rationale"', '"warnings": [1], "rationale"'),
        with_first("0").replace('"by hand"', "3"),
        with_first("0").replace('"CPU@f32"', "3"),
        with_first("0").replace('"first"', '"fist"'),
    ],
    ids=["5000 digits", "200k deep", "900 deep", "warnings text", "warnings number", "rationale", "config", "unknown"],
)
def test_plan_files_that_lie(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="plan"):
        Plan.read(tmp_path / "plan.json")


def test_missing_plan_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none.json"):
        Plan.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "placements",
    [
        (Placement(0, 4, A),),
        (Placement(0, 6, A),),
        (Placement(1, 5, A),),
        (Placement(0, 2, A), Placement(2, 5, B)),
        (Placement(0, 2, A), Placement(4, 5, B)),
        (),
    ],
)
def test_plans_that_do_not_cover_the_model(placements: tuple[Placement, ...]) -> None:
    with pytest.raises(PlanError, match="plan"):
        Plan(placements, "broken").check(GRAPH)


def test_a_model_without_a_cache_has_no_static_shapes() -> None:
    """An encoder, or a model in one piece, runs on a GPU as it is."""
    plan = Plan.single(GRAPH, DeviceConfig.parse("GPU"))
    assert {str(c) for c in plan.configs} == {"CPU@f32", "GPU@f16"}
    assert {str(c) for c in Plan.explicit(GRAPH, "*=GPU").configs} == {"GPU@f16"}
    with pytest.raises(PlanError, match="are for decoders"):
        Plan.explicit(GRAPH, "*=CPU@f32+static").check(GRAPH)
