"""A pytest plugin: tests use a native library of another build, whose folder the environment names.

    PYTHONPATH=tests EDGERT_KERNELS_FROM=build/sanitized python -m pytest -p kernels_from tests/test_kernel_linear.py

The folder is what `cmake --install` was given as prefix.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import edgert
from edgert import native

FOLDER = Path(os.environ["EDGERT_KERNELS_FROM"], "edgert").resolve()


def pytest_configure() -> None:
    edgert.__path__.insert(0, str(FOLDER))
    if native.library() != FOLDER / native.FOLDER / native.LIBRARY:
        raise pytest.UsageError(f"{FOLDER / native.FOLDER} has no {native.LIBRARY}")


def pytest_report_header() -> str:
    return f"native kernels: {native.library()}"
