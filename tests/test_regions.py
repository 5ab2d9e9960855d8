"""Regions of one memory: what is in them stays in them, wherever they are moved to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgert.regions import Move, Region, Regions


class Memory(RuleBasedStateMachine):
    """Blocks with a number in each: which region it belongs to and where in it."""

    @initialize(blocks=st.integers(0, 40))
    def begin(self, blocks: int) -> None:
        self.regions = Regions(blocks)
        self.memory = np.full(blocks, -1)
        self.contents: dict[Region, list[int]] = {}
        self.written = 0

    @rule()
    def open(self) -> None:
        self.contents[self.regions.open()] = []

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        region = self.any(data)
        self.regions.close(region)
        del self.contents[region]

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), blocks=st.integers(0, 12))
    def shrink(self, data: st.DataObject, blocks: int) -> None:
        region = self.any(data)
        self.regions.shrink(region, blocks)
        del self.contents[region][blocks:]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        regions = data.draw(st.lists(self.known(), min_size=1, max_size=3, unique=True))
        wants = {region: data.draw(st.integers(0, 16)) for region in regions}
        used = sum(max(len(kept), wants.get(region, 0)) for region, kept in self.contents.items())
        if used > len(self.memory):
            before = [(region.first, region.capacity, region.used) for region in self.contents]
            assert self.regions.missing(wants) == used - len(self.memory)
            with pytest.raises(ValueError, match=f"{used - len(self.memory)} of {len(self.memory)} blocks are missing"):
                self.regions.reserve(wants)
            assert before == [(region.first, region.capacity, region.used) for region in self.contents]
            return
        for move in self.regions.reserve(wants):
            assert 0 <= min(move.source, move.target) <= max(move.source, move.target) <= len(self.memory) - move.count
            self.memory[move.target : move.target + move.count] = self.memory[move.source : move.source + move.count]
        for region, blocks in wants.items():
            kept = self.contents[region]
            while len(kept) < blocks:
                self.memory[region.first + len(kept)] = self.written
                kept.append(self.written)
                self.written += 1

    @invariant()
    def everything_is_where_it_belongs(self) -> None:
        if not hasattr(self, "regions"):
            return
        ends = [0]
        for region in sorted(self.contents, key=lambda region: (region.first, region.end)):
            kept = self.contents[region]
            assert region.used == len(kept) <= region.capacity
            if region.capacity:
                assert ends[-1] <= region.first
                ends.append(region.end)
            assert self.memory[region.first : region.first + len(kept)].tolist() == kept
        assert ends[-1] <= len(self.memory)
        assert self.regions.free == len(self.memory) - sum(map(len, self.contents.values()))

    def known(self) -> st.SearchStrategy[Region]:
        return st.sampled_from(list(self.contents))

    def any(self, data: st.DataObject) -> Region:
        return data.draw(self.known())


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_region_that_grows_is_seldom_moved() -> None:
    regions = Regions(1000)
    growing, other = regions.open(), regions.open()
    moved = 0
    for blocks in range(1, 400):
        moved += sum(move.count for move in regions.reserve({growing: blocks, other: blocks}))
    assert moved < 4 * 800


def test_gaps_are_brought_together_for_one_that_fits_into_none() -> None:
    regions = Regions(12)
    small = [regions.open() for _ in range(3)]
    for region in small:
        regions.reserve({region: 4})
    regions.close(small[1])
    for region in (small[0], small[2]):
        regions.shrink(region, 2)
    large = regions.open()
    assert regions.reserve({large: 8}) == [Move(8, 2, 2)]
    assert (large.first, large.capacity, regions.free) == (4, 8, 0)
