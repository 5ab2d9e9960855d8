"""Sets up the environment of the runtimes that edgert is compared with. Run by its own Python; see the Makefile.

    build/peers/bin/python benchmarks/runtimes/install.py

Wheels from the package index, and llama.cpp from its sources (`llama-cpp-python`): once with all that it can use of
this CPU, once for AVX2. What is there is left.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "peers-requirements.txt"
TORCH, LLAMA = "torch==2.13.0", "llama-cpp-python==0.3.36"
# CPU flags as Linux calls them. AMX is left out: such a build of this version crashes.
SWITCHES = {
    "avx512f": "GGML_AVX512",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
    "avx_vnni": "GGML_AVX_VNNI",
}
# Of the switches those that a limited instruction set has; AVX2, FMA and F16C are on by themselves.
WITHIN = {"all": set(SWITCHES), "avx2": set[str](), "avx2-vnni": {"avx_vnni"}}
FOLDERS = "llama.json"  # beside the builds: the folder for each instruction set, and the switches it was built with


def pip(*arguments: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env={**os.environ, **environment})


def cpu_flags() -> set[str]:
    """The CPU's features; where the system does not list them, those of an AVX2 machine, which is on the safe side."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        print(f"{platform.system()} does not list the CPU's features: llama.cpp is built for AVX2", file=sys.stderr)
        return set()
    lines = info.read_text("utf-8").splitlines()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def llama(root: Path) -> None:
    flags = cpu_flags()
    folders: dict[str, dict[str, str | list[str]]] = {}
    for name, within in WITHIN.items():
        switches = [switch for flag, switch in SWITCHES.items() if flag in flags & within]
        same = next((f for f in folders.values() if f["switches"] == switches), None)
        if same is not None:  # e.g. AVX2-VNNI on a CPU without
            folders[name] = same
            continue
        folders[name] = {"folder": f"llama-{name}", "switches": switches}
        target = root / f"llama-{name}"
        if target.exists():
            continue
        partial = root / f"partial-llama-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        options = ["-DGGML_NATIVE=OFF", "-DLLAVA_BUILD=OFF", *(f"-D{switch}=ON" for switch in switches)]
        # pip's cache would give the wheel of the other build, which has the same name.
        pip(
            "install", "--no-cache-dir", "--no-deps", "--no-binary", "llama-cpp-python", "--target", str(partial),
            LLAMA, CMAKE_ARGS=" ".join(options), CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
        )  # fmt: skip
        partial.rename(target)
    (root / FOLDERS).write_text(json.dumps(folders, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    pip("install", "--quiet", "--upgrade", "pip>=25.1")
    pip("install", TORCH)  # alone first: where an index or folder offers a CPU build of it, pip takes that one
    pip("install", TORCH, "-r", str(REQUIREMENTS))
    llama(Path(sys.prefix))
