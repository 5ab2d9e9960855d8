"""Two limits that are kept by pausing: mean watts of the machine, and joules in an hour."""

from __future__ import annotations

from collections import deque

MIN_PACE = 0.05  # of the time, what workers take (`protocol.Pace`): slower is no answer, but a service that hangs
PAYBACK_S = 10.0  # what was drawn above the limit is saved within about so long, so that a minute's mean holds
_HOUR_S, _BIN_S = 3600.0, 60.0
_KINDS = 64  # of work, whose watts are remembered
_SPREAD_S = 1200.0  # what is left of an hour's joules is handed out at the rate that would use it up in this time


class Pacer:
    """Holds the mean watts of the machine below a limit, by leaving a share of the time idle.

    A machine that works a share s of the time draws idle + s · (full - idle). Both ends are learnt from what is
    measured, `full` for each kind of work; until then it is what the plans' predictions say, and `idle` nothing, which
    errs towards pausing too much. What was drawn above the limit before that was known is a debt that lowers the aim
    until it is paid.

    Args:
        limit_w: watts, above 0.

    Attributes:
        informed: whether it knows anything to go by, measured or predicted; else it cannot hold the limit.
    """

    def __init__(self, limit_w: float) -> None:
        self.informed = False
        self._limit_w = limit_w
        self._idle_w: float | None = None
        self._full_w: dict[frozenset[str], float] = {}  # measured, by what ran
        self._debt_j = 0.0
        self._last: tuple[float, frozenset[str]] | None = None  # when it looked, and what ran
        self._shares = deque([1.0, 1.0], maxlen=2)  # of the last two stretches: meters tell means over about so long

    def look(self, now_s: float, work: frozenset[str], watts: float | None, predicted_w: float | None) -> float:
        """The share of time that may be worked until the next look, `MIN_PACE` to 1.

        Args:
            now_s: a clock that does not go backwards.
            work: names of what runs; empty while nothing does.
            watts: measured, mean since the last look; None where nobody knows.
            predicted_w: of this work, or of the most expensive that may come while none runs; None where nobody knows.
        """
        if watts is not None and self._last is not None:
            before_s, before = self._last
            self._debt_j = max(0.0, self._debt_j + (watts - self._limit_w) * (now_s - before_s))
            if work == before:
                self._learn(watts, work)
        self._last = now_s, work
        full_w = self._full_w.get(work, predicted_w)
        if full_w is None or not work:  # what comes may be the most expensive of all
            full_w = max([*self._full_w.values(), *([] if predicted_w is None else [predicted_w])], default=None)
        self.informed = full_w is not None
        share = self._share(full_w)
        self._shares.append(share)
        return share

    def _learn(self, watts: float, work: frozenset[str]) -> None:
        if not work:
            self._idle_w = watts if self._idle_w is None else (self._idle_w + watts) / 2
            return
        share = sum(self._shares) / len(self._shares)
        full_w = (watts - (1 - share) * min(self._idle_w or 0.0, watts)) / share
        if len(self._full_w) >= _KINDS:
            self._full_w.clear()
        # Up at once, down slowly: a meter's first mean has some idle time in it.
        self._full_w[work] = max(full_w, 0.8 * self._full_w.get(work, full_w) + 0.2 * full_w)

    def _share(self, full_w: float | None) -> float:
        aim_w = self._limit_w - self._debt_j / PAYBACK_S
        if full_w is None or full_w <= aim_w:
            return 1.0
        idle_w = min(self._idle_w or 0.0, full_w)
        if aim_w <= idle_w:
            return MIN_PACE
        return max(MIN_PACE, (aim_w - idle_w) / (full_w - idle_w))


class Budget:
    """Joules of the last hour against a limit.

    What is left is handed out at the rate that would use it up in twenty minutes. So the pace falls as the limit
    comes near, and steady work settles at 3/4 of it instead of running into it.

    Args:
        limit_j: joules in any hour, above 0; None for no limit.
    """

    def __init__(self, limit_j: float | None) -> None:
        self._limit_j = limit_j
        self._bins: deque[tuple[int, float]] = deque()  # minute, joules
        self._total_j: float | None = None  # since the beginning; None until anything was told
        self._full_w: float | None = None  # spent while working all the time
        self._last: tuple[float, bool, float, float] | None = None  # when, whether work ran, the total then, the pace

    def spend(self, joules: float, now_s: float) -> None:
        minute = int(now_s // _BIN_S)
        self._total_j = (self._total_j or 0.0) + joules
        if self._bins and self._bins[-1][0] == minute:
            joules += self._bins.pop()[1]
        self._bins.append((minute, joules))

    def spent(self, now_s: float) -> float | None:
        """Joules of the last 60 to 61 minutes; None where nobody has told of any."""
        if self._total_j is None:
            return None
        while self._bins and (self._bins[0][0] + 1) * _BIN_S <= now_s - _HOUR_S:
            self._bins.popleft()
        return sum(joules for _, joules in self._bins)

    def left_share(self, now_s: float) -> float | None:
        """What is left of the limit, 0 to 1; None without one."""
        if self._limit_j is None:
            return None
        return max(0.0, 1 - (self.spent(now_s) or 0.0) / self._limit_j)

    def look(self, now_s: float, running: bool, pace: float) -> float:
        """The share of time that may be worked until the next look, `MIN_PACE` to 1.

        Args:
            now_s: a clock that does not go backwards.
            running: whether anything is in work.
            pace: what else limits that share.
        """
        left = self.left_share(now_s)
        if self._limit_j is None or left is None:
            return 1.0
        total_j = self._total_j or 0.0
        if self._last is not None:
            before_s, ran, before_j, share = self._last
            if ran and running and now_s > before_s and total_j > before_j:
                full_w = (total_j - before_j) / (now_s - before_s) / share
                self._full_w = full_w if self._full_w is None else (self._full_w + full_w) / 2
        allowed = 1.0
        if self._full_w is not None:
            allowed = min(1.0, max(MIN_PACE, left * self._limit_j / _SPREAD_S / self._full_w))
        self._last = now_s, running, total_j, min(pace, allowed)
        return allowed
