"""The native kernels: an OpenVINO op extension built from `kernels/`, and whether it can be used here.

A pure installation (no compiler when it was built) has none; everything still runs, on OpenVINO's own kernels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import edgert

if TYPE_CHECKING:
    import openvino
    from openvino.utils.node_factory import NodeFactory

FOLDER = "_kernels"
LIBRARY = "edgert_kernels.dll" if sys.platform == "win32" else "edgert_kernels.so"
VERSION_FILE = "openvino-version.txt"  # beside the library: the OpenVINO release it was built against


@dataclass(frozen=True)
class KernelStatus:
    """What became of an attempt to load the kernels.

    Attributes:
        path: the library; None where it was not built.
        loads: OpenVINO took it.
        reason: why it does not load, in one line; None where it does.
    """

    path: Path | None
    loads: bool
    reason: str | None


def library() -> Path | None:
    """The extension library of this installation, or None where it was not built."""
    # An editable install has two folders: the sources, and the one in site-packages that CMake installs into.
    candidates = (Path(root) / FOLDER / LIBRARY for root in edgert.__path__)
    return next((path for path in candidates if path.is_file()), None)


def load(core: openvino.Core) -> KernelStatus:
    """Register the kernels' operations with `core`; where they cannot, `reason` says why and `core` is as before."""
    path = library()
    if path is None:
        return KernelStatus(None, False, f"{LIBRARY} is not part of this installation")
    reason = _mismatch(path)
    if reason is None:
        try:
            core.add_extension(str(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
    return KernelStatus(path, reason is None, reason)


def status() -> KernelStatus:
    """Whether the kernels can be used: loads them into a core of its own."""
    import openvino

    return load(openvino.Core())


def instruction_set() -> str | None:
    """Which instruction set the kernels use here, e.g. `avx512-vnni`; where `status` says that they load.

    None where the environment variable EDGERT_KERNELS_MAX_ISA, which limits it, names none.
    """
    import ctypes

    ask = ctypes.CDLL(str(library())).edgert_kernels_isa
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return None if name is None else name.decode()


def factory() -> NodeFactory:
    """Makes nodes of the kernels' operations; where `status` says that they load.

    No core must know the operations for that. So a bundle's own model file cannot name them.
    """
    path = library()
    assert path is not None
    return _factory(path)


@cache
def _factory(path: Path) -> NodeFactory:
    from openvino.utils.node_factory import NodeFactory

    made = NodeFactory()
    made.add_extension(str(path))
    return made


def _mismatch(path: Path) -> str | None:
    """Why the library must not be loaded beside the installed OpenVINO, or None.

    OpenVINO's C++ interface is stable within one release only. On Linux the loader refuses another one by itself (the
    soname carries the release); on Windows nothing would.
    """
    import openvino

    try:
        built = (path.parent / VERSION_FILE).read_text(encoding="utf-8").strip()
    except OSError as error:
        return f"{VERSION_FILE} beside the library cannot be read: {error}"
    installed = openvino.get_version().partition("-")[0]
    return None if built == installed else f"built against OpenVINO {built}, but {installed} is installed"
