"""Set the NPU compiler up under Wine, on Linux and without an NPU: what `edgert doctor --setup npu-compiler` does.

OpenVINO's Windows wheel holds the compiler; a small program (npuc.c), built here with MinGW, drives it. All of it lives
in one Wine prefix in edgert's cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from edgert.bundle import sha256
from edgert.errors import EdgertError
from edgert.npu.compiler import Failed, Limits, openvino_version, under_wine, wine_prefix, wine_program

PACKAGES = ("wine64", "gcc-mingw-w64-x86-64-win32")
# SHA-256 of `openvino-VERSION-…-cp311-cp311-win_amd64.whl`: the wheel runs as a program here.
WHEELS = {"2026.4.1": "bfddae6d6d3ad240157b946f180c33d0ddfaaae7487995d929a4e6b4bc12b283"}
LIBRARIES = (
    "openvino", "openvino_c", "openvino_ir_frontend", "openvino_intel_npu_plugin", "openvino_intel_npu_compiler",
    "openvino_intel_npu_compiler_loader", "tbb12",
)  # fmt: skip
_MINGW = ("x86_64-w64-mingw32-gcc-win32", "x86_64-w64-mingw32-gcc")
_TRIAL_LIMITS = Limits(seconds=120)
_TRIAL = """<?xml version="1.0"?>
<net name="trial" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1,16" element_type="f16"/>
<output><port id="0" precision="FP16"><dim>1</dim><dim>16</dim></port></output></layer>
<layer id="1" name="relu" type="ReLU" version="opset1">
<input><port id="0" precision="FP16"><dim>1</dim><dim>16</dim></port></input>
<output><port id="1" precision="FP16"><dim>1</dim><dim>16</dim></port></output></layer>
<layer id="2" name="y" type="Result" version="opset1">
<input><port id="0" precision="FP16"><dim>1</dim><dim>16</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
<edge from-layer="1" from-port="1" to-layer="2" to-port="0"/></edges></net>
"""


def setup(progress: Callable[[str], None]) -> Path:
    """Set the compiler up, unless it is already there.

    Args:
        progress: told each step before it is taken.

    Returns:
        The Wine prefix that holds it. It appears when it is whole and a trial model has been compiled.

    Raises:
        EdgertError: the machine is no Linux, a program is missing and cannot be installed from here, the wheel is not
            the one that is expected, or the compiler does not run. The message names the remedy.
    """
    if not sys.platform.startswith("linux"):
        raise EdgertError(f"setup npu-compiler: made for Linux, this is {sys.platform}")
    prefix = wine_prefix()
    if prefix.is_dir():
        return prefix
    wine, mingw = _programs(progress)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npu-compiler-", dir=prefix.parent, ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / "prefix"
        progress("make a Wine prefix")
        draft.mkdir()
        environment = {**os.environ, **under_wine(draft, wine).environment}
        _call([wine, "wineboot", "-i"], environment)
        program = draft / "drive_c" / "npuc"
        program.mkdir()
        progress(f"download OpenVINO {openvino_version()} for Windows")
        _libraries(Path(folder), program)
        progress("build the program that drives the compiler")
        source = files("edgert.npu").joinpath("npuc.c").read_text("utf-8")
        (program / "npuc.c").write_text(source, "utf-8")
        _call([mingw, "-O1", "-s", "-o", str(program / "npuc.exe"), str(program / "npuc.c")])
        progress("compile a trial model")
        (Path(folder) / "trial.xml").write_text(_TRIAL, "utf-8")
        (Path(folder) / "trial.bin").touch()
        trial = (Path(folder) / "trial.xml", Path(folder) / "trial.blob", "4000")
        outcome = under_wine(draft, wine).compile(*trial, {}, _TRIAL_LIMITS)
        if isinstance(outcome, Failed):
            raise EdgertError(f"setup npu-compiler: the compiler does not run under {wine}: {outcome.reason}")
        _call([_wineserver(wine), "-w"], environment)  # it holds the prefix under its temporary name
        try:
            draft.rename(prefix)
        except OSError:  # another setup was faster
            if not prefix.is_dir():
                raise
    return prefix


def _programs(progress: Callable[[str], None]) -> tuple[str, str]:
    """Wine and MinGW, installed if need be."""

    def look() -> tuple[str | None, str | None]:
        return wine_program(), next((path for name in _MINGW if (path := shutil.which(name))), None)

    wine, mingw = look()
    if (wine is None or mingw is None) and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        progress(f"install {' and '.join(PACKAGES)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _call(["apt-get", "update", "-qq"], environment)
        _call(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], environment)
        wine, mingw = look()
    if wine is None or mingw is None:
        missing = [name for name, path in (("Wine", wine), ("MinGW's gcc", mingw)) if path is None]
        raise EdgertError(
            f"setup npu-compiler: {' and '.join(missing)} not found; "
            f"install with: sudo apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    return wine, mingw


def _libraries(folder: Path, target: Path) -> None:
    """Put the wheel's libraries that the compiler needs into `target`."""
    version = openvino_version()
    if version not in WHEELS:
        raise EdgertError(
            f"setup npu-compiler: OpenVINO {version} is installed, the compiler is known for {', '.join(WHEELS)}"
        )
    wanted = ["--platform", "win_amd64", "--python-version", "3.11", "--only-binary=:all:", "--no-deps"]
    _call([
        sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *wanted,
        f"openvino=={version}", "-d", str(folder),
    ])  # fmt: skip
    wheel = next(folder.glob("openvino-*.whl"))
    found = sha256(wheel)
    if found != WHEELS[version]:
        raise EdgertError(f"setup npu-compiler: {wheel.name} has hash {found[:12]}…, expected {WHEELS[version][:12]}…")
    with zipfile.ZipFile(wheel) as archive:
        for name in LIBRARIES:
            with archive.open(f"openvino/libs/{name}.dll") as source, (target / f"{name}.dll").open("wb") as stream:
                shutil.copyfileobj(source, stream)


def _wineserver(wine: str) -> str:
    beside = [Path(wine).with_name(name) for name in ("wineserver64", "wineserver")]
    return next((str(path) for path in beside if path.is_file()), shutil.which("wineserver") or "wineserver")


def _call(command: list[str], environment: dict[str, str] | None = None) -> None:
    try:
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False,
        )  # fmt: skip
    except OSError as error:
        raise EdgertError(f"setup npu-compiler: {command[0]}: {error.strerror}") from error
    if ended.returncode != 0:
        said = [line.strip() for line in (ended.stderr + ended.stdout).splitlines() if line.strip()]
        what = " ".join(command[:4])
        raise EdgertError(f"setup npu-compiler: {what} failed: {said[-1][:300] if said else ended.returncode}")
