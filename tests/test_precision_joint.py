"""Formats and placement together: against all plans with all mixes where these are few, baselines, limits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from test_cost import block, chain
from test_scheduler import ONE_CALL, THREE_CALLS, machine_of, value_of

from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.errors import PlanError, UsageError
from edgert.graph import BlockGraph, BlockKind
from edgert.placement import HOST, Plan
from edgert.precision import Layer, Mix, Option, Problem, Solution, fill, front, graph_with, mix_loss, named, solve
from edgert.precision import joint as joints
from edgert.precision.hull import Table
from edgert.precision.joint import Joint
from edgert.precision.layers import recipe_only
from edgert.profile import Profile, shipped
from edgert.scheduler import OBJECTIVES, Constraints, Objective, schedule

KINDS = tuple(named(name) for name in ("f16", "int4-asym-g32", "int4-sym-pc", "int8"))
CPU, GPU, NPU = (DeviceConfig.parse(name) for name in ("CPU@f32", "GPU@f16", "NPU@f16"))
WIDTH = 4096


def layers_of(rng: np.random.Generator, between: int, kinds: int = 4) -> tuple[Layer, ...]:
    """A tied table, and two matrices for each block between; the NPU's INT4 loses more than the other one."""

    def options() -> tuple[Option, ...]:
        harm = rng.lognormal(-4, 1)
        losses = zip(KINDS[:kinds], (0.0, harm, 3 * harm, 0.02 * harm), strict=False)
        return tuple(Option(kind, float(loss)) for kind, loss in losses)

    found = [Layer("table", "embedding+head", (0, between + 1), (4 * WIDTH, WIDTH), options())]
    for index in range(1, between + 1):
        for number in range(2):
            shape = (WIDTH * int(rng.integers(1, 4)), WIDTH)
            found.append(Layer(f"{index}.{number}", "linear", (index,), shape, options()))
    return tuple(found)


def graph_of(layers: tuple[Layer, ...]) -> BlockGraph:
    blocks = []
    last = layers[0].blocks[-1]
    for index in range(last + 1):
        elements = sum(layer.elements for layer in layers if index in layer.blocks)
        kind = BlockKind.EMBED if index == 0 else BlockKind.HEAD if index == last else BlockKind.ATTENTION
        one = block(index, kind, weight_bytes={"f16": 2 * elements, "f32": 4 * WIDTH})
        if index:
            one = replace(one, flops_per_token=2 * elements)
        if kind is BlockKind.ATTENTION:
            one = replace(one, kv_bytes_per_token=1024, states=("k", "v"))
        blocks.append(one)
    return chain(blocks, 4 * WIDTH)


def machine(rng: np.random.Generator, graph: BlockGraph, *, reads_only: bool = False) -> Profile:
    """A CPU, a GPU and an NPU of random speeds; they only read if asked for, and computing takes no time."""
    while True:
        profile = machine_of(rng, graph, 3)
        if {c.device for c in profile.configs} == {"CPU", "GPU", "NPU"} and GPU in profile.configs:
            break
    if reads_only:
        profile = replace(profile, devices=tuple(replace(m, compute_gops=1e12) for m in profile.devices))
    return profile


def problem_of(
    seed: int, *, between: int = 1, objective: Objective = "latency", load: Workload = ONE_CALL,
    reads_only: bool = False, kinds: int = 4,
) -> Problem:  # fmt: skip
    rng = np.random.default_rng(seed)
    layers = layers_of(rng, between, kinds)
    graph = graph_of(layers)
    return Problem(layers, graph, machine(rng, graph, reads_only=reads_only), objective, load=load)


def every_mix(problem: Problem) -> list[Mix]:
    ways = itertools.product(*[[option.format for option in layer.options] for layer in problem.layers])
    return [dict(zip((layer.name for layer in problem.layers), way, strict=True)) for way in ways]


def costs_of(problem: Problem, mix: Mix) -> Costs:
    assert problem.profile is not None
    return Costs(graph_with(problem.graph, problem.layers, mix), problem.profile)


