"""Rounds in which runtimes take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

from bandwidth import read_gbps
from rich.console import Console
from runtimes.catalogue import Runtime
from runtimes.measure import START_LIMIT_S, Cell, Cells, OverLimitError, Process, RuntimeFailedError, steps_ms

DEEP = 4096  # from here on a context is filled once and goes on from round to round
NEW = 18  # tokens of a turn: the first comes with the prompt, the first step is not counted
FULL = (480, 32)  # prompt and new tokens after which memory is read
Work = list[tuple[Runtime, Cells]]


class Bench:
    """One run: its processes, and what was found.

    Args:
        limit_s: for one request; who does not keep it gets "over N s" instead of a figure.
    """

    def __init__(
        self, work: Work, threads: int, vocab_size: int, limit_s: float, log: IO[bytes], progress: Console
    ) -> None:
        self._work, self._threads, self._vocab_size, self._limit_s = work, threads, vocab_size, limit_s
        self._log, self._progress = log, progress
        self._alive: dict[str, Process] = {}
        self._deep: set[tuple[str, int]] = set()
        self._seed = 0
        self.versions: dict[str, dict[str, str]] = {}
        self.bandwidth: list[float] = []

    def _turns(self, number: int, what: str) -> Iterator[tuple[Runtime, Cells]]:
        self._progress.print(what, style="dim")
        shift = number % len(self._work)
        yield from self._work[shift:] + self._work[:shift]

    def _say(self, runtime: Runtime, text: str) -> None:
        self._progress.print(f"  {runtime.name}: {text}", style="yellow", markup=False)

    def _process(self, runtime: Runtime) -> Process:
        """The runtime's own process, with its model loaded, so that a limit is the request's alone."""
        if runtime.name not in self._alive:
            self._alive[runtime.name] = self._fresh(runtime)
            self.versions[runtime.name] = self._alive[runtime.name].ask(START_LIMIT_S, do="versions")
        return self._alive[runtime.name]

    def _fresh(self, runtime: Runtime) -> Process:
        return Process(runtime, self._threads, self._vocab_size, self._log)

    def _ask(self, runtime: Runtime, cells: Sequence[Cell], **request: Any) -> list[float] | None:
        """Stamps, or None and a word in `cells` where there are none."""
        if all(cell.closed for cell in cells):
            return None
        self._seed += 1
        try:
            answer = self._process(runtime).ask(self._limit_s, seed=self._seed, **request)
            stamps: list[float] = answer["stamps_s"]
            return stamps
        except (OverLimitError, RuntimeFailedError) as error:
            self._alive.pop(runtime.name).end()
            self._deep = {(name, context) for name, context in self._deep if name != runtime.name}
            over = isinstance(error, OverLimitError)
            for cell in cells:
                cell.over_s, cell.error = (self._limit_s, None) if over else (None, str(error))
            self._say(runtime, f"over {self._limit_s:.0f} s" if over else str(error))
            return None

    def load(self, rounds: int) -> None:
        """Process start to first token, and memory after 512 tokens; the files are in memory before."""
        for runtime, _ in self._work:
            paths = runtime.model.iterdir() if runtime.model.is_dir() else [runtime.model]
            for path in paths:
                if path.is_file():
                    path.read_bytes()
        for number in range(rounds):
            for runtime, cells in self._turns(number, f"load, round {number + 1}"):
                found = [
                    cells.setdefault(name, Cell()) for name in ("load", "resident memory", "anonymous memory", "peak")
                ]
                if found[0].closed:
                    continue
                process = self._fresh(runtime)
                try:
                    process.ask(START_LIMIT_S, do="run", prompt=32, seed=number, new=1)
                    found[0].values.append(process.age_ms)
                    process.ask(START_LIMIT_S, do="hold", prompt=FULL[0], seed=number + 1000, new=FULL[1])
                    memory = process.ask(START_LIMIT_S, do="memory")
                    for cell, name in zip(found[1:], ("resident", "anonymous", "peak"), strict=True):
                        if memory[name] is not None:
                            cell.values.append(memory[name])
                    self.versions[runtime.name] = process.ask(START_LIMIT_S, do="versions")
                except OverLimitError:
                    found[0].over_s = START_LIMIT_S
                except RuntimeFailedError as error:
                    found[0].error = str(error)
                    self._say(runtime, str(error))
                finally:
                    process.end()

    def fill(self, contexts: Sequence[int]) -> None:
        """Prefill what goes on from round to round."""
        for context in contexts:
            for runtime, cells in self._turns(0, f"fill {context}"):
                cell = cells.setdefault(f"decode {context}", Cell())
                if self._ask(runtime, [cell], do="hold", prompt=context, new=2):
                    self._deep.add((runtime.name, context))

    def round(self, number: int, prompts: Sequence[int], contexts: Sequence[int]) -> None:
        """Round 0 is not counted: runtimes compile kernels when they first meet a shape."""
        if number and (rate := read_gbps(self._threads)) is not None:
            self.bandwidth.append(rate)
        for length in sorted({*prompts, *(c for c in contexts if c < DEEP)}):
            for runtime, cells in self._turns(number, f"round {number}, prompt {length}"):
                prefill, decode = (
                    cells.setdefault(f"{phase} {length}", Cell()) if length in lengths else None
                    for phase, lengths in (("prefill", prompts), ("decode", contexts))
                )
                wanted = [cell for cell in (prefill, decode) if cell is not None]
                stamps = self._ask(runtime, wanted, do="run", prompt=length, new=1 if decode is None else NEW)
                if number and stamps and prefill is not None:
                    prefill.values.append(1000 * stamps[0])
                if number and stamps and decode is not None:
                    decode.values.append(steps_ms(stamps))
        for context in (c for c in contexts if c >= DEEP):
            for runtime, cells in self._turns(number, f"round {number}, context {context}"):
                cell = cells[f"decode {context}"]
                if (runtime.name, context) in self._deep:
                    stamps = self._ask(runtime, [cell], do="resume", prompt=context, new=NEW)
                    if number and stamps:
                        cell.values.append(steps_ms(stamps))

    def end(self) -> None:
        for process in self._alive.values():
            process.end()
        self._alive.clear()
