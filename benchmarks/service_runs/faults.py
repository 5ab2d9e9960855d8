"""Workers that die, hang or compute NaN while they answer: do the answers go on, and how long does that take?"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from service_runs.host import Host, answer, asking
from service_runs.load import requests

HARM = {"kill": signal.SIGKILL, "hang": signal.SIGUSR2, "nan": signal.SIGUSR1}
FLAGS = ("--step-timeout", "1s", "--no-sandbox")  # a sandbox changes nothing here and costs a start
STREAMS = 4


@dataclass
class Faults:
    """What a run gave.

    Attributes:
        recovery_s: by kind of fault, from the fault to the first piece of a new worker.
        wrong: answers that are not those of an undisturbed run.
    """

    recovery_s: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in HARM})
    answers: int = 0
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        every = [each for times in self.recovery_s.values() for each in times]
        return {
            "faults": len(every),
            "answers": self.answers,
            "wrong": len(self.wrong),
            "examples": self.wrong[:10],
            "recovery_s": {
                kind: {"count": len(times), "median": statistics.median(times), "worst": max(times)}
                for kind, times in (*self.recovery_s.items(), ("all", every))
                if times
            },
        }


async def run(host: Host, *, count: int, seed: int, progress: Callable[[float], None] = lambda share: None) -> Faults:
    """Args:
    host: a faulty one.
    count: faults, of all kinds in turn.
    """
    found, rng = Faults(), random.Random(seed)
    async with host.client() as client:
        await host.ready(client)
        asked = requests()
        expected = [(await answer(client, prompt, **options)).text for prompt, options in asked]
        kinds = list(HARM)
        number = 0
        while number < count:
            chosen = rng.sample(range(len(asked)), STREAMS)
            last = [0.0]  # when any stream last gave a piece
            streams = [asyncio.create_task(_read(client, *asked[i], expected[i], found, last)) for i in chosen]
            kind = kinds[number % len(kinds)]
            took = await _harm(host, kind, rng, streams, last)
            await asyncio.gather(*streams)
            if took is not None:  # otherwise the answers were over before
                found.recovery_s[kind].append(took)
                number += 1
                progress(number / count)
    return found


async def _harm(
    host: Host, kind: str, rng: random.Random, streams: list[asyncio.Task[None]], last: list[float]
) -> float | None:
    """Do harm at a random moment; seconds until a piece came after that, None where none had to."""
    await asyncio.sleep(rng.uniform(0, 0.3))
    workers = host.workers()
    if not workers or all(stream.done() for stream in streams):
        return None
    start = time.perf_counter()
    try:
        workers[0].send_signal(HARM[kind])
    except psutil.NoSuchProcess:
        return None
    new_at: float | None = None
    while not all(stream.done() for stream in streams):
        if new_at is None and {worker.pid for worker in host.workers()} - {workers[0].pid}:
            new_at = time.perf_counter()
        if new_at is not None and last[0] > new_at:  # what the old one had sent before does not count
            return last[0] - start
        await asyncio.sleep(0.005)
    return None


async def _read(
    client: httpx.AsyncClient, prompt: str, options: dict[str, Any], expected: str, found: Faults, last: list[float]
) -> None:
    text = ""
    try:
        async with asking(client, prompt, **options) as chunks:
            async for stream in chunks:
                text = stream.text
                last[0] = time.perf_counter()
    except (httpx.HTTPError, RuntimeError) as error:
        found.wrong.append(f"{prompt!r}: {error}")
    found.answers += 1
    if text != expected:
        found.wrong.append(f"{prompt!r}: got {text!r}, expected {expected!r}")
