"""What each layer takes in each format and in each place: the time of its block, shared out.

What a layer takes has to add up, and a block's time is the longer of reading and computing. So the time of a block is
looked up with all its layers in the same format (`Costs` knows measured blocks, and reckons the others) and shared out
to them by their bytes; a mixed block takes of each layer its share of the block in that layer's format. That is exact
for blocks of one format and for those that only read, and in between else. It only ranks: the value of a solution is
what `predict` says of the mix, and that reckons a mixed block by the profile's rates even where uniform ones were
measured.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from edgert.cost import Costs
from edgert.device import DeviceKind
from edgert.graph import BlockGraph
from edgert.placement import Plan
from edgert.precision.formats import FORMATS
from edgert.precision.hull import Floats, Indices, cheapest
from edgert.precision.layers import graph_with
from edgert.precision.problem import Problem
from edgert.profile import Profile
from edgert.scheduler import Constraints
from edgert.scheduler.labels import Chain, Flags
from edgert.scheduler.objectives import Aim
from edgert.scheduler.pricing import Prices


class Shares:
    """The blocks of a problem as the scheduler prices them, once for each format.

    Args:
        constraints: those of the problem, without the configurations that it does not allow.

    Attributes:
        prices: of the model in its first format; configurations, columns, sets and cuts are those of all.
        aim: the problem's.
        on_npu: which configurations are an NPU's, shape `[n]`.
        suits_npu: which options an NPU's recipe has, shape `[layers, options]`.
        numbers: for each block its layers.

    Raises:
        UsageError, PlanError: see `edgert.scheduler.schedule`.
    """

    def __init__(self, problem: Problem, profile: Profile, constraints: Constraints) -> None:
        self.problem, self.profile = problem, profile
        used = {option.format for layer in problem.layers for option in layer.options}
        kinds = [kind for kind in FORMATS if kind in used] or list(FORMATS[:1])
        self._uniform = [problem.uniform(kind) for kind in kinds]
        priced = [
            Prices(
                self.costs(choice), problem.load, forbidden=constraints.forbidden, required=constraints.required
            )
            for choice in self._uniform
        ]  # fmt: skip
        self.prices = priced[0]
        self.aim = Aim(self.prices, problem.objective, constraints)
        # What a block takes with all its layers in a format: [kinds, blocks, columns, n, n].
        self._nodes = np.array([prices.chain.nodes[prices.chain.kinds] for prices in priced])
        self.on_npu = np.array([config.kind is DeviceKind.NPU for config in self.prices.configs])
        self._kind = np.zeros(problem.bytes.shape, np.intp)
        self.suits_npu = np.zeros(problem.bytes.shape, np.bool_)
        self.numbers: list[list[int]] = [[] for _ in problem.graph.blocks]
        for number, layer in enumerate(problem.layers):
            for index in layer.blocks:
                self.numbers[index].append(number)
            for k, option in enumerate(layer.options):
                self._kind[number, k] = kinds.index(option.format)
                self.suits_npu[number, k] = option.format.npu

    def graph(self, choice: Indices) -> BlockGraph:
        """The model with these options."""
        return graph_with(self.problem.graph, self.problem.layers, self.problem.mix(choice))

    def costs(self, choice: Indices) -> Costs:
        """What it takes."""
        return Costs(self.graph(choice), self.profile, self.problem.shapes)

    @cached_property
    def sets(self) -> tuple[Flags, Floats]:
        """As `Prices.sets`; the first of them where no energy is known, as it makes no difference then what waits."""
        masks, watts = self.prices.sets
        return (masks, watts) if not self.prices.missing else (masks[:1], watts[:1])

    def waiting_w(self, plan: Plan) -> float:
        """The watts of all hardware that a plan uses, waiting."""
        used = {config.unit for config in plan.configs}
        return min(
            float(watts)
            for mask, watts in zip(*self.sets, strict=True)
            if used <= {config.unit for config, inside in zip(self.prices.configs, mask, strict=True) if inside}
        )

    def on(self, path: Indices, weights: Floats) -> Floats:
        """What each option of each layer takes on a path `[blocks, 2]`, as weighted columns: `[layers, options]`."""
        found = np.zeros(self.problem.bytes.shape)
        for index, (numbers, shares) in enumerate(zip(self.numbers, self._shares, strict=True)):
            here = self._nodes[:, index, :, path[index, 0], path[index, 1]] @ weights
            found[numbers] += shares * here[self._kind[numbers]]
        return found

    def chain(self, weights: Floats, prices: Floats) -> Chain:
        """A chain whose blocks have, in every state, the options that are the best for it.

        It has one column more: `prices` of the options that were taken.

        Args:
            weights: of the other columns; the last one weighs 1.
            prices: beside what options take, shape `[layers, options]`; inf where there is none. What two blocks share
                is paid for in the last of them.
        """
        base, n = self.prices.chain, len(self.prices.configs)
        p, d = np.indices((n, n))
        npu = self.on_npu[p] | self.on_npu[d]
        nodes = np.zeros((len(self.numbers), len(weights) + 1, n, n))
        allowed = base.allowed[base.kinds].copy()
        last = [layer.blocks[-1] for layer in self.problem.layers]
        for index, (numbers, shares) in enumerate(zip(self.numbers, self._shares, strict=True)):
            if not numbers:
                nodes[index, :-1] = self._nodes[0, index]
                continue
            here = np.einsum("c,fcpd->fpd", weights, self._nodes[:, index])
            totals = shares[:, :, None, None] * here[self._kind[numbers]] + prices[numbers][:, :, None, None]
            totals[np.broadcast_to(npu & ~self.suits_npu[numbers][:, :, None, None], totals.shape)] = np.inf
            allowed[index] &= np.isfinite(totals.min(axis=1)).all(axis=0)
            options = cheapest(totals, self.problem.losses[numbers][:, :, None, None])  # [layers of the block, n, n]
            for number, share, taken in zip(numbers, shares, options, strict=True):
                columns = self._nodes[self._kind[number, taken], index, :, p, d]  # [n, n, columns]
                nodes[index, :-1] += np.moveaxis(columns * share[taken][:, :, None], 2, 0)
                if index == last[number]:
                    nodes[index, -1] += np.where(allowed[index], prices[number, taken], 0.0)
        leaving, entering = (np.pad(side, ((0, 0), (0, 1), (0, 0), (0, 0))) for side in (base.leaving, base.entering))
        return Chain(np.arange(len(self.numbers)), nodes, allowed, leaving, entering, base.split)

    @cached_property
    def _shares(self) -> list[Floats]:
        """For each block the parts of it that its layers are, shape `[layers of the block, options]`."""
        sizes, found = self.problem.bytes, []
        for numbers in self.numbers:
            inside = np.where(np.isfinite(sizes[numbers]), sizes[numbers], 0.0)
            whole = np.array([sizes[numbers, choice[numbers]].sum() for choice in self._uniform])
            found.append(inside / whole[self._kind[numbers]])
        return found
