"""Intel's NPU compiler at arm's length: where it is found, and one run of it in a process of its own.

A model that the compiler does not support can make it abort, hang, or take all memory. So it never runs inside the
process of whoever asks: what becomes of a run is a value, `Compiled` or `Failed`.

The compiler needs no NPU, but Intel's Linux wheel of OpenVINO does not hold it
(https://github.com/openvinotoolkit/openvino/issues/36374); the one of the Windows wheel runs under Wine (`setup`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil

from edgert.errors import UsageError
from edgert.folders import cache_folder

# Meteor and Arrow Lake, Lunar Lake, Panther Lake.
PLATFORMS = ("3720", "4000", "5010")
POLL_S = 0.05
MAX_REASON = 500
# Wine's server ends with its last program. A program that starts in that moment loses its connection and never runs.
_WINE_LOST_SERVER = "wine client error:"
_WINE_ATTEMPTS = 4


@dataclass(frozen=True)
class Limits:
    """What one run may take.

    Attributes:
        seconds: wall-clock time.
        memory_bytes: resident memory of the compiler and its child processes together, looked at every `POLL_S`.
    """

    seconds: float = 900
    memory_bytes: int = 12 * 1024**3


@dataclass(frozen=True)
class Compiled:
    """A run that gave a blob.

    Attributes:
        blob: the file that was asked for.
        compile_s: time in the compiler alone, without the start of its process and the reading of the model.
        peak_rss_bytes: the most resident memory that was seen, mapped weights included.
        blob_bytes: size of the blob.
        estimated_us: latency of one inference as the compiler estimates it, never a measurement; None where it says
            nothing.
    """

    blob: Path
    compile_s: float
    peak_rss_bytes: int
    blob_bytes: int
    estimated_us: float | None


@dataclass(frozen=True)
class Failed:
    """A run that gave none.

    Attributes:
        kind: the compiler said no, ended its process, or was ended for going over one of `Limits`.
        reason: the compiler's own message, or the limit.
    """

    kind: Literal["rejected", "aborted", "timeout", "memory"]
    reason: str


@dataclass(frozen=True)
class Compiler:
    """One way to run the compiler.

    Attributes:
        name: `openvino`, `driver` or `wine`.
        version: which compiler it is: two of the same version make the same blob of the same model. The one under Wine
            is that of OpenVINO's Windows wheel.
        command: called with MODEL.xml OUT.blob KEY=VALUE …; prints `compile_s SECONDS`, exits with 1 for a model that
            is rejected.
        properties: what it needs to be told beside the caller's properties.
        environment: added to this process's own.
    """

    name: str
    version: str
    command: tuple[str, ...]
    properties: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def compile(
        self, xml: Path, out: Path, platform: str, properties: Mapping[str, str], limits: Limits
    ) -> Compiled | Failed:
        """Compile a static IR to a blob. `out` appears when it is whole; nothing else stays behind.

        Args:
            xml: the model; its weights beside it, as `save_model` writes them.
            platform: one of `PLATFORMS`; no such NPU need be there.

        Raises:
            UsageError: the platform is not known, or the model is no file.
        """
        if platform not in PLATFORMS:
            raise UsageError(f"NPU platform {platform!r}: expected one of {', '.join(PLATFORMS)}")
        if not xml.is_file():
            raise UsageError(f"model {xml}: no such file")
        # The compiler estimates the latency in its log only.
        given = {"LOG_LEVEL": "LOG_INFO", **self.properties, **properties, "NPU_PLATFORM": platform}
        with tempfile.TemporaryDirectory(prefix=".npu-", dir=out.parent, ignore_cleanup_errors=True) as folder:
            work = Path(folder)
            command = [*self.command, _placed(xml, work), "model.blob", *(f"{k}={v}" for k, v in given.items())]
            for _ in range(_WINE_ATTEMPTS):
                run = _run(command, {**os.environ, **self.environment}, work, limits)
                if not run.output.startswith(_WINE_LOST_SERVER):
                    break
            if run.over:
                return run.over
            blob = work / "model.blob"
            compile_s = re.search(r"^compile_s ([\d.]+)", run.output, re.MULTILINE)
            if run.status != 0 or compile_s is None or not blob.is_file():
                return Failed("rejected" if run.status == 1 else "aborted", _reason(run))
            estimate = re.search(r"Estimated inference latency: ([\d.]+) us", run.output)
            blob.replace(out)
        return Compiled(
            blob=out,
            compile_s=float(compile_s[1]),
            peak_rss_bytes=run.peak_rss_bytes,
            blob_bytes=out.stat().st_size,
            estimated_us=float(estimate[1]) if estimate else None,
        )


@dataclass(frozen=True)
class Candidate:
    """A place where the compiler may be.

    Attributes:
        name: as in `Compiler.name`.
        compiler: None where it is not there.
        detail: what was found, in one line.
        remedy: what to do to have it; None where it is there, or nothing can be done.
    """

    name: str
    compiler: Compiler | None
    detail: str
    remedy: str | None = None

    @property
    def available(self) -> bool:
        return self.compiler is not None


def find() -> Compiler | None:
    """The first compiler that is there."""
    return next((c.compiler for c in find_all() if c.compiler is not None), None)


def find_all() -> list[Candidate]:
    """All places that are looked at, the preferred first. Nothing is run or imported."""
    return [_in_openvino(), _in_driver(), _under_wine()]


def wine_prefix() -> Path:
    """The Wine prefix that `setup` makes; the compiler lies on its drive C."""
    return cache_folder() / f"npu-compiler-{openvino_version()}"


def wine_program() -> str | None:
    """Wine's 64-bit loader."""
    debian = Path("/usr/lib/wine/wine64")
    return str(debian) if debian.is_file() else shutil.which("wine64") or shutil.which("wine")


