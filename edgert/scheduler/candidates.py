"""Plans that may be the best: the additive model's optimum, overlapping prefills, and the front between two axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.placement import Placement, Plan
from edgert.prediction import Prediction, predict
from edgert.scheduler.labels import Flags, Floats, Indices, Search
from edgert.scheduler.objectives import SLACK, Aim, Constraints, Objective
from edgert.scheduler.pricing import TIMES, Prices

FRONT = 8  # plans at most on the front between the axes
OVERLAPPING = 4  # splits of a prefill over two devices that are looked at more closely


@dataclass(frozen=True)
class Judged:
    """A plan, what it takes, and what it does not keep."""

    plan: Plan
    prediction: Prediction
    value: float
    reached: Mapping[str, float]
    broken: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Optimum:
    """What the search came to: plans that are best or nearly so, a bound (None where nothing keeps the limits), labels
    that were kept, and the multipliers of the limits, `[sets, limits]`."""

    judged: list[Judged]
    bound: float | None
    labels: int
    multipliers: Floats


class Candidates:
    """Plans for one question to the scheduler, judged by `predict`.

    Raises:
        UsageError, PlanError: see `Prices` and `Aim`.
    """

    def __init__(
        self, costs: Costs, objective: Objective, constraints: Constraints | None, load: Workload | None, width: int
    ) -> None:
        self.costs, self.load, self.width = costs, load or Workload(), width
        self.constraints = constraints or Constraints()
        self.prices = Prices(
            costs, self.load, forbidden=self.constraints.forbidden, required=self.constraints.required,
            errors=self.constraints.max_error is not None,
        )  # fmt: skip
        self.aim = Aim(self.prices, objective, self.constraints)
        # Without the energy it makes no difference what waits.
        masks, watts = self.prices.sets
        self.masks, self.watts = (masks, watts) if not self.prices.missing else (masks[:1], watts[:1])
        self._judged: dict[Any, Judged] = {}

    def best(self, candidates: Sequence[Judged]) -> Judged | None:
        """Of those that keep the constraints; among equals that with the fewest submodels, then the first."""
        fit = [c for c in candidates if not c.broken]
        # Reckoned in another order the same sums differ in the last digits.
        return min(fit, key=lambda c: (float(f"{c.value:.12g}"), pieces(c.plan)), default=None)

    def judge(self, plan: Plan) -> Judged:
        key = (plan.placements, plan.decode)
        if key not in self._judged:
            prediction = predict(self.costs, plan, self.load)
            reached = self.aim.reached(plan, prediction)
            broken = (*self.aim.beyond(reached), *self.aim.barred(plan))
            self._judged[key] = Judged(plan, prediction, self.aim.value(prediction), reached, broken)
        return self._judged[key]

    def optimum(self) -> Optimum:
        limits = dict(self.constraints.limits)
        path, bound, labels, multipliers = self.search(self.aim.weights, limits, self.width)
        judged = []
        for _ in range(4):
            if path is None:
                break
            judged.append(self.judge(self.prices.plan(path, "optimum")))
            # Devices that work at the same time may take more than one after the other: with less room it may fit.
            reached = judged[-1].reached
            over = {name: reached[name] - most for name, most in self.constraints.limits.items() if name in reached}
            over = {name: by for name, by in over.items() if by > SLACK * self.constraints.limits[name]}
            limits = {name: most - over.get(name, 0.0) for name, most in limits.items()}
            if not over or min(limits.values()) <= 0:
                break
            path, *_ = self.search(self.aim.weights, limits, self.width)
        return Optimum(judged, None if bound == np.inf else bound, labels, multipliers)

    def search(
        self, weights: Callable[[float], Floats], limits: Mapping[str, float], width: int
    ) -> tuple[Indices | None, float, int, Floats]:
        """The cheapest path over all sets of hardware, a bound, labels, and multipliers `[sets, limits]`."""
        chain = self.prices.chain
        costs = np.array([weights(waiting_w) for waiting_w in self.watts])
        bounded = [self.aim.rows(limits, waiting_w) for waiting_w in self.watts]
        multipliers = np.zeros((len(costs), len(bounded[0][1])))
        if not multipliers.size:
            values, paths = chain.cheapest(costs, self.masks)
            first = int(values.argmin())
            return paths[first], float(values[first]), 0, multipliers
        best, path, bound, labels = np.inf, None, np.inf, 0
        for number, (mask, cost, (rows, most)) in enumerate(zip(self.masks, costs, bounded, strict=True)):
            one = Search(chain, mask, cost, rows, most, below=best, width=width).run()
            multipliers[number] = one.multipliers
            bound, labels = min(bound, one.bound), labels + one.labels
            if one.path is not None:
                best, path = one.cost, one.path
        return path, bound, labels, multipliers

    def overlapping(self, optimum: Optimum) -> list[Judged]:
        """Plans whose prefill goes through one device and then through another, which work at the same time."""
        prices, chain, calls = self.prices, self.prices.chain, len(self.load.calls)
        units = np.array([config.unit for config in prices.configs])
        blocks, n = len(chain.kinds), len(units)
        if calls == 1 or len(set(units.tolist())) == 1 or blocks < 3:
            return []
        inside = chain.nodes[chain.kinds][:, prices.columns.index("prefill_us"), :, 0]
        able: Flags = np.any(chain.allowed, axis=2)[chain.kinds]
        inside = np.where(able, inside, np.inf)
        first = int(inside[0].argmin())
        inside[0] = np.where(able[0], inside[0], 0.0)  # elsewhere the lookup is little
        ends = [side[:, prices.columns.index("prefill_us"), 0] for side in (chain.leaving, chain.entering)]
        before = np.cumsum(inside, axis=0)[:-1] + ends[0]  # [cut, n]
        after = np.cumsum(inside[::-1], axis=0)[::-1][1:] + ends[1]
        longer = np.maximum(before[:, :, None], after[:, None, :])
        shorter = np.minimum(before[:, :, None], after[:, None, :])
        took_us: Floats = longer + shorter / calls
        took_us[:, units[:, None] == units] = np.inf
        took_us[0] = np.inf  # the lookup alone keeps nothing busy
        cuts = took_us.argmin(axis=0)
        order = np.argsort(took_us.min(axis=0), axis=None, kind="stable")
        decodes = [spread(list(judged.plan.phases.values())[-1]) for judged in optimum.judged[:1]]
        plans = []
        for a, b in zip(*np.unravel_index(order[:OVERLAPPING], (n, n)), strict=True):
            if took_us[cuts[a, b], a, b] == np.inf:
                break
            cut = int(cuts[a, b]) + 1
            prefill = [prices.configs[a]] * cut + [prices.configs[b]] * (blocks - cut)
            prefill[0] = prefill[0] if able[0, a] else prices.configs[first]
            alone = [[prefill[0], *[prices.configs[c]] * (blocks - 1)] for c in (a, b)]
            others = [*decodes, *alone] if prices.pairs else []
            plans += [Plan.from_configs(prefill, "overlap", decode=decode) for decode in (*others, prefill)]
        return [self.judge(plan) for plan in plans]

    def supported(self) -> list[Judged]:
        """Plans on the convex front between the two axes, by halving the angles between those that are found."""
        prices = self.prices

        def solve(first: float, second: float) -> Judged | None:
            def weights(waiting_w: float) -> Floats:
                if prices.missing:
                    row = prices.row({"prefill_us": first, "handover_us": first, "decode_us": second})
                else:
                    row = first * prices.row(dict.fromkeys(TIMES, 1.0)) + second * prices.row(prices.energy(waiting_w))
                return self.aim.settled(row)

            path, *_ = self.search(weights, self.constraints.limits, self.width // 10)
            return None if path is None else self.judge(prices.plan(path, "front"))

        fast = solve(1.0, 0.0)
        if fast is None:
            return []
        x, y = self.axes(fast)
        found = [fast, frugal] if (frugal := solve(1e-6 * y / x if x else 0.0, 1.0)) else [fast]
        spans = [(found[0], found[-1])]
        while spans and len(found) < FRONT:
            (low, high), *spans = spans
            (x1, y1), (x2, y2) = self.axes(low), self.axes(high)
            middle = solve(y1 - y2, x2 - x1) if x2 > x1 and y1 > y2 else None
            if middle is not None and all(middle is not one for one in found):
                found.append(middle)
                spans += [(low, middle), (middle, high)]
        return found

    def axes(self, judged: Judged) -> tuple[float, float]:
        """Time and energy; times of prefill and decode where no energy is known."""
        prediction = judged.prediction
        if self.prices.missing or prediction.energy_uj is None:
            return prediction.prefill_us + prediction.handover_us, prediction.decode_us
        return prediction.total_us, prediction.energy_uj

    def least(self, name: str) -> float:
        """The least that any plan reaches of what a limit is on."""
        most, value = self.constraints.limits[name], np.inf
        while True:

            def weights(waiting_w: float, most: float = most) -> Floats:
                return self.aim.rows({name: most}, waiting_w)[0][0]  # type: ignore[no-any-return]

            # Watts are a quotient: at the least of them no plan's energy is below what they would make of its time.
            path, *_ = self.search(weights, {}, self.width)
            if path is not None:
                self.judge(self.prices.plan(path, "least"))
            fair = [judged for judged in self._judged.values() if not self.aim.barred(judged.plan)]
            found = min((judged.reached.get(name, 0.0) for judged in fair), default=np.inf)
            if found >= value * (1 - SLACK):
                return value
            most = value = found


def pieces(plan: Plan) -> int:
    """Submodels in all phases, before they are cut alike."""
    return sum(map(len, plan.phases.values()))


def spread(placements: Sequence[Placement]) -> list[DeviceConfig]:
    """The configuration of each block."""
    return [p.config for p in placements for _ in range(p.first, p.last + 1)]
