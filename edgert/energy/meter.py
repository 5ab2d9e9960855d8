"""What joules are read from: counters that start over, and watts that somebody declares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edgert.errors import DeviceError, UsageError

Provenance = Literal["measured", "estimated", "unavailable"]
Clock = Callable[[], float]  # seconds that only grow

# An assumption: more than any machine that edgert is for draws. It says how often a counter must be read, and what is
# no wrap but a reset. The comments of Linux's i915_hwmon.c reckon with the same number.
PLAUSIBLE_W = 1000.0
DECLARED = "declared "  # how the domains of declared watts begin


class Meter(Protocol):
    """One source of joules.

    Attributes:
        domain: what it covers: `psys` (the platform), `package`, `cores`, `igpu`, `dram`, `npu`, `gpu` (a discrete
            one), `battery` or `declared DEVICE`.
        source: what is read, for people.
        provenance: `measured`, or `estimated`.
        resolution_uj: the step in which it counts; None where that is unknown or there is none.
        max_interval_s: the longest time between two reads; None where any will do.
    """

    @property
    def domain(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def provenance(self) -> Provenance: ...
    @property
    def resolution_uj(self) -> float | None: ...
    @property
    def max_interval_s(self) -> float | None: ...

    def read_uj(self) -> float:
        """Microjoules since some moment; only the difference of two reads means anything.

        Raises:
            DeviceError: it cannot be read now; the message says why and what to do.
        """


@dataclass(frozen=True)
class Absence:
    """A domain that no meter covers.

    Attributes:
        domain: as in `Meter`.
        reason: why, and what to do about it, in one line.
    """

    domain: str
    reason: str


class Register:
    """A counter that starts over.

    Args:
        read: its value in microjoules; may raise `DeviceError`.
        range_uj: the value at which it starts over; None where it never does.
    """

    def __init__(self, read: Callable[[], float], range_uj: float | None) -> None:
        self.range_uj = range_uj
        self._read = read
        self._last_uj = read()
        self._before_uj = 0.0

    def read_uj(self) -> float:
        """The value as if it never started over; right if it did so once at most since the last read."""
        value = self._read()
        if value < self._last_uj:
            if self.range_uj is None:
                raise DeviceError(f"it went back from {self._last_uj:.0f} to {value:.0f} uJ: it was reset")
            self._before_uj += self.range_uj
        self._last_uj = value
        return self._before_uj + value


@dataclass(frozen=True)
class Counter:
    """A meter that is one register, or several of the same domain (two packages, two cards) added. See `Meter`."""

    domain: str
    source: str
    registers: Sequence[Register]
    resolution_uj: float | None = None
    max_interval_s: float | None = None
    provenance: Provenance = "measured"

    def read_uj(self) -> float:
        try:
            return sum(register.read_uj() for register in self.registers)
        except DeviceError as error:
            raise DeviceError(f"{self.source}: {error}") from error


@dataclass(frozen=True)
class Declared:
    """Watts that somebody says a device draws, for as long as it is measured. See `Meter`.

    Attributes:
        device: whose.
        watts: above 0, at most `PLAUSIBLE_W`.
        clock: tells the time.
    """

    device: str
    watts: float
    clock: Clock
    resolution_uj: float | None = None
    max_interval_s: float | None = None
    provenance: Provenance = "estimated"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.watts) and 0 < self.watts <= PLAUSIBLE_W):
            limit = f"a number above 0, at most {PLAUSIBLE_W:.0f}"
            raise UsageError(f"declared watts of {self.device} are {self.watts}, expected {limit}")

    @property
    def domain(self) -> str:
        return f"{DECLARED}{self.device}"

    @property
    def source(self) -> str:
        return f"{self.watts:g} W declared for {self.device}"

    def read_uj(self) -> float:
        return self.watts * self.clock() * 1e6


def wrap_interval_s(range_uj: float | None) -> float | None:
    """How often to read a counter so that it cannot start over twice in between: half of what a wrap takes."""
    return range_uj / (PLAUSIBLE_W * 1e6) / 2 if range_uj else None
