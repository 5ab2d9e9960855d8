"""Measuring: what a stretch of time took, domain by domain, and which domain is the machine's total."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from edgert.energy.meter import DECLARED, PLAUSIBLE_W, Absence, Clock, Meter, Provenance
from edgert.errors import DeviceError

# Never without power, so a counter of theirs that stands still does not count. An NPU or a GPU may be switched off.
_ALWAYS_ON = {"psys", "package", "cores", "dram", "battery"}
_RESET_SLACK_S = 1.0  # counters move in steps, so one may jump by more than the time since the last read allows


@dataclass(frozen=True)
class Energy:
    """What one domain took over a window.

    Attributes:
        domain: as in `Meter`; of a total, the domains that were added, e.g. `package + dram`.
        energy_uj: microjoules, 0 or more; None where `provenance` is `unavailable`.
        idle_uj: what it would have taken had the machine idled; None where that was not measured.
        duration_s: of the window.
        provenance: `measured`, `estimated` (declared watts, the firmware's guess of the NPU), or `unavailable`.
        source: what was read.
        resolution_uj: the step of the counter; None where it is unknown or there is none.
        reason: why it is unavailable, and what to do about it; empty otherwise.
    """

    domain: str
    energy_uj: float | None
    idle_uj: float | None
    duration_s: float
    provenance: Provenance
    source: str
    resolution_uj: float | None
    reason: str = ""

    @property
    def above_idle_uj(self) -> float | None:
        """Microjoules beyond idling, below 0 where noise is more than the work; None where either is unknown."""
        return None if self.energy_uj is None or self.idle_uj is None else self.energy_uj - self.idle_uj

    @property
    def mean_w(self) -> float | None:
        """Mean power; None where the energy is, or the window has no length."""
        return None if self.energy_uj is None or self.duration_s <= 0 else self.energy_uj / 1e6 / self.duration_s

    @property
    def resolved(self) -> bool:
        """Whether the window is long enough to tell its joules within a twentieth."""
        if self.energy_uj is None or self.duration_s <= 0:
            return False
        return self.resolution_uj is None or self.energy_uj >= 20 * self.resolution_uj


@dataclass(frozen=True)
class Idle:
    """What the machine draws when it has nothing to do.

    Attributes:
        watts: by domain; one that could not be measured, or was declared, is not in it.
        duration_s: of the window in which it was measured.
    """

    watts: Mapping[str, float]
    duration_s: float

    @classmethod
    def of(cls, results: Sequence[Energy]) -> Idle:
        """From the results of a window in which the machine had nothing to do."""
        watts = {energy.domain: energy.mean_w for energy in results if not energy.domain.startswith(DECLARED)}
        duration_s = max((energy.duration_s for energy in results), default=0.0)
        return cls({domain: w for domain, w in watts.items() if w is not None}, duration_s)


class Meters:
    """The meters of a machine.

    Attributes:
        present: one a domain.
        absent: domains without one.
    """

    def __init__(
        self, present: Sequence[Meter], absent: Sequence[Absence] = (), *, clock: Clock = time.monotonic
    ) -> None:
        self.present = tuple(present)
        self.absent = tuple(absent)
        self.clock = clock
        self.lock = threading.Lock()  # meters remember what they read last, and several windows may be open

    def measure(self, idle: Idle | None = None) -> Window:
        """`with meters.measure() as window: …`, then `window.results`. With `idle`, results say what idling took."""
        return Window(self, idle)


class Window:
    """A stretch of time. Meters are read at its ends, and between them each only as often as it needs."""

    def __init__(self, meters: Meters, idle: Idle | None) -> None:
        self._meters = meters
        self._idle = idle
        self._used_uj: dict[str, float] = {}
        self._first_s: dict[str, float] = {}
        self._last: dict[str, tuple[float, float]] = {}  # seconds and microjoules of the last read
        self._failed: dict[str, str] = {}
        self._began_s = self._ended_s = 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Window:
        self._began_s = self._ended_s = self._meters.clock()
        self.sample()
        if any(meter.max_interval_s is not None for meter in self._meters.present):
            self._thread = threading.Thread(target=self._keep_sampling, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def _keep_sampling(self) -> None:
        """Read each meter at its own interval: reading costs time, and wakes what it reads."""
        interval_s = {m.domain: m.max_interval_s for m in self._meters.present if m.max_interval_s is not None}
        due_s = dict(interval_s)
        waited_s = 0.0
        while not self._done.wait(min(due_s.values()) - waited_s):
            waited_s = min(due_s.values())
            due = {domain for domain, at_s in due_s.items() if at_s <= waited_s}
            self._read([meter for meter in self._meters.present if meter.domain in due])
            due_s |= {domain: waited_s + interval_s[domain] for domain in due}

    def sample(self) -> None:
        """Read every meter now."""
        self._read(self._meters.present)

    def _read(self, meters: Sequence[Meter]) -> None:
        with self._meters.lock:
            self._ended_s = self._meters.clock()
            for meter in meters:
                if meter.domain not in self._failed:
                    try:
                        self._add(meter)
                    except DeviceError as error:
                        self._failed[meter.domain] = str(error)

    def _add(self, meter: Meter) -> None:
        now_s, now_uj = self._meters.clock(), meter.read_uj()
        self._first_s.setdefault(meter.domain, now_s)
        then_s, then_uj = self._last.get(meter.domain, (now_s, now_uj))
        self._last[meter.domain] = (now_s, now_uj)
        step_uj = now_uj - then_uj
        if not 0 <= step_uj <= (now_s - then_s + _RESET_SLACK_S) * PLAUSIBLE_W * 1e6:
            raise DeviceError(
                f"{meter.source}: moved by {step_uj / 1e6:.1f} J in {now_s - then_s:.3f} s, so it was reset; "
                "measure again"
            )
        self._used_uj[meter.domain] = self._used_uj.get(meter.domain, 0.0) + step_uj

    @property
    def results(self) -> tuple[Energy, ...]:
        """One for each domain, those without a meter included, up to the last time the meters were read."""
        duration_s = self._ended_s - self._began_s
        found = [self._result(meter) for meter in self._meters.present]
        absent = [_unavailable(a.domain, "", duration_s, a.reason) for a in self._meters.absent]
        return (*found, *absent)

    def _result(self, meter: Meter) -> Energy:
        reason = self._failed.get(meter.domain)
        if reason is not None:
            return _unavailable(meter.domain, meter.source, self._ended_s - self._began_s, reason)
        used_uj = self._used_uj[meter.domain]
        duration_s = self._last[meter.domain][0] - self._first_s[meter.domain]
        if not used_uj and meter.domain in _ALWAYS_ON:
            reason = f"it did not move in {duration_s:.3f} s: it does not count, or only in larger steps"
            return _unavailable(meter.domain, meter.source, duration_s, reason)
        idle_w = None if self._idle is None else self._idle.watts.get(meter.domain)
        idle_uj = None if idle_w is None else idle_w * duration_s * 1e6
        return Energy(meter.domain, used_uj, idle_uj, duration_s, meter.provenance, meter.source, meter.resolution_uj)


def total(results: Sequence[Energy]) -> Energy:
    """The machine's total. Domains contain each other, so this is one of them, or some that do not.

    The best that is there: `psys`; `package`, with `dram` and a discrete `gpu`, which are not in it; `battery`; what
    was declared. An unavailable one says why for all of them.
    """
    there = {energy.domain: energy for energy in results if energy.energy_uj is not None}
    declared = [domain for domain in there if domain.startswith(DECLARED)]
    for domains in (["psys"], ["package", "dram", "gpu"], ["battery"], declared):
        if domains and domains[0] in there:
            return _sum([there[domain] for domain in domains if domain in there])
    reasons = why_unavailable([e for e in results if e.domain in {"psys", "package", "battery"}])
    duration_s = max((energy.duration_s for energy in results), default=0.0)
    return _unavailable("total", "", duration_s, "; ".join(reasons) or "there is no meter")


def why_unavailable(results: Sequence[Energy]) -> list[str]:
    """A line for each reason why some domains are unavailable, e.g. `npu, battery: …`."""
    domains: dict[str, list[str]] = {}
    for energy in results:
        if energy.energy_uj is None:
            domains.setdefault(energy.reason, []).append(energy.domain)
    return [f"{', '.join(names)}: {reason}" for reason, names in domains.items()]


def merge(windows: Sequence[Sequence[Energy]]) -> tuple[Energy, ...]:
    """The results of several windows of the same meters as those of one that is as long as all of them."""
    merged = []
    for same in zip(*windows, strict=True):
        duration_s = sum(energy.duration_s for energy in same)
        failed = next((energy for energy in same if energy.energy_uj is None), None)
        first = same[0]
        merged.append(
            replace(
                failed or _sum(same),
                domain=first.domain,
                source=first.source,
                resolution_uj=first.resolution_uj,
                duration_s=duration_s,
            )
        )
    return tuple(merged)


def _sum(parts: Sequence[Energy]) -> Energy:
    """Parts that are all available, added."""
    idle = [part.idle_uj for part in parts if part.idle_uj is not None]
    steps = [part.resolution_uj for part in parts if part.resolution_uj is not None]
    return Energy(
        " + ".join(part.domain for part in parts),
        sum(part.energy_uj or 0.0 for part in parts),
        sum(idle) if len(idle) == len(parts) else None,
        max(part.duration_s for part in parts),
        "measured" if all(part.provenance == "measured" for part in parts) else "estimated",
        "; ".join(part.source for part in parts),
        sum(steps) if len(steps) == len(parts) else None,
    )


def _unavailable(domain: str, source: str, duration_s: float, reason: str) -> Energy:
    return Energy(domain, None, None, duration_s, "unavailable", source, None, reason)
