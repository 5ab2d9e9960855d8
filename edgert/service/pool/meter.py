"""How much a second, over the last seconds."""

from __future__ import annotations

from collections import deque

_GRAIN_S = 0.5
_LEAST_S = 1.0  # a single token just now is no rate yet


class Meter:
    """Sums of amounts over the last `span_s` seconds. Plain data: the times are the caller's."""

    def __init__(self, span_s: float = 10.0) -> None:
        self._span_s = span_s
        self._buckets: deque[tuple[float, float]] = deque()  # when each begins, and its sum

    def add(self, amount: float, now_s: float) -> None:
        if self._buckets and now_s - self._buckets[-1][0] < _GRAIN_S:
            begin, total = self._buckets[-1]
            self._buckets[-1] = (begin, total + amount)
            return
        self._forget(now_s)
        self._buckets.append((now_s, amount))

    def total(self, now_s: float) -> float | None:
        """Of the span; None where nothing came in it."""
        self._forget(now_s)
        return sum(amount for _, amount in self._buckets) if self._buckets else None

    def rate(self, now_s: float) -> float | None:
        """A second, since the oldest amount in the span; None where nothing came in it."""
        total = self.total(now_s)
        return None if total is None else total / max(now_s - self._buckets[0][0], _LEAST_S)

    def _forget(self, now_s: float) -> None:
        while self._buckets and now_s - self._buckets[0][0] > self._span_s:
            self._buckets.popleft()
