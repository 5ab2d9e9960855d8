"""Plans in virtual time: by hand, against the prediction, and against what must be conserved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.errors import PlanError, UsageError
from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.placement import Plan
from edgert.prediction import memory_bytes, predict
from edgert.profile import DeviceModel, Measurement, Profile, Slowdown
from edgert.simulator import (
    Background,
    Battery,
    Environment,
    Request,
    Simulation,
    Thermal,
    candidates,
    poisson,
    resident_bytes,
    simulate,
)
from edgert.switching import Candidate, State, Switcher

# 1 byte takes 1 us to read and nothing to move; computing takes nothing.
UNIT = DeviceModel("unit", 1e-3, 1e12, 7.0, 1e12, 2.0, 0.5, "f32", "modelled", "made up")
A, B, C = (DeviceConfig("SIM", name) for name in "abc")
CPU = DeviceConfig("CPU", "f32")


def block(index: int, kind: BlockKind = BlockKind.FFN, **values: Any) -> Block:
    defaults = {"weight_bytes": {}, "flops_per_token": 0, "kv_bytes_per_token": 0, "recurrent_bytes": 0}
    tensors = {"input": f"n{index - 1}:0" if index else None, "output": f"n{index}:0"}
    return Block(index=index, kind=kind, name=f"{kind}.{index}", states=(), **{**tensors, **defaults, **values})


def chain(*blocks: Block, width: int = 1) -> BlockGraph:
    return BlockGraph(blocks, tuple(Edge(b.index, b.index + 1, b.output, width) for b in blocks[:-1]))


def machine(models: dict[DeviceConfig, DeviceModel], **values: Any) -> Profile:
    devices = tuple(replace(model, name=f"m{i}", config=str(c)) for i, (c, model) in enumerate(models.items()))
    return Profile(**{"version": 2, "machine": "test", "devices": devices, "base_w": 3.0, **values})


# A call of the first block takes 100 us, one of the second 40.
GRAPH = chain(block(0, weight_bytes={"u8": 93}), block(1, weight_bytes={"u8": 33}))
ON_A, ON_B, SPLIT = Plan.single(GRAPH, A), Plan.single(GRAPH, B), Plan.from_configs([A, B], "test")
COSTS = Costs(GRAPH, machine({A: UNIT, B: UNIT}))
LOAD = Workload(prompt_tokens=4, new_tokens=3, chunk=2)


def run(requests: Sequence[Request], plan: Plan = ON_A, costs: Costs = COSTS, **more: Any) -> Simulation:
    return simulate(costs, {"plan": plan}, requests, **more)


def costs(**values: Any) -> Costs:
    return Costs(GRAPH, machine({A: UNIT, B: UNIT}, **values))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Costs, Plan, Workload]:
    count = draw(st.integers(1, 5))
    sizes = st.integers(0, 60)
    blocks = [
        block(
            i,
            draw(st.sampled_from([BlockKind.ATTENTION, BlockKind.FFN])),
            weight_bytes={"u8": draw(sizes)},
            flops_per_token=draw(sizes),
            kv_bytes_per_token=draw(st.integers(0, 4)),
            recurrent_bytes=draw(st.integers(0, 9)),
        )
        for i in range(count)
    ]
    graph = chain(*blocks, width=draw(st.integers(0, 8)))
    number = st.one_of(st.just(0.0), st.floats(0.01, 20))
    configs = [A, B, CPU, DeviceConfig("CPU", "f32+dq")]  # the last two are the same hardware
    models = {
        config: replace(
            UNIT,
            launch_us=draw(st.one_of(st.integers(0, 9).map(float), number)),
            transfer_gbps=draw(st.sampled_from([1e-3, 1e-2, 1e12])),
            compute_gops=draw(st.sampled_from([1e-3, 1.0])),
            precision=draw(st.sampled_from(["f32", "f16"])),
            active_w=draw(number),
            idle_w=draw(number),
        )
        for config in configs
    }
    slowdowns = [Slowdown(str(a), str(b), draw(st.floats(1, 2))) for a, b in [(A, B), (CPU, A)] if draw(st.booleans())]
    measured = [
        Measurement(str(A), blocks[0].signature, 1, past, 30.0 + past, 0.0, energy_uj, 1, "measured")
        for energy_uj in [draw(st.one_of(st.none(), st.floats(1, 99)))]
        for past in (0, 8)
        if draw(st.booleans())
    ]
    profile = machine(
        models,
        base_w=draw(number),
        slowdowns=tuple(slowdowns),
        measurements=tuple(measured),
        shared_gbps=draw(st.one_of(st.none(), st.sampled_from([1e-4, 1e-3, 3e-3]))),
    )
    placed = st.lists(st.sampled_from(configs), min_size=count, max_size=count)
    decode = draw(st.one_of(st.none(), placed))
    plan = Plan.from_configs(draw(placed), "test", decode=decode, merge=draw(st.booleans()))
    load = Workload(draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    return Costs(graph, profile), plan, load


@settings(deadline=None, max_examples=300)
@given(cases())
def test_a_request_that_nothing_disturbs_takes_what_is_predicted(case: tuple[Costs, Plan, Workload]) -> None:
    costs, plan, load = case
    expected = predict(costs, plan, load)
    found = run([Request(0.0, load)], plan, costs)
    (served,) = found.served
    near = {"rel": 1e-9, "abs": 1e-9}
    assert served.ttft_us == pytest.approx(expected.prefill_us, **near)
    assert served.handover_us == pytest.approx(expected.handover_us, **near)
    assert served.end_us == found.end_us == pytest.approx(expected.total_us, **near)
    assert (served.tpot_us is None) == (expected.tpot_us is None)
    if expected.tpot_us is not None:
        assert served.tpot_us == pytest.approx(expected.tpot_us, **near)
    assert found.missing == expected.missing == ()
    assert found.energy_parts_uj == pytest.approx(expected.energy_parts_uj, **near)
    assert served.energy_uj == pytest.approx(expected.energy_uj, **near)
    assert found.provenance == expected.provenance


@settings(deadline=None, max_examples=100)
@given(
    cases(),
    st.lists(st.floats(0, 500), min_size=1, max_size=6),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from([str(A), "CPU"]), st.floats(0, 900), st.floats(0.1, 0.4)), max_size=2),
)
def test_what_is_conserved(
    case: tuple[Costs, Plan, Workload], arrivals: list[float], at_once: int, loads: list[tuple[str, float, float]]
) -> None:
    costs, plan, load = case
    environment = Environment(tuple(Background(unit, at, at + 500, share, 1.5) for unit, at, share in loads))
    requests = [Request(at, load) for at in arrivals]
    found = run(requests, plan, costs, environment=environment, at_once=at_once)
    assert len(found.served) == len(requests)
    assert all(0 <= busy_us <= found.end_us * (1 + 1e-12) for busy_us in found.busy_us.values())
    # What the calls take is theirs whoever disturbs them; the base is drawn all the time.
    alone = predict(costs, plan, load)
    for config in plan.configs:
        part = str(config)
        assert found.energy_parts_uj[part] == pytest.approx(
            len(requests) * alone.energy_parts_uj[part], rel=1e-9, abs=1e-6
        )
    assert found.energy_parts_uj["base"] == pytest.approx((costs.profile.base_w or 0) * found.end_us, rel=1e-9)
    assert sum(served.energy_uj or 0 for served in found.served) <= (found.energy_uj or 0) * (1 + 1e-9)
    waits_w = {config.unit: costs.model(config).idle_w or 0.0 for config in reversed(plan.configs)}
    waiting = sum(watts * (found.end_us - found.busy_us[unit]) for unit, watts in waits_w.items())
    assert found.energy_parts_uj["waiting"] == pytest.approx(waiting, rel=1e-9, abs=1e-6)
    # Nothing that disturbs makes anything faster.
    assert found.end_us >= max(arrivals) + alone.total_us * (1 - 1e-9)


def test_requests_are_served_in_the_order_in_which_they_came() -> None:
    # 133 us a call: two chunks and two more tokens are 532 us a request.
    requests = [Request(at, LOAD) for at in (300.0, 0.0, 100.0)]
    found = run(requests)
    assert [s.arrival_us for s in found.served] == [0.0, 100.0, 300.0]
    assert [s.start_us for s in found.served] == [0.0, 532.0, 1064.0]
    assert [s.end_us for s in found.served] == [532.0, 1064.0, 1596.0]
    assert [s.ttft_us for s in found.served] == [266.0, 532 + 266 - 100, 1064 + 266 - 300]
    assert found.utilisation == {"SIM@a": 1.0}
    # Each draws 2 W of its device and 3 W of the base.
    assert [s.energy_uj for s in found.served] == pytest.approx([532 * 5] * 3)


def test_two_at_once_take_turns_call_by_call() -> None:
    found = run([Request(0.0, LOAD), Request(10.0, LOAD)], at_once=2)
    # The second waits for one call of the first, then they alternate, and each has half of the base.
    assert [s.end_us for s in found.served] == [7 * 133, 8 * 133]
    assert [s.tpot_us for s in found.served] == [2 * 133, 2 * 133]
    assert sum(s.energy_uj or 0 for s in found.served) == pytest.approx(8 * 133 * 5)
    first = 4 * 133 * 2 + 3 * (10 + (7 * 133 - 10) / 2)
    assert found.served[0].energy_uj == pytest.approx(first)


def test_requests_of_the_same_moment_keep_their_order() -> None:
    found = run([Request(0.0, Workload(1, 1, 1))] * 4, at_once=4)
    assert [served.end_us for served in found.served] == [133, 266, 399, 532]


def test_chunks_of_one_request_fill_the_gaps_of_another() -> None:
    alone = run([Request(0.0, LOAD)], SPLIT).end_us
    found = run([Request(0.0, LOAD)] * 2, SPLIT, at_once=2)
    assert alone < found.end_us < 2 * alone
    assert sum(found.busy_us.values()) == pytest.approx(2 * 4 * 140)


def test_other_requests_slow_as_long_as_they_are_there() -> None:
    load = Workload(1, 1, 1)
    plans = {"a": ON_A, "b": ON_B}

    def ends(costs: Costs) -> list[float]:
        class InTurn(Switcher):
            def choose(self, state: Any) -> str:
                return "a" if state.now_us < 33 else "b"

        requests = [Request(0.0, load), Request(33.0, load)]
        found = simulate(costs, plans, requests, switcher=InTurn(candidates(costs, plans, load)), at_once=2)
        return [served.end_us for served in found.served]

    assert ends(costs()) == [133, 166]
    # From 33 on a works at half its speed: 100 us of work take 200. b works at 1 / 1.25 from 33 to 233, which is 160 of
    # its 133 us of work: it is done at 33 + 166.25, when a has 16.875 us left, at full speed.
    slow = (Slowdown(str(A), str(B), 2.0), Slowdown(str(B), str(A), 1.25))
    assert ends(costs(slowdowns=slow)) == pytest.approx([199.25 + 100 - 166.25 / 2, 199.25])
    # Each reads 126 bytes in 126 us; the memory gives three quarters of both together.
    assert ends(costs(shared_gbps=1.5e-3)) == pytest.approx([33 + 100 * 4 / 3, 33 + 100 * 4 / 3 + 33])
    assert ends(costs(shared_gbps=2e-3)) == [133, 166]


def test_what_is_slowed_by_its_own_request_is_not_slowed_twice() -> None:
    both = costs(slowdowns=(Slowdown(str(A), str(B), 2.0), Slowdown(str(B), str(A), 2.0)))
    found = run([Request(0.0, Workload(4, 1, 2))] * 2, SPLIT, both, at_once=2)
    # a: 0-200 and 400-600 for the first request, 200-400 and 600-800 for the second; b takes 80 after each.
    assert [served.end_us for served in found.served] == [680, 880]


def test_a_slow_device_reads_less() -> None:
    load, half = Workload(1, 1, 1), Background(str(B), 0.0, 1e9, 0.5, 1.0)
    # The second request on a runs beside the first on b: together they read 1.5 bytes a us, which the memory gives.
    found = run([Request(0.0, load)] * 2, SPLIT, costs(shared_gbps=1.5e-3), environment=Environment((half,)), at_once=2)
    # a: 0-100, 100-200; b, at half its speed: 100-180, 200-280.
    assert [served.end_us for served in found.served] == pytest.approx([180, 280])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_another_program_takes_its_share(share: float) -> None:
    def ends(start_us: float, end_us: float) -> Simulation:
        other = Background(str(A), start_us, end_us, share, 1.0)
        return run([Request(0.0, LOAD)], environment=Environment((other,)))

    found = ends(0.0, math.inf)
    assert found.end_us == pytest.approx(532 / (1 - share))
    assert found.energy_parts_uj[str(A)] == pytest.approx(532 * 2)
    assert found.energy_parts_uj["background"] == pytest.approx(found.end_us)
    # 100 us in which it has the rest of the device, in the middle of a call.
    assert ends(50.0, 150.0).end_us == pytest.approx(532 + 100 * share)
    assert run([Request(0.0, LOAD)], environment=Environment((Background(str(B), 0.0, 9e9, share, 1.0),))).end_us == 532


def test_shares_add_up_to_less_than_all() -> None:
    half = Background(str(A), 0.0, 100.0, 0.5, 0.0)
    with pytest.raises(UsageError, match=r"share of all together is 1\.0, expected below 1"):
        Environment((half, replace(half, start_us=99.0, end_us=200.0)))
    Environment((half, replace(half, start_us=100.0, end_us=200.0)))


# The machine draws 5 W while it works, which strive for 75 degrees, and 3.5 W while it waits or is throttled: 60.
HEAT = Thermal(None, 10.0, 1e-3, 65.0, 62.0, 4.0)


def test_heat_throttles_and_lets_go() -> None:
    found = run([Request(0.0, Workload(4, 20, 2))], environment=Environment(thermals=(HEAT,)))
    # From 25 to 65 on the way to 75; from 65 to 62 on the way to 60; from 62 to 65 on the way to 75.
    warm, cool, again = 1e3 * math.log(50 / 10), 1e3 * math.log(5 / 2), 1e3 * math.log(13 / 10)
    times = [warm, warm + cool, warm + cool + again, warm + 2 * cool + again]
    assert [event.at_us for event in found.events][:4] == pytest.approx(times)
    assert [event.what.rpartition(" ")[2] for event in found.events][:4] == ["throttled", "before"] * 2
    assert found.hottest_c == (65.0,)
    # 21 calls of 133 us; throttled time counts for a quarter. The third time it is throttled they have not ended.
    done = warm + cool / 4 + again + cool / 4 + again
    assert found.end_us == pytest.approx(times[3] + again + 4 * (21 * 133 - done))
    assert found.energy_parts_uj[str(A)] == pytest.approx(21 * 133 * 2)


def test_heat_of_one_device_slows_that_device() -> None:
    for unit, slower in ((str(A), True), (str(B), False)):
        thermal = Thermal(unit, 10.0, 1e-3, 40.0, 32.0, 2.0)
        found = run([Request(0.0, Workload(4, 20, 2))], SPLIT, environment=Environment(thermals=(thermal,)))
        # On its way 0.5 W of waiting heat by 5 degrees, 2 W by 20: a computes most of the time, b less.
        assert bool(found.events) == slower
        assert (found.end_us > run([Request(0.0, Workload(4, 20, 2))], SPLIT).end_us) == slower


def test_the_battery_is_empty_when_the_energy_says_so() -> None:
    requests = [Request(0.0, LOAD), Request(1000.0, LOAD)]
    whole = run(requests)
    assert whole.energy_uj is not None
    charge_j = whole.energy_uj * 1e-6
    left = run(requests, environment=Environment(battery=Battery(charge_j * 2, 0.75)))
    assert left.battery_share == pytest.approx(0.25)
    assert left.served == whole.served
    assert left.events == ()

    # 532 us at 5 W, 468 us at 3.5 W, 132 us of the second request: then it is empty.
    short = Environment(battery=Battery((532 * 5 + 468 * 3.5 + 132 * 5) * 1e-6))
    found = run(requests, environment=short)
    assert found.end_us == pytest.approx(1132)
    assert found.energy_uj == pytest.approx(532 * 5 + 468 * 3.5 + 132 * 5)
    assert (len(found.served), found.unserved, found.battery_share) == (1, 1, 0.0)
    assert [event.what for event in found.events] == ["battery empty"]

    # Plugged in from 100 to 600 it gets back the 500 uJ that it has lost, and no more.
    assert short.battery is not None
    plugged = replace(short.battery, plugged_us=((100.0, 600.0),), charge_w=2.0)
    found = run(requests, environment=Environment(battery=plugged))
    assert [(event.at_us, event.what) for event in found.events] == [(100.0, "on mains"), (600.0, "on battery")]
    drained_uj = 400 * 3.5 + 532 * 5
    assert found.battery_share == pytest.approx(1 - drained_uj / (short.battery.capacity_j * 1e6))


def test_unknown_watts_leave_times_and_stop_heat() -> None:
    unknown = Costs(GRAPH, machine({A: replace(UNIT, active_w=None), B: replace(UNIT, idle_w=None)}, base_w=None))
    found = run([Request(0.0, LOAD)], SPLIT, unknown)
    assert found.missing == ("SIM@b: idle_w", "machine: base_w", "SIM@a: active_w")
    assert found.energy_uj is found.served[0].energy_uj is found.tokens_per_joule is None
    assert found.end_us == predict(unknown, SPLIT, LOAD).total_us
    with pytest.raises(
        PlanError, match=r"heat and battery need watts .* SIM@b: idle_w, machine: base_w, SIM@a: active_w"
    ):
        run([Request(0.0, LOAD)], SPLIT, unknown, environment=Environment(thermals=(HEAT,)))


# b takes twice as long and a third of a's watts.
THRIFTY = Costs(
    GRAPH,
    machine(
        {A: replace(UNIT, active_w=20.0), B: replace(UNIT, bandwidth_gbps=0.5e-3, active_w=1.0)},
        base_w=0.5,
        memory_bytes=252,
    ),
)
BOTH = {"performance": ON_A, "battery saver": ON_B}
MS = 1e3


def switched(environment: Environment, requests: Sequence[Request], **more: Any) -> Simulation:
    switcher = Switcher(candidates(THRIFTY, BOTH, LOAD), **{"dwell_us": 5 * MS, **more})
    return simulate(THRIFTY, BOTH, requests, environment, switcher)


STEADY = [Request(MS * i, LOAD) for i in range(60)]


def test_a_lasting_change_switches_once_and_between_requests() -> None:
    battery = Battery(1.0, 0.5, plugged_us=((0.0, 20 * MS),))
    found = switched(Environment(battery=battery), STEADY)
    first, second = found.switches
    assert (first.source, first.target, first.reason) == (None, "performance", "on mains: time of a request")
    assert (second.source, second.target) == ("performance", "battery saver")
    assert second.reason.startswith("on battery: energy x time of a request, ")
    # A look at every request: the first one that begins a dwell time after the change.
    assert 25 * MS <= second.at_us <= 26.1 * MS
    for served in found.served:
        assert served.plan == ("performance" if served.start_us < second.at_us else "battery saver")


@pytest.mark.parametrize("period", [1, 2, 4, 10, 16])
def test_a_signal_that_comes_and_goes_does_not_make_it_flap(period: int) -> None:
    plugged = tuple((MS * at, MS * (at + period / 2)) for at in range(0, 60, period))
    found = switched(Environment(battery=Battery(1.0, plugged_us=plugged)), STEADY)
    signals = [event for event in found.events if event.what in ("on mains", "on battery")]
    assert len(signals) >= 60 // period
    gaps = [b.at_us - a.at_us for a, b in zip(found.switches[1:], found.switches[2:], strict=False)]
    assert all(gap >= 5 * MS for gap in gaps)
    if period / 2 <= 5:
        assert len(found.switches) == 1
    else:
        assert len(found.switches) > 1


def test_the_switcher_is_told_when_the_battery_is_low() -> None:
    # 20 W of the device, 0.5 W of the base: 300 us above a fifth.
    charge_j = 20.5 * 300e-6
    battery = Battery(1.0, 0.2 + charge_j)
    one = {"performance": ON_A}
    found = simulate(THRIFTY, one, STEADY[:1], Environment(battery=battery), Switcher(candidates(THRIFTY, one, LOAD)))
    assert [(event.at_us, event.what) for event in found.events] == [(pytest.approx(300), "battery low")]


def test_a_queue_saves_time() -> None:
    crowded = switched(Environment(battery=Battery(1.0)), [Request(0.0, LOAD)] * 20, crowd=3, dwell_us=0.0)
    # The first look sees no queue yet.
    assert [s.plan for s in crowded.served] == ["performance"] * 17 + ["battery saver"] * 3
    assert crowded.switches[-1].reason.startswith("on battery: energy x time")


THREE = [Candidate("fast", 1.0, 10.0), Candidate("both", 1.5, 5.0), Candidate("thrifty", 4.0, 3.0)]


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (State(0.0), "fast"),
        (State(0.0, 0.1), "fast"),
        (State(0.0, 0.5, True), "both"),
        (State(0.0, 0.2, True), "thrifty"),
        (State(0.0, 0.2, True, waiting=9), "thrifty"),
        (State(0.0, 0.5, True, waiting=3), "both"),
        (State(0.0, 0.5, True, waiting=4), "fast"),
        (State(0.0, throttled=True), "thrifty"),
    ],
)
def test_what_is_short_decides(state: State, name: str) -> None:
    assert Switcher(THREE).choose(state) == name
    assert Switcher([replace(c, energy_uj=None) for c in THREE]).choose(state) == "fast"


def test_a_gain_within_the_margin_is_no_reason() -> None:
    pair = [Candidate("old", 1.0, 1.09), Candidate("new", 1.08, 1.0)]
    for margin, name in ((0.1, "old"), (0.05, "new")):
        switcher = Switcher(pair, dwell_us=0.0, margin=margin)
        assert switcher.choose(State(0.0)) == "old"
        assert switcher.choose(State(1.0, throttled=True)) == name


def test_what_was_observed_counts_and_is_forgotten() -> None:
    switcher = Switcher([Candidate("a", 1.0, 1.0), Candidate("b", 1.5, 1.0)], dwell_us=10.0, margin=0.0, forget_us=50.0)
    assert switcher.choose(State(0.0)) == "a"
    switcher.observe("a", 1.0, slowdown=4.0)  # counts as 2, half of its logarithm
    assert [switcher.choose(State(at)) for at in (1.0, 10.0, 11.0)] == ["a", "a", "b"]
    # log 2 falls to log 1.5 within 50 log2(log 2 / log 1.5) = 38.7 us.
    assert [switcher.choose(State(at)) for at in (39.0, 40.0, 49.0, 50.0)] == ["b", "b", "b", "a"]
    assert switcher.switches[1].reason == "on mains: time of a request, 18% less than with a"
    with pytest.raises(UsageError, match="observation of 'c', which is none of a, b"):
        switcher.observe("c", 1.0, 1.0)
    with pytest.raises(UsageError, match=r"observation of a: slowdown is 0\.0"):
        switcher.observe("a", 1.0, 0.0)


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans(), st.booleans(), st.floats(0.2, 5)), max_size=60))
def test_there_is_a_dwell_time_between_two_switches(looks: list[tuple[float, bool, bool, float]]) -> None:
    switcher, now_us = Switcher(THREE, dwell_us=30.0), 0.0
    for gap_us, on_battery, throttled, slowdown in looks:
        now_us += gap_us
        name = switcher.choose(State(now_us, 0.5, on_battery, throttled))
        switcher.observe(name, now_us, slowdown)
    times = [switch.at_us for switch in switcher.switches[1:]]
    assert len(times) <= now_us / 30
    assert all(after - before >= 30 for before, after in pairwise(times))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Switcher([]), "candidates are [], expected at least one"),
        (lambda: Switcher([THREE[0]] * 2), "no name twice"),
        (lambda: Switcher([THREE[0], replace(THREE[1], energy_uj=None)]), "the energy of both is not known"),
        (lambda: Switcher(THREE, dwell_us=-1.0), "dwell_us is -1.0, expected 0 or more"),
        (lambda: Switcher(THREE, margin=math.nan), "margin is nan"),
        (lambda: Switcher(THREE, low_share=2.0), "low_share is 2.0, expected 0 to 1"),
        (lambda: Switcher(THREE, crowd=0), "crowd is 0, expected at least 1"),
        (lambda: Switcher(THREE, forget_us=0.0), "forget_us is 0.0, expected above 0"),
        (lambda: Candidate("x", 0.0, None), "candidate x: latency_us is 0.0"),
    ],
)
def test_switchers_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert message in str(caught.value)


def test_a_device_that_another_program_slows_is_left_and_tried_again() -> None:
    busy = Background(str(A), 10 * MS, 30 * MS, 0.8, 1.0)
    found = switched(Environment((busy,)), STEADY, forget_us=5 * MS)
    assert [s.target for s in found.switches][:2] == ["performance", "battery saver"]
    assert 15 * MS <= found.switches[1].at_us <= 20 * MS
    assert found.switches[-1].target == "performance"
    assert len(found.switches) <= 1 + 60 / 5


def test_plans_on_the_same_hardware_learn_from_each_other() -> None:
    units = {"a": frozenset({"GPU"}), "b": frozenset({"GPU"}), "c": frozenset({"CPU"})}

    def chosen(units: dict[str, frozenset[str]]) -> list[str]:
        three = [Candidate(n, us, 1.0, units.get(n, frozenset())) for n, us in (("a", 1.0), ("b", 1.2), ("c", 2.0))]
        switcher, names = Switcher(three, dwell_us=0.0, margin=0.0, forget_us=1e9), []
        for at in range(6):
            names.append(switcher.choose(State(float(at))))
            switcher.observe(names[-1], at + 0.5, 1.0 if names[-1] == "c" else 20.0)  # the GPU is busy
        return names

    assert chosen(units) == ["a", *"ccccc"]
    assert chosen({}) == [*"ab", *"cccc"]  # without, b is tried too
    found = {c.name: c.units for c in candidates(THRIFTY, {**BOTH, "split": SPLIT}, LOAD)}
    assert found == {"performance": {str(A)}, "battery saver": {str(B)}, "split": {str(A), str(B)}}


def test_a_lookup_of_embeddings_is_no_use_of_a_device() -> None:
    graph = chain(block(0, BlockKind.EMBED, weight_bytes={"u8": 99}), block(1, weight_bytes={"u8": 33}))
    own = Costs(graph, machine({CPU: UNIT, A: UNIT}))
    (found,) = candidates(own, {"plan": Plan.from_configs([CPU, A], "test")}, LOAD)
    assert found.units == {str(A)}


def test_switching_serves_more_from_a_battery_than_the_fastest_plan() -> None:
    battery = Environment(battery=Battery(0.3))
    fast = run(STEADY, ON_A, THRIFTY, environment=battery)
    assert fast.unserved
    assert switched(battery, STEADY).unserved < fast.unserved


def test_what_is_loaded_must_fit_together() -> None:
    # 126 bytes of weights each.
    assert resident_bytes(THRIFTY, BOTH, 7) == 252
    assert resident_bytes(THRIFTY, {**BOTH, "again": ON_A}, 7) == 252
    small = Costs(GRAPH, replace(THRIFTY.profile, memory_bytes=251))
    with pytest.raises(PlanError, match="plans performance, battery saver and 1 sequences hold"):
        simulate(small, BOTH, STEADY, None, Switcher(candidates(small, BOTH, LOAD)))
    run(STEADY, ON_A, small)


@given(cases(), st.integers(1, 50))
def test_one_plan_holds_what_is_predicted(case: tuple[Costs, Plan, Workload], context: int) -> None:
    costs, plan, _ = case
    assert resident_bytes(costs, {"plan": plan}, context) == sum(memory_bytes(costs, plan, context).values())


def test_plans_and_places_must_be_known() -> None:
    with pytest.raises(UsageError, match="2 plans; expected one, or a switcher"):
        simulate(COSTS, BOTH, STEADY)
    with pytest.raises(UsageError, match="the switcher may pick battery saver; loaded are performance"):
        simulate(COSTS, {"performance": ON_A}, STEADY, None, Switcher(candidates(COSTS, BOTH, LOAD)))
    with pytest.raises(UsageError, match="the environment names GPU; the machine has SIM@a, SIM@b"):
        run(STEADY, environment=Environment((Background("GPU", 0.0, 1.0, 0.5, 1.0),)))
    with pytest.raises(UsageError, match="0 requests"):
        run([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(-1.0, LOAD), "arrival_us is -1.0"),
        (lambda: Background("CPU", 0.0, 1.0, 1.0, 0.0), "background on CPU: share is 1.0"),
        (lambda: Background("CPU", 2.0, 1.0, 0.5, 0.0), "end_us is 1.0, expected above start_us, 2.0"),
        (lambda: replace(HEAT, resume_c=65.0), "resume_c is 65.0, expected below limit_c, 65.0"),
        (lambda: replace(HEAT, factor=0.5), "heat of the machine: factor is 0.5"),
        (lambda: Battery(0.0), "battery: capacity_j is 0.0"),
        (lambda: Battery(1.0, 1.1), "start_share is 1.1, expected 0 to 1"),
        (lambda: poisson(1, 1, 0.0, [LOAD]), "mean_gap_us is 0.0"),
        (lambda: poisson(1, 1, math.inf, [LOAD]), "mean_gap_us is inf, expected a finite number above 0"),
        (lambda: poisson(1, 1, 1.0, []), "0 loads, the least is 1"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert message in str(caught.value)


def test_the_same_input_gives_the_same_result() -> None:
    def once() -> str:
        requests = poisson(7, 40, 600.0, [LOAD, Workload(9, 1, 2), Workload(1, 9, 4)])
        environment = Environment(
            (Background(str(A), 5 * MS, 9 * MS, 0.3, 1.0),),
            (replace(HEAT, limit_c=90.0, resume_c=80.0),),
            Battery(1.0, plugged_us=((0.0, 8 * MS),)),
        )
        switcher = Switcher(candidates(THRIFTY, BOTH, LOAD), dwell_us=2 * MS)
        return json.dumps(simulate(THRIFTY, BOTH, requests, environment, switcher, at_once=2).to_json())

    assert once() == once()
    data = json.loads(once())
    assert len(data["served"]) == 40
    assert data["energy_uj"] == pytest.approx(sum(data["energy_parts_uj"].values()))
    assert poisson(7, 5, 600.0, [LOAD]) != poisson(8, 5, 600.0, [LOAD])
