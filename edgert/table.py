"""Numbers that were measured at some sizes, and what they say of others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = float | NDArray[np.float64]


class Table:
    """Measured values by new tokens and past, with straight lines between them.

    Behind fewer tokens than were measured it is as behind the fewest; behind more, the line through the first and the
    last goes on, if it rises. With more new tokens than were measured it is in proportion.
    """

    def __init__(self, values: Mapping[tuple[int, int], float]) -> None:
        self._rows = {
            tokens: np.array(sorted((p, v) for (t, p), v in values.items() if t == tokens))
            for tokens in sorted({t for t, _ in values})
        }
        self._sizes = list(self._rows)

    def covers(self, tokens: int) -> bool:
        """Whether it was measured in the same phase, and with as few tokens."""
        return self._sizes[0] <= tokens and (tokens == 1 or self._sizes[-1] > 1)

    def reaches(self, tokens: int, past: float) -> bool:
        """Whether it was measured with as many tokens, and behind as many."""
        return tokens <= self._sizes[-1] and past <= max(row[-1, 0] for row in self._rows.values())

    def at(self, tokens: int, past: Floats) -> Floats:
        last = self._sizes[-1]
        if tokens >= last:
            return self._row(last, past) * (tokens / last)
        high = self._sizes[bisect_left(self._sizes, tokens)]
        if high == tokens:
            return self._row(high, past)
        low = self._sizes[bisect_left(self._sizes, tokens) - 1]
        share = (tokens - low) / (high - low)
        return self._row(low, past) * (1 - share) + self._row(high, past) * share

    def _row(self, tokens: int, past: Floats) -> Floats:
        row = self._rows[tokens]
        at, values = row[:, 0], row[:, 1]
        inside: Floats = np.interp(past, at, values)
        if len(row) > 1:  # a cache that grows makes nothing faster; noise may say so
            slope = max(0.0, (values[-1] - values[0]) / (at[-1] - at[0]))
            inside = inside + slope * np.maximum(0.0, past - at[-1])
        return inside
