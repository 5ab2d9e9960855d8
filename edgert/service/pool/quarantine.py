"""Hardware that failed is left alone for a while: a minute, and twice as long each time that it fails again."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_S = 60.0
LONGEST_S = 3600.0


@dataclass
class _Record:
    until_s: float
    spell_s: float
    reason: str


class Quarantine:
    """Units (`DeviceConfig.unit`) in quarantine. Plain data: the times are the caller's."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def add(self, unit: str, reason: str, now_s: float) -> float:
        """Put a unit into quarantine; for how many seconds. One that was well for an hour begins anew."""
        record = self._records.get(unit)
        if record is None or now_s - record.until_s >= LONGEST_S:
            spell_s = FIRST_S
        elif now_s < record.until_s:  # the same failure, seen by several workers
            return record.until_s - now_s
        else:
            spell_s = min(2 * record.spell_s, LONGEST_S)
        self._records[unit] = _Record(now_s + spell_s, spell_s, reason)
        return spell_s

    def avoided(self, now_s: float) -> dict[str, str]:
        """Units in quarantine now, with the reason."""
        return {unit: record.reason for unit, record in self._records.items() if now_s < record.until_s}

    def end_s(self, unit: str) -> float:
        """When a unit came out, or comes out; 0 for one that never was in."""
        record = self._records.get(unit)
        return 0.0 if record is None else record.until_s
