"""Linux's perf counters: the one system call that opens them, which Python does not have."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import weakref
from collections.abc import Callable

from edgert.errors import DeviceError

# Linux's UAPI: arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/linux/perf_event.h for the rest.
_PERF_EVENT_OPEN = 298
_ATTRIBUTES_BYTES = 64  # PERF_ATTR_SIZE_VER0: type, size, config, and zeros for all else
_CLOSE_ON_EXEC = 8
_ALL_PROCESSES = _NO_GROUP = -1


class PerfCounter:
    """One event counted on one CPU for all processes; closed when it is dropped.

    Args:
        kind: number of the event source, as in its file `type`.
        config: of the event.
        cpu: number of the CPU.

    Raises:
        DeviceError: not Linux on x86-64, or the kernel refuses.
    """

    def __init__(self, kind: int, config: int, cpu: int) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise DeviceError("perf events are opened on Linux on x86-64 only")
        attributes = struct.pack("=IIQ", kind, _ATTRIBUTES_BYTES, config).ljust(_ATTRIBUTES_BYTES, b"\0")
        libc = ctypes.CDLL(None, use_errno=True)
        self._file: int = libc.syscall(
            ctypes.c_long(_PERF_EVENT_OPEN),
            attributes,
            ctypes.c_int(_ALL_PROCESSES),
            ctypes.c_int(cpu),
            ctypes.c_int(_NO_GROUP),
            ctypes.c_ulong(_CLOSE_ON_EXEC),
        )
        if self._file < 0:
            raise DeviceError(f"perf_event_open: {os.strerror(ctypes.get_errno())}")
        weakref.finalize(self, os.close, self._file)

    def read(self) -> int:
        """The count; `DeviceError` where it cannot be read."""
        try:
            return int(struct.unpack("=q", os.read(self._file, 8))[0])
        except (OSError, struct.error) as error:
            raise DeviceError(f"perf event: {error}") from error


Opener = Callable[[int, int, int], Callable[[], int]]


def open_counter(kind: int, config: int, cpu: int) -> Callable[[], int]:
    """Open a counter as `PerfCounter` and give what reads it."""
    return PerfCounter(kind, config, cpu).read
