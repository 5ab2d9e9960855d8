"""`edgert doctor`: what it finds here, and what it says of installations that are broken in known ways."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgert
from edgert import native
from edgert.cli import doctor
from edgert.device import DeviceKind
from edgert.discovery import Absence
from edgert.npu.compiler import Candidate, Compiler


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *arguments])
    code = args.run(args)
    assert isinstance(code, int)
    return code


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to report instead of the installed ones; None for a package that is to be absent."""
    fake: dict[str, str | None] = {}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: fake[name] if name in fake else real(name))
    return fake


def test_table_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    code = run()
    shown = capsys.readouterr().out
    found = doctor.checks()
    assert code == (1 if any(check.ok is False for check in found) else 0)
    assert "edgert[compile]" in shown
    assert all(check.name in shown for check in found)


def test_json_is_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    run("--json")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["OpenVINO"] == {"name": "OpenVINO", "ok": True, "detail": "2026.4.1", "remedy": None}
    assert rows["devices"]["ok"] is True
    assert "CPU: " in rows["devices"]["detail"]
    assert rows["native kernels"]["ok"] is (True if native.library() else None)


@pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")
@pytest.mark.parametrize(("limit", "ok", "detail"), [("scalar", True, "scalar: "), ("mmx", False, "'mmx'")])
def test_kernels_say_their_instruction_set(limit: str, ok: bool, detail: str) -> None:
    ask = "from edgert.cli import doctor; check = doctor.check_kernels(); print(check.ok, check.detail)"
    environment = os.environ | {"EDGERT_KERNELS_MAX_ISA": limit}
    command = [sys.executable, "-c", ask]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(str(ok)), shown
    assert detail in shown


