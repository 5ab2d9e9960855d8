"""Which instruction set the native kernels use, and what may be asked of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from kernel_ops import INSTRUCTION_SETS, controls, instruction_set, instruction_sets, with_threads

from edgert import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

# Its own process, as the environment is read once.
ASK = """
import ctypes, sys
import openvino
library = ctypes.CDLL(sys.argv[1])
library.edgert_kernels_isa.restype = ctypes.c_char_p
print(library.edgert_kernels_isa())
"""


def used_with(limit: str | None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "EDGERT_KERNELS_MAX_ISA"}
    if limit is not None:
        environment["EDGERT_KERNELS_MAX_ISA"] = limit
    asked = [sys.executable, "-c", ASK, str(native.library())]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_limit_is_an_upper_limit() -> None:
    order = {name: i for i, name in enumerate(INSTRUCTION_SETS)}
    for name in INSTRUCTION_SETS:
        with instruction_set(name) as used:
            assert controls().edgert_kernels_isa().decode() == used
            assert order[used] <= order[name]
    assert instruction_sets()[0] == "scalar"
    assert instruction_sets()[-1] == "amx-int8-emulated"


def test_software_tiles_are_used_only_where_they_are_asked_for() -> None:
    with instruction_set("amx-int8") as used:
        assert used != "amx-int8-emulated"


@pytest.mark.parametrize("name", [b"", b"avx", b"AVX2", b"avx512", b"avx2 "])
def test_an_unknown_limit_changes_nothing(name: bytes) -> None:
    before = controls().edgert_kernels_isa()
    assert controls().edgert_kernels_limit_isa(name) is None
    assert controls().edgert_kernels_limit_isa(None) is None
    assert controls().edgert_kernels_isa() == before


def test_the_environment_limits_too() -> None:
    best = used_with(None)
    assert used_with("") == best
    assert used_with("scalar") == str(b"scalar")
    with instruction_set("avx2") as used:
        assert used_with("avx2") == str(used.encode())
    assert used_with("avx3") == "None", "an unknown name is no crash: the first use of a kernel raises"


def test_an_unknown_name_in_the_environment_is_an_error_at_the_first_use() -> None:
    code = """
import sys
import numpy as np
from pathlib import Path
from kernel_ops import Operation
attributes = dict(in_features=32, out_features=1, bits=8, group=32, asymmetric=False, norm="", epsilon=0.0,
                  gated=False, activation="", bias=False, residual=False)
made = Operation("QuantizedLinear", [([-1, 32], np.float32), ([-1], np.uint8)], attributes, Path(sys.argv[1]))
made(np.zeros((1, 32), np.float32), np.zeros(544, np.uint8))
"""
    environment = {**os.environ, "EDGERT_KERNELS_MAX_ISA": "sse9", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(native.library())], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "EDGERT_KERNELS_MAX_ISA is 'sse9', expected scalar, avx2, avx2-vnni, avx512-vnni or amx-int8" in done.stderr


def test_threads_may_be_more_than_cores() -> None:
    """The helper that other tests rely on: results come back, errors too."""
    assert with_threads(64, lambda: np.ones(1)) == 1
    with pytest.raises(ValueError, match="from inside"):
        with_threads(2, _fail)
    assert threading.current_thread() is threading.main_thread()


def _fail() -> np.ndarray:
    raise ValueError("from inside")
