"""The state of an environment as time passes: how fast devices are, how hot, and what is left in the battery."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

from edgert.simulator.environment import Environment


class Surroundings:
    """Begins at time 0, in a machine as cold as the room.

    Args:
        low_share: charge at which the battery counts as low, 0 to 1; None where nobody asks.

    Attributes:
        now_us: how much time has passed.
        hottest_c: of each thermal model until now, degrees Celsius.
        plugged: whether mains supply the machine.
        empty: whether the battery, which should, cannot.
    """

    def __init__(self, environment: Environment, units: Iterable[str], low_share: float | None) -> None:
        self.now_us = 0.0
        self._environment, self._units, self._low_share = environment, tuple(units), low_share
        self._changes_us = deque(environment.changes_us)
        self._celsius = [thermal.ambient_c for thermal in environment.thermals]
        self._hot = [False] * len(self._celsius)
        self.hottest_c = list(self._celsius)
        battery = environment.battery
        self._capacity_uj = battery.capacity_j * 1e6 if battery else 0.0
        self._charge_uj = self._capacity_uj * battery.start_share if battery else 0.0
        self.plugged = battery is None or battery.plugged(0.0)
        self.empty = self._low = False
        self._speeds: dict[str, float] = {}
        self._set_speeds()

    @property
    def throttled(self) -> bool:
        return any(self._hot)

    @property
    def battery_share(self) -> float | None:
        """Charge, 0 to 1; None without a battery."""
        return self._charge_uj / self._capacity_uj if self._environment.battery else None

    def speed(self, unit: str) -> float:
        """The part of its full speed that a device has for requests, above 0, at most 1."""
        return self._speeds[unit]

    def background_w(self) -> dict[str, float]:
        """What other programs draw, by the device that they use."""
        return self._environment.background_w(self.now_us)

    def next_us(self, unit_w: Mapping[str, float], total_w: float) -> float:
        """When something changes, if the devices and the machine draw these watts until then."""
        turns_us = (self.now_us + left_us for left_us in self._turns_us(self._heat_w(unit_w, total_w)))
        return min([*list(self._changes_us)[:1], *turns_us, *(self.now_us + us for us in self._drains_us(total_w))])

    def advance(self, to_us: float, unit_w: Mapping[str, float], total_w: float) -> list[str]:
        """Let time pass, no further than `next_us`; what happened at its end, in words."""
        time_us, happened = to_us - self.now_us, []
        heat_w = self._heat_w(unit_w, total_w)
        turns_us, (low_us, empty_us) = self._turns_us(heat_w), self._drains_us(total_w)
        # Compared as `next_us` computed them: rounding must not part what it found from what is reached.
        turned = [self.now_us + left_us <= to_us for left_us in turns_us]
        low, empty = self.now_us + low_us <= to_us, self.now_us + empty_us <= to_us
        for i, thermal in enumerate(self._environment.thermals):
            self._celsius[i] = thermal.after(self._celsius[i], heat_w[i], time_us)
            if turned[i]:
                self._celsius[i] = thermal.resume_c if self._hot[i] else thermal.limit_c
                self._hot[i] = not self._hot[i]
                happened.append(f"{thermal.name}: {'throttled' if self._hot[i] else 'as fast as before'}")
            self.hottest_c[i] = max(self.hottest_c[i], self._celsius[i])
        battery = self._environment.battery
        if battery and self.plugged:
            self._charge_uj = min(self._capacity_uj, self._charge_uj + battery.charge_w * time_us)
        elif battery:
            self._charge_uj = 0.0 if empty else self._charge_uj - total_w * time_us
        if low:
            self._low = True
            happened.append("battery low")
        if empty:
            self.empty = True
            happened.append("battery empty")
        self.now_us = to_us
        while self._changes_us and self._changes_us[0] <= to_us:
            self._changes_us.popleft()
        if battery and battery.plugged(to_us) != self.plugged:
            self.plugged, self._low = not self.plugged, False
            happened.append("on mains" if self.plugged else "on battery")
        self._set_speeds()
        return happened

    def _set_speeds(self) -> None:
        for unit in self._units:
            factors = [
                thermal.factor
                for thermal, hot in zip(self._environment.thermals, self._hot, strict=True)
                if hot and thermal.unit in (None, unit)
            ]
            self._speeds[unit] = (1 - self._environment.share(unit, self.now_us)) / max(factors, default=1.0)

    def _heat_w(self, unit_w: Mapping[str, float], total_w: float) -> list[float]:
        return [total_w if t.unit is None else unit_w.get(t.unit, 0.0) for t in self._environment.thermals]

    def _turns_us(self, heat_w: list[float]) -> list[float]:
        """For each thermal model the time until its throttling begins or ends."""
        states = zip(self._environment.thermals, self._celsius, heat_w, self._hot, strict=True)
        return [thermal.reaches_us(celsius, watts, hot) for thermal, celsius, watts, hot in states]

    def _drains_us(self, total_w: float) -> tuple[float, float]:
        """The time until the battery is low, and until it is empty; infinite where that does not come."""
        if self._environment.battery is None or self.plugged or total_w <= 0:
            return math.inf, math.inf
        low_us = math.inf
        if self._low_share is not None and not self._low:
            low_us = max(0.0, self._charge_uj - self._low_share * self._capacity_uj) / total_w
        return low_us, self._charge_uj / total_w
