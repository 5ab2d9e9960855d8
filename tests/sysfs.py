"""Trees of files as Linux shows the energy counters of Intel machines."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from edgert.errors import DeviceError

RANGE_UJ = 262_143_328_850  # max_energy_range_uj of a counter with steps of 2^-14 J
GUIDS = {"meteorlake": 0x130670B2, "lunarlake": 0x3072005, "pantherlake": 0x3086000}
NPU_OFFSET = {"meteorlake": 0x628, "lunarlake": 0x5D0, "pantherlake": 0x670}
IGPU_OFFSET = {"meteorlake": 0x620, "lunarlake": 0x5C8, "pantherlake": 0x668}
TELEMETRY_BYTES = 0x1000


class Sysfs:
    """A machine's `/sys` under a folder, and the perf events behind it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.perf_counts: dict[int, int] = {}  # by the event's configuration
        self.perf_allowed = True
        self.opened: list[tuple[int, int, int]] = []
        (root / "sys/class").mkdir(parents=True)

    def write(self, path: str, text: object) -> Path:
        file = self.root / "sys" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return file

    def zone(self, name: str, label: str, energy_uj: int, range_uj: int = RANGE_UJ) -> None:
        """A RAPL zone, e.g. `intel-rapl:0:1`: a folder inside its parent's, and a link to it in the class."""
        control, *numbers = name.split(":")
        parents = [":".join([control, *numbers[: end + 1]]) for end in range(len(numbers))]
        folder = "/".join(["devices/virtual/powercap", control, *parents])
        for file, text in (("name", label), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
            self.write(f"{folder}/{file}", text)
        for link, target in ((control, f"devices/virtual/powercap/{control}"), (name, folder)):
            path = self.root / "sys/class/powercap" / link
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.symlink_to(self.root / "sys" / target)

    def zone_file(self, name: str, file: str = "energy_uj") -> Path:
        return self.root / "sys/class/powercap" / name / file

    def set_uj(self, name: str, energy_uj: int) -> None:
        self.zone_file(name).write_text(f"{energy_uj}\n")

    def perf(self, *events: str, cpus: str = "0") -> None:
        """The `power` event source with events such as `pkg`."""
        codes = {"cores": 1, "pkg": 2, "ram": 3, "gpu": 4, "psys": 5}
        folder = "bus/event_source/devices/power"
        self.write(f"{folder}/type", 24)
        self.write(f"{folder}/cpumask", cpus)
        for event in events:
            self.write(f"{folder}/events/energy-{event}", f"event=0x{codes[event]:02x}")
            self.write(f"{folder}/events/energy-{event}.unit", "Joules")
            self.write(f"{folder}/events/energy-{event}.scale", "2.3283064365386962890625e-10")
            self.perf_counts[codes[event]] = 0

    def perf_opener(self, kind: int, config: int, cpu: int) -> Callable[[], int]:
        if not self.perf_allowed:
            raise DeviceError("perf_event_open: Permission denied")
        self.opened.append((kind, config, cpu))
        return lambda: self.perf_counts[config]

    def telemetry(self, machine: str, folder: str = "telem1") -> None:
        """A PMT region of the machine, and before it one that nothing is known of."""
        for name, guid in (("telem0", 0x1A067102), (folder, GUIDS[machine])):
            self.write(f"class/intel_pmt/{name}/guid", f"{guid:#x}")
            (self.root / "sys/class/intel_pmt" / name / "telem").write_bytes(bytes(TELEMETRY_BYTES))

    def set_telemetry(self, offset: int, raw: int, folder: str = "telem1") -> None:
        """Write a 64-bit container of the region."""
        file = self.root / "sys/class/intel_pmt" / folder / "telem"
        data = bytearray(file.read_bytes())
        data[offset : offset + 8] = struct.pack("<Q", raw)
        file.write_bytes(data)

    def battery(self, name: str = "BAT0", **files: object) -> None:
        for file, text in {"type": "Battery", "status": "Discharging", **files}.items():
            self.write(f"class/power_supply/{name}/{file}", text)

    def card(self, name: str, driver: str, **files: object) -> None:
        """A graphics card's hwmon folder."""
        folder = f"class/drm/{name}/device/hwmon/hwmon{len(driver)}"
        for file, text in {"name": driver, **files}.items():
            self.write(f"{folder}/{file}", text)


def meteor_lake(root: Path) -> Sysfs:
    """A laptop: every RAPL domain, the package through MSR and MMIO, perf, telemetry, a battery that charges."""
    machine = Sysfs(root)
    machine.zone("intel-rapl:0", "package-0", 1_000_000)
    machine.zone("intel-rapl:0:0", "core", 400_000)
    machine.zone("intel-rapl:0:1", "uncore", 100_000)
    machine.zone("intel-rapl:1", "psys", 3_000_000)
    machine.zone("intel-rapl-mmio:0", "package-0", 1_000_500)
    machine.perf("pkg", "cores", "gpu", "psys")
    machine.telemetry("meteorlake")
    machine.battery(status="Charging", power_now=0)
    machine.write("class/power_supply/AC/type", "Mains")
    machine.card("card1", "i915", in0_input=700)  # an integrated GPU counts no joules there
    return machine


def lunar_lake(root: Path) -> Sysfs:
    """A laptop on its battery, without psys."""
    machine = Sysfs(root)
    machine.zone("intel-rapl:0", "package-0", 5_000_000)
    machine.zone("intel-rapl:0:0", "core", 900_000)
    machine.zone("intel-rapl:0:1", "uncore", 10_000)
    machine.zone("intel-rapl-mmio:0", "package-0", 5_000_100)
    machine.telemetry("lunarlake")
    machine.battery(power_now=9_000_000, energy_now=40_000_000)
    return machine


def panther_lake(root: Path) -> Sysfs:
    """A mini PC whose kernel found the GPU's counter at 0 and dropped it: no uncore, in powercap or in perf."""
    machine = Sysfs(root)
    machine.zone("intel-rapl:0", "package-0", 7_000_000)
    machine.zone("intel-rapl:0:0", "core", 2_000_000)
    machine.zone("intel-rapl:1", "psys", 9_000_000)
    machine.zone("intel-rapl-mmio:0", "package-0", 7_000_000)
    machine.perf("pkg", "cores", "psys")
    machine.telemetry("pantherlake")
    return machine