def on_npu(plan: Plan) -> set[int]:
    return {
        index
        for placements in plan.phases.values()
        for p in placements
        for index in range(p.first, p.last + 1)
        if p.config == NPU
    }


def suits(problem: Problem, plan: Plan, mix: Mix) -> bool:
    inside = on_npu(plan)
    return all(mix[layer.name].npu for layer in problem.layers if inside & set(layer.blocks))


def every_solution(problem: Problem) -> list[tuple[float, float]]:
    """Loss and value of all plans with all mixes."""
    assert problem.profile is not None
    configs, blocks = problem.profile.configs, len(problem.graph.blocks)
    ways = list(itertools.product([HOST], *[configs] * (blocks - 1)))
    plans = [Plan.from_configs(p, "test", decode=d) for p in ways for d in ways]
    found = []
    for mix in every_mix(problem):
        costs, loss = costs_of(problem, mix), mix_loss(problem.layers, mix)
        found += [
            (loss, value_of(problem.objective, costs, plan, problem.load))
            for plan in plans
            if suits(problem, plan, mix)
        ]
    return found


def check(problem: Problem, found: Solution) -> None:
    """Whether a solution is what it says."""
    assert found.plan is not None
    assert found.prediction is not None
    assert suits(problem, found.plan, found.mix)
    assert found.value == value_of(problem.objective, costs_of(problem, found.mix), found.plan, problem.load)
    assert found.loss == mix_loss(problem.layers, found.mix)
    assert found.unit == ("uJ" if problem.objective == "tokens_per_joule" else "us")
    inside = on_npu(found.plan)
    assert found.recipe == tuple(layer.name for layer in problem.layers if inside & set(layer.blocks))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_plan_with_any_mix_is_better(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joints, "_BYTES", 0.0)
    for seed in range(2):
        problem = problem_of(seed, objective=objective, reads_only=True, kinds=3)
        everything = np.array(every_solution(problem))
        for price in np.geomspace(0.01, 100, 4) * everything[:, 1].min():
            found = solve(problem, float(price))
            check(problem, found)
            least = (everything[:, 1] + price * everything[:, 0]).min()
            assert found.value + price * found.loss <= least * (1 + 1e-9)


def test_where_computing_takes_time_too_it_is_as_good() -> None:
    for seed, objective in enumerate(OBJECTIVES):
        problem = problem_of(seed, objective=objective, kinds=3)
        everything = np.array(every_solution(problem))
        for price in np.geomspace(0.01, 100, 4) * everything[:, 1].min():
            found = solve(problem, float(price))
            check(problem, found)
            least = (everything[:, 1] + price * everything[:, 0]).min()
            assert found.value + price * found.loss <= least * 1.01  # a hundredth goes to the bytes
        for budget in (0.001, 0.01, 0.1):
            found = fill(problem, budget)
            check(problem, found)
            assert found.loss <= budget
            assert found.value <= everything[everything[:, 0] <= budget, 1].min() * 1.08  # three layers: coarse steps


def baselines(problem: Problem, budget: float) -> list[float]:
    """The least value within a budget of every configuration with free formats, and of the recipe in all layers."""
    assert problem.profile is not None
    found = []
    for mix in every_mix(problem):
        if mix_loss(problem.layers, mix) <= budget:
            costs = costs_of(problem, mix)
            plans = [Plan.single(problem.graph, config) for config in problem.profile.configs if config != NPU]
            if all(kind.npu for kind in mix.values()):
                plans.append(schedule(costs, problem.objective, load=problem.load).plan)
            found += [value_of(problem.objective, costs, plan, problem.load) for plan in plans]
    return found


