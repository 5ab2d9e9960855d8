"""Energy meters, on file trees as Linux shows them on machines that this is not."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sysfs import IGPU_OFFSET, NPU_OFFSET, RANGE_UJ, Sysfs, lunar_lake, meteor_lake, panther_lake

from edgert.energy import Counter, Energy, Idle, Meters, Register, find_meters, merge, total
from edgert.energy.perf import PerfCounter
from edgert.errors import DeviceError, UsageError

MACHINES = {"meteorlake": meteor_lake, "lunarlake": lunar_lake, "pantherlake": panther_lake}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")


class Watch:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def find(watch: Watch) -> Callable[..., Meters]:
    def find_on(machine: Sysfs, **declared_w: float) -> Meters:
        return find_meters(machine.root, declared_w, clock=watch, perf_opener=machine.perf_opener)

    return find_on


def sources(meters: Meters) -> dict[str, str]:
    return {meter.domain: meter.source for meter in meters.present}


def reasons(meters: Meters) -> dict[str, str]:
    return {absence.domain: absence.reason for absence in meters.absent}


def by_domain(results: tuple[Energy, ...]) -> dict[str, Energy]:
    return {energy.domain: energy for energy in results}


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody read a file: tests may run as root, who may read all."""
    real = Path.open

    def opened(self: Path, *arguments: object, **options: object) -> object:
        if self.resolve() == path.resolve():
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **o: opened(self, "r", -1, *a, **o).read())  # type: ignore[attr-defined]


def test_meteor_lake(tmp_path: Path, find: Callable[..., Meters]) -> None:
    machine = meteor_lake(tmp_path)
    meters = find(machine)
    assert sources(meters) == {
        "package": "RAPL powercap intel-rapl:0",
        "cores": "RAPL powercap intel-rapl:0:0",
        "igpu": "RAPL powercap intel-rapl:0:1",
        "psys": "RAPL powercap intel-rapl:1",
        "npu": "PMT telem1 0x130670b2 at 0x628, firmware's estimate",
    }
    assert machine.opened == []  # what powercap tells is not opened again
    assert "BAT0 is Charging" in reasons(meters)["battery"]
    assert "unplug" in reasons(meters)["battery"]
    assert {"psys", "package", "igpu", "gpu"}.isdisjoint(reasons(meters))


def test_lunar_lake(tmp_path: Path, find: Callable[..., Meters]) -> None:
    meters = find(lunar_lake(tmp_path))
    assert sources(meters).keys() == {"package", "cores", "igpu", "npu", "battery"}
    assert "virtual machine" in reasons(meters)["psys"]


