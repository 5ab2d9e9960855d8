"""Which devices this machine has, what they can do, and why one that is missing is missing.

OpenVINO says which devices it can use, and nothing of those it cannot. Between a chip and OpenVINO's plugin stand the
kernel's driver, a device node and the right to open it, and a driver in user space; `absences` looks at each in turn
and names the first that is not in place. Outside Linux only the plugin can be looked at without further packages; if
that is there, the reason is unknown, and is said to be.

Sources: https://docs.openvino.ai/2024/get-started/configurations/configurations-intel-gpu.html and
https://github.com/intel/linux-npu-driver/blob/main/docs/overview.md (what must be installed, who may open the nodes);
https://docs.kernel.org/PCI/sysfs-pci.html (the tree under /sys/bus/pci).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import psutil

from edgert.backends import devices_of
from edgert.device import DeviceInfo, DeviceKind
from edgert.errors import MissingDependencyError

ROOT = Path("/")
INTEL = 0x8086

# Processor and platform by PCI device id: the ids of the kernel's driver (drivers/accel/ivpu/ivpu_drv.h), the platforms
# that OpenVINO 2026.4.1's plugin gives them (src/plugins/intel_npu/src/backend/src/zero_device.cpp, getName).
NPU_IDS = {
    0x7D1D: ("Meteor Lake", "3720"),
    0xAD1D: ("Arrow Lake", "3720"),
    0x643E: ("Lunar Lake", "4000"),
    0xB03E: ("Panther Lake", "5010"),
    0xFD3E: ("Wildcat Lake", "5020"),
    0xD71D: ("Nova Lake", "6010"),
}

# Names of CPU flags in /proc/cpuinfo (arch/x86/include/asm/cpufeatures.h) that matter to language models.
_ISA = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512-VNNI",
    "avx512_bf16": "AVX-512-BF16",
    "avx512_fp16": "AVX-512-FP16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "amx_fp16": "AMX-FP16",
}
_LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64", "usr/lib", "lib", "usr/local/lib",
)  # fmt: skip


@dataclass(frozen=True)
class Absence:
    """A kind of device that cannot be used here.

    Attributes:
        kind: which.
        reason: why, in one line.
        remedy: what to do about it, in one line.
    """

    kind: DeviceKind
    reason: str
    remedy: str


@dataclass(frozen=True)
class CpuFacts:
    """The CPU, as far as the operating system tells.

    Attributes:
        isa: names of the instruction sets that matter here, e.g. `AVX-512-VNNI`; None where they are unknown.
        cores: physical cores; None where unknown.
        threads: what the operating system schedules on; None where unknown.
        performance_cores: cores of the fast kind (P); None where there is one kind only, or it is unknown.
        efficiency_cores: cores of the other kinds (E and low-power E); None as above.
        memory_bytes: the machine's RAM.
    """

    isa: tuple[str, ...] | None
    cores: int | None
    threads: int | None
    performance_cores: int | None
    efficiency_cores: int | None
    memory_bytes: int

    def details(self) -> dict[str, str]:
        """The facts as text, for `DeviceInfo.details`."""
        kinds = ""
        if self.performance_cores is not None:
            kinds = f"{self.performance_cores} P + {self.efficiency_cores} E, "
        return {
            "isa": "unknown" if self.isa is None else " ".join(self.isa) or "below AVX2",
            "cores": f"{self.cores or 'unknown'} ({kinds}{self.threads or 'unknown'} threads)",
            "memory": f"{self.memory_bytes / 2**30:.1f} GiB",
        }


@dataclass(frozen=True)
class PciFunction:
    """One function on the PCI bus.

    Attributes:
        path: its folder in sysfs.
        vendor: PCI vendor id.
        device: PCI device id.
        pci_class: 24 bits: base class, subclass, programming interface.
        driver: the kernel driver that is bound to it; None where none is.
    """

    path: Path
    vendor: int
    device: int
    pci_class: int
    driver: str | None


@dataclass(frozen=True)
class _Stack:
    """What must be in place for one kind of device on Linux.

    Attributes:
        modules: kernel drivers, any of which will do.
        nodes: where a function's device nodes are named in sysfs, and their folder under /dev.
        enable: what to do where there is no such hardware.
        firmware: what to do where the kernel driver does not take the hardware.
        install: how to get the driver in user space.
        elsewhere: where to look on Windows.
    """

    modules: tuple[str, ...]
    nodes: tuple[str, str]
    enable: str
    firmware: str
    install: str
    elsewhere: str


_STACKS = {
    DeviceKind.GPU: _Stack(
        modules=("xe", "i915"),
        nodes=("drm/renderD*", "dri"),
        enable="needs Intel graphics: enable it in the firmware setup; in a virtual machine pass it through",
        firmware="look at `dmesg | grep -E 'i915|xe'`; a GPU newer than the kernel needs a newer kernel or firmware",
        install="install Intel's compute runtime, e.g. `sudo apt install intel-opencl-icd ocl-icd-libopencl1`, or from "
        "https://github.com/intel/compute-runtime/releases",
        elsewhere="if the Device Manager shows one under Display adapters, install Intel's current graphics driver",
    ),
    DeviceKind.NPU: _Stack(
        modules=("intel_vpu",),
        nodes=("accel/accel*", "accel"),
        enable="needs an Intel Core Ultra: enable the NPU in the firmware setup; in a virtual machine pass it through",
        firmware="look at `dmesg | grep intel_vpu`; it wants the firmware (linux-firmware, or the package intel-fw-npu)"
        " and, for an NPU newer than the kernel, a newer kernel",
        install="install intel-level-zero-npu, intel-driver-compiler-npu and level-zero from "
        "https://github.com/intel/linux-npu-driver/releases",
        elsewhere="if the Device Manager shows one under Neural processors, install Intel's current NPU driver",
    ),
}


def survey() -> tuple[list[DeviceInfo], list[Absence]]:
    """The devices that can be used now, with all that is known of them, and why each other kind cannot."""
    found: list[DeviceInfo] = []
    broken: dict[DeviceKind, Absence] = {}
    for kind in DeviceKind:
        try:
            found += devices_of(kind)
        except MissingDependencyError as error:
            if find_spec("onnxruntime"):
                reason = f"onnxruntime does not load: {error.__cause__ or error}"
                broken[kind] = Absence(kind, reason, "pip install --force-reinstall onnxruntime")
    absent = absences({DeviceKind(info.name.partition(".")[0]) for info in found} | broken.keys())
    return [_with_facts(info) for info in found], [*absent, *broken.values()]


def _with_facts(info: DeviceInfo) -> DeviceInfo:
    """Add what OpenVINO does not tell."""
    facts: dict[str, str] = {}
    if info.name == DeviceKind.CPU:
        facts = cpu_facts().details()
    elif info.name.startswith(DeviceKind.GPU) and (version := opencl_driver_version()):
        facts = {"driver": version}
    return replace(info, details={**info.details, **facts})


def absences(present: Collection[DeviceKind], root: Path = ROOT, plugins: Path | None = None) -> list[Absence]:
    """Why a GPU or an NPU cannot be used, or onnxruntime is not there. OpenVINO is not loaded.

    Args:
        present: the kinds that can be used.
        root: where `sys`, `dev`, `etc` and `usr` are.
        plugins: OpenVINO's folder of libraries; by default that of the installed package.
    """
    found = [_absence(kind, stack, root, plugins) for kind, stack in _STACKS.items() if kind not in present]
    if DeviceKind.ORT not in present and not find_spec("onnxruntime"):
        remedy = "to run ONNX bundles: pip install 'edgert[onnx]'"
        found.append(Absence(DeviceKind.ORT, "onnxruntime is not installed", remedy))
    return found


def _absence(kind: DeviceKind, stack: _Stack, root: Path, plugins: Path | None) -> Absence:
    missing = _missing_plugin(kind, plugins)
    if platform.system() != "Linux":
        if missing is not None:
            return missing
        reason = f"OpenVINO lists no {kind}; whether this machine has one is unknown"
        return Absence(kind, reason, stack.elsewhere)
    functions = pci_functions(root)
    if functions is None:
        reason = f"OpenVINO lists no {kind}; whether this machine has one is unknown, for there is no /sys/bus/pci"
        return Absence(kind, reason, stack.enable)
    candidates = [function for function in functions if _is(kind, function)]
    if not candidates and kind is DeviceKind.GPU and (root / "dev/dxg").exists():  # WSL keeps GPUs off the bus
        remedy = f"{stack.install}; in Windows, {stack.elsewhere}"
        return Absence(kind, "OpenVINO finds no driver for WSL's GPU (/dev/dxg)", remedy)
    if not candidates:
        return Absence(kind, f"no Intel {kind} on the PCI bus", stack.enable)
    return (
        next((problem for f in candidates if (problem := _kernel_problem(kind, stack, f, root))), None)
        or _missing_libraries(kind, stack, candidates[0], root)
        or missing
        or Absence(
            kind, f"{_name(kind, candidates[0])} and its drivers are there, and OpenVINO cannot use it", stack.firmware
        )
    )


def _is(kind: DeviceKind, function: PciFunction) -> bool:
    if function.vendor != INTEL:
        return False
    if kind is DeviceKind.GPU:
        return function.pci_class >> 16 == 0x03  # display controllers
    return function.device in NPU_IDS or function.driver == "intel_vpu"  # a newer kernel knows newer ones


def _name(kind: DeviceKind, function: PciFunction) -> str:
    codename, npu = NPU_IDS.get(function.device, ("unknown", "unknown"))
    of = f" ({codename}, platform {npu})" if kind is DeviceKind.NPU else ""
    return f"Intel {kind} {function.vendor:04x}:{function.device:04x}{of} at {function.path.name}"


def _kernel_problem(kind: DeviceKind, stack: _Stack, function: PciFunction, root: Path) -> Absence | None:
    name, wanted = _name(kind, function), " or ".join(stack.modules)
    if function.driver is None:
        if any((root / "sys/bus/pci/drivers" / module).exists() for module in stack.modules):
            return Absence(kind, f"{name}: the kernel driver {wanted} is loaded and did not take it", stack.firmware)
        loads = " || ".join(f"sudo modprobe {module}" for module in stack.modules)
        return Absence(kind, f"{name}: the kernel driver {wanted} is not loaded", f"{loads}, or a newer kernel")
    if function.driver not in stack.modules:
        remedy = f"give it back to {wanted} (a device for a virtual machine is not for the host)"
        return Absence(kind, f"{name} is bound to the kernel driver {function.driver}, not to {wanted}", remedy)
    pattern, folder = stack.nodes
    nodes = [root / "dev" / folder / entry.name for entry in sorted(function.path.glob(pattern))]
    if not nodes:
        return Absence(kind, f"{name}: the kernel driver {function.driver} made no device node for it", stack.firmware)
    node, path = nodes[0], f"/dev/{folder}/{nodes[0].name}"
    if not node.exists():
        return Absence(kind, f"{name}: {path} is not there", f"in a container, pass it in: --device {path}")
    if not os.access(node, os.R_OK | os.W_OK):
        return Absence(kind, f"{name}: no permission to read and write {path}", _permit(node, path))
    return None


def _permit(node: Path, path: str) -> str:
    try:
        group = node.group()
    except KeyError:  # a group of the host that a container has no name for
        return f"in a container, join the node's group: --group-add {node.stat().st_gid}"
    if group == "root" or node.stat().st_mode & 0o060 != 0o060:
        return f"sudo chown root:render {path} && sudo chmod g+rw {path}, and be in the group render"
    return f"join the group {group}: sudo usermod -aG {group} $USER, then log in again"


def _missing_libraries(kind: DeviceKind, stack: _Stack, function: PciFunction, root: Path) -> Absence | None:
    if kind is DeviceKind.GPU:
        missing = [] if _library(root, "libOpenCL.so.1") else ["libOpenCL.so.1"]
        vendors = Path(os.environ.get("OCL_ICD_VENDORS") or root / "etc/OpenCL/vendors")
        if not any("igdrcl" in _text(icd) for icd in vendors.glob("*.icd")):
            missing.append("Intel's OpenCL driver (libigdrcl.so)")
    else:
        missing = [] if _library(root, "libze_loader.so.1") else ["libze_loader.so.1 (Level Zero)"]
        # Drivers before 1.16 have the older name.
        if not _library(root, "libze_intel_npu.so.1") and not _library(root, "libze_intel_vpu.so.1"):
            missing.append("Intel's NPU driver (libze_intel_npu.so.1)")
    if not missing:
        return None
    return Absence(kind, f"{_name(kind, function)}: not found in user space: {', '.join(missing)}", stack.install)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _library(root: Path, name: str) -> bool:
    folders = [root / folder for folder in _LIBRARY_FOLDERS]
    folders += [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    return any((folder / name).exists() for folder in folders)


def _missing_plugin(kind: DeviceKind, plugins: Path | None) -> Absence | None:
    if plugins is None:
        spec = find_spec("openvino")
        if spec is None or not spec.submodule_search_locations:
            return Absence(kind, "OpenVINO is not installed", "pip install edgert")
        plugins = Path(spec.submodule_search_locations[0]) / "libs"
    name = f"openvino_intel_{kind.lower()}_plugin"
    if not plugins.is_dir() or any(plugins.glob(f"*{name}*")):  # other packagings keep their libraries elsewhere
        return None
    return Absence(kind, f"this OpenVINO has no {name}", "pip install --force-reinstall openvino, Intel's wheel")


def pci_functions(root: Path = ROOT) -> list[PciFunction] | None:
    """What is on the PCI bus, by address; None where that cannot be seen."""
    folder = root / "sys/bus/pci/devices"
    if not folder.is_dir():
        return None
    return list(_read_functions(folder))


def _read_functions(folder: Path) -> Iterator[PciFunction]:
    for path in sorted(folder.iterdir()):
        try:
            vendor, device, pci_class = (int((path / f).read_text(), 16) for f in ("vendor", "device", "class"))
        except (OSError, ValueError):  # gone meanwhile, or hidden from a sandbox
            continue
        link = path / "driver"
        yield PciFunction(path, vendor, device, pci_class, link.resolve().name if link.exists() else None)


def npu_platform(root: Path = ROOT) -> str | None:
    """The platform of this machine's NPU, such as `4000`, whether or not it can be used; None for none or unknown."""
    functions = [f for f in pci_functions(root) or () if f.vendor == INTEL]
    return next((NPU_IDS[f.device][1] for f in functions if f.device in NPU_IDS), None)


