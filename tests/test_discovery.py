"""Device discovery, on file trees of machines that have what this one lacks."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgert import discovery
from edgert.backends import openvino
from edgert.device import DeviceKind
from edgert.discovery import Absence, absences, cpu_facts, npu_platform
from edgert.errors import MissingDependencyError

LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
LUNAR_LAKE = 0x643E


class Machine:
    """A file tree as Linux shows a machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "sys/bus/pci/devices").mkdir(parents=True)
        self.plugins = root / "plugins"
        self.write("plugins/libopenvino_intel_gpu_plugin.so", "")
        self.write("plugins/libopenvino_intel_npu_plugin.so", "")

    def write(self, path: str | Path, text: str = "") -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def add(self, address: str, device: int, pci_class: int, vendor: int = 0x8086) -> None:
        for name, value in (("vendor", vendor), ("device", device), ("class", pci_class)):
            self.write(f"sys/bus/pci/devices/{address}/{name}", f"0x{value:04x}\n")

    def load(self, driver: str, address: str | None = None, node: str | None = None) -> None:
        """Load a kernel driver; bind it to the function at `address`; name a device node of it, e.g. `accel/accel0`."""
        folder = self.root / "sys/bus/pci/drivers" / driver
        folder.mkdir(parents=True, exist_ok=True)
        if address is not None:
            function = self.root / "sys/bus/pci/devices" / address
            (function / "driver").symlink_to(folder)
            if node is not None:
                (function / node).mkdir(parents=True)

    def absence(self, kind: DeviceKind) -> Absence:
        [found] = [a for a in absences(set(), self.root, self.plugins) if a.kind is kind]
        return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if os.name == "nt":
        pytest.skip("Windows has no such file names")
    for name in ("OCL_ICD_VENDORS", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    return Machine(tmp_path)


def with_npu(machine: Machine) -> Machine:
    machine.add("0000:00:0b.0", LUNAR_LAKE, 0x120000)
    return machine


def with_npu_node(machine: Machine) -> Machine:
    with_npu(machine).load("intel_vpu", "0000:00:0b.0", "accel/accel0")
    machine.write("dev/accel/accel0").chmod(0o660)
    return machine


def with_gpu_node(machine: Machine) -> Machine:
    machine.add("0000:00:02.0", 0x64A0, 0x030000)
    machine.load("xe", "0000:00:02.0", "drm/renderD128")
    machine.write("dev/dri/renderD128").chmod(0o660)
    return machine


def test_no_such_hardware(machine: Machine) -> None:
    machine.add("0000:00:00.0", 0x0D57, 0x060000)  # Intel, a bridge
    machine.add("0000:01:00.0", 0x2684, 0x030000, vendor=0x10DE)  # a GPU, not Intel's
    assert machine.absence(DeviceKind.GPU).reason == "no Intel GPU on the PCI bus"
    assert machine.absence(DeviceKind.NPU).reason == "no Intel NPU on the PCI bus"


def test_present_kinds_are_not_absent(machine: Machine) -> None:
    assert not absences({DeviceKind.GPU, DeviceKind.NPU, DeviceKind.ORT}, machine.root, machine.plugins)


def test_bus_that_cannot_be_seen(tmp_path: Path, machine: Machine) -> None:
    [npu] = absences({DeviceKind.GPU, DeviceKind.ORT}, tmp_path / "nothing", machine.plugins)
    assert npu.reason.startswith("OpenVINO lists no NPU; whether this machine has one is unknown")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (0x7D1D, "Meteor Lake, platform 3720"),
        (0xAD1D, "Arrow Lake, platform 3720"),
        (0x643E, "Lunar Lake, platform 4000"),
        (0xB03E, "Panther Lake, platform 5010"),
        (0xFD3E, "Wildcat Lake, platform 5020"),
        (0xD71D, "Nova Lake, platform 6010"),
    ],
)
def test_npu_without_its_kernel_driver(machine: Machine, device: int, name: str) -> None:
    machine.add("0000:00:0b.0", device, 0x120000)
    npu = machine.absence(DeviceKind.NPU)
    assert npu.reason == (
        f"Intel NPU 8086:{device:04x} ({name}) at 0000:00:0b.0: the kernel driver intel_vpu is not loaded"
    )
    assert npu.remedy.startswith("sudo modprobe intel_vpu")
    assert npu_platform(machine.root) == name[-4:]


def test_npu_that_only_a_newer_kernel_knows(machine: Machine) -> None:
    machine.add("0000:00:0b.0", 0xBEEF, 0x120000)
    assert machine.absence(DeviceKind.NPU).reason == "no Intel NPU on the PCI bus"
    machine.load("intel_vpu", "0000:00:0b.0")
    assert "8086:beef (unknown, platform unknown)" in machine.absence(DeviceKind.NPU).reason
    assert npu_platform(machine.root) is None


