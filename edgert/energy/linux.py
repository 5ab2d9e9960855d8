"""Linux's files that count joules. Each function gives the meters it finds and says of the others why not.

Elsewhere these files do not exist, and nothing is found. docs/energy.md says what each source covers, and its traps.
`covered` names the domains that have a meter already; it may grow while a function is at work.

Sources: https://docs.kernel.org/power/powercap/powercap.html; Linux's drivers/powercap/intel_rapl_common.c,
arch/x86/events/rapl.c, drivers/gpu/drm/i915/i915_hwmon.c, drivers/gpu/drm/xe/xe_hwmon.c,
Documentation/ABI/testing/sysfs-class-power; https://github.com/intel/Intel-PMT (xml/MTL, LNL, PTL: *_aggregator.xml);
https://github.com/intel/linux-npu-driver (tools/intel-npu-smi/src/pmt_telemetry.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edgert.energy.meter import Absence, Clock, Counter, Meter, Provenance, Register, wrap_interval_s
from edgert.energy.perf import Opener
from edgert.errors import DeviceError

Found = Meter | Absence

_RAPL_DOMAINS = {"psys": "psys", "package": "package", "core": "cores", "uncore": "igpu", "dram": "dram"}
_PERF_DOMAINS = {"psys": "psys", "pkg": "package", "cores": "cores", "gpu": "igpu", "ram": "dram"}
# The same package counted again, through other registers: what the first of these tells is what is read.
_RAPL_INTERFACES = ("intel-rapl", "intel-rapl-mmio", "intel-rapl-tpmi")
_READ_FILES = "run as root, or `sudo chmod a+r` it until the next boot (any user may then watch the power)"

# Counters are 32 bits of 2^-14 J: the telemetry by its definition, discrete GPUs by the drivers' comments.
_FRACTION_BITS = 14
_TELEMETRY_RANGE_UJ = 2.0 ** (32 - _FRACTION_BITS) * 1e6
# An assumption: firmware does not look at the battery more often, and asking it costs it time.
_BATTERY_INTERVAL_S = 1.0
_BATTERY_STEP_UJ = 3.6e6  # ACPI tells whole mWh


class _Region(NamedTuple):
    """Where a telemetry region counts: byte offsets, and what a unit of the NPU's counter is in 2^-14 J."""

    npu: int
    igpu: int | None
    npu_factor: int = 1


# By guid. Offsets of Meteor, Lunar and Panther Lake stand in Intel's definitions (VPU_ENERGY, VCCGT_ENERGY); those of
# Arrow Lake's and Wildcat Lake's NPU in its npu-smi.
_REGIONS = {
    0x130670B2: _Region(0x628, 0x620),  # Meteor Lake
    0x1306A0B2: _Region(0x628, None),  # Arrow Lake H
    0x1306A0B3: _Region(0x628, None),  # Arrow Lake
    0x1306A0B4: _Region(0x628, None),  # Arrow Lake S
    0x03072005: _Region(0x5D0, 0x5C8),  # Lunar Lake
    0x03086000: _Region(0x670, 0x668),  # Panther Lake
    0x0308D000: _Region(0x670, None, 100),  # Wildcat Lake
}


def powercap(root: Path, covered: Collection[str]) -> Iterator[Found]:
    """RAPL through `/sys/class/powercap`: of the interfaces to a domain the first one that can be read."""
    refused: dict[str, str] = {}
    for interface in _RAPL_INTERFACES:
        zones: dict[str, list[Path]] = {}
        for zone in sorted((root / "sys/class/powercap").glob(f"{interface}:*")):
            name = re.sub(r"-\d+(-die-\d+)?$", "", _text(zone / "name") or "")
            if name in _RAPL_DOMAINS:
                zones.setdefault(_RAPL_DOMAINS[name], []).append(zone)
        for domain, folders in zones.items():
            if domain in covered:
                continue
            try:
                registers = [_rapl_register(folder) for folder in folders]
                if not any(register.read_uj() for register in registers):
                    raise DeviceError(f"{folders[0] / 'energy_uj'} is 0: it has never counted")
            except DeviceError as error:
                refused.setdefault(domain, str(error))
                continue
            range_uj = min((r.range_uj for r in registers if r.range_uj), default=None)
            yield Counter(
                domain,
                "RAPL powercap " + " + ".join(folder.name for folder in folders),
                registers,
                resolution_uj=range_uj and range_uj / 2**32,
                max_interval_s=wrap_interval_s(range_uj),
            )
    yield from (Absence(domain, reason) for domain, reason in refused.items() if domain not in covered)


