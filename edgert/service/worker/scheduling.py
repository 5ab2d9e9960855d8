"""How much this process wants the CPU: little while it only has background work."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import suppress

_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # asm/unistd_64.h, asm-generic/unistd.h
_IO_IDLE, _IO_NONE = 3 << 13, 0  # linux/ioprio.h


def set_background(on: bool) -> None:
    """Take, or leave, the system's class for background work; all threads of this process go along.

    Linux: SCHED_BATCH (sched(7)) and idle disk priority, and nice 10 only where the system lets a process come back
    from it. Windows: EcoQoS (`ProcessPowerThrottling`) and the priority class below normal. Elsewhere nothing happens.
    """
    if sys.platform == "win32":
        _windows(on)
    elif sys.platform == "linux":
        _linux(on)


if sys.platform == "linux":

    def _linux(on: bool) -> None:
        import resource

        returns = resource.getrlimit(resource.RLIMIT_NICE)[0]  # 20 lets a process come back to nice 0
        nice = returns == resource.RLIM_INFINITY or returns >= 20 or os.geteuid() == 0
        call = _IOPRIO_SET.get(platform.machine())
        libc = ctypes.CDLL(None, use_errno=True)
        for name in os.listdir("/proc/self/task"):
            thread = int(name)
            with suppress(OSError):  # it has ended meanwhile, or a container forbids it
                os.sched_setscheduler(thread, os.SCHED_BATCH if on else os.SCHED_OTHER, os.sched_param(0))
                if nice:
                    os.setpriority(os.PRIO_PROCESS, thread, _NICE if on else 0)
            if call is not None:
                libc.syscall(call, 1, thread, _IO_IDLE if on else _IO_NONE)


if sys.platform == "win32":

    class _Throttling(ctypes.Structure):  # PROCESS_POWER_THROTTLING_STATE
        _fields_ = (("version", ctypes.c_uint32), ("control", ctypes.c_uint32), ("state", ctypes.c_uint32))

    def _windows(on: bool) -> None:
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        speed = 1  # PROCESS_POWER_THROTTLING_EXECUTION_SPEED
        # A control mask of 0 gives the choice back to Windows.
        state = _Throttling(1, speed if on else 0, speed if on else 0)
        kernel.SetProcessInformation(process, 4, ctypes.byref(state), ctypes.sizeof(state))
        below_normal, normal = 0x4000, 0x20
        kernel.SetPriorityClass(process, below_normal if on else normal)
