"""The memory bandwidth of this machine, measured by a small program that is compiled when it is first needed.

python benchmarks/bandwidth.py [THREADS]
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("bandwidth.cpp")
PROGRAM = Path(__file__).parents[1] / "build" / "bench" / ("bandwidth.exe" if os.name == "nt" else "bandwidth")
REPETITIONS = 5


def read_gbps(threads: int) -> float | None:
    """GB/s that `threads` threads read together, the median of some repetitions; None where there is no compiler."""
    if not _built():
        return None
    found = subprocess.run(
        [str(PROGRAM), str(threads), str(REPETITIONS)], check=True, capture_output=True, text=True, timeout=120
    )
    return statistics.median(map(float, found.stdout.split()))


def _built() -> bool:
    if PROGRAM.exists() and PROGRAM.stat().st_mtime >= SOURCE.stat().st_mtime:
        return True
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (compiler := shutil.which(name)):
            # Native vectors: not that the reads were slower without, but their instructions must not be what limits.
            command = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", str(SOURCE), "-o", str(PROGRAM)]
            return subprocess.run(command).returncode == 0
    if compiler := shutil.which("cl"):
        command = [compiler, "/O2", "/std:c++17", "/EHsc", str(SOURCE), f"/Fe:{PROGRAM}", f"/Fo:{PROGRAM}.obj"]
        return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    return False


if __name__ == "__main__":
    rate = read_gbps(int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1)
    print("no C++ compiler found" if rate is None else f"{rate:.1f} GB/s")