def _rapl_register(zone: Path) -> Register:
    # The largest value is 2^32 - 1 steps, and the next one is 0.
    largest = _text(zone / "max_energy_range_uj") or ""
    range_uj = int(largest) * 2**32 / (2**32 - 1) if largest.isdecimal() and int(largest) else None
    return Register(partial(_number, zone / "energy_uj"), range_uj)


def perf(root: Path, covered: Collection[str], opener: Opener) -> Iterator[Found]:
    """RAPL through perf events. The kernel counts their wraps, with a timer while they are open."""
    source = root / "sys/bus/event_source/devices/power"
    for event, domain in _PERF_DOMAINS.items():
        file = source / f"events/energy-{event}"
        config = re.fullmatch(r"event=(0x[0-9a-f]{1,16})", _text(file) or "")
        if not config or domain in covered:
            continue
        try:
            if _text(Path(f"{file}.unit")) != "Joules":
                raise DeviceError(f"{file}.unit is not Joules")
            scale_uj = _number(Path(f"{file}.scale")) * 1e6
            kind = int(_number(source / "type"))
            counters = [opener(kind, int(config[1], 16), cpu) for cpu in _cpus(source / "cpumask")]
            registers = [Register(partial(_scaled, count, scale_uj), None) for count in counters]
        except DeviceError as error:
            remedy = "it needs root, CAP_PERFMON, or `sudo sysctl kernel.perf_event_paranoid=0`"
            yield Absence(domain, f"perf event energy-{event}: {error}; {remedy}")
        else:
            yield Counter(domain, f"RAPL perf event energy-{event}", registers)


def _scaled(count: Callable[[], int], scale_uj: float) -> float:
    return count() * scale_uj


def _cpus(file: Path) -> list[int]:
    """One CPU of each package, from a list such as `0,8-9`."""
    text = _text(file) or ""
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text):
        raise DeviceError(f"{file} holds {text[:40]!r}, expected a list of CPUs")
    spans = [part.partition("-") for part in text.split(",")]
    return [cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)]


def telemetry(root: Path) -> Iterator[Found]:
    """Intel PMT: the NPU, and the integrated GPU where RAPL does not tell of it."""
    for folder in sorted((root / "sys/class/intel_pmt").glob("telem*")):
        guid = _text(folder / "guid") or ""
        region = _REGIONS.get(int(guid, 16)) if re.fullmatch(r"0x[0-9a-fA-F]{1,8}", guid) else None
        if region is None:
            continue
        # Intel's definition of VPU_ENERGY: "estimated by Pcode using utilization factor from the VPU".
        counters: list[tuple[str, str, int, int, Provenance]] = [
            ("npu", "firmware's estimate", region.npu, region.npu_factor, "estimated")
        ]
        if region.igpu is not None:
            counters.append(("igpu", "voltage regulator", region.igpu, 1, "measured"))
        for domain, what, offset, factor, provenance in counters:
            range_uj = factor * _TELEMETRY_RANGE_UJ
            step_uj = range_uj / 2**32
            try:
                register = Register(partial(_telemetry_uj, folder / "telem", offset, step_uj), range_uj)
            except DeviceError as error:
                yield Absence(domain, str(error))
                continue
            name = f"PMT {folder.name} {guid} at {offset:#x}, {what}"
            yield Counter(domain, name, [register], step_uj, wrap_interval_s(range_uj), provenance)


def _telemetry_uj(file: Path, offset: int, step_uj: float) -> float:
    try:
        with file.open("rb", buffering=0) as telemetry:
            telemetry.seek(offset)
            data = telemetry.read(4)
    except OSError as error:
        raise _unreadable(file, error) from error
    if len(data) < 4:
        raise DeviceError(f"{file} ends before byte {offset + 4:#x}")
    return int.from_bytes(data, "little") * step_uj


