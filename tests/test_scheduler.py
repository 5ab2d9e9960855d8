"""Schedules: against all plans there are where these are few, against the baselines, and in what they say."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import block, chain

from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.errors import PlanError, UnknownDeviceError, UsageError
from edgert.graph import BlockGraph, BlockKind
from edgert.placement import HOST, Placement, Plan
from edgert.prediction import predict
from edgert.profile import DeviceModel, Measurement, Profile, shipped
from edgert.scheduler import OBJECTIVES, Constraints, Objective, Schedule, labels, schedule, sensitivity
from edgert.scheduler.candidates import Candidates

CONFIGS = ("CPU@f32", "CPU@bf16", "GPU@f16", "GPU@f16+static", "NPU@f16")
IDLE_W = {"CPU": 1.0, "GPU": 0.5, "NPU": 0.2}


def model_of(rng: np.random.Generator, layers: int) -> BlockGraph:
    """Embedding, layers of attention and FFN, head; sizes are random, some layers are alike."""

    def sizes(scale: float) -> dict[str, object]:
        weights = int(rng.integers(1, 50) * 1e5 * scale)
        return {"weight_bytes": {"u4": weights}, "flops_per_token": 4 * weights}

    blocks = [block(0, BlockKind.EMBED, weight_bytes={"u8": int(rng.integers(1, 40) * 1e5)})]
    for _ in range(layers):
        if len(blocks) == 1 or rng.random() < 0.5:
            attention, ffn = sizes(1), sizes(3)
            states = {"kv_bytes_per_token": int(rng.integers(1, 9) * 2048)}
        blocks.append(replace(block(len(blocks), BlockKind.ATTENTION, **attention, **states), states=("k", "v")))
        blocks.append(block(len(blocks), BlockKind.FFN, **ffn))
    blocks.append(block(len(blocks), BlockKind.HEAD, **sizes(2)))
    return chain(blocks, int(rng.integers(1, 20) * 1024))


def machine_of(rng: np.random.Generator, graph: BlockGraph, size: int, *, measured: bool = False) -> Profile:
    """Some configurations, the reference first, of random speeds; measured on every block, or not at all."""
    names = [CONFIGS[0], *rng.choice(CONFIGS[1:], size=size - 1, replace=False)]
    models, rows = [], []
    for number, name in enumerate(names):
        config = DeviceConfig.parse(str(name))
        speed = rng.uniform(0.3, 3, 6)
        models.append(
            DeviceModel(
                name=f"m{number}", bandwidth_gbps=40 * speed[0], compute_gops=2000 * speed[1], launch_us=50 * speed[2],
                transfer_gbps=10 * speed[3], active_w=10 * speed[4], idle_w=IDLE_W[config.device],
                precision="f32" if config.device == "CPU" else "f16", provenance="modelled", source="made up",
                config=str(config),
            )
        )  # fmt: skip
        for signature in dict.fromkeys(b.signature for b in graph.blocks) if measured else ():
            for tokens in (1, 64):
                latency_us = float(rng.uniform(200, 2000) * (1 + tokens / 20))
                energy_uj = float(10 * speed[4] * latency_us * rng.uniform(0.8, 1.2))
                error = 0.0 if number == 0 else float(rng.uniform(0, 0.02))
                rows.append(
                    Measurement(str(config), signature, tokens, 0, latency_us, 1.0, energy_uj, 5, "measured", error)
                )
    return Profile(2, "made up", tuple(models), base_w=float(rng.uniform(0, 8)), measurements=tuple(rows))


def costs_of(seed: int, *, layers: int = 2, size: int = 3) -> Costs:
    rng = np.random.default_rng(seed)
    graph = model_of(rng, layers)
    return Costs(graph, machine_of(rng, graph, size))


ONE_CALL = Workload(100, 20, 100)
THREE_CALLS = Workload(300, 20, 100)
SEEDS = st.integers(0, 10**6)


def value_of(objective: Objective, costs: Costs, plan: Plan, load: Workload) -> float:
    found = predict(costs, plan, load)
    if objective == "tokens_per_joule":
        assert found.energy_uj is not None
        return found.energy_uj
    if objective == "latency":
        return found.total_us
    return found.decode_us + 1e-6 * (found.prefill_us + found.handover_us)


def every_plan(costs: Costs) -> list[Plan]:
    """All that may be: the lookup on a CPU, everything else anywhere."""
    on = costs.profile.configs
    lookup = [c for c in on if c.device == "CPU"]
    ways = list(itertools.product(lookup, *[on] * (len(costs.graph.blocks) - 1)))
    return [Plan.from_configs(p, "test", decode=d) for p in ways for d in ways]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_is_better_among_all_plans(objective: Objective) -> None:
    for seed in range(8):
        costs = costs_of(seed, layers=1, size=2 + seed % 2)
        found = schedule(costs, objective, load=ONE_CALL)
        least = min(value_of(objective, costs, plan, ONE_CALL) for plan in every_plan(costs))
        assert found.value == pytest.approx(least, rel=1e-9)
        assert found.value == value_of(objective, costs, found.plan, ONE_CALL)
        assert found.exact
        assert found.bound == pytest.approx(least, rel=1e-9)


def test_a_runner_up_costs_what_the_best_plan_with_it_does() -> None:
    for seed in range(4):
        costs = costs_of(seed, layers=1, size=2)
        found = schedule(costs, load=ONE_CALL)
        values = [(plan, value_of("tokens_per_joule", costs, plan, ONE_CALL)) for plan in every_plan(costs)]

        def on(plan: Plan, phase: str, index: int) -> str:
            placements = list(plan.phases.values())[0 if phase == "prefill" else -1]
            return next(str(p.config) for p in placements if p.first <= index <= p.last)

        assert len(found.runner_ups) == 2 * len(costs.graph.blocks)
        for row in found.runner_ups:
            here = on(found.plan, row.phase, row.block)
            others = {on(plan, row.phase, row.block) for plan, _ in values}
            least = {
                c: min(v for plan, v in values if on(plan, row.phase, row.block) == c) for c in others if c != here
            }
            if not least:
                assert row.config is None
                assert row.price is None
                continue
            assert row.config in least
            assert row.price == pytest.approx(min(least.values()) - found.value, rel=1e-6, abs=1e-6 * found.value)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, data=st.data())
def test_the_sum_along_a_path_is_what_is_predicted(seed: int, data: st.DataObject) -> None:
    costs = costs_of(seed)
    prices = Candidates(costs, "latency", None, ONE_CALL, 1).prices
    names = st.sampled_from(costs.profile.configs)
    n = len(costs.graph.blocks)
    ways = [[HOST, *data.draw(st.lists(names, min_size=n - 1, max_size=n - 1))] for _ in range(2)]
    plan = Plan.from_configs(ways[0], "test", decode=ways[1])
    found = predict(costs, plan, ONE_CALL)
    totals = dict(zip(prices.columns, prices.chain.totals(prices.path(plan)), strict=True))
    assert totals["prefill_us"] == pytest.approx(found.prefill_us, rel=1e-9)
    assert totals["handover_us"] == pytest.approx(found.handover_us, rel=1e-9, abs=1e-6)
    assert totals["decode_us"] == pytest.approx(found.decode_us, rel=1e-9)
    used = {c.unit for c in plan.configs}
    sets = [
        sum(weight * totals[name] for name, weight in prices.energy(watts).items())
        for mask, watts in zip(*prices.sets, strict=True)
        if used <= {c.unit for c, inside in zip(prices.configs, mask, strict=True) if inside}
    ]
    assert min(sets) == pytest.approx(found.energy_uj, rel=1e-9)
    for device, size in found.memory_bytes.items():
        assert abs(totals[f"memory {device}"] - size) <= len(costs.graph.blocks)  # a prediction counts whole bytes


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, objective=st.sampled_from(OBJECTIVES), load=st.sampled_from([ONE_CALL, THREE_CALLS]))
def test_no_baseline_is_better(seed: int, objective: Objective, load: Workload) -> None:
    costs = costs_of(seed, size=4)
    found = schedule(costs, objective, load=load)
    names = [str(c) for c in sorted(costs.profile.configs, key=str)]
    pairs = [f"{a} -> {b}" for a, b in itertools.permutations(names, 2)]
    assert [b.name for b in found.baselines] == [*names, *pairs]
    for baseline in found.baselines:
        assert baseline.plan is not None
        assert baseline.broken == ()
        assert found.value <= value_of(objective, costs, baseline.plan, load) * (1 + 1e-12)
    assert found.gap is not None
    assert found.bound is not None


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, share=st.floats(0.2, 1.2), more=st.floats(1, 2))
def test_a_weaker_constraint_makes_nothing_worse(seed: int, share: float, more: float) -> None:
    costs = costs_of(seed)
    free = schedule(costs, load=ONE_CALL)
    most = (free.prediction.tpot_us or 0.0) * share
    values = [free.value]
    for factor in (more, 1.0):
        try:
            found = schedule(costs, constraints=Constraints(max_tpot_us=most * factor), load=ONE_CALL)
        except PlanError:
            values.append(np.inf)
            continue
        assert (found.prediction.tpot_us or 0.0) <= most * factor * (1 + 1e-9)
        values.append(found.value)
    assert values == sorted(values)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, share=st.floats(0.01, 0.99), width=st.integers(1, 40))
def test_a_short_search_says_how_far_it_may_be_off(seed: int, share: float, width: int) -> None:
    costs = costs_of(seed, layers=4, size=4)
    free = Candidates(costs, "latency", None, ONE_CALL, 1).optimum().judged[0]
    loose = Candidates(costs, "latency", Constraints(max_watts=free.reached["max_watts"]), ONE_CALL, 1)
    least = loose.least("max_watts")
    limit = Constraints(max_watts=1.001 * least + share * (free.reached["max_watts"] - least))
    exact = Candidates(costs, "latency", limit, ONE_CALL, 10**5).optimum()
    short = Candidates(costs, "latency", limit, ONE_CALL, width).optimum()
    assert exact.bound is not None
    assert exact.judged[0].value == pytest.approx(exact.bound, rel=1e-7)
    assert short.bound is not None
    assert short.bound <= exact.bound * (1 + 1e-7)
    assert all(judged.value >= exact.bound * (1 - 1e-7) for judged in short.judged)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, objective=st.sampled_from(OBJECTIVES), turn=st.integers(1, 3))
def test_the_same_question_has_the_same_answer(seed: int, objective: Objective, turn: int) -> None:
    def answer(costs: Costs) -> str:
        return json.dumps(schedule(costs, objective, load=THREE_CALLS).to_json())

    costs = costs_of(seed, size=4)
    first = answer(costs)
    assert answer(costs) == first
    assert answer(Costs(costs.graph, costs.profile)) == first
    devices = costs.profile.devices
    turned = replace(costs.profile, devices=devices[turn:] + devices[:turn])
    assert answer(Costs(costs.graph, turned)) == first


def big(layers: int, configs: int) -> Costs:
    """A model of equal layers, and configurations on three pieces of hardware, one like the other."""
    rng = np.random.default_rng(layers)
    graph = model_of(rng, 1)
    embed, attention, ffn, head = graph.blocks
    parts = [embed, *[attention, ffn] * layers, head]
    blocks = [
        replace(b, index=i, name=f"{b.kind}.{i}", input=f"n{i - 1}:0", output=f"n{i}:0") for i, b in enumerate(parts)
    ]
    profile = machine_of(rng, graph, 2)
    names = [f"{device}@v{i}" for i in range(configs // 3) for device in ("CPU", "GPU", "NPU")]
    models = [
        replace(
            profile.devices[0], name=f"m{i}", config=name, idle_w=IDLE_W[name[:3]],
            **{field: 30 * rng.uniform(0.8, 1.2) for field in ("bandwidth_gbps", "compute_gops", "active_w")},
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return Costs(chain(blocks, 4096), replace(profile, devices=tuple(models)))


def test_the_steps_of_a_search_grow_with_the_layers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = labels._step

    def counted(value: Any, *arguments: Any) -> Any:
        steps.append(value.size)
        return step(value, *arguments)

    monkeypatch.setattr(labels, "_step", counted)
    for layers in (20, 40, 80):
        steps.clear()
        task = Candidates(big(layers, 30), "tokens_per_joule", None, THREE_CALLS, labels.WIDTH)
        found = task.optimum()
        assert found.labels == 0
        assert found.judged[0].value <= (found.bound or 0.0) * (1 + 1e-9)
        # One step a boundary, over 31 x 31 states (with the host) in each of the sets of hardware that have a CPU.
        assert len(steps) == 2 * layers + 1
        assert set(steps) == {31**2 * len(task.masks)}
        assert len(task.masks) == 4


def test_limits_on_equal_layers_take_few_labels() -> None:
    costs = big(80, 3)
    free = Candidates(costs, "tokens_per_joule", None, ONE_CALL, 1).optimum().judged[0]
    name = "max_tpot_us"
    least = Candidates(costs, "tokens_per_joule", Constraints(max_tpot_us=free.reached[name]), ONE_CALL, 1).least(name)
    limit = (least + free.reached[name]) / 2
    found = schedule(costs, constraints=Constraints(max_tpot_us=limit), load=ONE_CALL)
    assert found.exact
    assert found.labels <= 162 * (10 + 100 + 1000)
    assert (found.prediction.tpot_us or 0.0) <= limit * (1 + 1e-9)


def test_devices_that_work_at_the_same_time_are_seen() -> None:
    # Two devices that are equally fast at half the prompt's work each; sums alone know nothing of the gain.
    graph = model_of(np.random.default_rng(1), 6)
    fast = DeviceModel("a", 50, 500, 1, 100, 10, 0.1, "f16", "modelled", "made up", config="GPU@f16+static")
    models = (
        replace(fast, name="c", compute_gops=50, config="CPU@f32"), fast, replace(fast, name="b", config="NPU@f16")
    )  # fmt: skip
    costs = Costs(graph, Profile(2, "made up", models, base_w=5.0))
    load = Workload(2048, 2, 128)
    found = schedule(costs, "latency", load=load)
    units = {p.config.unit for p in found.plan.placements[1:]}
    assert units >= {"GPU", "NPU"}
    assert found.bound is not None
    assert found.value < 0.8 * found.bound
    assert found.gap == 0
    reached = schedule(costs, "latency", Constraints(max_ttft_us=found.prediction.prefill_us), load)
    assert reached.bound is None  # one after the other they do not come there
    assert reached.gap is None
    assert reached.value == found.value


def test_the_library_goes_from_battery_saver_to_performance() -> None:
    costs = costs_of(5, layers=3, size=4)
    found = schedule(costs, load=THREE_CALLS)
    assert 2 <= len(found.library) <= 8
    assert found.library[0].name.startswith("battery saver")
    assert found.library[0].prediction.energy_uj == found.value
    assert any(c.plan.placements == found.plan.placements and c.plan.decode == found.plan.decode for c in found.library)
    fastest = min(found.library, key=lambda c: c.prediction.total_us)
    assert "performance" in fastest.name
    energies = [c.prediction.energy_uj or 0.0 for c in found.library]
    assert energies == sorted(energies)
    assert len({c.name for c in found.library}) == len(found.library)
    for a, b in itertools.permutations(found.library, 2):
        mine, other = (
            (c.prediction.total_us, c.prediction.energy_uj or 0.0, sum(c.prediction.memory_bytes.values()))
            for c in (a, b)
        )
        assert any(x < y for x, y in zip(mine, other, strict=True))
    assert all(f"on {costs.profile.machine}" in c.plan.rationale for c in found.library)


def without_watts(costs: Costs) -> Costs:
    first, *rest = costs.profile.devices
    profile = replace(costs.profile, devices=(replace(first, active_w=None), *rest), base_w=None)
    return Costs(costs.graph, profile)


def test_without_energy_there_is_an_error_or_another_library() -> None:
    costs = without_watts(costs_of(3))
    named = r"the energy is not known without CPU@f32: active_w, machine: base_w"
    with pytest.raises(PlanError, match=named):
        schedule(costs, load=ONE_CALL)
    with pytest.raises(PlanError, match=named):
        schedule(costs, "latency", Constraints(max_watts=20), ONE_CALL)
    found = schedule(costs, "latency", load=ONE_CALL)
    assert found.prediction.energy_uj is None
    assert "fast decode" in found.library[0].name
    assert any("fast prefill" in choice.name for choice in found.library)


def refused(constraints: Constraints, seed: int = 0, *, load: Workload = ONE_CALL) -> str:
    with pytest.raises(PlanError) as caught:
        schedule(costs_of(seed, size=4), constraints=constraints, load=load)
    return str(caught.value)


def test_what_cannot_be_kept_is_said_with_what_could_be() -> None:
    costs = costs_of(0, size=4)
    for name, reached in (("max_ttft_us", "prefill_us"), ("max_tpot_us", "tpot_us"), ("max_watts", "watts")):
        message = refused(Constraints(**{name: 1e-3}))
        least = float(message.rpartition(" ")[2])
        assert f"{name} is 0.001, the least is" in message
        found = schedule(costs, constraints=Constraints(**{name: least * 1.0001}), load=ONE_CALL)
        assert getattr(found.prediction, reached) <= least * 1.0001
        assert refused(Constraints(**{name: least * 0.9999}))
    assert "max_memory_bytes is 5, the least is" in refused(Constraints(max_memory_bytes=5))
    both = Constraints(max_ttft_us=1.0, max_memory_bytes=5)
    assert "max_ttft_us is 1, the least is" in refused(both)
    assert "max_memory_bytes is 5, the least is" in refused(both)


def test_limits_that_exclude_each_other_are_named_together() -> None:
    costs = costs_of(2, size=4)
    frugal = schedule(costs, load=ONE_CALL)
    fast = schedule(costs, "latency", Constraints(), ONE_CALL)
    assert fast.value < frugal.prediction.total_us
    watts = (frugal.prediction.watts or 0.0) * 1.001
    tpot_us = (schedule(costs, "throughput", load=ONE_CALL).prediction.tpot_us or 0.0) * 1.001
    message = refused(Constraints(max_watts=watts, max_tpot_us=tpot_us, forbidden=("NPU",)), 2)
    assert "no plan keeps" in message


def test_memory_of_a_device_is_kept() -> None:
    costs = costs_of(1, size=4)
    free = schedule(costs, load=ONE_CALL)
    device, size = max(free.prediction.memory_bytes.items(), key=lambda item: item[1])
    found = schedule(costs, constraints=Constraints(max_device_memory_bytes={device: size // 2}), load=ONE_CALL)
    assert found.prediction.memory_bytes.get(device, 0) <= size // 2
    assert found.value >= free.value


def test_forbidden_and_required_devices() -> None:
    costs = costs_of(1, size=5)
    for name in ("GPU", "GPU@f16+static", "NPU"):
        found = schedule(costs, constraints=Constraints(forbidden=(name,)), load=ONE_CALL)
        assert not [c for c in found.plan.configs if name in (c.device, str(c))]
        single = next(b for b in found.baselines if b.name.startswith(name))
        assert single.broken == (f"{name} is forbidden",)
        found = schedule(costs, constraints=Constraints(required=(name,)), load=ONE_CALL)
        assert [c for c in found.plan.configs if name in (c.device, str(c))]
        with pytest.raises(PlanError, match="no configuration of it may run this model"):
            schedule(costs, constraints=Constraints(forbidden=(name,), required=(name,)), load=ONE_CALL)
    # The lookup of embeddings is no use of the CPU, and stays there.
    found = schedule(costs, constraints=Constraints(forbidden=("CPU",)), load=ONE_CALL)
    assert found.plan.placements[0] == Placement(0, 0, HOST)
    assert {c.device for c in found.plan.configs} <= {"CPU", "GPU", "NPU"}
    assert all(p.config.device != "CPU" for p in found.plan.placements[1:])
    with pytest.raises(PlanError, match=r"none of them may run this model"):
        schedule(costs, constraints=Constraints(forbidden=("CPU", "GPU", "NPU")), load=ONE_CALL)


def test_quality_needs_errors_that_were_measured() -> None:
    costs = costs_of(1, size=3)
    with pytest.raises(PlanError, match=r"max_error: no error was measured of attention.1 on .* and \d+ more"):
        schedule(costs, constraints=Constraints(max_error=0.1), load=ONE_CALL)
    graph = costs.graph
    profile = machine_of(np.random.default_rng(4), graph, 3, measured=True)
    exact = schedule(Costs(graph, profile), constraints=Constraints(max_error=1e-6), load=ONE_CALL)
    assert {str(p.config) for ps in exact.plan.phases.values() for p in ps if p.last} == {"CPU@f32"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_ttft_us": 0}, "max_ttft_us is 0, expected a finite number above 0"),
        ({"max_tpot_us": float("nan")}, "max_tpot_us is nan"),
        ({"max_watts": float("inf")}, "max_watts is inf"),
        ({"max_memory_bytes": -1}, "max_memory_bytes is -1"),
        ({"max_error": 0.0}, "max_error is 0.0"),
        ({"max_device_memory_bytes": {"GPU": 0}}, "max_device_memory_bytes GPU is 0"),
        ({"max_device_memory_bytes": {"GPU@f16": 10}}, "'GPU@f16' is no device; GPU is"),
    ],
)
def test_constraints_have_limits(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Constraints(**values)
    assert message in str(caught.value)


def test_names_that_are_none() -> None:
    for values in ({"forbidden": ("NUP",)}, {"required": ("gpu",)}, {"max_device_memory_bytes": {"X": 1}}):
        with pytest.raises(UnknownDeviceError):
            Constraints(**values)
    with pytest.raises(UsageError, match="objective is 'speed', expected one of tokens_per_joule, latency, throughput"):
        schedule(costs_of(0), "speed")  # type: ignore[arg-type]


def test_with_many_devices_that_wait_there_is_a_bound() -> None:
    costs = costs_of(3)
    cpu, gpu = costs.profile.devices[0], replace(costs.profile.devices[1], idle_w=2.0)
    many = [replace(gpu, name=f"g{i}", config=f"GPU.{i}@f16+static", bandwidth_gbps=10 + i) for i in range(1, 6)]
    for models, sets in (((cpu, *many[:3]), 8), ((cpu, *many), 1)):
        profile = replace(costs.profile, devices=models)
        task = Candidates(Costs(costs.graph, profile), "tokens_per_joule", None, ONE_CALL, labels.WIDTH)
        assert len(task.masks) == sets
        assert task.prices.exact == (sets > 1)
        found = schedule(Costs(costs.graph, profile), load=ONE_CALL)
        assert found.bound is not None
        assert found.exact == (found.bound >= found.value * (1 - 1e-9))
        assert found.exact or sets == 1


def test_one_new_token_has_no_decode() -> None:
    costs = costs_of(0)
    one = Workload(100, 1, 100)
    found = schedule(costs, load=one)
    assert found.plan.decode is None
    assert all("->" not in b.name for b in found.baselines)
    assert {row.phase for row in found.runner_ups} == {"prefill"}
    with pytest.raises(UsageError, match="new_tokens is 1, the least is 2"):
        schedule(costs, "throughput", load=one)


def test_a_model_in_one_piece_runs_in_one_place() -> None:
    costs = costs_of(0, size=5)
    whole = BlockGraph((replace(costs.graph.blocks[1], index=0, input=None),), (), "it could not be cut")
    found = schedule(Costs(whole, costs.profile), load=THREE_CALLS)
    assert len(found.plan.placements) == 1
    assert found.plan.decode is None
    broken = {b.name: b.broken for b in found.baselines}
    assert broken["NPU@f16"] == ("static shapes take no token ids, and this model is in one piece",)
    assert broken["CPU@f32"] == ()


def test_static_shapes_are_not_for_recurrent_states() -> None:
    costs = costs_of(1, size=5)
    first, second, *rest = costs.graph.blocks
    recurrent = replace(costs.graph, blocks=(first, replace(second, recurrent_bytes=999), *rest))
    found = schedule(Costs(recurrent, costs.profile), load=ONE_CALL)
    assert not [c for c in found.plan.configs if c.static]
    broken = {b.name: b.broken for b in found.baselines}
    assert broken["NPU@f16"] == ("static shapes pad a prompt, which would change a recurrent state",)
    assert "NPU@f16 -> CPU@f32" not in broken


def test_static_shapes_need_somewhere_to_look_embeddings_up() -> None:
    costs = costs_of(0)
    npu = replace(costs.profile.devices[0], config="NPU@f16", precision="f16")
    with pytest.raises(PlanError, match=r"none of NPU@f16 may run block 0 \(embed.0\)"):
        schedule(Costs(costs.graph, replace(costs.profile, devices=(npu,))), load=ONE_CALL)


def test_the_shipped_profiles_can_be_scheduled() -> None:
    graph = big(8, 3).graph
    for name, profile in shipped().items():
        watts = [profile.base_w, *(w for model in profile.devices for w in (model.active_w, model.idle_w))]
        found = schedule(Costs(graph, profile), "latency" if None in watts else "tokens_per_joule")
        assert found.gap == 0, name
        assert json.loads(json.dumps(found.to_json()))["plan"] == found.plan.to_json()


def test_what_a_profile_that_is_wrong_would_change() -> None:
    costs = costs_of(7, size=3)
    found = schedule(costs, load=ONE_CALL)
    rows = sensitivity(costs, found.plan, load=ONE_CALL)
    own = {c.unit for c in found.plan.configs}
    for row in rows:
        assert row.again is not None
        assert row.again <= row.kept * (1 + 1e-12)
        assert row.changed == (row.again < row.kept * (1 - 1e-12))
        if row.what.split()[0] in {*own, "base_w"}:
            assert (row.kept < found.value) == (row.factor < 1)
        else:
            assert row.kept == found.value
    units = {c.unit for c in costs.profile.configs}
    assert {row.what for row in rows} == {"base_w", *(f"{unit} {what}" for unit in units for what in ("time", "watts"))}
    # By a factor of twenty the device that everything runs on is no longer the best.
    rows = sensitivity(costs, found.plan, "latency", load=ONE_CALL, step=0.95)
    assert any(row.changed for row in rows)


def test_a_schedule_is_a_value() -> None:
    costs = costs_of(0)
    found = schedule(costs, load=ONE_CALL)
    assert isinstance(found, Schedule)
    assert Plan.from_json(found.to_json()["plan"]) == found.plan
    assert found.plan.rationale == "tokens per joule: prompt of 100, 20 new tokens, on made up"