def test_panther_lake_takes_the_gpu_from_telemetry(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = panther_lake(tmp_path)
    meters = find(machine)
    assert sources(meters)["igpu"] == "PMT telem1 0x3086000 at 0x668, voltage regulator"
    assert reasons(meters) == {"battery": "no battery under /sys/class/power_supply"}
    with meters.measure() as window:
        watch.now_s += 1
        machine.set_telemetry(0x668, 6 << 14)
    assert by_domain(window.results)["igpu"].energy_uj == pytest.approx(6e6)
    assert by_domain(window.results)["igpu"].provenance == "measured"


def test_a_zone_that_has_never_counted_hides_no_other_source(tmp_path: Path, find: Callable[..., Meters]) -> None:
    machine = lunar_lake(tmp_path)
    machine.set_uj("intel-rapl:0:1", 0)
    meters = find(machine)
    assert sources(meters)["igpu"] == "PMT telem1 0x3072005 at 0x5c8, voltage regulator"
    assert "igpu" not in reasons(meters)
    machine.set_uj("intel-rapl:0:0", 0)
    assert "energy_uj is 0: it has never counted" in reasons(find(machine))["cores"]


def test_total_is_never_a_sum_of_nested_domains(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = meteor_lake(tmp_path)
    with find(machine).measure() as window:
        watch.now_s += 2
        for zone, used_uj in (
            ("intel-rapl:0", 20_000_000), ("intel-rapl:0:0", 12_000_000), ("intel-rapl:1", 30_000_000),
            ("intel-rapl-mmio:0", 20_000_000),
        ):  # fmt: skip
            machine.set_uj(zone, int(machine.zone_file(zone).read_text()) + used_uj)
    whole = total(window.results)
    assert (whole.domain, whole.energy_uj, whole.duration_s, whole.provenance) == ("psys", 30e6, 2, "measured")
    assert whole.mean_w == pytest.approx(15)
    found = by_domain(window.results)
    assert found["package"].energy_uj == 20e6
    assert found["igpu"].energy_uj == 0  # switched off: a zero that is one
    assert found["package"].resolution_uj == pytest.approx(1e6 / 2**14, rel=1e-4)


def test_a_psys_that_does_not_count_is_not_a_zero(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = meteor_lake(tmp_path)
    machine.zone("intel-rapl:0:2", "dram", 50)
    with find(machine).measure() as window:
        watch.now_s += 2
        machine.set_uj("intel-rapl:0", 9_000_000)
        machine.set_uj("intel-rapl:0:2", 1_000_050)
    psys = by_domain(window.results)["psys"]
    assert (psys.energy_uj, psys.provenance) == (None, "unavailable")
    assert "did not move" in psys.reason
    whole = total(window.results)
    assert (whole.domain, whole.energy_uj) == ("package + dram", 9e6)


@pytest.mark.parametrize("machine_name", MACHINES)
def test_npu(machine_name: str, tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = MACHINES[machine_name](tmp_path)
    offset = NPU_OFFSET[machine_name]
    # Just before the 32 bits start over; what lies above them in the container is not the counter's.
    machine.set_telemetry(offset, (0xABC << 32) | (2**32 - 2**14))
    machine.set_telemetry(IGPU_OFFSET[machine_name], 12345)
    with find(machine).measure() as window:
        watch.now_s += 1
        machine.set_telemetry(offset, (0xABD << 32) | (3 << 14) | 2**13)
    npu = by_domain(window.results)["npu"]
    assert npu.energy_uj == pytest.approx(4.5e6)  # 1 J to the end of the range, 3.5 J beyond
    assert npu.provenance == "estimated"
    assert npu.resolution_uj == pytest.approx(1e6 / 2**14)


def test_telemetry_of_unknown_guid_or_too_short(tmp_path: Path, find: Callable[..., Meters]) -> None:
    machine = Sysfs(tmp_path)
    machine.telemetry("lunarlake")
    machine.write("class/intel_pmt/telem1/guid", "0x12345678")
    assert "known guid" in reasons(find(machine))["npu"]
    for text in ("0x" + "f" * 40, "nonsense", ""):
        machine.write("class/intel_pmt/telem1/guid", text)
        assert "known guid" in reasons(find(machine))["npu"]
    machine.write("class/intel_pmt/telem1/guid", "0x3072005")
    (tmp_path / "sys/class/intel_pmt/telem1/telem").write_bytes(bytes(0x5D0))
    assert "ends before byte 0x5d4" in reasons(find(machine))["npu"]


def test_wrap(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    machine.set_uj("intel-rapl:0", RANGE_UJ - 2_000_000)
    with find(machine).measure() as window:
        watch.now_s += 1
        machine.set_uj("intel-rapl:0", 3_000_000)
        window.sample()
        watch.now_s += 1
        machine.set_uj("intel-rapl:0", 4_000_000)
    assert by_domain(window.results)["package"].energy_uj == pytest.approx(6_000_000 + RANGE_UJ / (2**32 - 1))


def test_counters_are_read_often_enough_for_wraps(tmp_path: Path, find: Callable[..., Meters]) -> None:
    machine = meteor_lake(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 1, range_uj=65_532_610_987)  # steps of 2^-16 J
    intervals = {meter.domain: meter.max_interval_s for meter in find(machine).present}
    assert intervals["psys"] == pytest.approx(131.07, abs=0.01)  # 262144 J at 1000 W, twice
    assert intervals["package"] == pytest.approx(32.77, abs=0.01)


def test_a_reset_is_no_wrap(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    with find(machine).measure() as window:
        watch.now_s += 1
        machine.set_uj("intel-rapl:0", 0)  # as a wrap this would be 262 kJ in a second
    package = by_domain(window.results)["package"]
    assert package.energy_uj is None
    assert "reset" in package.reason
    assert total(window.results).domain == "battery"


def test_a_range_of_zero_or_none(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    machine.zone_file("intel-rapl:0", "max_energy_range_uj").unlink()
    machine.zone_file("intel-rapl:0:0", "max_energy_range_uj").write_text("0\n")
    with find(machine).measure() as window:
        watch.now_s += 1
        machine.set_uj("intel-rapl:0", 4_000_000)
        machine.set_uj("intel-rapl:0:0", 1_900_000)
    found = by_domain(window.results)
    assert "went back from 5000000 to 4000000" in found["package"].reason
    assert (found["cores"].energy_uj, found["cores"].resolution_uj) == (1e6, None)


def test_mmio_where_msr_cannot_be_read(
    tmp_path: Path, find: Callable[..., Meters], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = lunar_lake(tmp_path)
    forbid(machine.zone_file("intel-rapl:0"), monkeypatch)
    meters = find(machine)
    assert sources(meters)["package"] == "RAPL powercap intel-rapl-mmio:0"
    assert "package" not in reasons(meters)


def test_perf_where_powercap_is_not_there(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = meteor_lake(tmp_path)
    for file in ("name", "energy_uj"):
        for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1", "intel-rapl-mmio:0"):
            machine.zone_file(zone, file).unlink()
    meters = find(machine)
    assert sources(meters)["package"] == "RAPL perf event energy-pkg"
    assert (24, 2, 0) in machine.opened
    with meters.measure() as window:
        watch.now_s += 1
        machine.perf_counts[2] += 7 * 2**32
    assert by_domain(window.results)["package"].energy_uj == pytest.approx(7e6)


def test_perf_adds_packages(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = Sysfs(tmp_path)
    machine.perf("pkg", cpus="0,8-9")
    with find(machine).measure() as window:
        watch.now_s += 1
        machine.perf_counts[2] += 2**32
    assert [cpu for _, _, cpu in machine.opened] == [0, 8, 9]
    assert by_domain(window.results)["package"].energy_uj == pytest.approx(3e6)
    for hostile in ("0-", "x", "", "9" * 50):
        machine.write("bus/event_source/devices/power/cpumask", hostile)
        assert "expected a list of CPUs" in reasons(find(machine))["package"]


def test_nothing_may_be_read(
    tmp_path: Path, find: Callable[..., Meters], monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    machine = Sysfs(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 5)
    machine.perf("pkg")
    machine.perf_allowed = False
    file = machine.zone_file("intel-rapl:0")
    forbid(file, monkeypatch)
    meters = find(machine)
    reason = reasons(meters)["package"]
    assert f"{file}: Permission denied; run as root" in reason
    assert "kernel.perf_event_paranoid=0" in reason
    with meters.measure() as window:
        watch.now_s += 1
    whole = total(window.results)
    assert (whole.energy_uj, whole.provenance, whole.mean_w) == (None, "unavailable", None)
    assert "Permission denied" in whole.reason
    assert "no battery" in whole.reason


def test_a_machine_without_any_counter(tmp_path: Path, find: Callable[..., Meters]) -> None:
    meters = find(Sysfs(tmp_path))
    assert meters.present == ()
    assert reasons(meters).keys() == {"psys", "package", "cores", "igpu", "npu", "battery"}
    with meters.measure() as window:
        pass
    assert {energy.provenance for energy in window.results} == {"unavailable"}
    assert all(energy.energy_uj is None and energy.reason for energy in window.results)


def test_discrete_gpu(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    machine.card("card1", "xe", energy1_input=10, energy1_label="card", energy2_input=5, energy2_label="pkg")
    machine.card("card2", "i915", energy1_input=100)
    machine.card("card2", "i915_gt0", energy1_input=90)  # a tile, counted in the card already
    machine.card("card3", "amdgpu", energy1_input=1)
    meters = find(machine)
    assert sources(meters)["gpu"] == "hwmon card1 energy1_input + card2 energy1_input"
    with meters.measure() as window:
        watch.now_s += 1
        machine.card("card1", "xe", energy1_input=10 + 40_000_000)
        machine.card("card2", "i915", energy1_input=100 + 2_000_000)
        machine.set_uj("intel-rapl:0", 6_000_000)
    assert by_domain(window.results)["gpu"].energy_uj == 42e6
    whole = total(window.results)
    assert (whole.domain, whole.energy_uj, whole.resolution_uj) == ("package + gpu", 43e6, None)


def test_battery_power_is_added_up(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = Sysfs(tmp_path)
    machine.battery(power_now=10_000_000)
    machine.battery("BAT1", status="Not charging", power_now=0)
    machine.battery("hidpp_battery_0", scope="Device", power_now=5)
    with find(machine).measure() as window:
        watch.now_s += 2
        machine.battery(power_now=20_000_000)
        window.sample()
        watch.now_s += 1
        machine.battery(power_now=20_000_000)
    assert total(window.results).energy_uj == pytest.approx(50e6)
    assert total(window.results).source == "BAT0 + BAT1 power every 1 s"


def test_battery_by_voltage_and_current(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = Sysfs(tmp_path)
    machine.battery(voltage_now=12_000_000, current_now=-1_500_000)
    with find(machine).measure() as window:
        watch.now_s += 3
    assert total(window.results).energy_uj == pytest.approx(54e6)


def test_battery_by_what_is_left(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = Sysfs(tmp_path)
    machine.battery(energy_now=40_000_000)
    with find(machine).measure() as window:
        watch.now_s += 60
        machine.battery(energy_now=39_900_000)
    whole = total(window.results)
    assert whole.energy_uj == pytest.approx(360e6)
    assert whole.resolution_uj == 3.6e6


def test_battery_that_is_plugged_in_meanwhile(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = Sysfs(tmp_path)
    machine.battery(power_now=10_000_000)
    with find(machine).measure() as window:
        watch.now_s += 2
        machine.battery(status="Charging", power_now=10_000_000)
    assert total(window.results).energy_uj is None
    assert "BAT0 is Charging" in total(window.results).reason


def test_declared_watts_are_an_estimate_and_the_last_resort(
    tmp_path: Path, find: Callable[..., Meters], watch: Watch
) -> None:
    machine = lunar_lake(tmp_path)
    with find(machine, CPU=15, GPU=5.5).measure() as window:
        watch.now_s += 2
        machine.set_uj("intel-rapl:0", 5_500_000)
    assert total(window.results).domain == "package"
    only_declared = tuple(e for e in window.results if e.domain.startswith("declared") or e.energy_uj is None)
    whole = total(only_declared)
    assert (whole.domain, whole.provenance) == ("declared CPU + declared GPU", "estimated")
    assert whole.energy_uj == pytest.approx(41e6)
    for watts in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(UsageError, match="declared watts of CPU"):
            find(machine, CPU=watts)


def test_idle_is_subtracted(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    meters = find(machine, CPU=15)
    with meters.measure() as window:
        watch.now_s += 10
        machine.set_uj("intel-rapl:0", 5_000_000 + 20_000_000)
        machine.battery(status="Full")
    idle = Idle.of(window.results)
    assert idle.watts["package"] == pytest.approx(2)
    assert idle.duration_s == 10
    assert {"battery", "declared CPU"}.isdisjoint(idle.watts)
    with meters.measure(idle) as window:
        watch.now_s += 3
        machine.set_uj("intel-rapl:0", 25_000_000 + 36_000_000)
    package = by_domain(window.results)["package"]
    assert (package.energy_uj, package.idle_uj) == (36e6, pytest.approx(6e6))
    assert package.above_idle_uj == pytest.approx(30e6)
    assert by_domain(window.results)["declared CPU"].above_idle_uj is None


def test_merge(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    meters = find(machine)
    windows = []
    for end_uj in (6_000_000, 9_000_000):
        with meters.measure() as window:
            watch.now_s += 2
            machine.set_uj("intel-rapl:0", end_uj)
        windows.append(window.results)
    merged = by_domain(merge(windows))
    assert (merged["package"].energy_uj, merged["package"].duration_s) == (4e6, 4)
    assert merged["package"].source == "RAPL powercap intel-rapl:0"
    assert merged["package"].resolution_uj == by_domain(windows[0])["package"].resolution_uj
    assert merged["psys"].provenance == "unavailable"


def test_a_thread_reads_in_between(watch: Watch) -> None:
    reads: list[int] = []
    enough = threading.Event()

    def read() -> float:
        reads.append(threading.get_ident())
        if len(reads) == 10:
            enough.set()
        return float(len(reads))

    meter = Counter("npu", "a counter", [Register(read, None)], max_interval_s=1e-4)
    with Meters([meter], clock=watch).measure() as window:
        assert enough.wait(30)
    assert threading.get_ident() in {reads[0], reads[-1]}
    assert len(set(reads)) == 2
    assert by_domain(window.results)["npu"].energy_uj == len(reads) - 2  # the first two are the meter's and the start's
    assert not [t for t in threading.enumerate() if t is not threading.current_thread() and t.ident in reads]


def test_a_meter_is_read_only_as_often_as_it_needs() -> None:
    """A battery every second: that must not read counters that last for minutes."""
    reads = {"battery": 0, "package": 0}
    enough = threading.Event()

    def meter(domain: str, interval_s: float) -> Counter:
        def read() -> float:
            reads[domain] += 1
            if reads["battery"] == 12:
                enough.set()
            return float(reads[domain])

        return Counter(domain, "a counter", [Register(read, None)], max_interval_s=interval_s)

    with Meters([meter("battery", 1e-4), meter("package", 1e4)]).measure():
        assert enough.wait(30)
    assert reads["package"] == 3  # when found, at the start and at the end


def test_a_counter_that_vanishes(tmp_path: Path, find: Callable[..., Meters], watch: Watch) -> None:
    machine = lunar_lake(tmp_path)
    with find(machine).measure() as window:
        watch.now_s += 1
        machine.zone_file("intel-rapl:0").unlink()
        machine.zone_file("intel-rapl:0:0").write_text("nonsense\n")
        machine.set_uj("intel-rapl:0:1", 20_000)
    found = by_domain(window.results)
    assert "No such file" in found["package"].reason
    assert "holds no number" in found["cores"].reason
    assert found["igpu"].energy_uj == 10_000


def test_perf_events_of_this_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        with pytest.raises(DeviceError, match="Linux on x86-64"):
            PerfCounter(1, 0, 0)
        return
    with pytest.raises(DeviceError, match="perf_event_open"):
        PerfCounter(0x7FFF_FFFF, 0, 0)
    try:
        counter = PerfCounter(1, 0, 0)  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK: nanoseconds
    except DeviceError as error:
        pytest.skip(f"not allowed here: {error}")
    first = counter.read()
    deadline = time.monotonic() + 30
    while counter.read() <= first and time.monotonic() < deadline:
        pass
    assert counter.read() > first
