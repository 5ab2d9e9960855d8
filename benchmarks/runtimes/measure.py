"""Processes of runtimes that take turns, and what they took."""

from __future__ import annotations

import itertools
import json
import os
import queue
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from runtimes.catalogue import Runtime

WORKER = Path(__file__).with_name("worker.py")
START_LIMIT_S = 300.0  # to load a model, and for small requests


class OverLimitError(Exception):
    """No answer in time; the process is gone."""


class RuntimeFailedError(Exception):
    """The runtime's own words."""


class Process:
    """A worker (see `worker.py`); the model loads with the first request.

    Args:
        log: where its standard error goes.
    """

    def __init__(self, runtime: Runtime, threads: int, vocab_size: int, log: IO[bytes]) -> None:
        self._runtime, self._spec = runtime, {
            "engine": runtime.kind, "model": str(runtime.model), "threads": threads, "vocab_size": vocab_size,
            "options": dict(runtime.options),
        }  # fmt: skip
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(runtime.python), str(WORKER), json.dumps(self._spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            env={**os.environ, **runtime.environment},
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, limit_s: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            OverLimitError: it took longer; the process was ended.
            RuntimeFailedError: the runtime failed, or its process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.end()
            raise OverLimitError from None
        except (OSError, ValueError):  # the process is gone, or was ended from here
            line = ""
        if not line:
            self.end()
            raise RuntimeFailedError(f"the process ended with {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeFailedError(answer["error"])
        return answer

    @property
    def age_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._started)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not read yet has no reader any more
                    pipe.close()


@dataclass
class Cell:
    """A figure of a runtime: one value a round, and what kept it from having more.

    Attributes:
        values: milliseconds, or bytes.
        over_s: the limit that a request did not keep, if one did not.
        error: what the runtime said, if it failed.
    """

    values: list[float] = field(default_factory=list)
    over_s: float | None = None
    error: str | None = None

    @property
    def closed(self) -> bool:
        """Whether asking again would be of no use."""
        return self.over_s is not None or self.error is not None

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values and not self.closed else None


Cells = dict[str, Cell]  # by what was measured, e.g. "decode 512"


def steps_ms(stamps_s: Sequence[float]) -> float:
    """The median of the times between tokens, without the first one, which finds caches as others left them."""
    steps = [b - a for a, b in itertools.pairwise(stamps_s)]
    return 1000 * statistics.median(steps[1:])
