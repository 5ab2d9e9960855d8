"""Memory of workers, of the machine, and of models that are not loaded yet."""

from __future__ import annotations

import mmap
from pathlib import Path

from edgert.errors import BundleError

# Beside the weights: OpenVINO's own memory, activations, the tokenizer. Weights that are repacked are counted once, as
# the originals are mapped from the file and may leave.
OVERHEAD = 1.2


def resident_bytes(pid: int) -> int | None:
    """What a process holds in memory; None where it is gone, or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        pass
    import psutil  # only where there is no /proc: it costs the server a megabyte

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def machine_bytes() -> int:
    """The machine's memory."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    import psutil

    return int(psutil.virtual_memory().total)


def bundle_bytes(path: Path) -> int:
    """Size of a bundle's files. Raises `BundleError` where there is no folder to look into."""
    try:
        if not path.is_dir():
            raise BundleError(f"bundle {path}: no such folder")
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    except OSError as error:
        raise BundleError(f"bundle {path}: {error.strerror}") from error
