"""Which of the loaded plans serves the next request: a policy with hysteresis, fed with plain numbers.

    switcher = Switcher([Candidate("performance", 2.1e6, 4.4e7), Candidate("battery saver", 3.0e6, 2.6e7)])
    name = switcher.choose(State(now_us=0.0, battery_share=0.8, on_battery=True))
    switcher.observe(name, now_us=2.5e6, slowdown=1.2, dearer=1.0)

What is best depends on what is short: time on mains, energy when the battery is low, both in between. The plan changes
when another has been better by a margin, at every look, for a dwell time; so it changes at most once a dwell time, and
not at all for a signal that comes and goes faster. All candidates are compiled before: a switch costs nothing, and
happens between requests only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import UsageError


@dataclass(frozen=True)
class Candidate:
    """A plan that is loaded, and what it is predicted to take for a typical request.

    Attributes:
        name: unique among the candidates.
        latency_us: of the whole request, above 0.
        energy_uj: of the machine, above 0; None where nobody knows, and then of no candidate.
        units: the hardware that it uses, as in `DeviceConfig.unit`. What is observed of a plan counts for all that use
            the same; empty: for itself only.
    """

    name: str
    latency_us: float
    energy_uj: float | None
    units: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for what, value in (("latency_us", self.latency_us), ("energy_uj", self.energy_uj)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"candidate {self.name}: {what} is {value}, expected a finite number above 0")


@dataclass(frozen=True)
class State:
    """What is seen of the machine.

    Attributes:
        now_us: any clock that does not go backwards.
        battery_share: charge, 0 to 1; None where there is no battery.
        on_battery: whether the battery supplies the machine.
        throttled: whether heat slows a device.
        waiting: requests that nobody serves yet, the next one not among them.
    """

    now_us: float
    battery_share: float | None = None
    on_battery: bool = False
    throttled: bool = False
    waiting: int = 0


@dataclass(frozen=True)
class Switch:
    """A change of plan; `source` is None for the first choice."""

    at_us: float
    source: str | None
    target: str
    reason: str


class Switcher:
    """Picks plans. It remembers; one switcher serves one run of one machine.

    Args:
        candidates: at least one; the order breaks ties.
        dwell_us: for how long another plan must have been better, 0 or more.
        margin: by how much it must be better: 0.1 means that what is to be kept low is 10 % higher with the old plan.
        low_share: charge up to which a battery that supplies the machine is low, 0 to 1.
        crowd: waiting requests from which time counts more than energy, at least 1.
        forget_us: time in which what was observed loses half its weight, above 0.

    Raises:
        UsageError: an argument is out of its range, or the energy of some candidates only is known.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        *,
        dwell_us: float = 30e6,
        margin: float = 0.1,
        low_share: float = 0.2,
        crowd: int = 4,
        forget_us: float = 300e6,
    ) -> None:
        names = [c.name for c in candidates]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"switcher: candidates are {names}, expected at least one, and no name twice")
        unknown = [c.name for c in candidates if c.energy_uj is None]
        if unknown and len(unknown) < len(names):
            raise UsageError(f"switcher: the energy of {', '.join(unknown)} is not known, but that of others is")
        for what, value, good, range_ in (
            ("dwell_us", dwell_us, dwell_us >= 0, "0 or more"),
            ("margin", margin, 0 <= margin < math.inf, "a finite number, 0 or more"),
            ("low_share", low_share, 0 <= low_share <= 1, "0 to 1"),
            ("crowd", crowd, crowd >= 1, "at least 1"),
            ("forget_us", forget_us, forget_us > 0, "above 0"),
        ):
            if not good:
                raise UsageError(f"switcher: {what} is {value}, expected {range_}")
        self.low_share = low_share
        self.current: str | None = None
        self.switches: list[Switch] = []
        self._candidates = {c.name: c for c in candidates}
        self._dwell_us, self._margin, self._crowd, self._forget_us = dwell_us, margin, crowd, forget_us
        self._beaten_since_us: float | None = None  # since when another plan has been better, at every look
        # What slows one plan slows those on the same hardware. Else each would seem as good as predicted until it is
        # tried, and the switcher would go round among them.
        self._shared: dict[str, str | frozenset[str]] = {c.name: c.units or c.name for c in candidates}
        self._seen: dict[str | frozenset[str], tuple[float, float, float]] = {}  # when, logarithms of the two ratios

    @property
    def names(self) -> tuple[str, ...]:
        """The plans that it picks from."""
        return tuple(self._candidates)

    def choose(self, state: State) -> str:
        """The plan for the next request.

        It may be called without one, too: the more often it looks, and at the latest when the state changes, the better
        it knows for how long something has been so.
        """
        why, slow, dear = self._aim(state)
        scores = {name: self._score(name, state.now_us, slow, dear) for name in self._candidates}
        best = min(scores, key=scores.__getitem__)
        if self.current is None:
            self._switch(Switch(state.now_us, None, best, why))
        elif scores[self.current] - scores[best] <= math.log1p(self._margin):
            self._beaten_since_us = None
        else:
            if self._beaten_since_us is None:
                self._beaten_since_us = state.now_us
            since_us = state.now_us - self._beaten_since_us
            if since_us >= self._dwell_us:
                gain = 1 - math.exp(scores[best] - scores[self.current])
                reason = f"{why}, {gain:.0%} less than with {self.current}"
                self._switch(Switch(state.now_us, self.current, best, reason))
        assert self.current is not None
        return self.current

    def observe(self, name: str, now_us: float, slowdown: float, dearer: float | None = None) -> None:
        """Learn from a request that had the machine to itself; others tell of their neighbours, not of their plan.

        Args:
            name: of the plan that served it.
            now_us: when it ended.
            slowdown: time that it took over the time predicted for it, above 0.
            dearer: the same of its energy; None where that was not measured.
        """
        for what, value in (("slowdown", slowdown), ("dearer", dearer)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"observation of {name}: {what} is {value}, expected a finite number above 0")
        if name not in self._candidates:
            raise UsageError(f"observation of {name!r}, which is none of {', '.join(self._candidates)}")
        slow, dear = self._ratios(name, now_us)
        # The newest request counts as much as all before it.
        slow = (slow + math.log(slowdown)) / 2
        dear = dear if dearer is None else (dear + math.log(dearer)) / 2
        self._seen[self._shared[name]] = (now_us, slow, dear)

    def _switch(self, switch: Switch) -> None:
        self.current = switch.target
        self._beaten_since_us = None
        self.switches.append(switch)

    def _aim(self, state: State) -> tuple[str, int, int]:
        """What is to be kept low, in words, and the powers of time and energy in it.

        Their product is the energy-delay product (Gonzalez and Horowitz, Energy dissipation in general purpose
        microprocessors, IEEE Journal of Solid-State Circuits, September 1996).
        """
        energy = int(next(iter(self._candidates.values())).energy_uj is not None)
        if energy and state.on_battery and state.battery_share is not None and state.battery_share <= self.low_share:
            return "battery low: energy of a request", 0, 1
        # What cooling carries away bounds the watts, so requests in an hour are bounded by the energy of each.
        if energy and state.throttled:
            return "throttled: energy of a request", 0, 1
        if state.waiting >= self._crowd:
            return f"{state.waiting} requests wait: time of a request", 1, 0
        if energy and state.on_battery:
            return "on battery: energy x time of a request", 1, 1
        return ("on battery" if state.on_battery else "on mains") + ": time of a request", 1, 0

    def _score(self, name: str, now_us: float, slow: int, dear: int) -> float:
        """Logarithm of what is to be kept low."""
        candidate = self._candidates[name]
        seen_slow, seen_dear = self._ratios(name, now_us)
        score = slow * (math.log(candidate.latency_us) + seen_slow)
        return score + dear * (math.log(candidate.energy_uj or 1.0) + seen_dear)

    def _ratios(self, name: str, now_us: float) -> tuple[float, float]:
        """Logarithms of measured over predicted, time and energy; what was seen long ago counts for nothing.

        A plan that was left because it was slow is not observed any more. Forgetting is what gives it another try.
        """
        if self._shared[name] not in self._seen:
            return 0.0, 0.0
        at_us, slow, dear = self._seen[self._shared[name]]
        weight = 0.5 ** (max(0.0, now_us - at_us) / self._forget_us)
        return slow * weight, dear * weight
