"""One option for each of many layers, so that a sum of costs and a sum of losses are both small. Arrays only.

For a price of the loss every layer takes its own best option: a Lagrangian relaxation (Everett, 1963,
https://doi.org/10.1287/opre.11.3.399). As the price falls from infinity to 0, layers step along their lower convex
hulls, and sorted by the price at which they do, these steps walk along the convex hull of all choices: no choice is
below it. Between two corners of the hull single exchanges come closer to a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
_SAME = 1e-12  # relative: costs that differ by less are the same, whoever added them up
_STARTS = 8  # corners of the hull from which exchanges are tried
_LEAST_LOSS = 1e-6  # nats a token: where losses are compared by their logarithms, what is below it is alike


@dataclass(frozen=True, eq=False)
class Walk:
    """The corners of the convex hull of all choices, from the least loss to the least cost.

    Attributes:
        start: option of each layer at the first corner, shape `[layers]`.
        layers, options: which layer takes which option on the way to the next corner, each `[corners - 1]`.
        prices: of the loss, at which it does, falling, `[corners - 1]`.
        costs, losses: at the corners, each `[corners]`.
    """

    start: Indices
    layers: Indices
    options: Indices
    prices: Floats
    costs: Floats
    losses: Floats

    def at(self, corner: int) -> Indices:
        """The option of each layer at a corner."""
        choice = self.start.copy()
        for layer, option in zip(self.layers[:corner], self.options[:corner], strict=True):
            choice[layer] = option
        return choice


@dataclass(frozen=True, eq=False)
class Table:
    """What the options of layers take.

    Attributes:
        costs: shape `[layers, options]`; inf where a layer has no such option. Each has one at least.
        losses: 0 or more, shape `[layers, options]`.
    """

    costs: Floats
    losses: Floats

    def cost(self, choice: Indices) -> float:
        return math.fsum(self.costs[np.arange(len(choice)), choice])

    def loss(self, choice: Indices) -> float:
        return math.fsum(self.losses[np.arange(len(choice)), choice])

    def best(self, price: float) -> Indices:
        """For each layer the option with the least cost + price * loss; among equals that with the least loss."""
        return cheapest(self.costs + price * self.losses, self.losses)

    @cached_property
    def walk(self) -> Walk:
        steps: list[tuple[float, int, int, float, float]] = []  # price, layer, option, by how much cost and loss change
        start = np.zeros(len(self.costs), np.intp)
        for layer, (costs, losses) in enumerate(zip(self.costs, self.losses, strict=True)):
            corners = envelope(costs, losses).tolist()
            start[layer] = corners[0]
            for a, b in pairwise(corners):
                saved, more = float(costs[a] - costs[b]), float(losses[b] - losses[a])
                steps.append((saved / more, layer, b, -saved, more))
        steps.sort(key=lambda step: -step[0])  # stable: a layer's own steps are in order
        return Walk(
            start,
            np.array([step[1] for step in steps], np.intp),
            np.array([step[2] for step in steps], np.intp),
            np.array([step[0] for step in steps], np.float64),
            np.cumsum([self.cost(start), *(step[3] for step in steps)]),
            np.cumsum([self.loss(start), *(step[4] for step in steps)]),
        )

    def fill(self, budget: float) -> Indices:
        """A choice with a loss of at most `budget`, and a cost of at most that of the best corner that keeps it.

        From each of the last corners that keep it, single layers change their option, those first that save most.
        Where no corner keeps it, it is the first one, with the least loss.
        """
        walk = self.walk
        last = max(0, int(np.searchsorted(walk.losses, budget * (1 + _SAME), side="right")) - 1)
        while last and self.loss(walk.at(last)) > budget:  # sums in another order differ in their last digits
            last -= 1
        found = [self._exchanged(walk.at(corner), budget) for corner in range(last, max(-1, last - _STARTS), -1)]
        return min(found, key=self.cost)  # the first of equals: the one nearest to the budget

    def _exchanged(self, choice: Indices, budget: float) -> Indices:
        every, loss = np.arange(len(choice)), self.loss(choice)
        while choice.size:
            saved = self.costs[every, choice][:, None] - self.costs
            more = self.losses - self.losses[every, choice][:, None]
            saved[(loss + more > budget) | (saved <= _SAME * np.abs(self.costs))] = 0.0
            layer, option = np.unravel_index(int(saved.argmax()), saved.shape)
            tried = choice.copy()
            tried[layer] = option
            if saved[layer, option] <= 0 or (loss := self.loss(tried)) > budget:
                break
            choice = tried
        return choice


def cheapest(totals: Floats, losses: Floats) -> Indices:
    """Along the second axis, the first of those with the least loss among those with the least total."""
    least = totals.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        near = totals <= least + _SAME * np.abs(least)
    found: Indices = np.where(near, losses, np.inf).argmin(axis=1)
    return found


def envelope(costs: Floats, losses: Floats) -> Indices:
    """The points on the lower convex hull, from the least loss to the least cost, shape `[corners]`; inf is none."""
    order = [i for i in np.lexsort((costs, losses)).tolist() if np.isfinite(costs[i])]  # among equals the first
    hull: list[int] = []
    for i in order:
        if hull and costs[i] >= costs[hull[-1]] * (1 - _SAME):
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            # b stays where the step to it saves more for its loss than the one from it.
            if (costs[a] - costs[b]) * (losses[i] - losses[b]) > (costs[b] - costs[i]) * (losses[b] - losses[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, np.intp)


def thinned(costs: Floats, losses: Floats, points: int) -> list[int]:
    """At most so many of the corners of a hull, the ends among them, evenly along it in cost and logarithm of loss."""
    if len(costs) <= points:
        return list(range(len(costs)))
    logs = np.log(np.maximum(losses, _LEAST_LOSS))
    axes = [axis / max(float(np.ptp(axis)), 1e-12) for axis in (costs, logs)]
    along = np.append(0.0, np.cumsum(np.hypot(*(np.diff(axis) for axis in axes))))
    wanted = np.linspace(0.0, along[-1], points)
    return sorted({int(np.abs(along - place).argmin()) for place in wanted})
