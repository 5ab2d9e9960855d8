"""The best mixes of formats: for a price of the loss, for a budget, and all along the front between the two."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from edgert.errors import UsageError
from edgert.precision.hull import Floats, Indices, Table, envelope, thinned
from edgert.precision.joint import Joint
from edgert.precision.layers import Mix, mix_bytes, mix_loss
from edgert.precision.problem import Problem, Solution

__all__ = ["POINTS", "Problem", "Solution", "fill", "front", "random_mixes", "solve"]

POINTS = 40  # of a front
_NOISE = 1.0  # of random mixes: standard deviation of the logarithms of costs and losses
_TRIES = 20  # for each random mix, to be none of those before


def solve(problem: Problem, price: float) -> Solution:
    """The mix, and with a profile the plan, with the least value + price * loss.

    With a profile it is the least of those that are judged, which are the likely ones and all that are usual: every
    single configuration with the mix that is best on it, and an NPU's recipe in all blocks. A smaller model is worth a
    little too, so that what takes no time is not as large as can be.

    Args:
        price: of a nat a token, in the unit of the value; finite, 0 or more.

    Raises:
        UsageError: the price is not.
        PlanError: (with a profile) no plan keeps the constraints, or nothing is known of what it takes.
    """
    if not (np.isfinite(price) and price >= 0):
        raise UsageError(f"price is {price}, expected a finite number, 0 or more")
    joint = _joint(problem)
    if joint is None:
        return _sized(problem, _table(problem).best(price))
    found = _best(joint, price)
    if found is None:
        raise joint.refusal()
    return found


def fill(problem: Problem, budget: float) -> Solution:
    """The best mix that is found with a predicted loss of at most `budget`, nats a token; never one above it.

    It is no worse than any corner of the front that keeps the budget: between two of them, layers are exchanged one by
    one.

    Raises:
        UsageError: no mix keeps the budget.
        PlanError: see `solve`.
    """
    joint = _joint(problem)
    tables = [_table(problem)] if joint is None else [way.table for way in joint.ways]
    least = min(float(table.walk.losses[0]) for table in tables)
    if not least <= budget:
        raise UsageError(f"budget is {budget:.6g} nats a token, the least that these layers reach is {least:.6g}")
    if joint is None:
        return _sized(problem, tables[0].fill(budget))
    choices = ((way, way.table.fill(budget)) for way in joint.ways)
    kept = [(way, choice) for way, choice in choices if way.table.loss(choice) <= budget]
    found = joint.judged(joint.likely(kept)) or joint.judged(kept)
    found += [one for one in _corners(problem, POINTS) if one.loss <= budget]
    if not found:
        raise joint.refusal()
    return min(found, key=lambda one: (joint.merit(one), one.loss))


def front(problem: Problem, points: int = POINTS) -> list[Solution]:
    """Mixes along the lower convex hull of value against loss, at most so many, by ascending loss.

    Without a profile they are corners of the exact hull. With one they are the best of those that are judged (see
    `solve`) for prices along it; none of them is beaten by another one.

    Args:
        points: at least 2; evenly spread over value and the logarithm of the loss.

    Raises:
        UsageError: there are fewer points.
        PlanError: see `solve`.
    """
    if points < 2:
        raise UsageError(f"points is {points}, the least is 2")
    joint = _joint(problem)
    if joint is None:
        walk = _table(problem).walk
        return [_sized(problem, walk.at(corner)) for corner in thinned(walk.costs, walk.losses, points)]
    found = _corners(problem, points)
    if not found:
        raise joint.refusal()
    kept: list[Solution] = []
    for one in sorted(found, key=lambda one: (one.loss, joint.merit(one))):
        if not kept or joint.merit(one) < joint.merit(kept[-1]):
            kept.append(one)
    return kept


def random_mixes(problem: Problem, count: int, seed: int, lo: float, hi: float) -> list[Mix]:
    """Mixes that differ, with predicted losses spread evenly in their logarithm, by ascending wanted loss.

    Each is near the front of layers whose bytes and losses were multiplied by random factors, where its loss comes
    nearest to the wanted one. What cannot be reached is not; and there are fewer mixes where layers make no more.

    Args:
        lo, hi: nats a token, `0 < lo <= hi`.
    """
    if not 0 < lo <= hi < np.inf:
        raise UsageError(f"losses of random mixes are {lo} to {hi}, expected numbers above 0, the lower one first")
    rng = np.random.default_rng(seed)
    table, found = _table(problem), dict[bytes, Indices]()
    for number in range(count):
        for _ in range(_TRIES):
            wanted = np.log(lo) + (number + rng.random()) / count * (np.log(hi) - np.log(lo))
            choice = _drawn(table, rng, float(wanted))
            if choice.tobytes() not in found:
                found[choice.tobytes()] = choice
                break
    return [problem.mix(choice) for choice in found.values()]


def _drawn(table: Table, rng: np.random.Generator, wanted: float) -> Indices:
    """A random choice with a loss whose logarithm is near to that."""
    noise = np.exp(_NOISE * rng.standard_normal((2, *table.costs.shape)))
    walk = Table(table.costs * noise[0], table.losses * noise[1]).walk
    own = walk.start.copy()
    losses = [table.loss(own)]
    for layer, option in zip(walk.layers, walk.options, strict=True):
        losses.append(losses[-1] + float(table.losses[layer, option] - table.losses[layer, own[layer]]))
        own[layer] = option
    return walk.at(int(np.abs(np.log(np.maximum(losses, 1e-12)) - wanted).argmin()))


def _prices(costs: Floats, losses: Floats) -> list[float]:
    """For each corner of a hull, by ascending loss, a price of the loss at which it is the best."""
    if len(costs) == 1:
        return [0.0]
    slopes = -np.diff(costs) / np.maximum(np.diff(losses), 1e-300)
    return [float(2 * slopes[0]), *np.sqrt(slopes[1:] * slopes[:-1]).tolist(), 0.0]


def _best(joint: Joint, price: float) -> Solution | None:
    """The best for a price of those that are judged; None where none keeps the constraints."""
    found = joint.judged(joint.near(price)) or joint.judged((way, way.table.best(price)) for way in joint.ways)
    return min(found, key=lambda one: (joint.merit(one) + price * one.loss, one.loss), default=None)


@lru_cache(maxsize=4)
def _corners(problem: Problem, points: int) -> tuple[Solution, ...]:
    """The best for prices all along the hull of what is likely, where there is one that keeps the constraints."""
    joint = _joint(problem)
    if joint is None:
        return ()
    walks = [way.table.walk for way in joint.ways]
    costs = np.concatenate([walk.costs + way.beside for walk, way in zip(walks, joint.ways, strict=True)])
    losses = np.concatenate([walk.losses for walk in walks])
    hull = envelope(costs, losses)
    wanted = hull[thinned(costs[hull], losses[hull], points)]
    found = (_best(joint, price) for price in _prices(costs[wanted], losses[wanted]))
    return tuple(one for one in found if one is not None)


@lru_cache(maxsize=4)
def _joint(problem: Problem) -> Joint | None:
    return None if problem.profile is None else Joint(problem, problem.profile)


def _table(problem: Problem) -> Table:
    """What options take where only bytes are known."""
    return Table(problem.bytes, problem.losses)


def _sized(problem: Problem, choice: Indices) -> Solution:
    mix = problem.mix(choice)
    size = mix_bytes(problem.layers, mix)
    return Solution(mix, mix_loss(problem.layers, mix), size, float(size), problem.unit)
