"""Formats and placement together: plans that may be the best with some mix, and for each of them the best mixes.

For a price of the loss each state of a block (where it is in prefill, and where in decode) has formats of its own that
are the best, those of an NPU's recipe where one of the two is an NPU; with them the scheduler's chain gives the best
plan for that price. Beside these plans stand what the scheduler makes of the model in a single format, every
configuration alone and every pair of one for prefill and one for decode. Each plan has mixes of its own that are the
best on it, as far as what layers take adds up (`shares`); `predict` judges a plan with its mix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from edgert.cost import Costs
from edgert.errors import PlanError
from edgert.placement import Plan
from edgert.precision.hull import Indices, Table, cheapest
from edgert.precision.layers import mix_bytes, mix_loss
from edgert.precision.problem import Problem, Solution
from edgert.precision.shares import Shares
from edgert.prediction import predict
from edgert.profile import Profile
from edgert.scheduler import Schedule, schedule
from edgert.scheduler.labels import Flags, Search

PRICES = 12  # of the loss, for which the best plan is looked for
CLOSE = 3  # plans that are judged for a price, besides those that everybody would try
_WIDTH = 100  # labels of a search under limits
# What a smaller model is worth beside time or energy: half the bytes are half a percent. It decides about what takes no
# time at all, as the table of an embedding.
_BYTES = 0.01


@dataclass(frozen=True, eq=False)
class Way:
    """A plan, and what the layers' options take on it.

    Attributes:
        recipe: numbers of the layers of blocks on an NPU.
        table: of the layers, a price of their bytes included; without options that the plan does not allow.
        beside: what the plan takes beside its layers, such that for one mix the sum is what is predicted.
        usual: whether everybody would try it: a single configuration, or an NPU's recipe in all blocks.
    """

    plan: Plan
    recipe: tuple[int, ...]
    table: Table
    beside: float
    usual: bool


class Joint:
    """Mixes for a problem with a profile, each on a plan that suits it.

    Raises:
        UsageError, PlanError: (methods too) see `edgert.scheduler.schedule`; or the profile does not know one of the
            problem's configurations.
    """

    def __init__(self, problem: Problem, profile: Profile) -> None:
        self.problem = problem
        constraints = problem.constraints
        if problem.configs is not None:
            Costs(problem.graph, profile).require(problem.configs)
            others = (str(config) for config in profile.configs if config not in problem.configs)
            constraints = replace(constraints, forbidden=(*constraints.forbidden, *others))
        self.constraints = constraints
        self.shares = Shares(problem, profile, constraints)
        self._judged: dict[tuple[Way, bytes], Solution | None] = {}
        self._least: dict[str, float] = {}  # of what is limited

    def near(self, price: float) -> list[tuple[Way, Indices]]:
        """The best mix for a price of the loss, on the plans for which that is likely the best, and the usual ones."""
        return self.likely([(way, way.table.best(price)) for way in self.ways], price)

    def likely(self, found: list[tuple[Way, Indices]], price: float = 0.0) -> list[tuple[Way, Indices]]:
        """Of plans with mixes those that come first as far as layers add up, and the usual ones."""

        def value(one: tuple[Way, Indices]) -> float:
            way, choice = one
            return way.beside + way.table.cost(choice) + price * way.table.loss(choice)

        ranked = sorted(found, key=value)
        return [*ranked[:CLOSE], *(one for one in ranked[CLOSE:] if one[0].usual)]

    def judged(self, found: Iterable[tuple[Way, Indices]]) -> list[Solution]:
        """What plans with mixes come to, without those that break a constraint."""
        return [one for way, choice in found if (one := self._judge(way, choice)) is not None]

    def merit(self, solution: Solution) -> float:
        """What solutions are compared by: the value, and a little for the bytes."""
        return solution.value + self._byte_price * solution.bytes

    def refusal(self) -> PlanError:
        """Says what could be reached of the limits by the solutions that were judged."""
        limits = self.constraints.limits
        told = "; ".join(
            f"{name} is {limits[name]:.6g}, the least that was found is {least:.6g}"
            for name, least in self._least.items()
        )
        return PlanError(f"no mix of formats was found whose plan keeps the constraints: {told or 'no plan was found'}")

    @cached_property
    def ways(self) -> tuple[Way, ...]:
        """Plans that may be the best with some mix."""
        found: dict[tuple[object, ...], Way] = {}

        def add(plan: Plan | None, *, usual: bool = False, everywhere: bool = False) -> None:
            if plan is None or self.shares.aim.barred(plan):
                return
            key = (plan.placements, plan.decode, everywhere)
            if key not in found and (way := self._way(plan, usual, everywhere)) is not None:
                found[key] = way

        for one in self._schedules.values():
            for baseline in sorted(one.baselines, key=lambda b: " -> " in b.name):
                add(baseline.plan, usual=" -> " not in baseline.name)
        if "recipe" in self._schedules:
            add(self._schedules["recipe"].plan, usual=True, everywhere=True)
        for one in self._schedules.values():
            for plan in (one.plan, *(choice.plan for choice in one.library)):
                add(plan)
        prices = np.concatenate([np.zeros(1), *(way.table.walk.prices for way in found.values())])
        for price in np.unique(np.quantile(prices, np.linspace(0.0, 1.0, PRICES), method="nearest")):
            add(self._cheapest(float(price)))
        if not found:
            raise self._unplaced()
        return tuple(found.values())

    def _cheapest(self, price: float) -> Plan | None:
        """The best plan for a price of the loss, as far as layers add up and devices take turns; None for none."""
        shares, best, plan = self.shares, np.inf, None
        beside = price * self.problem.losses + self._byte_price * self.problem.bytes
        for mask, waiting_w in zip(*shares.sets, strict=True):
            weights = shares.aim.weights(float(waiting_w))
            chain, weights = shares.chain(weights, beside), np.append(weights, 1.0)
            if not (chain.allowed & mask[:, None] & mask).any(axis=(1, 2)).all():
                continue  # a block may run on an NPU only, and none of its formats may
            rows, most = shares.aim.rows(self.constraints.limits, float(waiting_w))
            if most.size:
                rows = np.pad(rows, ((0, 0), (0, 1)))
                one = Search(chain, mask, weights, rows, most, below=best, width=_WIDTH).run()
                value, path = one.cost, one.path
            else:
                values, paths = chain.cheapest(weights[None], mask[None])
                value, path = float(values[0]), paths[0]
            if path is not None and value < best:
                best, plan = value, shares.prices.plan(path, "")
        return plan

    @cached_property
    def _schedules(self) -> dict[str, Schedule]:
        """What the scheduler makes of the smallest mix, of the most exact one, and of the smallest for an NPU."""
        sizes, shares = self.problem.bytes, self.shares
        choices = {"small": cheapest(sizes, self.problem.losses), "exact": np.zeros(len(sizes), np.intp)}
        if shares.on_npu.any() and shares.suits_npu.any(axis=1).all():
            choices["recipe"] = cheapest(np.where(shares.suits_npu, sizes, np.inf), self.problem.losses)
        found, refused = {}, None
        for name, choice in choices.items():
            try:
                costs = shares.costs(choice)
                found[name] = schedule(costs, self.problem.objective, self.constraints, self.problem.load)
            except PlanError as error:
                refused = refused or error
        if not found and refused is not None:  # not even with the smallest mix
            raise refused
        return found

    @cached_property
    def _byte_price(self) -> float:
        """Of a byte, in the unit of values."""
        sizes = self.problem.bytes
        most = float(np.where(np.isfinite(sizes), sizes, 0.0).max(axis=1, initial=0.0).sum())
        return _BYTES * next(iter(self._schedules.values())).value / max(most, 1.0)

    def _unplaced(self) -> PlanError:
        """Says why there is no plan at all."""
        layers = zip(self.problem.layers, self.shares.suits_npu, strict=True)
        unsuited = [layer.name for layer, suits in layers if not suits.any()]
        if not unsuited:
            return self.refusal()
        return PlanError(
            f"every plan has a block on an NPU that cannot be there: {len(unsuited)} layers have no format that suits "
            f"one, the first is {unsuited[0]}"
        )

    def _way(self, plan: Plan, usual: bool, everywhere: bool) -> Way | None:
        """A plan with its table; None where its layers have nothing that suits an NPU which it uses."""
        problem, shares = self.problem, self.shares
        try:
            path = shares.prices.path(plan)
        except ValueError:  # of configurations that may run nothing
            return None
        on_npu: Flags = np.any(shares.on_npu[path], axis=1)
        recipe = [number for number, layer in enumerate(problem.layers) if on_npu[list(layer.blocks)].any()]
        bound = np.zeros((len(problem.layers), 1), np.bool_)
        bound[slice(None) if everywhere else recipe] = True
        usable = np.isfinite(problem.bytes) & (shares.suits_npu | ~bound)
        if not usable.any(axis=1).all():
            return None
        costs = shares.on(path, shares.aim.weights(shares.waiting_w(plan)))
        table = Table(np.where(usable, costs + self._byte_price * problem.bytes, np.inf), problem.losses)
        one = cheapest(np.where(usable, problem.bytes, np.inf), problem.losses)
        value = shares.aim.value(predict(shares.costs(one), plan, problem.load))
        value += self._byte_price * mix_bytes(problem.layers, problem.mix(one))
        rationale = (
            f"{problem.objective.replace('_', ' ')} with mixed formats: prompt of {problem.load.prompt_tokens}, "
            f"{problem.load.new_tokens} new tokens, on {shares.profile.machine}"
        )
        return Way(replace(plan, rationale=rationale), tuple(recipe), table, value - table.cost(one), usual)

    def _judge(self, way: Way, choice: Indices) -> Solution | None:
        key = (way, choice.tobytes())
        if key not in self._judged:
            problem, aim = self.problem, self.shares.aim
            mix = problem.mix(choice)
            prediction = predict(self.shares.costs(choice), way.plan, problem.load)
            reached = aim.reached(way.plan, prediction)
            broken = aim.beyond(reached)
            for name in self.constraints.limits:
                self._least[name] = min(self._least.get(name, np.inf), reached.get(name, 0.0))
            self._judged[key] = None if broken else Solution(
                mix=mix,
                loss=mix_loss(problem.layers, mix),
                bytes=mix_bytes(problem.layers, mix),
                value=float(aim.value(prediction)),
                unit=problem.unit,
                plan=way.plan,
                prediction=prediction,
                recipe=tuple(problem.layers[number].name for number in way.recipe),
            )  # fmt: skip
        return self._judged[key]