def test_driver_that_does_not_take_the_device(machine: Machine) -> None:
    with_npu(machine).load("intel_vpu")
    npu = machine.absence(DeviceKind.NPU)
    assert npu.reason.endswith("the kernel driver intel_vpu is loaded and did not take it")
    assert "firmware" in npu.remedy


def test_device_given_to_a_virtual_machine(machine: Machine) -> None:
    machine.add("0000:00:02.0", 0x7D55, 0x030000)
    machine.load("vfio-pci", "0000:00:02.0")
    assert "bound to the kernel driver vfio-pci, not to xe or i915" in machine.absence(DeviceKind.GPU).reason


def test_driver_without_a_node(machine: Machine) -> None:
    with_npu(machine).load("intel_vpu", "0000:00:0b.0")
    assert machine.absence(DeviceKind.NPU).reason.endswith("intel_vpu made no device node for it")


def test_node_that_a_container_lacks(machine: Machine) -> None:
    with_npu(machine).load("intel_vpu", "0000:00:0b.0", "accel/accel1")
    npu = machine.absence(DeviceKind.NPU)
    assert npu.reason.endswith("/dev/accel/accel1 is not there")
    assert npu.remedy.endswith("--device /dev/accel/accel1")


@pytest.mark.parametrize(
    ("group", "mode", "remedy"),
    [
        ("render", 0o660, "join the group render: sudo usermod -aG render $USER, then log in again"),
        ("root", 0o660, "sudo chown root:render /dev/dri/renderD128 && sudo chmod g+rw /dev/dri/renderD128"),
        ("video", 0o600, "sudo chown root:render /dev/dri/renderD128 && sudo chmod g+rw /dev/dri/renderD128"),
        (None, 0o660, "in a container, join the node's group: --group-add "),
    ],
)
def test_node_that_may_not_be_opened(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, group: str | None, mode: int, remedy: str
) -> None:
    (with_gpu_node(machine).root / "dev/dri/renderD128").chmod(mode)
    asked: list[tuple[Path, int]] = []

    def name_of_group(_: Path) -> str:
        if group is None:
            raise KeyError("no such group")
        return group

    def access(path: Path, mode: int) -> bool:  # root may open everything
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(Path, "group", name_of_group)
    gpu = machine.absence(DeviceKind.GPU)
    assert gpu.reason == "Intel GPU 8086:64a0 at 0000:00:02.0: no permission to read and write /dev/dri/renderD128"
    assert gpu.remedy.startswith(remedy)
    assert asked == [(machine.root / "dev/dri/renderD128", os.R_OK | os.W_OK)]


def test_gpu_without_its_driver_in_user_space(machine: Machine) -> None:
    with_gpu_node(machine)
    both = machine.absence(DeviceKind.GPU)
    assert both.reason.endswith("not found in user space: libOpenCL.so.1, Intel's OpenCL driver (libigdrcl.so)")
    assert "intel-opencl-icd" in both.remedy
    machine.write(LIBRARIES / "libOpenCL.so.1")
    machine.write("etc/OpenCL/vendors/nvidia.icd", "libnvidia-opencl.so.1\n")
    assert machine.absence(DeviceKind.GPU).reason.endswith("user space: Intel's OpenCL driver (libigdrcl.so)")
    machine.write("etc/OpenCL/vendors/intel.icd", "/usr/lib/x86_64-linux-gnu/intel-opencl/libigdrcl.so\n")
    assert "OpenVINO cannot use it" in machine.absence(DeviceKind.GPU).reason