def hwmon(root: Path) -> Iterator[Found]:
    """Discrete Intel GPUs; for integrated ones the drivers show no such file.

    The drivers add up a 32-bit counter whenever the file is read, so it must be read in time, and never starts over.
    """
    registers, names = [], []
    for folder in sorted((root / "sys/class/drm").glob("card*/device/hwmon/hwmon*")):
        # `i915_gt0` is a tile of the card; of the files the first is the card, a second one its package.
        files = sorted(folder.glob("energy*_input")) if _text(folder / "name") in {"i915", "xe"} else []
        if files:
            try:
                registers.append(Register(partial(_number, files[0]), None))
            except DeviceError as error:
                yield Absence("gpu", str(error))
                return
            names.append(f"{folder.parents[2].name} {files[0].name}")
    if registers:
        interval_s = wrap_interval_s(_TELEMETRY_RANGE_UJ)
        yield Counter("gpu", "hwmon " + " + ".join(names), registers, max_interval_s=interval_s)


def battery(root: Path, clock: Clock) -> Iterator[Found]:
    """The machine's batteries while they discharge: all that the machine draws, its screen too."""
    folders = []
    for folder in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(folder / "type") == "Battery" and _text(folder / "scope") != "Device":  # not a mouse's
            folders.append(folder)
    if not folders:
        return
    meter = Battery(tuple(folders), clock)
    try:
        meter.read_uj()
    except DeviceError as error:
        yield Absence(meter.domain, str(error))
    else:
        yield meter


class Battery:
    """Batteries as a meter: their power, added up over time, or what is left in them. See `Meter`.

    A power is what the firmware last told, a second ago or several; energy is told in steps of 1 mWh or more.
    """

    domain = "battery"
    provenance: Provenance = "measured"
    max_interval_s = _BATTERY_INTERVAL_S

    def __init__(self, folders: tuple[Path, ...], clock: Clock) -> None:
        self._folders = folders
        self._clock = clock
        self._last: tuple[float, float] | None = None  # seconds, microwatts
        self._used_uj = 0.0
        tells_power = any(_text(f / name) for f in folders for name in ("power_now", "current_now"))
        self._read = self._integrated if tells_power else self._spent
        self.resolution_uj = None if tells_power else _BATTERY_STEP_UJ
        what = f"power every {_BATTERY_INTERVAL_S:g} s" if tells_power else "energy_now"
        self.source = f"{' + '.join(f.name for f in folders)} {what}"

    def read_uj(self) -> float:
        states = {folder: _text(folder / "status") for folder in self._folders}
        discharging = [folder for folder, status in states.items() if status == "Discharging"]
        if not discharging or "Charging" in states.values():
            told = ", ".join(f"{folder.name} is {status}" for folder, status in states.items())
            raise DeviceError(f"{told}: a battery tells what the machine draws while it discharges; unplug the charger")
        return self._read(discharging)

    def _integrated(self, discharging: list[Path]) -> float:
        now = (self._clock(), sum(_battery_uw(folder) for folder in discharging))
        if self._last is not None:
            self._used_uj += (now[0] - self._last[0]) * (now[1] + self._last[1]) / 2
        self._last = now
        return self._used_uj

    def _spent(self, discharging: list[Path]) -> float:
        return -sum(_number(folder / "energy_now") * 3600 for folder in self._folders)  # microwatt hours


def _battery_uw(folder: Path) -> float:
    """Microwatts; some drivers give them, and the current, below 0 while the battery discharges."""
    if _text(folder / "power_now"):
        return abs(_number(folder / "power_now"))
    return abs(_number(folder / "voltage_now") * _number(folder / "current_now")) / 1e6


def _text(file: Path) -> str | None:
    """A file's text; None where it is not there, or cannot be read."""
    try:
        return file.read_text("ascii", errors="replace").strip()
    except OSError:
        return None


def _number(file: Path) -> float:
    try:
        return float(file.read_text("ascii"))
    except OSError as error:
        raise _unreadable(file, error) from error
    except ValueError as error:
        raise DeviceError(f"{file} holds no number: {error}") from error


def _unreadable(file: Path, error: OSError) -> DeviceError:
    remedy = f"; {_READ_FILES}" if isinstance(error, PermissionError) else ""
    return DeviceError(f"{file}: {error.strerror}{remedy}")