@pytest.mark.parametrize("load", [ONE_CALL, THREE_CALLS])
def test_no_baseline_is_better(load: Workload) -> None:
    for seed in range(3):
        problem = problem_of(seed, objective=OBJECTIVES[seed], load=load, kinds=3)
        found = front(problem)
        for one in found:
            check(problem, one)
        losses = [one.loss for one in found]
        assert losses == sorted(set(losses))
        assert losses[0] == 0.0
        for one in found[:: max(1, len(found) // 4)]:
            # Corners of the front: what is between them may be better than both.
            assert one.value <= min(baselines(problem, one.loss)) * 1.01
            filled = fill(problem, one.loss)
            assert filled.loss <= one.loss
            assert filled.value <= one.value * 1.01


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("measured", [False, True])
def test_a_single_format_adds_up_to_what_is_predicted(objective: Objective, measured: bool) -> None:
    rng = np.random.default_rng(7)
    layers = layers_of(rng, 2)
    graph = graph_of(layers)
    small = graph_with(graph, layers, {layer.name: KINDS[3] for layer in layers})
    profile = machine_of(rng, small if measured else graph, 4, measured=measured)
    problem = Problem(layers, graph, profile, objective, load=ONE_CALL)
    joint = Joint(problem, profile)
    assert len(joint.ways) >= 4
    for way in joint.ways:
        for kind in KINDS:
            choice = problem.uniform(kind)
            if np.isfinite(way.table.cost(choice)):
                (found,) = joint.judged([(way, choice)])
                assert way.beside + way.table.cost(choice) == pytest.approx(joint.merit(found), rel=1e-9)
    # INT8 was measured and the rest was not: the time of a block is that of the measurement, whatever the rates say.
    assert (Costs(small, profile).entry(1, profile.configs[0], 1).provenance == "measured") is measured


def test_the_npu_binds_formats_and_the_lookup_does_not_go_there() -> None:
    shape = replace_devices(problem_of(3, between=2), CPU, NPU)
    found = solve(replace(shape, configs=(NPU,)), 0.0)
    assert found.plan is not None
    assert on_npu(found.plan) == {1, 2, 3}
    assert found.plan.placements[0].config == HOST
    assert found.recipe == tuple(layer.name for layer in shape.layers)  # the table is the head's too
    assert {kind.name for kind in found.mix.values()} == {"int4-sym-pc"}
    free = solve(replace(shape, configs=(CPU,)), 0.0)
    assert free.recipe == ()
    assert free.plan is not None
    assert on_npu(free.plan) == set()
    assert {kind.name for kind in free.mix.values()} == {"int4-sym-pc"}  # the smallest
    dear = [solve(replace(shape, configs=(config,)), 1e5).mix for config in (CPU, NPU)]
    assert "int4-asym-g32" in {kind.name for kind in dear[0].values()}
    assert all(kind.npu for kind in dear[1].values())


def replace_devices(problem: Problem, *configs: DeviceConfig) -> Problem:
    assert problem.profile is not None
    devices = tuple(m for m in problem.profile.devices if m.device in configs)
    return replace(problem, profile=replace(problem.profile, devices=devices))


def test_the_price_of_the_recipe() -> None:
    problem = problem_of(5, between=2)
    bound = replace(problem, layers=recipe_only(problem.layers))
    for budget in (0.003, 0.03):
        free, suited = fill(problem, budget), fill(bound, budget)
        assert all(kind.npu for kind in suited.mix.values())
        assert free.value <= suited.value * 1.01


def test_limits_are_kept() -> None:
    problem = problem_of(1, between=2, load=Workload(100, 20, 100))
    free = solve(problem, 0.0)
    assert free.prediction is not None
    most = free.prediction.prefill_us * 1.001
    limited = replace(problem, constraints=Constraints(max_ttft_us=most))
    for one in (solve(limited, 0.0), fill(limited, 10.0), *front(limited)):
        assert one.prediction is not None
        assert one.prediction.prefill_us <= most * (1 + 1e-9)
        check(limited, one)
    memory = int(1.02 * min(sum(p.memory_bytes.values()) for one in front(problem) if (p := one.prediction)))
    small = front(replace(problem, constraints=Constraints(max_memory_bytes=memory)))
    assert small
    for one in small:
        assert one.prediction is not None
        assert sum(one.prediction.memory_bytes.values()) <= memory
    with pytest.raises(PlanError, match=r"no plan keeps the constraints: max_ttft_us is 1, the least is "):
        solve(replace(problem, constraints=Constraints(max_ttft_us=1.0)), 0.0)
    # The smallest mix would fit, this one does not: what it breaks is said.
    with pytest.raises(
        PlanError, match=r"no mix .* keeps the constraints: max_memory_bytes is .*, the least that was found is "
    ):
        solve(replace(problem, constraints=Constraints(max_memory_bytes=memory)), 1e12)


def test_only_the_configurations_that_are_allowed() -> None:
    problem = problem_of(2, between=2)
    for configs in ((CPU,), (GPU,), (NPU,), (GPU, NPU)):
        for one in front(replace(problem, configs=configs), 5):
            assert one.plan is not None
            blocks = {p.config for ps in one.plan.phases.values() for p in ps if p.last > 0}
            assert blocks <= set(configs)
    with pytest.raises(PlanError, match=r"nothing is known of the time on GPU\.1@f16"):
        solve(replace(problem, configs=(DeviceConfig.parse("GPU.1@f16"),)), 0.0)


def test_a_block_without_a_format_for_the_npu_stays_away() -> None:
    problem = problem_of(2, between=1)
    first, second, *rest = problem.layers
    stubborn = replace(second, options=tuple(o for o in second.options if not o.format.npu))
    problem = replace(problem, layers=(first, stubborn, *rest))
    for one in front(problem, 5):
        assert one.plan is not None
        assert second.blocks[0] not in on_npu(one.plan)
    with pytest.raises(PlanError, match=r"every plan has a block on an NPU .* 1 layers .* the first is 1\.0"):
        solve(replace(problem, configs=(NPU,)), 0.0)


def test_what_is_asked_wrongly() -> None:
    problem = problem_of(0)
    with pytest.raises(UsageError, match="configs are given without a profile"):
        replace(problem, profile=None, configs=(CPU,))
    with pytest.raises(UsageError, match=r"max_error is 0\.1: it cannot be kept while formats are chosen"):
        replace(problem, constraints=Constraints(max_error=0.1))
    with pytest.raises(UsageError, match="objective is 'fastest'"):
        solve(replace(problem, objective="fastest"), 0.0)  # type: ignore[arg-type]
    assert problem.profile is not None
    unknown = tuple(replace(m, active_w=None) for m in problem.profile.devices)
    thirsty = replace(problem, profile=replace(problem.profile, devices=unknown), objective="tokens_per_joule")
    with pytest.raises(PlanError, match="the energy is not known without"):
        solve(thirsty, 0.0)
    assert solve(replace(thirsty, objective="latency"), 0.0).value > 0


def test_the_same_question_has_the_same_answer() -> None:
    problem = problem_of(4, between=2, objective="tokens_per_joule")
    again = replace(problem)
    for one, other in zip([*front(problem), fill(problem, 0.01)], [*front(again), fill(again, 0.01)], strict=True):
        assert one.plan is not None
        assert other.plan is not None
        assert (one.mix, one.loss, one.bytes, one.value) == (other.mix, other.loss, other.bytes, other.value)
        assert json.dumps(one.plan.to_json()) == json.dumps(other.plan.to_json())


def test_a_lookup_takes_no_time_and_is_small_all_the_same() -> None:
    table = Layer("table", "embedding", (0,), (4 * WIDTH, WIDTH), (Option(KINDS[0], 0.0), Option(KINDS[3], 1e-9)))
    layers = (table, *layers_of(np.random.default_rng(0), 1)[1:])
    graph = graph_of(layers_of(np.random.default_rng(0), 1))
    problem = Problem(layers, graph, shipped()["lunarlake"], "latency", load=ONE_CALL)
    assert fill(problem, 0.001).mix["table"].name == "int8"


def test_a_table_of_one_way() -> None:
    problem = problem_of(0)
    assert problem.profile is not None
    for way in Joint(problem, problem.profile).ways:
        assert isinstance(way.table, Table)
        bound = [problem.layers[number].name for number in way.recipe]
        for number, layer in enumerate(problem.layers):
            usable = np.isfinite(way.table.costs[number])[: len(layer.options)]
            suited = np.array([option.format.npu for option in layer.options])
            assert usable[suited].all()
            assert not (layer.name in bound and usable[~suited].any())
