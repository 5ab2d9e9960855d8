"""Many clients for a long time: some hang up, some read slowly, and what each gets must be what it would get alone."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from service_runs.host import Host, answer, asking

# How a client behaves, and how often.
MANNERS = {"whole": 6, "cancels": 2, "slow": 1, "hangs up": 1}
SLOW_S = 0.05
SAMPLE_SHARE = 1 / 120  # of the time, from one look at memory to the next
WARM_SHARE = 0.2  # of the time, at the beginning, in which memory may still grow
OPENINGS = (
    "Once upon a time", "In the beginning of the year", "The captain of the ship", "It was late in the evening when",
    "My dear friend,", "There was no reason to", "The old house stood", "A letter came from the", "He had never seen",
    "She looked at the", "When the rain was over", "They had walked for hours", "Nobody in the village",
    "The king said", "On the road to London", "Far away in the mountains",
)  # fmt: skip


@dataclass
class Load:
    """What a run gave.

    Attributes:
        counts: requests by manner, and what went wrong: `wrong text`, `failed`.
        queue_ms: of each whole answer, how long it waited to be admitted.
        tokens: of whole answers.
        memory: seconds since the start, bytes of the server and of its workers.
    """

    seconds: float
    clients: int
    counts: Counter[str] = field(default_factory=Counter)
    queue_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def growth(self) -> float:
        """By what share all processes grew: the last fifth of the time against the fifth after warm-up."""
        after = [(at, server + workers) for at, server, workers in self.memory if at > WARM_SHARE * self.seconds]
        first = [size for at, size in after if at <= 2 * WARM_SHARE * self.seconds]
        last = [size for at, size in after if at > (1 - WARM_SHARE) * self.seconds]
        return statistics.median(last) / statistics.median(first) - 1

    def to_json(self) -> dict[str, Any]:
        waits = sorted(self.queue_ms)
        return {
            "seconds": self.seconds,
            "clients": self.clients,
            "requests": dict(self.counts),
            "tokens_of_whole_answers": self.tokens,
            "queue_ms": {"median": statistics.median(waits), "p99": waits[int(0.99 * len(waits))], "worst": waits[-1]},
            "memory_growth": self.growth(),
            "memory_mb": {"server": self.memory[-1][1] / 1e6, "workers": self.memory[-1][2] / 1e6},
            "faults": self.faults[:20],
        }


def requests() -> list[tuple[str, dict[str, Any]]]:
    """What clients ask for: greedy, so that the right answer is known."""
    return [(opening, {"max_tokens": 16 + 8 * (n % 12), "temperature": 0}) for n, opening in enumerate(OPENINGS)]


async def serial(client: httpx.AsyncClient, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The answers, one after the other."""
    return [(await answer(client, prompt, **options)).text for prompt, options in asked]


async def run(
    host: Host, *, clients: int, seconds: float, seed: int, progress: Callable[[float], None] = lambda share: None
) -> Load:
    found = Load(seconds, clients)
    async with host.client() as client:
        await host.ready(client)
        asked = requests()
        expected = await serial(client, asked)
        start = time.monotonic()

        async def sample() -> None:
            while True:
                at = time.monotonic() - start
                found.memory.append((at, *host.resident_bytes()))
                progress(min(1.0, at / seconds))
                await asyncio.sleep(SAMPLE_SHARE * seconds)

        sampling = asyncio.create_task(sample())
        await asyncio.gather(
            *(
                _client(client, random.Random(f"{seed}-{n}"), start + seconds, asked, expected, found)
                for n in range(clients)
            )
        )
        sampling.cancel()
    return found


async def _client(
    client: httpx.AsyncClient,
    rng: random.Random,
    end: float,
    asked: Sequence[tuple[str, dict[str, Any]]],
    expected: Sequence[str],
    found: Load,
) -> None:
    while time.monotonic() < end:
        number = rng.randrange(len(asked))
        manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        prompt, options = asked[number]
        try:
            text, whole = await _ask(client, rng, manner, prompt, options, found)
        except (httpx.HTTPError, RuntimeError) as error:
            found.counts["failed"] += 1
            found.faults.append(f"{manner}: {error}")
            continue
        found.counts[manner] += 1
        if not expected[number].startswith(text) or (whole and text != expected[number]):
            found.counts["wrong text"] += 1
            found.faults.append(f"{manner}: {prompt!r}: got {text!r}, expected {expected[number]!r}")


async def _ask(
    client: httpx.AsyncClient, rng: random.Random, manner: str, prompt: str, options: dict[str, Any], found: Load
) -> tuple[str, bool]:
    """What was read, and whether it is the whole answer."""
    if manner == "hangs up":  # at any moment, also while it waits
        reading = asyncio.create_task(answer(client, prompt, **options))
        await asyncio.wait([reading], timeout=rng.uniform(0, 0.5))
        reading.cancel()
        await asyncio.wait([reading])
        return "", False
    limit = rng.randrange(1, 20) if manner == "cancels" else None
    text = ""
    async with asking(client, prompt, **options) as chunks:
        count = 0
        async for stream in chunks:
            text, count = stream.text, count + 1
            if count == limit:
                return text, False
            if manner == "slow":
                await asyncio.sleep(SLOW_S)
    assert stream.usage is not None
    found.queue_ms.append(stream.usage["edgert"]["queue_ms"])
    found.tokens += stream.usage["completion_tokens"]
    return text, True
