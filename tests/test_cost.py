"""Device models read from profiles, and what the cost model makes of them: by hand, and against bounds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.cost import Costs, Work, Workload, block_us, call_us, handover_us
from edgert.device import DeviceConfig
from edgert.errors import DeviceError, PlanError, UnknownDeviceError, UsageError
from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.placement import Placement, Plan
from edgert.prediction import Prediction, pipeline_us
from edgert.prediction import predict as predict_costs
from edgert.profile import DeviceModel, Measurement, Profile, Slowdown, named, names
from edgert.shapes import StaticShapes
from edgert.table import Table

# 1 byte takes 1 us to read and to move, 1 operation 1 us to compute.
UNIT = DeviceModel("unit", 1e-3, 1e-3, 7.0, 1e-3, 2.0, 0.5, "f32", "modelled", "made up")
A, B, C = (DeviceConfig("SIM", name) for name in "abc")


def block(index: int = 0, kind: BlockKind = BlockKind.FFN, **values: Any) -> Block:
    defaults = {"weight_bytes": {}, "flops_per_token": 0, "kv_bytes_per_token": 0, "recurrent_bytes": 0}
    tensors = {"input": f"n{index - 1}:0" if index else None, "output": f"n{index}:0"}
    return Block(index=index, kind=kind, name=f"{kind}.{index}", states=(), **{**tensors, **defaults, **values})


def chain(blocks: list[Block], width: int = 1) -> BlockGraph:
    return BlockGraph(tuple(blocks), tuple(Edge(b.index, b.index + 1, b.output, width) for b in blocks[:-1]))


def machine(models: dict[DeviceConfig, DeviceModel], **values: Any) -> Profile:
    """A profile of these models; its base takes nothing."""
    devices = tuple(replace(model, name=f"m{i}", config=str(c)) for i, (c, model) in enumerate(models.items()))
    return Profile(**{"version": 2, "machine": "test", "devices": devices, "base_w": 0.0, **values})


def predict(graph: BlockGraph, plan: Plan, models: dict[DeviceConfig, DeviceModel], **load: int) -> Prediction:
    return predict_costs(Costs(graph, machine(models)), plan, Workload(**load))


def test_the_shipped_models_have_names() -> None:
    for name in names():
        assert named(name).name == name
    assert named("lunarlake-igpu").bandwidth_gbps > named("lunarlake-npu").bandwidth_gbps
    with pytest.raises(UnknownDeviceError, match=r"'\.\./x' is not known; known: .*lunarlake-cpu,"):
        named("../x")


def profile_json(**changes: Any) -> dict[str, Any]:
    return {"version": 2, "machine": "m", "devices": [{**asdict(UNIT), **changes}]}


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(profile_json(active_w=None)), "utf-8")
    assert Profile.read(path).devices == (replace(UNIT, active_w=None),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "expected an object"),
        (json.dumps({**profile_json(), "version": 1}), "version is 1, this edgert reads 2"),
        (json.dumps({**profile_json(), "extra": 1}), "unknown field 'extra'"),
        (json.dumps({**profile_json(), "devices": profile_json()["devices"] * 2}), "the same name"),
        (json.dumps(profile_json(bandwidth_gbps=0)), "bandwidth_gbps is 0.0, expected a finite number above 0"),
        (json.dumps(profile_json(transfer_gbps=float("nan"))), "transfer_gbps is nan"),
        (json.dumps(profile_json(compute_gops=float("inf"))), "compute_gops is inf"),
        (json.dumps(profile_json(launch_us=-1)), "launch_us is -1.0, expected a finite number, 0 or more"),
        (json.dumps(profile_json(idle_w="1")), "idle_w is '1'"),
        (json.dumps(profile_json(precision="f64")), "precision is 'f64'"),
        (json.dumps(profile_json(name="a/../b")), "name is 'a/../b'"),
        (json.dumps(profile_json(name="f16")), "name is 'f16'"),
        (json.dumps(profile_json(provenance="guessed")), "provenance is 'guessed'"),
    ],
)
def test_hostile_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostile.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DeviceError, match=r"hostile\.json") as caught:
        Profile.read(path)
    assert message in str(caught.value)


def test_a_missing_profile(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"none\.json"):
        Profile.read(tmp_path / "none.json")


def test_a_call_is_launch_then_the_longer_of_reading_and_computing_then_moving() -> None:
    attention = block(weight_bytes={"u4": 90, "f16": 10}, flops_per_token=50, kv_bytes_per_token=8, recurrent_bytes=3)
    work = Work.of(attention)

    def call(model: DeviceModel, tokens: int, past: int) -> float:
        return call_us(model, [work], tokens, past, boundary_bytes=10)

    # One token after 5: reads 100 + 8·6 + 2·3 bytes; computes 50 + 4·6 operations.
    assert call(UNIT, 1, 5) == 7 + 154 + 10
    # Ten tokens after 5: reads 100 + 8·15 + 6; computes 500 + 4·(10·5 + 55).
    assert call(UNIT, 10, 5) == 7 + 920 + 100
    half = replace(UNIT, precision="f16")  # states and boundary tensors are half as large, weights are what they are
    assert call(half, 1, 5) == 7 + 100 + 54 / 2 + 5
    assert handover_us(UNIT, work.state_bytes(5)) == 43
    assert handover_us(half, work.state_bytes(5)) == 21.5


def test_an_embedding_reads_no_table_and_a_head_computes_the_rows_that_are_kept() -> None:
    embed = block(0, BlockKind.EMBED, weight_bytes={"u8": 10**6})
    head = block(1, BlockKind.HEAD, weight_bytes={"u8": 10}, flops_per_token=20)
    works = [Work.of(embed), Work.of(head)]
    assert call_us(UNIT, works, 100, 0) == 7 + 20
    assert call_us(UNIT, works, 100, 0, rows=100) == 7 + 2000


def test_a_mixture_of_experts_reads_the_experts_that_are_used() -> None:
    # 4-bit weights of 8 experts with 100 elements each, of which a token uses 2.
    experts = block(kind=BlockKind.MOE, weight_bytes={"u4": 400}, flops_per_token=2 * 200)
    work = Work.of(experts)
    assert work.weights_read(1) == pytest.approx(100)
    assert work.weights_read(2) == pytest.approx(400 * (1 - 0.75**2))
    assert work.weights_read(10_000) == pytest.approx(400)


def test_two_devices_and_three_chunks_by_hand() -> None:
    # a: 0-10, 10-20, 20-30; b: 10-14, 20-24, 30-34.
    assert pipeline_us([[10, 4]] * 3, ["a", "b"]) == 34
    # a: 0-4, 4-8, 8-12; b: 4-14, 14-24, 24-34.
    assert pipeline_us([[4, 10]] * 3, ["a", "b"]) == 34
    # Three stages, the first and the last on a. a: chunk 0 to 4, chunk 1 to 8, chunk 0 to 12 (it has waited since 7),
    # chunk 2 to 16 (since 8), chunk 1 to 20 (since 11), chunk 2 (since 19) to 24. b: 4-7, 8-11, 16-19.
    assert pipeline_us([[4, 3, 4]] * 3, ["a", "b", "a"]) == 24
    assert pipeline_us([[4, 3, 4]] * 3, ["a", "a", "a"]) == 33
    assert pipeline_us([[4, 3, 4]], ["a", "b", "a"]) == 11


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[list[int]], list[str]]:
    units = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
    calls = draw(
        st.lists(st.lists(st.integers(0, 20), min_size=len(units), max_size=len(units)), min_size=1, max_size=6)
    )
    return calls, units


@given(pipelines())
def test_a_pipeline_is_within_its_bounds(pipeline: tuple[list[list[int]], list[str]]) -> None:
    calls, units = pipeline
    latency_us = pipeline_us(calls, units)
    load = {unit: sum(c[s] for c in calls for s, u in enumerate(units) if u == unit) for unit in units}
    assert latency_us >= max(load.values())
    # Nothing is faster than the chunks through stages of their own, a recurrence without devices.
    left = [0.0] * len(units)
    for chunk in calls:
        before = 0.0
        for stage, time in enumerate(chunk):
            before = left[stage] = max(before, left[stage]) + time
    assert latency_us >= left[-1]
    assert latency_us <= sum(map(sum, calls))
    if len(set(units)) == 1:
        assert latency_us == sum(map(sum, calls))
    if len(set(units)) == len(units):
        assert latency_us == left[-1]


# Two blocks that hold 2 bytes of keys and values a token, and cost 100 and 40 us a call beside them.
GRAPH = chain(
    [block(i, BlockKind.ATTENTION, weight_bytes={"u8": w}, kv_bytes_per_token=2) for i, w in ((0, 93), (1, 33))]
)
FREE_MOVES = replace(UNIT, transfer_gbps=1e12)
MODELS = {A: FREE_MOVES, B: FREE_MOVES}


def test_a_prediction_by_hand() -> None:
    plan = Plan((Placement(0, 0, A), Placement(1, 1, B)), "test")
    found = predict(GRAPH, plan, MODELS, prompt_tokens=5, new_tokens=3, chunk=2)
    # Chunks end at tokens 2, 4 and 5, so a call reads 4, 8 and 10 bytes of keys and values.
    assert found.prefill_us == pytest.approx(104 + 108 + 110 + 50, abs=1e-6)
    # Two more tokens, with 6 and 7 in the cache, one device after the other.
    assert found.decode_us == pytest.approx(112 + 52 + 114 + 54, abs=1e-6)
    assert found.handover_us == 0
    busy, wall = 104 + 108 + 110 + 112 + 114 + 44 + 48 + 50 + 52 + 54, 372 + 332
    assert found.total_us == pytest.approx(wall, abs=1e-6)
    assert found.energy_uj == pytest.approx(2 * busy + 0.5 * (2 * wall - busy), abs=1e-5)
    assert found.provenance == "modelled"
    assert found.missing == ()


def test_one_token_more_is_one_decode_call_more() -> None:
    plan = Plan.single(GRAPH, A)
    one = predict(GRAPH, plan, MODELS, prompt_tokens=5, new_tokens=1, chunk=8)
    two = predict(GRAPH, plan, MODELS, prompt_tokens=5, new_tokens=2, chunk=8)
    assert one.decode_us == 0
    works = [Work.of(b) for b in GRAPH.blocks]
    assert two.decode_us == call_us(FREE_MOVES, works, 1, 5)
    assert one.prefill_us == two.prefill_us == call_us(FREE_MOVES, works, 5, 0)


def test_boundary_tensors_count_on_both_sides() -> None:
    graph = chain([block(0), block(1)], width=12)
    plan = Plan((Placement(0, 0, A), Placement(1, 1, B)), "test")
    found = predict(graph, plan, {A: UNIT, B: UNIT}, prompt_tokens=3, new_tokens=1, chunk=3)
    assert found.prefill_us == pytest.approx(2 * (7 + 3 * 12))


def test_states_change_hands_where_the_phases_differ() -> None:
    models = {A: UNIT, B: UNIT, C: replace(UNIT, transfer_gbps=0.5e-3)}
    plan = Plan((Placement(0, 1, A),), "test", decode=(Placement(0, 1, C),))
    found = predict(GRAPH, plan, models, prompt_tokens=10, new_tokens=1, chunk=10)
    assert found.handover_us == 40 + 80  # 4 bytes a token, read at 1 us a byte, written at 2
    plan = Plan((Placement(0, 0, A), Placement(1, 1, B)), "test", decode=(Placement(0, 0, A), Placement(1, 1, C)))
    found = predict(GRAPH, plan, models, prompt_tokens=10, new_tokens=1, chunk=10)
    assert found.handover_us == 20 + 40  # the first block's stay where they are


def test_neighbours_on_one_device_are_one_stage() -> None:
    graph = chain([block(i, weight_bytes={"u8": 3}) for i in range(4)])
    plan = Plan((Placement(0, 0, A), Placement(1, 1, A), Placement(2, 2, A), Placement(3, 3, B)), "test")
    found = predict(graph, plan, MODELS, prompt_tokens=3, new_tokens=1, chunk=1)
    # a: 0-30, 30-60, 60-90; b: 30-40, 60-70, 90-100.
    assert found.prefill_us == pytest.approx(100, abs=1e-6)


def test_configurations_of_one_device_take_turns_and_idle_once() -> None:
    f32, bf16 = DeviceConfig("CPU", "f32"), DeviceConfig("CPU", "bf16")
    plan = Plan((Placement(0, 0, f32), Placement(1, 1, bf16)), "test")
    models = {f32: FREE_MOVES, bf16: FREE_MOVES}
    found = predict(GRAPH, plan, models, prompt_tokens=4, new_tokens=1, chunk=2)
    assert found.prefill_us == pytest.approx(104 + 108 + 44 + 48, abs=1e-6)
    assert found.energy_uj == pytest.approx(2 * found.prefill_us)  # never idle


def test_what_is_missing_is_named() -> None:
    plan = Plan((Placement(0, 0, A), Placement(1, 1, B)), "test")
    models = {A: replace(UNIT, provenance="measured"), B: replace(UNIT, active_w=None, provenance="estimated")}
    found = predict(GRAPH, plan, models, prompt_tokens=1, new_tokens=1, chunk=1)
    assert found.energy_uj is None
    assert found.missing == ("SIM@b: active_w",)
    assert found.provenance == "estimated"
    with pytest.raises(PlanError, match="nothing is known of the time on SIM@a, SIM@b"):
        predict(GRAPH, plan, {C: UNIT}, prompt_tokens=1, new_tokens=1, chunk=1)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "chunk"])
def test_token_counts_have_a_limit(name: str) -> None:
    counts = {"prompt_tokens": 1, "new_tokens": 1, "chunk": 1, name: 0}
    with pytest.raises(UsageError, match=f"{name} is 0, the least is 1"):
        predict(GRAPH, Plan.single(GRAPH, A), MODELS, **counts)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="covers 1 blocks, the model has 2"):
        predict(GRAPH, Plan((Placement(0, 0, A),), "test"), MODELS, prompt_tokens=1, new_tokens=1, chunk=1)


# Tables of measurements.


def rows(
    config: DeviceConfig, signature: str, values: dict[tuple[int, int], float], **fields: Any
) -> list[Measurement]:
    defaults = {"spread_us": 0.0, "energy_uj": None, "runs": 1, "provenance": "measured"}
    return [
        Measurement(**{"config": str(config), "block": signature, "tokens": t, "past": p, "latency_us": us, **defaults,
                       **fields})
        for (t, p), us in values.items()
    ]  # fmt: skip


def test_a_measured_block_is_looked_up() -> None:
    table = Table({(1, 10): 5.0, (1, 30): 9.0, (16, 0): 20.0, (64, 0): 68.0, (64, 100): 168.0})
    assert table.at(1, 10) == 5
    assert table.at(1, 20) == 7
    assert table.at(1, 0) == 5  # not below what was measured
    assert table.at(1, 50) == 13
    assert table.at(40, 0) == 44
    assert table.at(64, 50) == 118
    assert table.at(128, 0) == 136
    assert table.at(1, np.array([10.0, 50.0])).tolist() == [5, 13]
    falling = Table({(1, 0): 9.0, (1, 10): 5.0})
    assert falling.at(1, 100) == 5  # a growing cache makes nothing faster
    assert table.covers(1)
    assert not Table({(16, 0): 1.0}).covers(1)


def test_measured_beats_estimated_beats_modelled() -> None:
    signature = GRAPH.blocks[0].signature
    estimated = rows(A, signature, {(1, 5): 50.0}, provenance="estimated")
    measured = rows(A, signature, {(1, 5): 30.0})

    def first(found: list[Measurement]) -> tuple[float, str]:
        costs = Costs(GRAPH, machine({A: UNIT}, measurements=tuple(found)))
        return float(costs.block_us(0, A, 1, 5)), costs.entry(0, A, 1).provenance

    assert first([]) == (93 + 12, "modelled")
    assert first(estimated) == (50 - 7, "estimated")  # net of the launch
    assert first([*estimated, *measured]) == (30 - 7, "measured")
    assert Costs(GRAPH, machine({A: UNIT}, measurements=tuple(measured))).entry(0, A, 1).what == signature


def test_rates_that_were_fitted_are_an_estimate_for_other_models() -> None:
    costs = Costs(GRAPH, machine({A: replace(UNIT, provenance="measured")}))
    assert costs.entry(0, A, 1).provenance == "estimated"


def test_a_whole_model_tells_how_much_faster_its_blocks_are_in_place() -> None:
    one, two = (block.signature for block in GRAPH.blocks)
    alone = [*rows(A, one, {(1, 5): 107.0}), *rows(A, two, {(1, 5): 57.0})]
    whole = rows(A, GRAPH.signature, {(1, 5): 127.0})
    costs = Costs(GRAPH, machine({A: UNIT}, measurements=(*alone, *whole)))
    # Net 100 and 50 alone, 120 together.
    assert costs.block_us(0, A, 1, 5) == pytest.approx(80)
    assert costs.block_us(1, A, 1, 5) == pytest.approx(40)
    found = predict_costs(costs, Plan.single(GRAPH, A), Workload(5, 2, 5))
    assert found.decode_us == pytest.approx(127)


def test_measured_energy_is_taken_as_it_is() -> None:
    signature = GRAPH.blocks[0].signature
    costs = Costs(GRAPH, machine({A: UNIT}, measurements=tuple(rows(A, signature, {(1, 5): 30.0}, energy_uj=11.0))))
    assert costs.block_us(0, A, 1, 5) == 23  # net of the launch
    assert costs.block_uj(0, A, 1, 5) == pytest.approx(11 * 23 / 30)
    assert costs.block_uj(1, A, 1, 5) == pytest.approx(2 * costs.block_us(1, A, 1, 5))


def test_static_shapes_are_paid_in_full() -> None:
    static = DeviceConfig("NPU", "f16")
    costs = Costs(GRAPH, machine({static: UNIT}), StaticShapes((8,), (16, 64)))
    assert costs.block_us(0, static, 3, 0) == costs.block_us(0, static, 8, 8)
    assert costs.block_us(0, static, 1, 20) == costs.block_us(0, static, 1, 40)
    assert costs.block_us(0, static, 1, 20) > costs.block_us(0, static, 1, 10)


def test_a_window_bounds_what_attention_costs() -> None:
    wide = Work.of(block(kind=BlockKind.ATTENTION, kv_bytes_per_token=8, score_flops=10))
    narrow = replace(wide, window=4)
    assert narrow.attended(1, 100) == 4
    assert narrow.attended(3, 2) == 3 + 4 + 4
    assert narrow.attended(2, 1) == wide.attended(2, 1) == 5
    assert block_us(UNIT, narrow, 1, 1000) == block_us(UNIT, narrow, 1, 10) < block_us(UNIT, wide, 1, 10)


def test_devices_that_read_the_same_memory_slow_each_other_down() -> None:
    plan = Plan((Placement(0, 0, A), Placement(1, 1, B)), "test")
    models = {A: FREE_MOVES, B: FREE_MOVES}
    free = predict_costs(Costs(GRAPH, machine(models)), plan, Workload(8, 1, 2))
    crowded = predict_costs(Costs(GRAPH, machine(models, shared_gbps=1e-3)), plan, Workload(8, 1, 2))
    assert crowded.prefill_us == pytest.approx(2 * free.prefill_us)  # both would read all that there is
    told = (Slowdown(str(A), str(B), 1.25), Slowdown(str(B), str(A), 1.25))
    known = predict_costs(Costs(GRAPH, machine(models, shared_gbps=1e-3, slowdowns=told)), plan, Workload(8, 1, 2))
    assert known.prefill_us == pytest.approx(1.25 * free.prefill_us)
    assert known.decode_us == free.decode_us


def test_the_machine_draws_its_base_all_the_time() -> None:
    plan = Plan.single(GRAPH, A)
    found = predict_costs(Costs(GRAPH, machine(MODELS, base_w=10.0)), plan, Workload(4, 3, 4))
    assert found.energy_uj == pytest.approx(12 * found.total_us)
    assert found.energy_parts_uj["base"] == pytest.approx(10 * found.total_us)
    assert found.watts == pytest.approx(12)
    assert found.tokens_per_joule == pytest.approx(3e6 / (12 * found.total_us))
    unknown = predict_costs(Costs(GRAPH, machine(MODELS, base_w=None)), plan, Workload(4, 3, 4))
    assert unknown.energy_uj is None
    assert unknown.missing == ("machine: base_w",)


def test_memory_counts_what_is_there_twice() -> None:
    costs = Costs(GRAPH, machine({A: UNIT, B: replace(UNIT, precision="f16")}))
    one = predict_costs(costs, Plan.single(GRAPH, A), Workload(6, 4, 8))
    assert one.memory_bytes == {"SIM": 93 + 33 + 10 * 4}
    split = Plan((Placement(0, 1, A),), "test", decode=(Placement(0, 1, B),))
    both = predict_costs(costs, split, Workload(6, 4, 8))
    assert both.memory_bytes == {"SIM": 2 * (93 + 33) + 10 * 4 + 10 * 2}


def test_a_slower_profile_is_slower_by_that() -> None:
    profile = machine(MODELS, measurements=tuple(rows(A, GRAPH.blocks[0].signature, {(1, 5): 30.0}, energy_uj=3.0)))
    plan, load = Plan.single(GRAPH, A), Workload(5, 3, 5)
    before = predict_costs(Costs(GRAPH, profile), plan, load)
    after = predict_costs(Costs(GRAPH, profile.scaled(A, time=1.5, power=2)), plan, load)
    assert after.total_us == pytest.approx(1.5 * before.total_us)
    assert after.energy_uj == pytest.approx(3 * (before.energy_uj or 0))
    assert Costs(GRAPH, profile.scaled(B, time=9)).block_us(0, A, 1, 5) == 23