def cpu_facts(root: Path = ROOT) -> CpuFacts:
    """What is known of the CPU; instruction sets and kinds of cores on Linux only."""
    performance = _cores(root, ["cpu_core"])
    efficiency = _cores(root, ["cpu_atom", "cpu_lowpower"])
    hybrid = bool(performance and efficiency)
    return CpuFacts(
        isa=_isa(root),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(),
        performance_cores=performance if hybrid else None,
        efficiency_cores=efficiency if hybrid else None,
        memory_bytes=psutil.virtual_memory().total,
    )


def _isa(root: Path) -> tuple[str, ...] | None:
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return None if flags is None else tuple(name for flag, name in _ISA.items() if flag in flags)


def _cores(root: Path, groups: list[str]) -> int:
    """How many physical cores are in these groups. Hybrid CPUs have one group per kind of core, as event sources."""
    cores: set[str] = set()
    for group in groups:
        try:
            ranges = (root / "sys/devices" / group / "cpus").read_text().strip().split(",")
            for first, _, last in (r.partition("-") for r in ranges if r):
                for thread in range(int(first), int(last or first) + 1):
                    topology = root / f"sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list"
                    cores.add(topology.read_text().strip())
        except (OSError, ValueError):
            continue
    return len(cores)


def opencl_driver_version() -> str | None:
    """The version of Intel's GPU driver in user space, which OpenVINO does not tell; None where there is none."""
    try:
        cl = ctypes.CDLL("OpenCL.dll" if os.name == "nt" else "libOpenCL.so.1")
    except OSError:
        return None
    gpu, vendor_id, driver_version = ctypes.c_uint64(4), 0x1001, 0x102D  # names of the CL_DEVICE_… constants in cl.h
    handles, count = ctypes.c_void_p * 16, ctypes.c_uint32()
    platforms, devices = handles(), handles()
    if cl.clGetPlatformIDs(16, platforms, ctypes.byref(count)) != 0:
        return None
    for owner in platforms[: min(count.value, 16)]:
        if cl.clGetDeviceIDs(ctypes.c_void_p(owner), gpu, 16, devices, ctypes.byref(count)) != 0:
            continue
        for device in map(ctypes.c_void_p, devices[: min(count.value, 16)]):
            vendor, text = ctypes.c_uint32(), ctypes.create_string_buffer(128)
            cl.clGetDeviceInfo(device, vendor_id, ctypes.c_size_t(4), ctypes.byref(vendor), None)
            status = cl.clGetDeviceInfo(device, driver_version, ctypes.c_size_t(len(text)), text, None)
            if vendor.value == INTEL and status == 0:
                return text.value.decode("utf-8", "replace")
    return None
