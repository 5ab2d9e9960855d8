"""The cheapest way through a chain of blocks, each of which is in one of several states. Arrays only.

A state of a block is a pair: its configuration in prefill, and that in decode. What is paid is a vector, with a number
for each column (times, energy, bytes …): something for the state of every block, and something wherever the submodels
of a phase are cut. They are cut where the configuration changes; and where it stays but enters or leaves the other
phase, as a configuration that serves both phases has the same submodels in both (`Plan.submodels`).

Without limits one sweep of a dynamic programme finds the optimum. What a cut takes is a sum of a part for the side that
is left and a part for the side that is entered, so a step with n configurations takes O(n²), not O(n⁴). Limits on sums
of columns make it a shortest path under resource constraints: Lagrangian multipliers bound it from below (Handler and
Zang, https://doi.org/10.1002/net.3230100403); then partial ways ("labels") are kept that no other one dominates, and
that may still end within the limits and below the best that is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Flags = NDArray[np.bool_]
WIDTH = 1000  # labels that are kept at a block; with more the search is no longer exact, and says so
_SPARE = 10  # times as many labels are compared with each other
_WIDER = 10  # times as many labels are kept in every further search
_SAME = 1e-11  # relative: sums of the same numbers in another order differ less
_SLACK = 1e-9  # relative: a limit that is passed by less is kept


@dataclass(frozen=True, eq=False)
class Chain:
    """Blocks in a row, with `n` configurations in each of two phases.

    Attributes:
        kinds: of each block its row in `nodes` and `allowed`, shape `[blocks]`.
        nodes: what a block takes, shape `[kinds, columns, n, n]`: configuration in prefill, configuration in decode.
        allowed: which states a block may be in, shape `[kinds, n, n]`.
        leaving: what a cut after a block takes on the configuration before it, shape `[blocks - 1, columns, 2, n]`,
            the phases being prefill and decode.
        entering: the same for the configuration behind it.
        split: whether there is a cut although the configuration stays, shape `[blocks - 1, n]`.
    """

    kinds: Indices
    nodes: Floats
    allowed: Flags
    leaving: Floats
    entering: Floats
    split: Flags

    def totals(self, path: Indices) -> Floats:
        """All columns of a way through, shape `[columns]`; `path` is `[blocks, 2]`."""
        p, d = path[:, 0], path[:, 1]
        total: Floats = self.nodes[self.kinds, :, p, d].sum(axis=0)
        at = np.arange(len(path) - 1)
        cuts = _cuts(self.split[at, p[:-1]], self.split[at, d[:-1]], p[:-1], d[:-1], p[1:], d[1:])
        for phase, cut in enumerate(cuts):
            config = path[:, phase]
            taken = self.leaving[at, :, phase, config[:-1]] + self.entering[at, :, phase, config[1:]]
            total = total + cut @ taken
        return total

    def sweep(self, weights: Floats, masks: Flags, *, backward: bool = False) -> Floats:
        """The least weighted sum by block and state, shape `[blocks, batch, n, n]`; inf where a state is not allowed.

        Forward it counts from the first block to this one, backward all that comes after this one.

        Args:
            weights: of the columns, shape `[batch, columns]`.
            masks: configurations that may be used, shape `[batch, n]`.
        """
        nodes, leaving, entering = self._weighted(weights, masks)
        found = np.zeros((len(self.kinds), *nodes.shape[1:]))
        if backward:
            for i in range(len(self.kinds) - 2, -1, -1):
                behind = nodes[self.kinds[i + 1]] + found[i + 1]
                found[i] = _step(behind, entering[i], leaving[i], self.split[i])
        else:
            found[0] = nodes[self.kinds[0]]
            for i in range(1, len(self.kinds)):
                found[i] = _step(found[i - 1], leaving[i - 1], entering[i - 1], self.split[i - 1])
                found[i] += nodes[self.kinds[i]]
        return found

    def cheapest(self, weights: Floats, masks: Flags) -> tuple[Floats, Indices]:
        """The least weighted sums, shape `[batch]` (inf where there is no way), and paths `[batch, blocks, 2]`.

        Among equals the first in the order of configurations.
        """
        values = self.sweep(weights, masks)
        _, leaving, entering = self._weighted(weights, masks)
        batch, n = values.shape[1:3]
        every = np.arange(batch)
        paths = np.zeros((batch, len(self.kinds), 2), np.intp)
        total = values[-1].reshape(batch, -1)
        least = total.min(axis=1)
        p, d = np.arange(n)[None, :, None], np.arange(n)[None, None, :]
        for i in range(len(self.kinds) - 1, -1, -1):
            paths[:, i] = np.stack(np.unravel_index(total.argmin(axis=1), (n, n)), axis=1)
            if i:
                after = paths[:, i]
                p2, d2 = after[:, 0, None, None], after[:, 1, None, None]
                split = self.split[i - 1]
                p_cut, d_cut = _cuts(split[:, None], split, p, d, p2, d2)
                out, into = leaving[i - 1], entering[i - 1]
                before = values[i - 1] + p_cut * (out[:, 0, :, None] + into[every, 0, after[:, 0]][:, None, None])
                before += d_cut * (out[:, 1, None, :] + into[every, 1, after[:, 1]][:, None, None])
                total = before.reshape(batch, -1)
        return least, paths

    def through(self, weights: Floats, masks: Flags) -> Floats:
        """The least weighted sum of all ways that have a block in a state, shape `[blocks, batch, n, n]`."""
        return self.sweep(weights, masks) + self.sweep(weights, masks, backward=True)

    def _weighted(self, weights: Floats, masks: Flags) -> tuple[Floats, Floats, Floats]:
        nodes = np.einsum("bc,kcpd->kbpd", weights, self.nodes)
        usable = self.allowed[:, None] & masks[:, :, None] & masks[:, None, :]
        cuts = (np.einsum("bc,icfn->ibfn", weights, side) for side in (self.leaving, self.entering))
        return np.where(usable, nodes, np.inf), *cuts


@dataclass(frozen=True, eq=False)
class Found:
    """What a search under limits came to.

    Attributes:
        path: shape `[blocks, 2]`; None where nothing was found that is below what was known before.
        cost: of the path; inf where there is none.
        bound: no way within the limits costs less; inf where there is none, or none below what was known before.
        multipliers: what a unit of each limit is worth, 0 or more, shape `[limits]`.
        labels: how many partial ways were kept; 0 where the multipliers settled it.
    """

    path: Indices | None
    cost: float
    bound: float
    multipliers: Floats
    labels: int


class Search:
    """The cheapest way under limits.

    Args:
        mask: configurations that may be used, shape `[n]`.
        cost: weights of the columns, shape `[columns]`.
        limits: weights of the columns for each limit, shape `[limits, columns]`.
        most: what each of these sums may come to, shape `[limits]`.
        below: the cost of a way that is known already.
        width: labels that are kept at a block.
    """

    def __init__(
        self, chain: Chain, mask: Flags, cost: Floats, limits: Floats, most: Floats, *, below: float = np.inf,
        width: int = WIDTH,
    ) -> None:  # fmt: skip
        self.chain = chain
        self.mask = mask[None]
        self.rows = np.vstack([cost, limits])
        self.most = most
        self.width = width
        self.cost = below
        self.path: Indices | None = None

    def run(self) -> Found:
        none = np.zeros(len(self.most))
        bound, path = self._solve(none)
        if not np.isfinite(bound):
            return Found(None, np.inf, np.inf, none, 0)
        # What limits are measured against: some are differences, so that `most` says nothing of their size.
        sizes = np.abs(self.rows) @ np.abs(self.chain.totals(path))
        self.sizes = sizes
        self.slack = _SLACK * np.maximum(sizes[1:], np.abs(self.most))
        self.same = _SAME * np.maximum(sizes, np.append(0.0, np.abs(self.most)))
        if self._offer(path):
            return self._found(bound, none)
        if bound >= self.cost or (self.least() > self.most + self.slack).any():
            return self._found(np.inf, none)
        bound, multipliers = self._multipliers(bound)
        labels, width = 0, 1
        # With few labels it is soon known what a good way costs, and the next search is spared all that costs more.
        while bound < self.cost - self.same[0] and width < self.width:
            width = min(width * _WIDER, self.width)
            least, kept = self._labels(multipliers, width)
            bound, labels = max(bound, least), labels + kept
        return self._found(bound, multipliers, labels)

    def least(self) -> Floats:
        """The least that each limited sum can come to by itself, shape `[limits]`."""
        kind = self.chain.kinds[0]
        usable = self.chain.allowed[kind] & self.mask[0][:, None] & self.mask[0]
        first = np.where(usable, np.tensordot(self.rows[1:], self.chain.nodes[kind], axes=1), np.inf)
        return (first + self._to_go[0]).min(axis=(1, 2))  # type: ignore[no-any-return]

    def _found(self, bound: float, multipliers: Floats, labels: int = 0) -> Found:
        cost = self.cost if self.path is not None else np.inf
        return Found(self.path, cost, min(bound, cost), multipliers, labels)

    @cached_property
    def _to_go(self) -> Floats:
        """What each limited sum takes at least after a block, shape `[blocks, limits, n, n]`."""
        return self.chain.sweep(self.rows[1:], np.repeat(self.mask, len(self.most), axis=0), backward=True)

    def _solve(self, multipliers: Floats) -> tuple[float, Indices]:
        weights = self.rows[0] + multipliers @ self.rows[1:]
        value, paths = self.chain.cheapest(weights[None], self.mask)
        return float(value[0] - multipliers @ self.most), paths[0]

    def _offer(self, path: Indices) -> bool:
        """Take a path that is within the limits, if it is the cheapest so far; whether it is within them."""
        cost, *used = self.rows @ self.chain.totals(path)
        within = bool((np.array(used) <= self.most + self.slack).all())
        if within and cost < self.cost:
            self.cost, self.path = float(cost), path
        return within

    def _multipliers(self, bound: float) -> tuple[float, Floats]:
        """Multipliers with a high bound, one after the other: the best where there is one limit."""
        best = np.zeros(len(self.most))
        current = best.copy()
        for number in [*range(len(self.most))] * (1 if len(self.most) == 1 else 3):
            current[number] = 0.0
            value, low = self._solve(current)
            # The least of the limited sum, and among equals the cheapest: in each other's units.
            weights = self.rows[1 + number] + _SLACK * self.sizes[1 + number] / self.sizes[0] * self.rows[0]
            _, paths = self.chain.cheapest(weights[None], self.mask)
            high = paths[0]
            for _ in range(30):
                # Each path is a line over the multiplier; the two cross where the bound is at most this high.
                (base_low, over_low), (base_high, over_high) = (self._line(p, current, number) for p in (low, high))
                if over_low <= self.slack[number] or over_low - over_high <= self.slack[number]:
                    break
                current[number] = max(0.0, (base_high - base_low) / (over_low - over_high))
                value, path = self._solve(current)
                self._offer(path)
                if value >= base_low + current[number] * over_low - self.same[0]:
                    break
                low, high = (path, high) if self._line(path, current, number)[1] > 0 else (low, path)
            if value > bound:
                bound, best = value, current.copy()
            # One path breaks the limit and the other keeps it: often the best goes along one and then the other.
            for cut in range(1, len(low)):
                self._offer(np.concatenate([low[:cut], high[cut:]]))
                self._offer(np.concatenate([high[:cut], low[cut:]]))
        return bound, best

    def _line(self, path: Indices, multipliers: Floats, number: int) -> tuple[float, float]:
        cost, *used = self.rows @ self.chain.totals(path)
        over = np.array(used) - self.most
        others = np.delete(multipliers * over, number).sum()
        return float(cost + others), float(over[number])

    def _labels(self, multipliers: Floats, width: int) -> tuple[float, int]:
        """Search until no label is left that may lead to something better; the bound, and the labels kept."""
        chain, n = self.chain, self.chain.nodes.shape[-1]
        price = np.append(1.0, multipliers)
        offset = float(multipliers @ self.most)
        lagrangian = chain.sweep((price @ self.rows)[None], self.mask, backward=True)[:, 0]
        nodes = np.einsum("rc,kcpd->krpd", self.rows, chain.nodes).reshape(len(chain.nodes), len(price), -1)
        leaving, entering = (np.einsum("rc,icfn->irfn", self.rows, side) for side in (chain.leaving, chain.entering))
        usable = (chain.allowed & self.mask[0][:, None] & self.mask[0]).reshape(len(chain.allowed), -1)

        states = np.flatnonzero(usable[chain.kinds[0]])
        values = nodes[chain.kinds[0]][:, states].T
        steps: list[tuple[Indices, Indices]] = [(states, np.zeros(0, np.intp))]  # states, and labels they come from
        kept, dropped = 0, np.inf
        for i in range(len(chain.kinds)):
            if i:
                after = np.flatnonzero(usable[chain.kinds[i]])
                p, d = np.divmod(states, n)
                p2, d2 = np.divmod(after, n)
                rest = price @ nodes[chain.kinds[i]][:, after] + lagrangian[i].ravel()[after] - offset
                pieces = []
                for part in np.array_split(np.arange(len(states)), 1 + len(states) * len(after) // 10**6):
                    split = chain.split[i - 1]
                    cuts = _cuts(
                        split[p[part]][:, None], split[d[part]][:, None], p[part][:, None], d[part][:, None], p2, d2
                    )
                    bound = (values[part] @ price)[:, None] + rest
                    for phase, (cut, before, behind) in enumerate(zip(cuts, (p[part], d[part]), (p2, d2), strict=True)):
                        out, into = price @ leaving[i - 1, :, phase], price @ entering[i - 1, :, phase]
                        bound = bound + cut * (out[before][:, None] + into[behind])
                    label, target = np.nonzero(bound < self.cost - self.same[0])
                    found = values[part[label]] + nodes[chain.kinds[i]][:, after[target]].T
                    for phase, (cut, before, behind) in enumerate(zip(cuts, (p[part], d[part]), (p2, d2), strict=True)):
                        taken = leaving[i - 1][:, phase, before[label]] + entering[i - 1][:, phase, behind[target]]
                        found += cut[label, target][:, None] * taken.T
                    pieces.append((part[label], after[target], found))
                parents, states, values = (np.concatenate(part) for part in zip(*pieces, strict=True))
                steps.append((states, parents))
            to_go = self._to_go[i].reshape(len(self.most), -1)[:, states].T
            within = (values[:, 1:] + to_go <= self.most + self.slack).all(axis=1)
            bounds = values @ price + lagrangian[i].ravel()[states] - offset
            chosen, dropped = _fewest(np.flatnonzero(within), bounds, _SPARE * width, dropped)
            chosen = chosen[_undominated(states[chosen], values[chosen], self.same)]
            chosen, dropped = _fewest(chosen, bounds, width, dropped)
            states, values = states[chosen], values[chosen]
            steps[-1] = (states, steps[-1][1][chosen] if i else steps[-1][1])
            kept += len(states)
        if len(states):
            last = int(values[:, 0].argmin())
            path = np.zeros((len(steps), 2), np.intp)
            for i in range(len(steps) - 1, -1, -1):
                path[i] = np.divmod(steps[i][0][last], n)
                last = int(steps[i][1][last]) if i else last
            self._offer(path)
        return min(dropped, self.cost), kept


_ALONG = ((slice(None), slice(None), None), (slice(None), None, slice(None)))  # a phase's axis in `[batch, n, n]`


def _others(values: Floats, axis: int) -> Floats:
    """For every index along an axis, the least of the values at the others."""
    if values.shape[axis] == 1:
        return np.full_like(values, np.inf)
    two = np.partition(values, 1, axis=axis)
    least, second = two.take([0], axis), two.take([1], axis)
    return np.where(values == least, second, least)


def _step(value: Floats, out: Floats, into: Floats, split: Flags) -> Floats:
    """The least value of each state of the next block, from those of this one; all `[batch, n, n]`.

    Args:
        out, into: what a cut takes on the configuration that is left, and on the one that is entered, `[batch, 2, n]`.
        split: where there is a cut although the configuration stays, `[n]`.
    """
    diagonal = np.arange(value.shape[-1])
    cut = out + into  # where the configuration stays
    stay = np.where(split, cut, 0.0)
    best = value + stay[:, 0, :, None] + stay[:, 1, None, :]
    # One phase moves. The other is cut too if its configuration is the one that is left, or the one that is entered.
    for phase, other in ((0, 1), (1, 0)):
        moved = value + out[:, phase][_ALONG[phase]] + stay[:, other][_ALONG[other]]
        moved[:, diagonal, diagonal] += cut[:, other] - stay[:, other]
        moved = _others(moved, 1 + phase)
        moved[:, diagonal, diagonal] += cut[:, other] - stay[:, other]
        best = np.minimum(best, moved + into[:, phase][_ALONG[phase]])
    both = _others(_others(value + out[:, 0, :, None] + out[:, 1, None, :], 1), 2)
    return np.minimum(best, both + into[:, 0, :, None] + into[:, 1, None, :])


def _cuts(p_split: Flags, d_split: Flags, p: Indices, d: Indices, p2: Indices, d2: Indices) -> tuple[Flags, Flags]:
    """Whether prefill and decode are cut between the states (p, d) and (p2, d2)."""
    p_moves, d_moves = p != p2, d != d2
    p_shared = d_moves & ((p == d) | (p == d2))
    d_shared = p_moves & ((d == p) | (d == p2))
    return p_moves | p_split | p_shared, d_moves | d_split | d_shared


def _fewest(chosen: Indices, bounds: Floats, most: int, dropped: float) -> tuple[Indices, float]:
    """Those with the lowest bounds, in their order, and the lowest of those that were dropped, now or before."""
    if len(chosen) <= most:
        return chosen, dropped
    order = np.argsort(bounds[chosen], kind="stable")
    return chosen[np.sort(order[:most])], min(dropped, float(bounds[chosen[order[most]]]))


def _undominated(states: Indices, values: Floats, same: Floats) -> Indices:
    """The labels than which no other one of the same state is as good in everything, in their order."""
    if not len(states):
        return np.zeros(0, np.intp)
    # Labels that differ by rounding only are most of them, as equal blocks may change places: they go first.
    scaled = np.round(values / np.where(same > 0, same, 1.0) / 8)
    order = np.lexsort((*scaled.T[::-1], states))
    keys = np.column_stack([states, scaled])[order]
    order = order[np.append(True, (keys[1:] != keys[:-1]).any(axis=1))]
    groups = np.split(order, 1 + np.flatnonzero(np.diff(states[order])))
    kept = []
    for group in groups:
        front = group[:0]
        for part in np.array_split(group, 1 + len(group) // 256):  # by rising cost: a later one dominates no earlier
            found = values[part]
            beaten = (values[front][:, None] <= found + same).all(axis=2).any(axis=0)
            part, found = part[~beaten], found[~beaten]
            as_good = np.triu((found[:, None] <= found + same).all(axis=2), 1)
            # One that is itself beaten beats nothing that its own better does not: ties by rounding keep the first.
            front = np.append(front, part[~as_good.any(axis=0)])
        kept.append(front)
    return np.sort(np.concatenate(kept))