def under_wine(prefix: Path, wine: str) -> Compiler:
    """The compiler in a prefix."""
    return Compiler(
        "wine",
        f"plugin-{openvino_version()}",
        (wine, r"C:\npuc\npuc.exe"),
        {"NPU_COMPILER_TYPE": "PLUGIN"},
        # No debugger after a crash, no windows, no chatter of Wine's own between the compiler's messages.
        {
            "WINEPREFIX": str(prefix.resolve()),
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe,winedbg.exe=",
            "DISPLAY": "",
        },
    )


def openvino_version() -> str:
    """The release of the installed OpenVINO."""
    return metadata.version("openvino")


def _in_openvino() -> Candidate:
    form = "{}.dll" if sys.platform == "win32" else "lib{}.so"
    names = [form.format(f"openvino_intel_npu_compiler{part}") for part in ("_loader", "")]
    spec = find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        return Candidate("openvino", None, "OpenVINO is not installed", "pip install openvino")
    folder = Path(next(iter(spec.submodule_search_locations))) / "libs"
    if missing := [name for name in names if not (folder / name).is_file()]:
        return Candidate("openvino", None, f"{folder} has no {' and no '.join(missing)}")
    compiler = _in_python("openvino", "PLUGIN")
    return Candidate("openvino", compiler, f"{compiler.version} in {folder}")


def _in_driver() -> Candidate:
    """The compiler that the Linux driver brings. OpenVINO reaches it through the device only."""
    if not sys.platform.startswith("linux"):
        return Candidate("driver", None, "looked for on Linux only")
    nodes = sorted(Path("/dev/accel").glob("accel*"))
    if not nodes:
        return Candidate("driver", None, "no NPU here: /dev/accel has no device")
    usable = [node for node in nodes if os.access(node, os.R_OK | os.W_OK)]
    if not usable:
        return Candidate("driver", None, f"no permission on {nodes[0]}", "add the user to the group render")
    compiler = _in_python("driver", "DRIVER")
    return Candidate("driver", compiler, f"{compiler.version} through {usable[0]}")


def _under_wine() -> Candidate:
    remedy = "edgert doctor --setup npu-compiler"
    if not sys.platform.startswith("linux"):
        return Candidate("wine", None, "looked for on Linux only")
    prefix, wine = wine_prefix(), wine_program()
    if not prefix.is_dir():
        return Candidate("wine", None, f"not set up: no {prefix}", remedy)
    if wine is None:
        return Candidate("wine", None, "Wine is not installed", remedy)
    compiler = under_wine(prefix, wine)
    return Candidate("wine", compiler, f"{compiler.version} in {prefix}")


def _in_python(name: str, kind: Literal["PLUGIN", "DRIVER"]) -> Compiler:
    command = (sys.executable, "-m", "edgert.npu.child")
    return Compiler(name, f"{kind.lower()}-{openvino_version()}", command, {"NPU_COMPILER_TYPE": kind})


@dataclass(frozen=True)
class _Run:
    """How a process ended: `status` is None, and `over` says which limit, where it was ended."""

    status: int | None
    output: str
    peak_rss_bytes: int
    over: Failed | None = None


def _placed(xml: Path, work: Path) -> str:
    """The model's name as the compiler is given it. Wine's programs trip over names that are not ASCII, so they get
    a link; on Windows links are for administrators, and the compiler is native."""
    if sys.platform == "win32":
        return str(xml.resolve())
    (work / "model.xml").symlink_to(xml.resolve())
    (work / "model.bin").symlink_to(xml.with_suffix(".bin").resolve())
    return "model.xml"


def _run(command: list[str], environment: Mapping[str, str], work: Path, limits: Limits) -> _Run:
    deadline = time.monotonic() + limits.seconds
    peak = 0
    log = work / "log"
    over = None
    with log.open("wb") as stream:
        try:
            process = psutil.Popen(
                command, cwd=work, env=dict(environment), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )
        except OSError as error:
            return _Run(None, f"{command[0]}: {error.strerror}", 0)
        try:
            while process.poll() is None and over is None:
                peak = max(peak, _resident(process))
                if peak > limits.memory_bytes:
                    over = Failed("memory", f"over {limits.memory_bytes / 2**30:.1f} GiB of memory")
                elif time.monotonic() > deadline:
                    over = Failed("timeout", f"not done after {limits.seconds:g} s")
                else:
                    _wait(process, POLL_S)
        finally:  # Ctrl-C too
            _kill(process)
    return _Run(process.returncode, log.read_text("utf-8", "replace"), peak, over)


def _wait(process: psutil.Popen, seconds: float) -> None:
    with suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
        process.wait(seconds)


def _tree(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Popen) -> int:
    total = 0
    for one in _tree(process):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _kill(process: psutil.Popen) -> None:
    tree = _tree(process) if process.poll() is None else []
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=10)


def _reason(run: _Run) -> str:
    """The compiler's own words out of a log: what it printed as errors, and what OpenVINO made of them."""
    text = re.sub(r"\x1b\[[\d;]*m", "", run.output)
    fatal = re.findall(r"^LLVM ERROR: .*", text, re.MULTILINE)
    errors = re.findall(r"^\[ERROR\] [\d:.]+ \[[^\]]*\] (.*)", text, re.MULTILINE)
    returned = re.findall(r"returned msg:\s*\n?(.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\[\w+\] [\d:.]+ ", line)]
    found = fatal + errors + returned or lines[-1:] or [f"exit status {run.status}"]
    return "; ".join(dict.fromkeys(part.strip() for part in found))[:MAX_REASON]
