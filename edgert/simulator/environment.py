"""What happens around a machine while it serves: other programs, heat, the battery. Times in virtual microseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgert.errors import UsageError


@dataclass(frozen=True)
class Background:
    """Another program that takes a share of a device, so that calls there take `1 / (1 - share)` times as long.

    Attributes:
        unit: the hardware, as in `DeviceConfig.unit`.
        start_us, end_us: from when to when; `end_us` may be infinite.
        share: of the device's time, above 0 and below 1; those of one device add up.
        active_w: what the program draws above what the machine draws without it, 0 or more.
    """

    unit: str
    start_us: float
    end_us: float
    share: float
    active_w: float

    def __post_init__(self) -> None:
        where = f"background on {self.unit}"
        _check(where, "start_us", self.start_us, 0 <= self.start_us < math.inf, "a finite number, 0 or more")
        _check(where, "end_us", self.end_us, self.end_us > self.start_us, f"above start_us, {self.start_us}")
        _check(where, "share", self.share, 0 < self.share < 1, "above 0 and below 1")
        _check(where, "active_w", self.active_w, 0 <= self.active_w < math.inf, "a finite number, 0 or more")


@dataclass(frozen=True)
class Thermal:
    """What heat does: one resistance and one capacitance between what makes the heat and the room.

    The temperature strives for `ambient_c + resistance_c_per_w * watts`, and comes nearer by a factor of e every
    `time_constant_s`. That is one node of the circuit in https://doi.org/10.1145/859618.859620; a machine has many, so
    the numbers hold for the one that throttles. At `limit_c` devices slow down until `resume_c` is reached. A slowed
    call takes the same energy, over a longer time, so it draws less.

    Attributes:
        unit: the hardware that makes the heat and slows down, as in `DeviceConfig.unit`; None for all of the machine
            together, its base included.
        resistance_c_per_w: kelvins that a watt heats in the end, above 0.
        time_constant_s: resistance times capacitance, above 0.
        limit_c: degrees Celsius at which it slows down.
        resume_c: degrees Celsius at which it is as fast as before, below `limit_c`.
        factor: how many times as long calls take in between, 1 or more.
        ambient_c: temperature of the room, and of the machine at the start; below `resume_c`.
    """

    unit: str | None
    resistance_c_per_w: float
    time_constant_s: float
    limit_c: float
    resume_c: float
    factor: float
    ambient_c: float = 25.0

    def __post_init__(self) -> None:
        for name in ("resistance_c_per_w", "time_constant_s"):
            value = getattr(self, name)
            _check(self.name, name, value, 0 < value < math.inf, "a finite number above 0")
        _check(self.name, "factor", self.factor, 1 <= self.factor < math.inf, "a finite number, 1 or more")
        _check(self.name, "resume_c", self.resume_c, self.resume_c < self.limit_c, f"below limit_c, {self.limit_c}")
        _check(self.name, "ambient_c", self.ambient_c, self.ambient_c < self.resume_c, f"below {self.resume_c}")

    @property
    def name(self) -> str:
        return f"heat of {self.unit or 'the machine'}"

    def after(self, celsius: float, watts: float, time_us: float) -> float:
        """The temperature after some time at these watts."""
        steady = self._steady(watts)
        return steady + (celsius - steady) * math.exp(-time_us * 1e-6 / self.time_constant_s)

    def reaches_us(self, celsius: float, watts: float, throttled: bool) -> float:
        """When, counted from now, the throttling ends or begins at these watts; infinite where it does not."""
        target = self.resume_c if throttled else self.limit_c
        way, left = self._steady(watts) - celsius, self._steady(watts) - target
        if throttled:
            way, left = -way, -left
        if way <= left:  # there already
            return 0.0
        return self.time_constant_s * 1e6 * math.log(way / left) if left > 0 else math.inf

    def _steady(self, watts: float) -> float:
        return self.ambient_c + self.resistance_c_per_w * watts


@dataclass(frozen=True)
class Battery:
    """What supplies the machine except while it is plugged in; when it is empty, all ends.

    Attributes:
        capacity_j: above 0.
        start_share: charge at the start, 0 to 1.
        plugged_us: from when to when the machine is plugged in.
        charge_w: what goes into the battery then, 0 or more.
    """

    capacity_j: float
    start_share: float = 1.0
    plugged_us: tuple[tuple[float, float], ...] = ()
    charge_w: float = 0.0

    def __post_init__(self) -> None:
        _check("battery", "capacity_j", self.capacity_j, 0 < self.capacity_j < math.inf, "a finite number above 0")
        _check("battery", "start_share", self.start_share, 0 <= self.start_share <= 1, "0 to 1")
        _check("battery", "charge_w", self.charge_w, 0 <= self.charge_w < math.inf, "a finite number, 0 or more")
        for start_us, end_us in self.plugged_us:
            _check("battery", "plugged_us", (start_us, end_us), 0 <= start_us < end_us, "from 0 or more to later")

    def plugged(self, now_us: float) -> bool:
        return any(start_us <= now_us < end_us for start_us, end_us in self.plugged_us)


@dataclass(frozen=True)
class Environment:
    """All that happens around a machine; by default nothing. Without a battery it is on mains.

    Raises:
        UsageError: other programs take all of a device.
    """

    background: tuple[Background, ...] = ()
    thermals: tuple[Thermal, ...] = ()
    battery: Battery | None = None

    def __post_init__(self) -> None:
        for load in self.background:
            share = self.share(load.unit, load.start_us)
            _check(f"background on {load.unit}", "share of all together", share, share < 1, "below 1")

    @property
    def needs_power(self) -> bool:
        """Whether anything in it depends on what the machine draws."""
        return bool(self.thermals or self.battery)

    @property
    def changes_us(self) -> list[float]:
        """When something begins or ends, whatever the machine does; in order."""
        spans = [(load.start_us, load.end_us) for load in self.background]
        spans += self.battery.plugged_us if self.battery else ()
        return sorted({at_us for span in spans for at_us in span if math.isfinite(at_us)})

    def share(self, unit: str, now_us: float) -> float:
        """The share of a device that other programs have."""
        return sum(b.share for b in self.background if b.unit == unit and b.start_us <= now_us < b.end_us)

    def background_w(self, now_us: float) -> dict[str, float]:
        """What other programs draw, by the device that they use."""
        drawn: dict[str, float] = {}
        for load in self.background:
            if load.start_us <= now_us < load.end_us:
                drawn[load.unit] = drawn.get(load.unit, 0.0) + load.active_w
        return drawn


def _check(where: str, what: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise UsageError(f"{where}: {what} is {value}, expected {expected}")
