"""The scheduler's optimum against an integer programme of the same question, written without its arrays and its search.

Variables say which configuration runs a block in each phase; everything else, from cuts to waiting devices, follows by
linear constraints. HiGHS solves it to a gap of 0 (https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.milp.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from test_scheduler import machine_of, model_of

from edgert.cost import Costs, Workload, handover_us
from edgert.device import DeviceConfig
from edgert.graph import BlockKind
from edgert.placement import HOST
from edgert.scheduler import Constraints, Objective
from edgert.scheduler.candidates import Candidates, Judged
from edgert.scheduler.labels import WIDTH

Terms = dict[int, float]
INFEASIBLE = 2  # `status` of scipy's milp


class Programme:
    """Binary and other variables, linear constraints, and sums of terms."""

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.most: list[float] = []
        self.rows: list[tuple[Terms, float, float]] = []

    def new(self, *, whole: bool = False, most: float = 1.0) -> int:
        self.whole.append(int(whole))
        self.most.append(most)
        return len(self.whole) - 1

    def add(self, terms: Mapping[int, float], least: float = -np.inf, most: float = np.inf) -> None:
        self.rows.append((dict(terms), least, most))

    def both(self, a: int, b: int) -> int:
        """A variable that is 1 where both are."""
        x = self.new()
        self.add({x: 1, a: -1}, most=0)
        self.add({x: 1, b: -1}, most=0)
        self.add({x: 1, a: -1, b: -1}, least=-1)
        return x

    def differ(self, a: int, b: int) -> int:
        """A variable that is 1 where one of the two is."""
        x = self.new()
        self.add({x: 1, a: -1, b: 1}, least=0)
        self.add({x: 1, a: 1, b: -1}, least=0)
        self.add({x: 1, a: -1, b: -1}, most=0)
        self.add({x: 1, a: 1, b: 1}, most=2)
        return x

    def solve(self, cost: Terms) -> float | None:
        """The least cost; None where nothing fits."""
        matrix = np.zeros((len(self.rows), len(self.whole)))
        for row, (terms, _, _) in enumerate(self.rows):
            matrix[row, list(terms)] = list(terms.values())
        limits = LinearConstraint(matrix, [row[1] for row in self.rows], [row[2] for row in self.rows])
        weights = np.zeros(len(self.whole))
        weights[list(cost)] = list(cost.values())
        scale = np.abs(weights).max()
        found = milp(weights / scale, integrality=self.whole, bounds=Bounds(0, self.most), constraints=limits,
                     options={"mip_rel_gap": 0.0})  # fmt: skip
        if found.status == INFEASIBLE:
            return None
        assert found.status == 0, found.message
        return float(found.fun * scale)


def plus(*parts: Mapping[int, float], by: float = 1.0) -> Terms:
    total: Terms = {}
    for part in parts:
        for variable, weight in part.items():
            total[variable] = total.get(variable, 0.0) + by * weight
    return total


def optimum(costs: Costs, objective: Objective, constraints: Constraints, load: Workload) -> float | None:
    """The least value of the objective, devices taking turns; None where no plan keeps the constraints."""
    graph, profile = costs.graph, costs.profile
    blocks, names = range(len(graph.blocks)), {*constraints.forbidden}
    configs = [c for c in profile.configs if str(c) not in names and c.device not in names]
    every = list(dict.fromkeys([*configs, HOST]))
    crossing = [0, *(edge.bytes_per_token for edge in graph.edges), 0]
    size_us = 1e3  # times count in milliseconds, so that no number is near the tolerances of the solver
    p = Programme()

    where: dict[tuple[str, int, DeviceConfig], int] = {}
    for phase in ("prefill", "decode"):
        for i in blocks:
            for c in every:
                lookup = c == HOST or not (c.static or c.device.startswith("GPU"))
                able = lookup if i == 0 else c in configs
                where[phase, i, c] = p.new(whole=True, most=float(able))
            p.add({where[phase, i, c]: 1 for c in every}, 1, 1)
    shared = {(i, c): p.both(where["prefill", i, c], where["decode", i, c]) for i in blocks for c in every}

    times: dict[str, dict[DeviceConfig, Terms]] = {
        name: {c: {} for c in every} for name in ("prefill", "decode", "between")
    }
    energy: Terms = {}

    def spend(name: str, c: DeviceConfig, variable: int, latency_us: float, energy_uj: float) -> None:
        times[name][c] = plus(times[name][c], {variable: latency_us / size_us})
        energy[variable] = energy.get(variable, 0.0) + energy_uj / size_us

    for phase, other in (("prefill", "decode"), ("decode", "prefill")):
        calls, tokens = (len(load.calls), load.prompt_tokens) if phase == "prefill" else (load.new_tokens - 1,) * 2
        for c in every:
            model = costs.model(c)
            active_w = model.active_w or 0.0
            for i in blocks:
                at = where[phase, i, c]
                found = costs.phase(i, c, phase, load)
                spend(phase, c, at, found.total_us, found.energy_uj or 0.0)
                # A submodel begins here unless the one of the block before goes on.
                begins, ends = {at: 1.0}, {}
                if i:
                    goes_on = p.new()
                    cut = p.differ(where[other, i - 1, c], where[other, i, c])
                    for before in (at, where[phase, i - 1, c]):
                        p.add({goes_on: 1, before: -1}, most=0)
                    p.add({goes_on: 1, cut: 1}, most=1)
                    p.add({goes_on: 1, at: -1, where[phase, i - 1, c]: -1, cut: 1}, least=-1)
                    if c.static and i == blocks[-1] and graph.blocks[i].kind is BlockKind.HEAD:
                        goes_on = p.new(most=0)
                    begins, ends = {at: 1, goes_on: -1}, {where[phase, i - 1, c]: 1, goes_on: -1}
                moving_us = handover_us(model, crossing[i]) * tokens
                for variable, times_ in begins.items():
                    latency_us = times_ * (model.launch_us * calls + moving_us)
                    spend(phase, c, variable, latency_us, active_w * latency_us)
                for variable, times_ in ends.items():
                    spend(phase, c, variable, times_ * moving_us, active_w * times_ * moving_us)
    for (i, c), both in shared.items():
        moved_us = handover_us(costs.model(c), costs.works[i].state_bytes(load.prompt_tokens))
        for variable, sign in ((where["prefill", i, c], 1), (where["decode", i, c], 1), (both, -2)):
            spend("between", c, variable, sign * moved_us, sign * moved_us * (costs.model(c).active_w or 0.0))

    whole = {name: plus(*parts.values()) for name, parts in times.items()}
    wall = plus(*whole.values())
    longest = sum(max(0.0, weight) for weight in wall.values())
    energy = plus(energy, plus(wall, by=profile.base_w or 0.0))
    for unit in dict.fromkeys(c.unit for c in every):
        own = [c for c in every if c.unit == unit]
        used, waiting = p.new(whole=True), p.new(most=np.inf)
        for at in (where[phase, i, c] for phase in ("prefill", "decode") for i in blocks for c in own):
            p.add({used: 1, at: -1}, least=0)
        busy = plus(*(times[name][c] for name in times for c in own))
        p.add(plus({waiting: 1, used: -longest}, plus(wall, by=-1), busy), least=-longest)
        energy = plus(energy, {waiting: next((w for c in own if (w := costs.model(c).idle_w) is not None), 0.0)})

    memory: dict[str, Terms] = {}
    for (i, c), both in shared.items():
        states = costs.model(c).kv_width * costs.works[i].kv_bytes_per_token * (load.prompt_tokens + load.new_tokens)
        weights = graph.blocks[i].total_weight_bytes
        once = {where["prefill", i, c]: weights + states, where["decode", i, c]: weights + states}
        saved = {both: -states if c.static else -states - weights}
        memory[c.device] = plus(memory.get(c.device, {}), once, saved)

    if constraints.max_ttft_us:
        p.add(whole["prefill"], most=constraints.max_ttft_us / size_us)
    if constraints.max_tpot_us:
        p.add(whole["decode"], most=constraints.max_tpot_us * (load.new_tokens - 1) / size_us)
    if constraints.max_watts:
        p.add(plus(energy, plus(wall, by=-constraints.max_watts)), most=0)
    if constraints.max_memory_bytes:
        p.add(plus(*memory.values(), by=1e-6), most=constraints.max_memory_bytes * 1e-6)
    for device, most in constraints.max_device_memory_bytes.items():
        p.add(plus(memory[device], by=1e-6), most=most * 1e-6)
    if constraints.max_error:
        squares = [p.new(most=np.inf) for _ in blocks]
        for (_, i, c), at in where.items():
            lookup = graph.blocks[i].kind is BlockKind.EMBED and costs.error(i, c) is None
            error = 0.0 if lookup or p.most[at] == 0 else costs.error(i, c) or 0.0
            p.add({squares[i]: 1, at: -(error**2)}, least=0)
        p.add(dict.fromkeys(squares, 1.0), most=constraints.max_error**2)
    for name in constraints.required:
        here = [at for (_, i, c), at in where.items() if i and name in (str(c), c.device)]
        p.add(dict.fromkeys(here, 1.0), least=1)

    early = plus(whole["prefill"], whole["between"])
    cost = {"tokens_per_joule": energy, "latency": wall, "throughput": plus(whole["decode"], plus(early, by=1e-6))}
    found = p.solve(cost[objective])
    return None if found is None else found * size_us


def between(rng: np.random.Generator, free: Candidates, best: Judged, name: str, reached: Any) -> float:
    """A limit from a little below the least that any plan reaches to what the best plan without it does."""
    task = Candidates(free.costs, free.aim.objective, Constraints(**{name: reached}), free.load, WIDTH)
    most = max(task.constraints.limits.values())
    least = task.least(next(iter(task.constraints.limits)))
    share = rng.uniform(-0.2, 1)
    # Not quite at the least, where rounding decides.
    return max(1.0, 0.99 * least if share < 0 else 1.001 * least + share * (most - least))


def question(kind: str, seed: int) -> tuple[Costs, Objective, Constraints, Workload]:
    """A random instance; its limits lie between what the best plan without them reaches and the least of any plan."""
    rng = np.random.default_rng([seed, *kind.encode()])
    graph = model_of(rng, layers=int(rng.integers(1, 4)))
    profile = machine_of(rng, graph, size=int(rng.integers(2, 5)), measured="error" in kind or bool(rng.random() < 0.3))
    load = Workload(int(rng.integers(1, 300)), int(rng.integers(2, 40)), int(rng.integers(32, 300)))
    costs = Costs(graph, profile)
    objective: Objective = rng.choice(["tokens_per_joule", "latency", "throughput"])
    free = Candidates(costs, objective, None, load, WIDTH)
    best = free.optimum().judged[0]
    limits: dict[str, Any] = {}
    for name in kind.split("+"):
        if name == "required":
            limits[name] = (str(rng.choice([str(c) for c in profile.configs])),)
        elif name == "forbidden":
            limits[name] = (str(rng.choice([str(c) for c in profile.configs[1:]])),)
        elif name == "max_device_memory_bytes":
            device = max(free.prices.devices, key=lambda d: best.reached.get(f"{name} {d}", 0))
            limits[name] = {device: between(rng, free, best, name, {device: int(best.reached[f"{name} {device}"])})}
        elif name == "max_error":
            limits[name] = float(rng.uniform(0.005, 0.03))
        elif name != "nothing":
            limits[name] = between(rng, free, best, name, best.reached[name])
    return costs, objective, Constraints(**limits), load


KINDS = {
    "nothing": 100, "max_ttft_us": 40, "max_tpot_us": 40, "max_watts": 40, "max_memory_bytes": 40,
    "max_device_memory_bytes": 40, "max_error": 40, "required": 40, "forbidden": 40, "max_memory_bytes+max_ttft_us": 40,
    "max_error+max_tpot_us+required": 40, "max_watts+max_memory_bytes+forbidden": 40,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_is_that_of_an_integer_programme(kind: str) -> None:
    fit = 0
    for seed in range(KINDS[kind]):
        costs, objective, constraints, load = question(kind, seed)
        found = Candidates(costs, objective, constraints, load, WIDTH).optimum().bound
        expected = optimum(costs, objective, constraints, load)
        assert (found is None) == (expected is None), (kind, seed)
        if expected is not None:
            assert found == pytest.approx(expected, rel=1e-6), (kind, seed)
            fit += 1
    assert fit >= KINDS[kind] / 5  # there is something to find