def test_other_openvino_fails(versions: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    versions["openvino"] = "2025.1.0"
    check = doctor.check_openvino()
    assert check == doctor.Check(
        "OpenVINO", False, "2025.1.0 is installed, edgert needs 2026.4.1", "pip install openvino==2026.4.1"
    )
    assert run() == 1
    assert "FAILED" in capsys.readouterr().out


def test_absent_openvino_fails_and_nothing_else_is_asked_of_it(versions: dict[str, str | None]) -> None:
    versions["openvino"] = None
    found = {check.name: check for check in doctor.checks()}
    assert found["OpenVINO"].ok is False
    assert not {"native kernels", "devices"} & found.keys()


def test_runs_where_openvino_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_openvino(tmp_path, monkeypatch, "raise ImportError('libopenvino is damaged')")
    command = [sys.executable, "-m", "edgert", "doctor", "--json"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 1, child.stderr
    rows = {row["name"]: row for row in json.loads(child.stdout)}
    assert rows["devices"]["ok"] is False
    assert "libopenvino is damaged" in rows["devices"]["detail"]


def test_absent_compile_packages_are_named(versions: dict[str, str | None]) -> None:
    versions |= {"torch": None, "nncf": None}
    check = doctor.check_compile_packages()
    assert check.ok is None
    assert check.detail.startswith("missing: ")
    assert {"torch", "nncf"} <= set(check.detail.removeprefix("missing: ").split(", "))
    assert check.remedy is not None
    assert "edgert[compile]" in check.remedy


@pytest.mark.parametrize(
    ("torch", "torchvision", "expected"),
    [
        ("2.13.0+cpu", "0.28.0", [False]),  # PyPI's CUDA torchvision
        ("2.13.0", "0.28.0+cpu", [False]),
        ("2.13.0+cpu", "0.28.0+cpu", [True]),
        ("2.13.0", "0.28.0", [True]),
        ("2.13.0+cpu", None, []),
        (None, "0.28.0", []),
    ],
)
def test_torchvision_of_another_build_is_found(
    versions: dict[str, str | None], torch: str | None, torchvision: str | None, expected: list[bool]
) -> None:
    versions |= {"torch": torch, "torchvision": torchvision}
    found = doctor.check_torchvision()
    assert [check.ok for check in found] == expected
    if expected == [False]:
        assert found[0].remedy is not None
        assert "pip uninstall torchvision" in found[0].remedy


def test_kernels_not_built_for_want_of_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = doctor.check_kernels()
    assert check.ok is None
    assert "no C++ compiler on the path (looked for c++, g++, clang++, cl)" in check.detail
    assert check.remedy is not None
    assert check.remedy.startswith("install g++")


def test_kernels_not_built_although_a_compiler_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    monkeypatch.setenv("CXX", sys.executable)
    check = doctor.check_kernels()
    assert check.ok is None
    assert f"{sys.executable} is there now" in check.detail


def test_damaged_kernels_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / native.FOLDER
    folder.mkdir()
    (folder / native.LIBRARY).write_bytes(b"")
    (folder / native.VERSION_FILE).write_text("2025.0.0")
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    check = doctor.check_kernels()
    assert check.ok is False
    assert "built against OpenVINO 2025.0.0" in check.detail


def fake_openvino(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """What the child process of `check_devices` imports as openvino."""
    (folder / "openvino.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_driver_that_aborts_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_openvino(tmp_path, monkeypatch, "import os, sys\nprint('LLVM ERROR', file=sys.stderr)\nos._exit(134)")
    assert doctor.check_devices() == [
        doctor.Check("devices", False, "listing them failed (exit status 134): LLVM ERROR")
    ]


def test_driver_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_openvino(tmp_path, monkeypatch, "import threading\nthreading.Event().wait()")
    monkeypatch.setattr(doctor, "DEVICES_TIMEOUT_S", 0.5)
    [check] = doctor.check_devices()
    assert check.ok is False
    assert check.detail == "listing them took over 0.5 s"


def test_no_cpu_device_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_openvino(tmp_path, monkeypatch, "class Core:\n    available_devices = []")
    check, *_ = doctor.check_devices()
    assert check.ok is False
    assert check.detail == "OpenVINO reports no CPU device (found: none)"


LISTING = """
class Core:
    available_devices = ["CPU", "GPU.0", "GPU.1"]

    def get_property(self, device, name):
        return {"CPU": "c", "GPU.0": "integrated", "GPU.1": "discrete"}[device]
"""


def test_accelerators_are_checked_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_openvino(tmp_path, monkeypatch, LISTING)
    npu = Absence(DeviceKind.NPU, "no permission", "join the group render")
    asked: list[set[DeviceKind]] = []

    def absences(present: set[DeviceKind]) -> list[Absence]:
        asked.append(present)
        return [npu, Absence(DeviceKind.ORT, "not installed", "install it")]

    monkeypatch.setattr("edgert.discovery.absences", absences)
    assert doctor.check_devices() == [
        doctor.Check("devices", True, "CPU: c; GPU.0: integrated; GPU.1: discrete"),
        doctor.Check("GPU", True, "integrated; discrete"),
        doctor.Check("NPU", None, "no permission", "join the group render"),
    ]
    assert asked == [{DeviceKind.GPU}]


def candidates(monkeypatch: pytest.MonkeyPatch, *found: Candidate) -> None:
    monkeypatch.setattr("edgert.npu.compiler.find_all", lambda: list(found))


def test_npu_compiler_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler("wine", "plugin-2026.4.1", ("wine64",))
    candidates(
        monkeypatch, Candidate("openvino", None, "has none", None), Candidate("wine", compiler, "in a prefix", None)
    )
    assert doctor.check_npu_compiler() == doctor.Check("NPU compiler", True, "wine: in a prefix")


def test_npu_compiler_that_is_not_there_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "edgert doctor --setup npu-compiler"
    candidates(
        monkeypatch, Candidate("openvino", None, "has none", None), Candidate("wine", None, "not set up", command)
    )
    check = doctor.check_npu_compiler()
    assert check.ok is None
    assert check.detail == "openvino: has none; wine: not set up"
    assert check.remedy == f"to compile blobs for NPUs here: {command}"


def test_setup_of_the_npu_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def setup(progress: Callable[[str], None]) -> Path:
        progress("downloading [b]")
        return tmp_path

    monkeypatch.setattr("edgert.npu.setup.setup", setup)
    assert run("--setup", "npu-compiler") == 0
    out, err = capsys.readouterr()
    assert out == f"the NPU compiler is ready: {tmp_path}\n"
    assert err == "downloading [b]\n"


def test_broken_onnxruntime_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no libonnxruntime')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    check = doctor.check_onnxruntime()
    assert check.ok is False
    assert "no libonnxruntime" in check.detail
