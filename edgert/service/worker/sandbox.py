"""What a worker gives up before it opens a bundle that somebody else may have made: Linux only, by plain system calls.

* no new privileges (prctl(2)): nothing that it starts becomes more than it is;
* Landlock (landlock(7)): it reads the runtime, the system's libraries and its bundle, writes edgert's cache folder and
  the accelerators' device files, and nothing else; no TCP; no signals to, no abstract sockets of, other processes;
* seccomp (seccomp(2)): no sockets, no programs, no look into other processes, no namespaces, mounts or kernel modules.

What a kernel does not have is left out, and said. Threads that are older than `enter` stay outside of Landlock.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgert.folders import cache_folder

READABLE = (
    "/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/opt/intel", "/run/udev",
    "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip
WRITABLE = ("/dev/null", "/dev/dri", "/dev/accel")

# linux/prctl.h, linux/landlock.h; the numbers of Landlock's calls are the same on all machines
_PR_SET_NO_NEW_PRIVS = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_O_PATH, _O_CLOEXEC = 0o10000000, 0o2000000  # asm-generic/fcntl.h; Python has them on Linux only
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_FILE_RIGHTS = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 5: 2**16 - 1}  # all that a version knows

# asm/unistd_64.h and asm-generic/unistd.h: (x86-64, aarch64)
_CALLS = {
    "socket": (41, 198), "ptrace": (101, 117), "execve": (59, 221), "execveat": (322, 281),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
    "setns": (308, 268), "unshare": (272, 97), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "clone": (56, 220), "clone3": (435, 435), "seccomp": (317, 277), "ioprio_set": (251, 30),
}  # fmt: skip
_ELSEWHERE = ("clone", "clone3", "seccomp", "ioprio_set")  # not simply refused
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH of linux/audit.h
_NAMESPACES = 0x7E020000  # the CLONE_NEW… flags of linux/sched.h
_ALLOW, _KILL, _REFUSE, _ABSENT = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS


def enter(bundle: Path, writable: Sequence[Path] = ()) -> list[str]:
    """Give up what inference does not need. There is no way back.

    Args:
        bundle: may be read.
        writable: folders that may be written beside edgert's cache folder, made where they are missing.

    Returns:
        What holds this process from here on, and what could not be had, e.g. `without seccomp: …`.
    """
    if sys.platform == "linux":
        return _enter(bundle, writable)
    return [f"without sandbox: {sys.platform} has none that edgert knows"]


def _enter(bundle: Path, writable: Sequence[Path]) -> list[str]:
    temporary = cache_folder() / "tmp"
    for folder in (cache_folder(), temporary, *writable):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return [f"without sandbox: {_reason()}"]
    read = [Path(path) for path in READABLE] + [bundle, *_runtime()]
    write = [Path(path) for path in WRITABLE] + [cache_folder(), *writable]
    return ["no new privileges", _landlock(libc, read, write), _seccomp(libc)]


def first_to_go() -> None:
    """Let the kernel choose this process when memory runs out, not the server (proc(5), oom_score_adj)."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/oom_score_adj").write_text("500")
        except OSError:  # a container may forbid it
            return


def _runtime() -> Iterator[Path]:
    """Where Python and its packages are. Of `sys.path` only what is made for packages: it may hold a home folder."""
    listed = [sys.prefix, sys.base_prefix, sys.exec_prefix]
    listed += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    for name in ("edgert", "edgert.profiles"):  # elsewhere where edgert is installed as editable
        spec = importlib.util.find_spec(name)
        if spec is not None:
            listed += [str(Path(spec.origin).parent)] if spec.origin else spec.submodule_search_locations or ()
    yield from (path for path in dict.fromkeys(Path(each).resolve() for each in listed) if path != Path("/"))


def _landlock(libc: ctypes.CDLL, read: Sequence[Path], write: Sequence[Path]) -> str:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return f"without landlock: {_reason()}"
    files = max(rights for since, rights in _FILE_RIGHTS.items() if since <= version)
    tcp, scope = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    fields = 1 + (version >= 4) + (version >= 6)
    attributes = struct.pack("=3Q", files, tcp, scope)[: 8 * fields]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return f"without landlock: {_reason()}"
    try:
        for paths, rights in ((read, _READ_FILE | _READ_DIR | _EXECUTE), (write, files)):
            for path in paths:
                _allow(libc, ruleset, path, rights & files)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0):
            return f"without landlock: {_reason()}"
    finally:
        os.close(ruleset)
    held = [name for name, there in (("files", True), ("tcp", tcp), ("signals", scope)) if there]
    threads = len(os.listdir("/proc/self/task")) - 1
    return f"landlock: {', '.join(held)}" + (f" (but {threads} older threads)" if threads else "")


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    """A rule for a path and what is below it; none where nothing is there."""
    try:
        handle = os.open(path, _O_PATH | _O_CLOEXEC)
    except OSError:
        return
    try:
        # struct landlock_path_beneath_attr is packed; what only folders have is no right of a file
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & _OF_FILES, handle)
        libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(handle)


def _seccomp(libc: ctypes.CDLL) -> str:
    machine = platform.machine()
    if machine not in _MACHINES or sys.maxsize < 2**32:
        return f"without seccomp: edgert does not know the calls of {machine}"
    column, _ = _MACHINES[machine]
    steps = _filter(machine)
    code = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(code))  # struct sock_fprog
    # SECCOMP_SET_MODE_FILTER with SECCOMP_FILTER_FLAG_TSYNC: all threads of this process, older ones too
    if libc.syscall(_CALLS["seccomp"][column], 1, 1, program):
        return f"without seccomp: {_reason()}"
    return "seccomp: no sockets, no programs"


def _filter(machine: str) -> bytes:
    """The filter as classic BPF (linux/filter.h): a call's number is at 0, the machine at 4, arguments from 16 on."""
    column, machine_id = _MACHINES[machine]
    number = {name: numbers[column] for name, numbers in _CALLS.items()}

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    def equal(value: int, then: int, otherwise: int) -> bytes:
        return struct.pack("=HBBI", 0x15, then, otherwise, value)

    def any_of(bits: int, then: int, otherwise: int) -> bytes:
        return struct.pack("=HBBI", 0x45, then, otherwise, bits)

    def end(action: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, action)

    steps = [load(4), equal(machine_id, 1, 0), end(_KILL), load(0)]
    if machine == "x86_64":
        steps += [any_of(0x40000000, 0, 1), end(_KILL)]  # the x32 calls have other numbers
    for name, value in number.items():
        if name not in _ELSEWHERE:
            steps += [equal(value, 0, 1), end(_REFUSE)]
    # clone3's flags lie behind a pointer; without it, libraries use clone
    steps += [equal(number["clone3"], 0, 1), end(_ABSENT)]
    steps += [equal(number["clone"], 0, 4), load(16), any_of(_NAMESPACES, 0, 1), end(_REFUSE), end(_ALLOW)]
    return b"".join([*steps, end(_ALLOW)])


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
