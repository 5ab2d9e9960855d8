"""From a plan to submodels: where they are cut, what they share, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import edgert
from edgert import backends
from edgert.device import DeviceConfig
from edgert.errors import PlanError
from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.placement import Plan
from edgert.session import Model

A, B = DeviceConfig("CPU", "f32"), DeviceConfig("SIM", "f32")
STATIC, NPU = DeviceConfig("CPU", "f32+static"), DeviceConfig("NPU", "f16")
KINDS = [BlockKind.EMBED, BlockKind.ATTENTION, BlockKind.FFN, BlockKind.ATTENTION, BlockKind.FFN, BlockKind.HEAD]
GRAPH = BlockGraph(
    tuple(
        Block(i, kind, f"{kind}.{i}", f"t{i}:0" if i else None, f"t{i + 1}:0", (), {"f16": 1000}, 1000, 0, 0)
        for i, kind in enumerate(KINDS)
    ),
    tuple(Edge(i, i + 1, f"t{i + 1}:0", 4) for i in range(5)),
)


def ranges(plan: Plan, starts: set[int] = frozenset()) -> list[list[tuple[int, int]]]:  # type: ignore[assignment]
    return [[(p.first, p.last) for p in placements] for placements in plan.submodels(GRAPH, starts)]


def test_a_plan_of_one_device_is_not_cut() -> None:
    assert ranges(Plan.single(GRAPH, A)) == [[(0, 5)]]


def test_a_static_head_is_apart() -> None:
    assert ranges(Plan.single(GRAPH, STATIC)) == [[(0, 0), (1, 4), (5, 5)]]


def test_an_npu_is_cut_where_its_blobs_are() -> None:
    assert ranges(Plan.single(GRAPH, NPU), {1, 3, 5}) == [[(0, 0), (1, 2), (3, 4), (5, 5)]]
    assert ranges(Plan.single(GRAPH, STATIC), {1, 3, 5}) == [[(0, 0), (1, 4), (5, 5)]]


def test_phases_are_cut_at_the_same_blocks_where_they_share_a_configuration() -> None:
    plan = Plan.from_configs([A] * 6, "phases", decode=[A] * 3 + [B] * 3)
    assert ranges(plan) == [[(0, 2), (3, 5)], [(0, 2), (3, 5)]]
    held = plan.weights(GRAPH)
    assert [(copy.config, copy.bytes, copy.count) for copy in held] == [(A, 6000, 1), (B, 3000, 1)]
    assert "0.0 MB of it are copies" in plan.explain(GRAPH)


def test_phases_share_what_is_compiled(demo_path: Path) -> None:
    blocks = len(edgert.Bundle.open(demo_path).graph.blocks)  # type: ignore[union-attr]
    plan = Plan.from_configs([A] * blocks, "phases", decode=[A] * 4 + [B] * (blocks - 4))
    prefill, decode = edgert.load(demo_path, plan=plan)._engine.executor.chains
    assert prefill[0] is decode[0]
    assert prefill[1] is not decode[1]


def test_more_than_a_device_holds(demo: Model, demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = demo.bundle.graph
    assert graph is not None
    plan = Plan.single(graph, B)
    cache = sum(b.kv_bytes_per_token for b in graph.blocks) * demo.facts.context_length
    limit = sum(b.total_weight_bytes for b in graph.blocks) + cache
    for memory_bytes, fits in ((limit, True), (limit - 1, False)):
        monkeypatch.setattr(
            "edgert.stages.info_of", lambda config, m=memory_bytes: replace(backends.info_of(config), memory_bytes=m)
        )
        if fits:
            edgert.load(demo_path, plan=plan)
        else:
            with pytest.raises(PlanError, match=r"SIM would hold 0\.0 GB .*for 1024 tokens.* it has 0\.0 GB"):
                edgert.load(demo_path, plan=plan)
