"""Who has which part of one memory: parts of consecutive blocks that grow, and move when they must.

Only places are reckoned with here; whoever has the memory makes the moves that it is told. As long as what all regions
hold together is not more than there is, there is room: scattered gaps are brought together when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LEAST_BLOCKS = 4  # of a region that is not empty, where there is room


@dataclass(eq=False, slots=True)
class Region:
    """A part of the memory.

    Attributes:
        first: its first block.
        capacity: how many blocks belong to it; what follows those in use is given away when others need it.
        used: how many of them hold something.
    """

    first: int = 0
    capacity: int = 0
    used: int = 0

    @property
    def end(self) -> int:
        return self.first + self.capacity


@dataclass(frozen=True)
class Move:
    """Blocks that change their place, perhaps to one that overlaps the old one."""

    source: int
    target: int
    count: int


class Regions:
    """The parts of a memory of `blocks` blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._regions: set[Region] = set()

    @property
    def free(self) -> int:
        """How many blocks hold nothing."""
        return self.blocks - sum(region.used for region in self._regions)

    def __len__(self) -> int:
        return len(self._regions)

    def __contains__(self, region: Region) -> bool:
        return region in self._regions

    def open(self) -> Region:
        """A new region without blocks."""
        region = Region()
        self._regions.add(region)
        return region

    def close(self, region: Region) -> None:
        """Give all its blocks back."""
        self._regions.remove(region)

    def missing(self, wants: Mapping[Region, int]) -> int:
        """How many blocks beyond those that are free it would take to let each region hold so many."""
        return sum(max(0, blocks - region.used) for region, blocks in wants.items()) - self.free

    def reserve(self, wants: Mapping[Region, int]) -> list[Move]:
        """Let each region hold so many blocks from now on; it keeps those that it has.

        Returns:
            What must be moved, in this order, before anything is written.

        Raises:
            ValueError: there is not enough for all of them; nothing has changed.
        """
        if (missing := self.missing(wants)) > 0:
            raise ValueError(f"regions: {missing} of {self.blocks} blocks are missing")
        moves: list[Move] = []
        for region, blocks in wants.items():
            if blocks > region.capacity and not self._grow(region, blocks, moves):
                return moves + self._compact(wants)
            region.used = max(region.used, blocks)
        return moves

    def shrink(self, region: Region, blocks: int) -> None:
        """Keep no more than the first blocks."""
        region.used = min(region.used, blocks)

    def _grow(self, region: Region, blocks: int, moves: list[Move]) -> bool:
        """Make a region larger, twice as large if that can be, where there is a gap; the rest stays as it is."""
        wanted = max(blocks, 2 * region.capacity, _LEAST_BLOCKS)
        others = sorted((r for r in self._regions if r is not region and r.capacity), key=lambda r: r.first)
        if region.capacity:
            following = min((r.first for r in others if r.first >= region.end), default=self.blocks)
            if following - region.first >= blocks:
                region.capacity = min(wanted, following - region.first)
                return True
        starts, ends = [0, *(r.end for r in others)], [*(r.first for r in others), self.blocks]
        gaps = [(end - start, start) for start, end in zip(starts, ends, strict=True) if end - start >= blocks]
        if not gaps:
            return False
        size, start = min((gap for gap in gaps if gap[0] >= wanted), default=max(gaps))
        moves += _moves([(region.first, start, region.used)])
        region.first, region.capacity = start, min(wanted, size)
        return True

    def _compact(self, wants: Mapping[Region, int]) -> list[Move]:
        """Close all gaps; what is free becomes room for those that want to grow, the same for each."""
        order = sorted((r for r in self._regions if r.used or wants.get(r)), key=lambda r: (not r.used, r.first))
        sizes = {region: max(region.used, wants.get(region, 0)) for region in order}
        share = (self.blocks - sum(sizes.values())) // len(wants)
        down, up, packed, spread = [], [], 0, 0
        for region in order:
            capacity = sizes[region] + (share if region in wants else 0)
            down.append((region.first, packed, region.used))
            up.append((packed, spread, region.used))
            packed += region.used
            region.first, region.capacity, region.used = spread, capacity, sizes[region]
            spread += capacity
        for region in self._regions - sizes.keys():
            region.first = region.capacity = 0
        return _moves(down) + _moves(reversed(up))


def _moves(places: Iterable[tuple[int, int, int]]) -> list[Move]:
    return [Move(*place) for place in places if place[2] and place[0] != place[1]]
