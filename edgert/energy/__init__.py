"""Joules: where this machine counts them, and what a stretch of time took.

    meters = find_meters()
    with meters.measure() as window:
        …
    total(window.results).energy_uj

Every number says where it comes from; what cannot be read is `unavailable` with the reason, never 0. docs/energy.md
says what the sources cover and how far to trust them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from edgert.energy import linux
from edgert.energy.meter import DECLARED, Absence, Clock, Counter, Declared, Meter, Provenance, Register
from edgert.energy.perf import Opener, open_counter
from edgert.energy.window import Energy, Idle, Meters, Window, merge, total, why_unavailable

__all__ = [
    "DECLARED", "Absence", "Counter", "Declared", "Energy", "Idle", "Meter", "Meters", "Provenance", "Register",
    "Window", "find_meters", "merge", "total", "why_unavailable",
]  # fmt: skip

_NO_RAPL = (
    "neither /sys/class/powercap nor perf's power events have it; they need Linux on the machine itself (not in a "
    "virtual machine) and the kernel module intel_rapl_msr or rapl"
)
_NOT_FOUND = {
    "psys": _NO_RAPL,
    "package": _NO_RAPL,
    "cores": _NO_RAPL,
    "igpu": _NO_RAPL,
    "npu": "no region under /sys/class/intel_pmt has a known guid; the kernel module is pmt_telemetry",
    "battery": "no battery under /sys/class/power_supply",
}


def find_meters(
    root: Path = Path("/"),
    declared_w: Mapping[str, float] | None = None,
    *,
    clock: Clock = time.monotonic,
    perf_opener: Opener = open_counter,
) -> Meters:
    """The meters of this machine, and why the other domains have none. Reads each once.

    Args:
        root: where `sys` is.
        declared_w: watts by device, for where nothing can be read; counted as `estimated`.
        clock: seconds that only grow.
        perf_opener: opens a perf event, given its source, configuration and CPU.

    Raises:
        UsageError: declared watts are not a number above 0.
    """
    present: dict[str, Meter] = {}
    reasons: dict[str, list[str]] = {}
    found = chain(
        linux.powercap(root, present),
        linux.perf(root, present, perf_opener),
        linux.telemetry(root),
        linux.hwmon(root),
        linux.battery(root, clock),
    )
    for meter in found:  # the better source of a domain comes first
        if isinstance(meter, Absence):
            reasons.setdefault(meter.domain, []).append(meter.reason)
        else:
            present.setdefault(meter.domain, meter)
    declared = [Declared(device, watts, clock) for device, watts in (declared_w or {}).items()]
    absent = [
        Absence(domain, "; ".join(reasons.get(domain, [])) or _NOT_FOUND[domain])
        for domain in dict.fromkeys([*_NOT_FOUND, *reasons])
        if domain not in present
    ]
    return Meters([*present.values(), *declared], absent, clock=clock)
