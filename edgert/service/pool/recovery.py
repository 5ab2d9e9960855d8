"""After a worker has ended: which hardware is left alone, when the next one is started, and when to give up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from edgert.errors import BundleError, DeviceError, DeviceFailedError, MissingDependencyError, PlanError, UsageError
from edgert.service.pool.jobs import error_of
from edgert.service.pool.workers import Ended

FALLBACK_AFTER = 3  # failures in a row: then the most careful configuration is taken
FALLBACK_DEVICE = "CPU@f32"
HOPELESS_AFTER = 5  # workers in a row that never got ready
POISON_AFTER = 3  # workers in a row that ended while they had a request, without a token: it is the request
SUSPECT_AFTER = 2  # such a request then runs without newcomers, who would be taken down with it
SAFE = "CPU"  # the unit that is never avoided: what else should compute?
FIRST_S = 60.0  # of quarantine; twice as long each time that the hardware fails again
LONGEST_S = 3600.0
# Another worker would find the same.
_LASTING = (BundleError, UsageError, PlanError, MissingDependencyError)


@dataclass(frozen=True)
class Patience:
    """Times of supervision, in seconds.

    Attributes:
        backoff_s, backoff_max_s: before a new worker is started; doubled with each failure in a row.
        stop_s: that a worker may take to end when it is asked to; it may have caches to write.
        aging_s: after which a waiting background request counts as an interactive one.
        handover_s: that a model waits for memory before a busy one takes no more requests, so that it can be unloaded.
        again_s: after which an idle model leaves the most careful configuration again.
    """

    backoff_s: float = 0.1
    backoff_max_s: float = 30.0
    stop_s: float = 10.0
    aging_s: float = 30.0
    handover_s: float = 5.0
    again_s: float = 60.0


@dataclass
class Recovery:
    """The failures of one model's workers, in a row. Plain data: the times are the caller's.

    Attributes:
        failures: workers that ended unasked since the last token.
        unready: of these, the last ones that never got ready.
        own: of these, those that nothing outside has killed.
        retry_at_s: no worker is started earlier.
        since_s: when the first of them ended; None when all is well.
    """

    patience: Patience = field(default_factory=Patience)
    failures: int = 0
    unready: int = 0
    own: int = 0
    retry_at_s: float = 0.0
    since_s: float | None = None

    def failed(self, now_s: float, *, ready: bool, outside: bool = False) -> None:
        """A worker has ended; `ready`: it was usable before; `outside`: see `Ended`."""
        self.failures += 1
        self.own += not outside
        self.unready = 0 if ready else self.unready + 1
        wait_s = self.patience.backoff_s * 2.0 ** min(self.failures - 1, 30)
        self.retry_at_s = now_s + min(wait_s, self.patience.backoff_max_s)
        self.since_s = now_s if self.since_s is None else self.since_s

    def succeeded(self) -> None:
        """A token came."""
        self.failures, self.unready, self.own, self.since_s = 0, 0, 0, None

    @property
    def fallback(self) -> bool:
        return self.own >= FALLBACK_AFTER

    @property
    def hopeless(self) -> bool:
        return self.unready >= HOPELESS_AFTER


def culprits(ended: Ended, units: Collection[str]) -> list[str]:
    """The hardware that a worker's end speaks against, out of the units of its plan.

    A worker that names a unit is believed. One that crashed or hung names none: then it is whatever is not the CPU,
    as drivers are what crashes and hangs. One that was killed from outside (no memory left, a person) accuses nobody.
    """
    if ended.failed is not None:
        unit = ended.failed.unit
        return [] if unit is None or unit == SAFE else [unit]
    return [] if ended.outside else sorted(unit for unit in units if unit != SAFE)


def lasting(ended: Ended) -> bool:
    """Whether every other worker would fail in the same way, as the bundle or a setting is what is wrong."""
    if ended.failed is None or ended.failed.unit is not None:
        return False
    error = error_of(ended.failed.kind, ended.failed.message)
    return isinstance(error, _LASTING) or (isinstance(error, DeviceError) and not isinstance(error, DeviceFailedError))


@dataclass
class _Record:
    until_s: float
    spell_s: float
    reason: str


class Quarantine:
    """Hardware (`DeviceConfig.unit`) that is left alone for a while. Plain data: the times are the caller's."""

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
