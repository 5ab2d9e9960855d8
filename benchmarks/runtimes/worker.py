"""One runtime in a process of its own, for as long as the benchmark runs. Started by `measure.py`.

    python worker.py '{"engine": "llama.cpp", "model": "…", "threads": 2, "vocab_size": 151936, "options": {}}'

A request is a line of JSON on standard input, an answer one on standard output:

    {"do": "run", "prompt": 512, "seed": 7, "new": 18}      {"stamps_s": […]}      one for each of the new tokens
    {"do": "hold", "prompt": 8192, "seed": 7, "new": 1}     the same, and the sequence stays
    {"do": "resume", "prompt": 8192, "new": 18}             its next tokens
    {"do": "memory"}                                        {"resident": bytes, "anonymous": …, "peak": …}
    {"do": "versions"}                                      {"openvino": "2026.4.1", …}

An answer with "error" ends nothing; end of input ends the process.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from engines import ENGINES, Engine, Session


class Clock:
    """Stamps of tokens, in seconds since the start, which an engine sets again after what does not count."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.start()

    def start(self) -> None:
        self._start = time.perf_counter()

    def stamp(self) -> None:
        self.stamps.append(time.perf_counter() - self._start)


class Worker:
    def __init__(self, spec: Mapping[str, Any]) -> None:
        _keep_to(spec["threads"])
        self._vocabulary = range(1000, spec["vocab_size"])  # beyond what tokenizers keep for special tokens
        self._engine: Engine = ENGINES[spec["engine"]](Path(spec["model"]), spec["threads"], spec["options"])
        self._held: dict[int, Session] = {}  # by the length of the prompt

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "run" | "hold":
                hold = request["do"] == "hold"
                # Seeds differ, so no prompt begins as another one does, and no cache of prompts helps.
                tokens = random.Random(request["seed"]).choices(self._vocabulary, k=request["prompt"])
                clock = Clock()
                session = self._engine.begin(tokens, request["new"], clock, hold)
                if hold:
                    self._held[request["prompt"]] = session
                else:
                    self._engine.end(session)
                return {"stamps_s": clock.stamps}
            case "resume":
                clock = Clock()
                self._engine.resume(self._held[request["prompt"]], request["new"], clock)
                return {"stamps_s": clock.stamps}
            case "memory":
                return memory()
            case "versions":
                return {name: metadata.version(name) for name in self._engine.packages}
            case other:
                raise ValueError(f"request {other!r} is not known")


def memory() -> dict[str, int | None]:
    """Bytes of this process: resident, of them anonymous (None where the system does not tell), most resident ever."""
    status, rollup = Path("/proc/self/status"), Path("/proc/self/smaps_rollup")
    if status.exists():
        fields = _kilobytes(status)
        anonymous = _kilobytes(rollup).get("Anonymous") if rollup.exists() else None
        return {"resident": fields["VmRSS"], "anonymous": anonymous, "peak": fields["VmHWM"]}
    import psutil

    info = psutil.Process().memory_info()
    return {"resident": info.rss, "anonymous": None, "peak": getattr(info, "peak_wset", None)}


def _kilobytes(path: Path) -> dict[str, int]:
    """Fields `Name: 123 kB` as bytes."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    return found


def _keep_to(threads: int) -> None:
    """Let this process have as many cores as threads: not every runtime can be told how many to use."""
    if threads >= (os.cpu_count() or threads):
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    else:
        import psutil

        process = psutil.Process()
        if hasattr(process, "cpu_affinity"):
            process.cpu_affinity(process.cpu_affinity()[:threads])


def main() -> None:
    # Libraries print what they like; only answers may get to the other side.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(json.loads(sys.argv[1]))
            found = worker.answer(json.loads(line))
        except Exception as error:  # of whatever library: the other side reports it
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
