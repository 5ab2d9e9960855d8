"""The machine's joules, shared out to the requests whose tokens ran.

Meters are read at most every 50 ms, as reading costs time; what they counted in between is shared by the tokens that
ran in between. Where no meter can be read, declared watts are taken for as long as the devices were busy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from edgert.energy import Energy, total

READ_EVERY_S = 0.05
RECENT_S = 5.0  # what the watts shown are the mean of


class Counted(Protocol):
    """An open `edgert.energy.Window`."""

    @property
    def results(self) -> tuple[Energy, ...]: ...
    def sample(self) -> None: ...


@dataclass
class _Share:
    joules: float = 0.0
    pending: int = 0  # tokens since the meters were read


class Joules:
    """What each request took of the machine's energy.

    Args:
        window: the machine's meters; None where there are none.
        declared_w: watts by device, and of the machine without them as `base`.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        window: Counted | None,
        declared_w: Mapping[str, float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._emulated = False
        self._window = window
        self._declared_w = declared_w
        self._base_w = declared_w.get("base", 0.0)
        self._units: frozenset[str] = frozenset()
        self._clock = clock
        self._shares: dict[int, _Share] = {}
        self._read_s = self._counted = 0.0
        self._provenance = "unavailable"
        self._recent: deque[tuple[float, float]] = deque()  # seconds and joules of each reading
        self._declared_j = 0.0  # of devices
        self.rest()

    def use(self, units: Collection[str], *, emulated: bool) -> None:
        """Say which hardware runs from now on, and whether it is emulated, so that its energy means nothing."""
        self._units, self._emulated = frozenset(units), emulated

    def rest(self) -> None:
        """Called before work begins after a pause: what idling took is nobody's."""
        self._settle(share=False)

    def step(self, tokens: Mapping[int, int], busy_us: float) -> None:
        """Count a step.

        Args:
            tokens: that ran, by request.
            busy_us: how long devices were busy with them.
        """
        devices_j = sum(w for device, w in self._declared_w.items() if device in self._units) * busy_us / 1e6
        step_j = devices_j + self._base_w * busy_us / 1e6
        self._declared_j += devices_j
        all_tokens = sum(tokens.values())
        for id, count in tokens.items():
            share = self._shares.setdefault(id, _Share())
            share.pending += count
            if self._by_declaration:
                share.joules += step_j * count / all_tokens
        if self._clock() - self._read_s >= READ_EVERY_S:
            self._settle(share=True)

    def of(self, id: int, *, last: bool = False) -> tuple[float | None, str]:
        """Joules of a request so far, and where they come from: `measured`, `estimated`, `unavailable`, `emulated`.

        Args:
            last: read the meters now, as it ends.
        """
        if self._emulated:
            return None, "emulated"
        share = self._shares.get(id, _Share())
        if last and share.pending:
            self._settle(share=True)
        provenance = self.provenance
        return (None if provenance == "unavailable" else share.joules), provenance

    def forget(self, id: int) -> None:
        self._shares.pop(id, None)

    @property
    def provenance(self) -> str:
        if self._emulated:
            return "emulated"
        return "estimated" if self._by_declaration else self._provenance

    def watts(self) -> float | None:
        """The machine's mean over the last seconds; None where nobody knows."""
        if self._clock() - self._read_s >= READ_EVERY_S:
            self._settle(share=True)
        if self.provenance in ("unavailable", "emulated") or len(self._recent) < 2:
            return None
        (first_s, first_j), (last_s, last_j) = self._recent[0], self._recent[-1]
        if last_s <= first_s:
            return None
        return (last_j - first_j) / (last_s - first_s) + (self._base_w if self._by_declaration else 0.0)

    @property
    def _by_declaration(self) -> bool:
        return self._provenance == "unavailable" and any(device in self._units for device in self._declared_w)

    def _settle(self, *, share: bool) -> None:
        """Read the meters, and share out what they counted since the last time."""
        used = 0.0
        if self._window is not None:
            self._window.sample()
            found = total(self._window.results)
            if found.energy_uj is not None:
                counted, self._provenance = found.energy_uj / 1e6, found.provenance
                used = max(0.0, counted - self._counted)
                self._counted = counted
        self._read_s = self._clock()
        self._recent.append((self._read_s, self._declared_j if self._by_declaration else self._counted))
        while len(self._recent) > 2 and self._read_s - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        pending = sum(each.pending for each in self._shares.values())
        for each in self._shares.values():
            if share and pending and not self._by_declaration:
                each.joules += used * each.pending / pending
            each.pending = 0
