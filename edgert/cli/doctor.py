"""`edgert doctor`: what this installation can do, and what to do about what it cannot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec

from edgert.cli.options import Subparsers, console, print_json
from edgert.device import DeviceKind

DEVICES_TIMEOUT_S = 60
COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: True where it works, False where something that edgert needs does not, None where an option is absent.
        detail: what was found, in one line.
        remedy: what to do about it; None where nothing need be done.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str | None = None


def checks() -> list[Check]:
    """Look at everything, most basic first. Never raises for what it finds; imports no package of `edgert[compile]`."""
    found = [check_python(), check_openvino()]
    if _version("openvino") is not None:
        found += [check_kernels(), *check_devices(), check_npu_compiler()]
    return [*found, check_compile_packages(), *check_torchvision(), check_onnxruntime()]


def check_python() -> Check:
    bits = 64 if sys.maxsize > 2**32 else 32
    detail = f"{platform.python_implementation()} {platform.python_version()}, {bits} bit, {platform.platform()}"
    if bits == 64:
        return Check("Python", True, detail)
    return Check("Python", False, detail, "OpenVINO needs a 64-bit Python")


def check_openvino() -> Check:
    pin = next((r.partition("==")[2] for r in _requirements() if r.startswith("openvino==")), None)
    installed = _version("openvino")
    remedy = f"pip install openvino=={pin}" if pin else "pip install edgert"
    if installed is None:
        return Check("OpenVINO", False, "not installed", remedy)
    if pin is not None and installed != pin:
        return Check("OpenVINO", False, f"{installed} is installed, edgert needs {pin}", remedy)
    return Check("OpenVINO", True, installed)


def check_kernels() -> Check:
    from edgert import native

    try:
        status = native.status()
    except ImportError as error:
        return Check("native kernels", False, f"OpenVINO cannot be imported: {error}")
    again = "in edgert's source folder: pip install --force-reinstall --no-deps --no-cache-dir -v ."
    if status.loads and (isa := native.instruction_set()) is not None:
        return Check("native kernels", True, f"{isa}: {status.path}")
    if status.loads:
        detail = f"EDGERT_KERNELS_MAX_ISA is {os.environ.get('EDGERT_KERNELS_MAX_ISA')!r}, which is no instruction set"
        return Check("native kernels", False, detail, "leave it unset, or see docs/kernels.md")
    if status.path is not None:
        return Check("native kernels", False, f"{status.path}: {status.reason}", f"build them again, {again}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS  # CMake's order too
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    detail = "not built, so there is no CPU@kernels, which is faster; "
    if compiler:
        return Check("native kernels", None, f"{detail}{compiler} is there now", f"build them, {again}")
    detail += f"no C++ compiler on the path (looked for {', '.join(names)})"
    install = "install g++ (Linux) or Visual Studio Build Tools (Windows)"
    return Check("native kernels", None, detail, f"{install}, then, {again}")


def check_devices() -> list[Check]:
    """What OpenVINO lists; if it can list, also a GPU and an NPU each, and why one is absent."""
    # A child, because a broken driver can hang or abort the process that asks for its devices.
    ask = "import json,openvino as v;c=v.Core();"
    ask += "print(json.dumps({d:c.get_property(d,'FULL_DEVICE_NAME') for d in c.available_devices}))"
    try:
        child = subprocess.run(
            [sys.executable, "-c", ask], capture_output=True, text=True, timeout=DEVICES_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        detail = f"listing them took over {DEVICES_TIMEOUT_S} s"
        return [Check("devices", False, detail, "update or remove the driver of the GPU or of the NPU")]
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check("devices", False, f"listing them failed (exit status {child.returncode}): {last}")]
    devices: dict[str, str] = json.loads(child.stdout)
    detail = "; ".join(f"{name}: {full.strip()}" for name, full in devices.items())
    check = Check("devices", True, detail)
    if "CPU" not in devices:
        detail = f"OpenVINO reports no CPU device (found: {detail or 'none'})"
        check = Check("devices", False, detail, "reinstall openvino")
    return [check, *_accelerators(devices)]


def _accelerators(devices: dict[str, str]) -> list[Check]:
    from edgert.discovery import absences

    names: dict[str, list[str]] = {DeviceKind.GPU: [], DeviceKind.NPU: []}
    for name, full in devices.items():
        names.get(name.partition(".")[0], []).append(full.strip())
    present = {DeviceKind(kind) for kind, found in names.items() if found}
    checks = [Check(kind, True, "; ".join(names[kind])) for kind in sorted(present)]
    # Onnxruntime has its own check, which tells more.
    return checks + [Check(a.kind, None, a.reason, a.remedy) for a in absences(present) if a.kind in names]


def check_npu_compiler() -> Check:
    """Whether blobs for NPUs can be compiled here, which needs no NPU."""
    from edgert.npu import compiler

    found = compiler.find_all()
    there = [f"{c.name}: {c.detail}" for c in found if c.available]
    if there:
        return Check("NPU compiler", True, "; ".join(there))
    detail = "; ".join(f"{c.name}: {c.detail}" for c in found)
    remedies = " or ".join(dict.fromkeys(c.remedy for c in found if c.remedy))
    return Check("NPU compiler", None, detail, f"to compile blobs for NPUs here: {remedies}" if remedies else None)


def check_compile_packages() -> Check:
    names = [_name(r) for r in _requirements() if re.search(r"""extra\s*==\s*['"]compile['"]""", r)]
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        detail = f"missing: {', '.join(missing)}"
        return Check("edgert[compile]", None, detail, "to compile models here: pip install 'edgert[compile]'")
    return Check("edgert[compile]", True, ", ".join(f"{name} {version}" for name, version in versions.items()))