def test_npu_without_its_driver_in_user_space(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_npu_node(machine)
    reason = "not found in user space: libze_loader.so.1 (Level Zero), Intel's NPU driver (libze_intel_npu.so.1)"
    assert machine.absence(DeviceKind.NPU).reason.endswith(reason)
    machine.write("opt/level-zero/libze_loader.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(machine.root / "opt/level-zero"))
    assert machine.absence(DeviceKind.NPU).reason.endswith("user space: Intel's NPU driver (libze_intel_npu.so.1)")
    for name in ("libze_intel_npu.so.1", "libze_intel_vpu.so.1"):  # the latter before 1.16
        driver = machine.write(LIBRARIES / name)
        assert "OpenVINO cannot use it" in machine.absence(DeviceKind.NPU).reason
        driver.unlink()


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_openvino_without_the_plugin(machine: Machine, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    with_npu_node(machine)
    for name in ("libze_loader.so.1", "libze_intel_npu.so.1"):
        machine.write(LIBRARIES / name)
    (machine.plugins / "libopenvino_intel_npu_plugin.so").unlink()
    monkeypatch.setattr(platform, "system", lambda: system)
    assert machine.absence(DeviceKind.NPU).reason == "this OpenVINO has no openvino_intel_npu_plugin"


def test_windows_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    [npu] = absences({DeviceKind.GPU, DeviceKind.ORT})
    assert npu.reason == "OpenVINO lists no NPU; whether this machine has one is unknown"
    assert "Device Manager" in npu.remedy


def test_gpu_of_wsl(machine: Machine) -> None:
    machine.write("dev/dxg")
    gpu = machine.absence(DeviceKind.GPU)
    assert gpu.reason == "OpenVINO finds no driver for WSL's GPU (/dev/dxg)"
    assert "intel-opencl-icd" in gpu.remedy


def test_function_that_cannot_be_read_is_passed_over(machine: Machine) -> None:
    machine.write("sys/bus/pci/devices/0000:00:01.0/vendor", "")
    with_npu(machine)
    assert npu_platform(machine.root) == "4000"


def test_isa(machine: Machine) -> None:
    assert cpu_facts(machine.root).isa is None
    machine.write("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sse4_2\n")
    assert cpu_facts(machine.root).isa == ()
    machine.write("proc/cpuinfo", "flags\t\t: amx_int8 avx2 avx512_vnni avx512f avx_vnni fpu\n\nflags\t\t: fpu\n")
    facts = cpu_facts(machine.root)
    assert facts.isa == ("AVX2", "AVX-VNNI", "AVX-512", "AVX-512-VNNI", "AMX-INT8")
    assert facts.details()["isa"] == "AVX2 AVX-VNNI AVX-512 AVX-512-VNNI AMX-INT8"


def test_kinds_of_cores(machine: Machine) -> None:
    """2 P with two threads each, 4 E, 2 low-power E; then a kernel that says nothing of them."""
    threads = ["0-1", "0-1", "2-3", "2-3", *map(str, range(4, 10))]
    for thread, siblings in enumerate(threads):
        machine.write(f"sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list", siblings + "\n")
    for group, cpus in (("cpu_core", "0-3\n"), ("cpu_atom", "4,5-7\n"), ("cpu_lowpower", "8-9\n")):
        machine.write(f"sys/devices/{group}/cpus", cpus)
    facts = cpu_facts(machine.root)
    assert (facts.performance_cores, facts.efficiency_cores) == (2, 6)
    assert "2 P + 6 E" in facts.details()["cores"]
    facts = cpu_facts(machine.root / "nothing")
    assert (facts.performance_cores, facts.efficiency_cores) == (None, None)
    assert " P + " not in facts.details()["cores"]


def test_survey_accounts_for_every_kind() -> None:
    found, absent = discovery.survey()
    present = {DeviceKind(info.name.partition(".")[0]) for info in found}
    assert not present & {absence.kind for absence in absent}
    assert present | {absence.kind for absence in absent} == set(DeviceKind)
    cpu = next(info for info in found if info.name == "CPU")
    assert {"isa", "cores", "memory", "capabilities"} <= cpu.details.keys()


def test_broken_onnxruntime_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = discovery.devices_of

    def devices_of(kind: DeviceKind) -> Any:
        if kind is DeviceKind.ORT:
            raise MissingDependencyError("no libonnxruntime")
        return real(kind)

    monkeypatch.setattr(discovery, "devices_of", devices_of)
    monkeypatch.setattr(discovery, "find_spec", lambda name: find_spec("json" if name == "onnxruntime" else name))
    found, absent = discovery.survey()
    assert "CPU" in {info.name for info in found}
    assert [a.reason for a in absent if a.kind is DeviceKind.ORT] == ["onnxruntime does not load: no libonnxruntime"]


def test_onnxruntime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "find_spec", lambda name: None)
    [ort] = absences({DeviceKind.GPU, DeviceKind.NPU})
    assert (ort.kind, ort.reason) == (DeviceKind.ORT, "onnxruntime is not installed")
    assert "edgert[onnx]" in ort.remedy


class FakeCore:
    """OpenVINO with an NPU, and with a GPU whose driver fails to describe it."""

    available_devices = ("GPU", "NPU")
    properties = {  # noqa: RUF012
        "FULL_DEVICE_NAME": "Intel(R) AI Boost",
        "OPTIMIZATION_CAPABILITIES": ["FP16", "INT8", "EXPORT_IMPORT"],
        "DEVICE_ARCHITECTURE": "4000",
        "NPU_DEVICE_TOTAL_MEM_SIZE": 16 * 2**30,
        "NPU_DRIVER_VERSION": 1757000000,
        "NPU_COMPILER_VERSION": 7 << 16 | 2,
    }

    def get_property(self, device: str, name: str) -> Any:
        if device == "GPU" or name not in self.properties:
            raise RuntimeError("unsupported")
        return self.properties[name]


def test_npu_is_described_and_a_broken_gpu_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "core", FakeCore)
    openvino._info.cache_clear()
    try:
        [npu] = openvino.BACKEND.devices()
    finally:
        openvino._info.cache_clear()
    assert npu.name == "NPU"
    assert npu.details["platform"] == "4000"
    assert npu.details["compiler"] == "7.2"
    assert npu.details["driver"] == "1757000000"
    assert npu.details["memory"] == "16.0 GiB"
    assert "tiles" not in npu.details
