"""edgert beside other runtimes on this CPU: prefill, decode, memory and load, of the same weights, taking turns.

    make bench-peers [ARGS="--model qwen3 --isa all --keep"]

Every runtime has a process of its own, with as many threads as the others, that stays for the whole run. In a round
each of them does the same in turn; the next round begins with another one. Figures are medians of the rounds, between
which the bandwidth of the memory is measured. `make bench-peers` sets up what that needs in build/peers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from runtimes.catalogue import ENGINES, HELD, MODELS, compared, cpu, notes
from runtimes.report import DOCUMENT, keep, targets, terminal
from runtimes.rounds import DEEP, Bench, Work
from shapes import BUILD, ROOT

PHASES = ("load", "prefill", "decode")
PROMPTS, CONTEXTS = (128, 512, 2048), (32, 512, 2048, 8192)


def machine() -> dict[str, Any]:
    import psutil

    name, flags = cpu()
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": name, "cores": os.cpu_count(), "isa": [flag for flag in known if flag in flags],
        "memory_bytes": psutil.virtual_memory().total, "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--isa", choices=HELD, default="all", help="hold all runtimes to an instruction set")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--edgert-config", nargs="+", default=["CPU@kernels"], help="each is an engine of its own")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds for a request")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--keep", action="store_true", help=f"put it into {DOCUMENT.relative_to(ROOT)} and its page")
    options = parser.parse_args()
    prompts = options.prompts if "prefill" in options.phases else ()
    contexts = options.contexts if "decode" in options.phases else ()
    BUILD.mkdir(parents=True, exist_ok=True)
    chosen = compared(options.model, options.isa, options.edgert_config, options.engines)
    bundle = MODELS[options.model][1]()
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    work: Work = [(runtime, {}) for runtime in chosen]
    log, progress = BUILD / "peers.log", Console(stderr=True)
    with log.open("wb") as stream:
        bench = Bench(work, options.threads, manifest["model"]["vocab_size"], options.limit, stream, progress)
        try:
            if "load" in options.phases:
                bench.load(options.rounds)
            bench.fill([c for c in contexts if c >= DEEP])
            for number in range(options.rounds + 1 if prompts or contexts else 0):
                bench.round(number, prompts, contexts)
        finally:
            bench.end()
    result = {
        "model": f"{MODELS[options.model][0]}'s shape, random weights",
        "isa": options.isa,
        "date": datetime.date.today().isoformat(),
        "provenance": "measured",
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "bandwidth_gbps": bench.bandwidth,
        "weight_bytes_a_token": sum(p["bytes"] for p in manifest["report"]["precisions"]),
        "notes": notes(options.isa),
        "runtimes": [
            {
                "name": runtime.name,
                "precision": dict(runtime.precision),
                "versions": bench.versions.get(runtime.name, {}),
                "cells": {name: {**asdict(cell), "median": cell.median} for name, cell in cells.items()},
            }
            for runtime, cells in work
        ],
    }
    terminal(result, targets(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.keep:
        keep(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