def check_torchvision() -> list[Check]:
    """Whether torch and torchvision come from the same build; nothing to say where either is absent.

    The compiled part of torchvision loads beside the torch build it was made for only, and transformers imports
    torchvision wherever it finds it. The part of a version after `+` names the build: `2.13.0+cpu` beside a plain
    `0.28.0` is a CPU torch with the CUDA torchvision of PyPI.
    """
    torch, torchvision = _version("torch"), _version("torchvision")
    if torch is None or torchvision is None:
        return []
    detail = f"torch {torch}, torchvision {torchvision}"
    if torch.partition("+")[2] == torchvision.partition("+")[2]:
        return [Check("torchvision", True, detail)]
    remedy = "edgert does not need it: pip uninstall torchvision"
    return [Check("torchvision", False, f"{detail}: not the same build, the import fails", remedy)]


def check_onnxruntime() -> Check:
    if find_spec("onnxruntime") is None:
        return Check("onnxruntime", None, "not installed", "to run ONNX bundles: pip install 'edgert[onnx]'")
    try:
        import onnxruntime
    except ImportError as error:
        return Check("onnxruntime", False, f"cannot be imported: {error}", "pip install --force-reinstall onnxruntime")
    return Check("onnxruntime", True, f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}")


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation",
        description="Check the installation: packages, native kernels, devices. Exit status 1 if something that edgert "
        "needs does not work; what is merely optional and absent does not count.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    parser.add_argument(
        "--setup",
        choices=("npu-compiler",),
        help="set up what is missing, instead of checking: npu-compiler is Intel's compiler for NPUs, under Wine",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.setup:
        return _set_up_npu_compiler()
    found = checks()
    if options.json:
        print_json([asdict(check) for check in found])
    else:
        _print(found)
    return 1 if any(check.ok is False for check in found) else 0


def _set_up_npu_compiler() -> int:
    from edgert.npu.setup import setup

    progress = console(stderr=True)
    path = setup(lambda stage: progress.print(stage, soft_wrap=True))
    console().print(f"the NPU compiler is ready: {path}", soft_wrap=True)
    return 0


def _print(found: Sequence[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "check", "finding"):
        table.add_column(heading, overflow="fold")
    marks = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("absent", "yellow")}
    for check in found:
        finding = Text(check.detail)
        if check.remedy:
            finding.append(f"\n-> {check.remedy}", "cyan")
        table.add_row(marks[check.ok], Text(check.name), finding)
    console().print(table)


def _requirements() -> list[str]:
    """edgert's requirements as its metadata states them, extras included; empty where edgert is not installed."""
    try:
        return metadata.requires("edgert") or []
    except metadata.PackageNotFoundError:
        return []


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
