"""The op extension as a library: `edgert.native` finds it, and says why it does not load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import openvino as ov
import pytest

import edgert
from edgert import native

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")


def test_kernels_are_built_where_they_must_be() -> None:
    if os.environ.get("EDGERT_REQUIRE_KERNELS") != "1":
        pytest.skip("EDGERT_REQUIRE_KERNELS is not 1: an installation without kernels is valid")
    status = native.status()
    assert status.loads, status.reason


def test_missing_library_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    assert native.library() is None
    assert native.status() == native.KernelStatus(None, False, f"{native.LIBRARY} is not part of this installation")


@pytest.fixture
def other_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `_kernels` folder of its own, with what OpenVINO's release asks for and a library that is none."""
    folder = tmp_path / native.FOLDER
    folder.mkdir()
    (folder / native.VERSION_FILE).write_text(ov.get_version().partition("-")[0])
    (folder / native.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    return folder


def test_damaged_library_is_a_finding(other_installation: Path) -> None:
    status = native.status()
    assert status.path == other_installation / native.LIBRARY
    assert not status.loads
    assert status.reason is not None
    assert "Cannot add extension" in status.reason
    assert "\n" not in status.reason


def test_library_without_its_version_is_not_loaded(other_installation: Path) -> None:
    (other_installation / native.VERSION_FILE).unlink()
    status = native.status()
    assert not status.loads
    assert status.reason is not None
    assert f"{native.VERSION_FILE} beside the library cannot be read" in status.reason


@needs_kernels
def test_library_of_another_openvino_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library()
    assert path is not None
    shutil.copytree(path.parent, tmp_path / native.FOLDER)
    (tmp_path / native.FOLDER / native.VERSION_FILE).write_text("2025.0.0\n")
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    installed = ov.get_version().partition("-")[0]
    assert native.status().reason == f"built against OpenVINO 2025.0.0, but {installed} is installed"
    core = ov.Core()
    assert not native.load(core).loads
