"""The best plan for a workload, by the costs of its blocks: pure and deterministic, and never worse than a baseline.

    pricing      the costs of a graph as arrays: an additive model
    labels       the cheapest way through it, exact, under limits too
    objectives   what is wanted, as weights of those arrays
    candidates   plans that may be the best: that optimum; prefills that keep two devices busy, which it cannot see

Beside the candidates stand the baselines: every single configuration, and every pair of one for prefill and one for
decode. `edgert.prediction.predict` judges them all. The best that keeps the constraints is the plan; those that no
other one beats are the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import permutations
from typing import Any

import numpy as np

from edgert.cost import Costs, Workload
from edgert.errors import PlanError
from edgert.placement import PHASES, Plan
from edgert.prediction import Prediction
from edgert.profile import Profile
from edgert.scheduler.candidates import Candidates, Judged, Optimum, pieces
from edgert.scheduler.labels import WIDTH
from edgert.scheduler.objectives import OBJECTIVES, SLACK, Constraints, Objective
from edgert.scheduler.pricing import hindrance, matches

__all__ = [
    "OBJECTIVES", "Baseline", "Choice", "Constraints", "Objective", "RunnerUp", "Schedule", "Sensitivity", "schedule",
    "sensitivity",
]  # fmt: skip
LIBRARY = 8  # plans at most
_ALIKE = 0.01  # relative: a plan is not worth its place in the library if another one is as good but for less than this


@dataclass(frozen=True)
class Baseline:
    """A plan that everybody would try.

    Attributes:
        name: a configuration, or `PREFILL -> DECODE`.
        plan: None where there is none, as `broken` says.
        prediction: None where `plan` is.
        broken: why it cannot be chosen, a phrase each; empty where it can.
    """

    name: str
    plan: Plan | None
    prediction: Prediction | None
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """A plan of the library."""

    name: str
    plan: Plan
    prediction: Prediction


@dataclass(frozen=True)
class RunnerUp:
    """Where a block would run if not where it does.

    Attributes:
        block: index.
        phase: `prefill` or `decode`.
        config: the next best configuration, all other blocks being placed anew around it; None where there is none.
        price: by how much the objective gets worse, in its unit (`Schedule.value`); where limits bind, at least by how
            much. Overlap of devices is left out of it. None where `config` is.
    """

    block: int
    phase: str
    config: str | None
    price: float | None


@dataclass(frozen=True)
class Schedule:
    """The plan that was chosen, and what it was chosen from.

    Attributes:
        objective: `tokens_per_joule`: least energy of prompt and continuation, for each new token. `latency`: least
            time for both. `throughput`: most new tokens a second once the prompt is done, for one sequence; among
            equals the least time before.
        constraints: that it keeps.
        plan: the plan.
        prediction: of it.
        value: what was minimised: `energy_uj`, `total_us` or `decode_us` (and a millionth of the time before).
        bound: no plan whose devices take turns gets below it and keeps the constraints; None where none keeps them.
        gap: the part of `value` that is above `bound`, 0 to 1; 0 is a proof among plans whose devices take turns.
            None where `bound` is.
        overlap: whether chunks of a prefill can keep several devices busy at once; of such plans the likely ones are
            tried, not all.
        labels: partial plans that the search kept; 0 where it needed none.
        baselines: every configuration, and every pair for prefill and decode.
        library: plans that keep the constraints and are not beaten in time, energy and memory at once (in prefill,
            decode and memory where no energy is known), the most economical first; `plan` is one of them.
        runner_ups: for every block and phase.
    """

    objective: Objective
    constraints: Constraints
    plan: Plan
    prediction: Prediction
    value: float
    bound: float | None
    gap: float | None
    overlap: bool
    labels: int
    baselines: tuple[Baseline, ...]
    library: tuple[Choice, ...]
    runner_ups: tuple[RunnerUp, ...]

    @property
    def exact(self) -> bool:
        """Whether no plan is better: the gap is 0, and no two devices can work at the same time."""
        return self.gap == 0 and not self.overlap

    def to_json(self) -> dict[str, Any]:
        def shown(one: Baseline | Choice) -> dict[str, Any]:
            found: dict[str, Any] = {"name": one.name, "plan": one.plan and one.plan.to_json()}
            found["prediction"] = one.prediction and one.prediction.to_json()
            return found | ({"broken": list(one.broken)} if isinstance(one, Baseline) else {})

        return {
            "objective": self.objective,
            "constraints": asdict(self.constraints),
            "plan": self.plan.to_json(),
            "prediction": self.prediction.to_json(),
            **{name: getattr(self, name) for name in ("value", "bound", "gap", "overlap", "exact", "labels")},
            "baselines": [shown(baseline) for baseline in self.baselines],
            "library": [shown(choice) for choice in self.library],
            "runner_ups": [asdict(runner_up) for runner_up in self.runner_ups],
        }


@dataclass(frozen=True)
class Sensitivity:
    """What becomes of a plan if a number of the profile is another one.

    Attributes:
        what: `UNIT time`, `UNIT watts` (of all its configurations: it is the same hardware) or `base_w`.
        factor: by which it is multiplied.
        kept: the objective (`Schedule.value`) of the same plan.
        again: that of the plan that is best then; None where none keeps the constraints.
        changed: whether that is another plan.
    """

    what: str
    factor: float
    kept: float
    again: float | None
    changed: bool


def schedule(
    costs: Costs,
    objective: Objective = "tokens_per_joule",
    constraints: Constraints | None = None,
    load: Workload | None = None,
    *,
    width: int = WIDTH,
) -> Schedule:
    """The best plan for a workload.

    Args:
        load: `Workload()` where None.
        width: labels that are kept at a block, see `labels.Search`; with fewer it is sooner done, and less sure.

    Raises:
        UsageError: the objective is not known, or wants more new tokens than one.
        PlanError: no plan keeps the constraints; or energy counts, and the profile lacks watts; or `max_error` is set,
            and an error was not measured. The message names the constraint and what could be reached, or what lacks.
    """
    return _Task(costs, objective, constraints, load, width).schedule()


def sensitivity(
    costs: Costs,
    plan: Plan,
    objective: Objective = "tokens_per_joule",
    constraints: Constraints | None = None,
    load: Workload | None = None,
    *,
    step: float = 0.2,
) -> tuple[Sensitivity, ...]:
    """What becomes of a plan if times, watts or the base are by `step` less or more than the profile says."""
    constraints, load = constraints or Constraints(), load or Workload()
    profile = costs.profile
    changes: list[tuple[str, float, Profile]] = []
    usable = [
        config for config in profile.configs
        if hindrance(costs.graph, config) is None and not any(matches(name, config) for name in constraints.forbidden)
    ]  # fmt: skip
    for unit in dict.fromkeys(config.unit for config in usable):
        same = [config for config in profile.configs if config.unit == unit]
        for factor in (1 - step, 1 + step):
            slower = reduce(lambda p, config: p.scaled(config, time=factor), same, profile)
            changes.append((f"{unit} time", factor, slower))
            if objective == "tokens_per_joule" or constraints.max_watts:
                hungrier = reduce(lambda p, config: p.scaled(config, power=factor), same, profile)
                changes.append((f"{unit} watts", factor, hungrier))
    if profile.base_w and (objective == "tokens_per_joule" or constraints.max_watts):
        for factor in (1 - step, 1 + step):
            changes.append(("base_w", factor, replace(profile, base_w=profile.base_w * factor, base_range=())))
    rows = []
    for what, factor, changed in changes:
        task = _Task(Costs(costs.graph, changed, costs.shapes), objective, constraints, load, WIDTH)
        kept = task.judge(plan)
        best = task.best([*([] if (again := task.again()) is None else [again]), kept])
        moved = best is not None and best is not kept
        rows.append(Sensitivity(what, factor, kept.value, None if best is None else best.value, moved))
    return tuple(rows)


class _Task(Candidates):
    """One question to the scheduler, and all that its answer says."""

    @property
    def rationale(self) -> str:
        return (
            f"{self.aim.objective.replace('_', ' ')}: prompt of {self.load.prompt_tokens}, {self.load.new_tokens} new "
            f"tokens, on {self.costs.profile.machine}"
        )

    @property
    def overlap(self) -> bool:
        """Whether several devices can work at once."""
        return len(self.load.calls) > 1 and len({config.unit for config in self.prices.configs}) > 1

    def schedule(self) -> Schedule:
        baselines = self.baselines()
        optimum = self.optimum()
        fair = [self.judge(b.plan) for b in baselines if b.plan and not b.broken]
        candidates = [*optimum.judged, *self.overlapping(optimum), *fair, *self.supported()]
        best = self.best(candidates)
        if best is None:
            raise PlanError(self.refusal(optimum))
        gap = None
        if optimum.bound is not None:
            gap = float((best.value - optimum.bound) / best.value) if best.value else 0.0
            gap = gap if gap > SLACK else 0.0  # negative where devices overlap, and sums differ in their last digits
        return Schedule(
            objective=self.aim.objective,
            constraints=self.constraints,
            plan=replace(best.plan, rationale=self.rationale),
            prediction=best.prediction,
            value=float(best.value),
            bound=optimum.bound,
            gap=gap,
            overlap=self.overlap,
            labels=optimum.labels,
            baselines=baselines,
            library=self.library(best, candidates),
            runner_ups=self.runner_ups(best, optimum),
        )

    def again(self) -> Judged | None:
        """The best plan and nothing about it; None where none keeps the constraints."""
        optimum = self.optimum()
        singles = [self.judge(b.plan) for b in self.baselines(pairs=False) if b.plan and not b.broken]
        return self.best([*optimum.judged, *self.overlapping(optimum), *singles])

    def baselines(self, *, pairs: bool = True) -> tuple[Baseline, ...]:
        graph, found = self.costs.graph, []
        for config in sorted(self.costs.profile.configs, key=str):
            why = hindrance(graph, config)
            plan = None if why else Plan.single(graph, config)
            found.append(self._baseline(str(config), plan, why))
        singles = {b.name: b.plan for b in found if b.plan and b.prediction}
        able = [name for name in singles if any(str(config) == name for config in self.prices.configs)]
        for before, after in permutations(able, 2) if pairs and self.prices.pairs else ():
            rationale = f"prefill on {before}, decode on {after}"
            pair = replace(singles[before], rationale=rationale, decode=singles[after].placements)
            found.append(self._baseline(f"{before} -> {after}", pair, None))
        return tuple(found)

    def _baseline(self, name: str, plan: Plan | None, why: str | None) -> Baseline:
        try:
            if plan is not None:
                judged = self.judge(plan)
                return Baseline(name, plan, judged.prediction, judged.broken)
        except PlanError as error:  # a lookup of embeddings on a CPU that the profile does not know
            why = str(error)
        return Baseline(name, None, None, (why or "",))

    def library(self, best: Judged, candidates: Sequence[Judged]) -> tuple[Choice, ...]:
        """What keeps the constraints and is not beaten in everything, as far apart as possible; with the best."""
        fit = {id(c): c for c in (best, *candidates) if not c.broken}
        plans = sorted(fit.values(), key=lambda c: (c is not best, pieces(c.plan)))
        points = np.array([[*self.axes(c), sum(c.prediction.memory_bytes.values())] for c in plans])
        as_good = (points[:, None] <= points).all(axis=2)
        beaten = (as_good & ~as_good.T).any(axis=0)
        kept: list[int] = []
        for i in np.flatnonzero(~beaten | (np.arange(len(plans)) == 0)):
            if not (points[kept] <= points[i] * (1 + _ALIKE)).all(axis=1).any():
                kept.append(int(i))
        plans, points = [plans[i] for i in kept], points[kept]

        extremes = [int(points[:, axis].argmin()) for axis in (1, 0, 2)]
        chosen = list(dict.fromkeys([0, *extremes]))  # 0 is the best
        places = np.log(np.maximum(points, 1e-9))
        places /= np.maximum(np.ptp(places, axis=0), 1e-9)
        while len(chosen) < min(LIBRARY, len(plans)):
            away = np.linalg.norm(places[:, None] - places[chosen], axis=2).min(axis=1)
            chosen.append(int(away.argmax()))
        chosen.sort(key=lambda i: (points[i, 1], points[i, 0]))
        ends = ("fast decode", "fast prefill") if self.prices.missing else ("battery saver", "performance")
        names = {i: [e for e, own in zip((*ends, "small"), extremes, strict=True) if i == own] for i in chosen}
        between = [i for i in chosen if not names[i]]
        names |= {i: [f"balanced {n}" if len(between) > 1 else "balanced"] for n, i in enumerate(between, 1)}
        return tuple(self._choice(" and ".join(names[i]), plans[i]) for i in chosen)

    def _choice(self, name: str, judged: Judged) -> Choice:
        return Choice(name, replace(judged.plan, rationale=f"{name}; {self.rationale}"), judged.prediction)

    def runner_ups(self, best: Judged, optimum: Optimum) -> tuple[RunnerUp, ...]:
        limits = [self.aim.rows(self.constraints.limits, waiting_w) for waiting_w in self.watts]
        prices = np.array([self.aim.weights(waiting_w) for waiting_w in self.watts])
        offsets = np.zeros(len(prices))
        for number, (rows, most) in enumerate(limits):
            prices[number] += optimum.multipliers[number] @ rows
            offsets[number] = optimum.multipliers[number] @ most
        through = (self.prices.chain.through(prices, self.masks) - offsets[:, None, None]).min(axis=1)
        path, found = self.prices.path(best.plan), []
        for phase, name in enumerate(PHASES if self.prices.pairs else PHASES[:1]):
            values = through.min(axis=2 - phase)  # [blocks, n]
            # Overlap is in the plan's own value, and not in these: compared with that it would be in every price.
            overlaps = optimum.bound is not None and best.value < optimum.bound * (1 - SLACK)
            own = values[np.arange(len(path)), path[:, phase]] if overlaps else np.full(len(path), best.value)
            values[np.arange(len(path)), path[:, phase]] = np.inf
            for block, config in enumerate(values.argmin(axis=1)):
                value = values[block, config]
                known = bool(np.isfinite(value))
                price = max(0.0, float(value - own[block])) if known else None
                found.append(RunnerUp(block, name, str(self.prices.configs[config]) if known else None, price))
        return tuple(found)

    def refusal(self, optimum: Optimum) -> str:
        """Which constraints cannot be kept, and what could be reached of each."""
        limits = self.constraints.limits
        least = {name: self.least(name) for name in limits}
        hopeless = [name for name in limits if least[name] > limits[name] * (1 + SLACK)]
        if hopeless:
            found = "the least that was found is" if self.overlap else "the least is"
            told = "; ".join(f"{name} is {limits[name]:.6g}, {found} {least[name]:.6g}" for name in hopeless)
            return f"no plan keeps the constraints: {told}"
        wanted = [f"{name} {limits[name]:.6g} (least {least[name]:.6g})" for name in limits]
        wanted += [f"required {name}" for name in self.constraints.required]
        return f"no plan {'keeps' if optimum.bound is None else 'was found that keeps'} all of {', '.join(wanted)}"
