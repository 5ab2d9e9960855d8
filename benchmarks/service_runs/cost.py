"""What the service costs: over HTTP beside the API in a process, many clients beside one, and at rest."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from service_runs.host import Host, answer

import edgert

TOKENS = 192
CLIENTS = 8
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "that",
    "it",
    "was",
    "he",
    "his",
    "with",
    "for",
    "as",
    "had",
    "not",
    "but",
)
SETTLE_S = 10.0


def unlike(rng: random.Random, words: int) -> str:
    """A prompt that no cache knows."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def between_ms(at_s: list[float]) -> float:
    """Mean time from token to token, after the first ones."""
    return 1e3 * (at_s[-1] - at_s[4]) / (len(at_s) - 5)


async def overhead(host: Host, bundle: Path, device: str, *, rounds: int, seed: int) -> dict[str, Any]:
    """A stream over HTTP and one of the API in this process, in turns.

    The prompts are as long as each other; `first_byte_ms` is the time to the first byte beyond queue and prefill.
    """
    rng = random.Random(seed)
    model = edgert.load(bundle, device=device)
    over_http, in_process, first_byte, devices = [], [], [], []
    async with host.client() as client:
        await host.ready(client)
        await answer(client, "Once", max_tokens=8, temperature=0)
        for number in range(rounds + 1):  # the first one warms both up
            prompt = unlike(rng, 150)
            start = time.perf_counter()
            stream = await answer(client, prompt, max_tokens=TOKENS, temperature=0, logit_bias=_endless(model))
            assert stream.usage is not None
            at_s = stream.at_s[: stream.usage["completion_tokens"]]
            own = stream.usage["edgert"]
            begun = 1e3 * (at_s[0] - start) - own["prefill_ms"] - own["queue_ms"]
            prompt, times = unlike(rng, 150), []
            for _ in model.stream(prompt, max_tokens=TOKENS, logit_bias=_endless(model)):
                times.append(time.perf_counter())
            if number:
                over_http.append(between_ms(at_s))
                in_process.append(between_ms(times))
                first_byte.append(begun)
                devices.append(own["decode_ms"] / (stream.usage["completion_tokens"] - 1))
    return {
        "tokens": TOKENS,
        "rounds": rounds,
        "http_ms": statistics.median(over_http),
        "in_process_ms": statistics.median(in_process),
        "device_ms": statistics.median(devices),  # of http_ms, what the worker spends inside the devices
        "overhead_ms": statistics.median(a - b for a, b in zip(over_http, in_process, strict=True)),
        "first_byte_ms": statistics.median(first_byte),
    }


def _endless(model: edgert.Model) -> dict[int, float]:
    """A bias against ends, so that every stream is as long."""
    return dict.fromkeys(model.facts.eos_token_ids, -100.0)


async def throughput(host: Host, *, rounds: int, seed: int) -> dict[str, Any]:
    """Tokens a second of one client and of eight at once, in turns."""
    rng = random.Random(seed)
    one, many = [], []
    async with host.client() as client:
        await host.ready(client)
        await _rate(client, rng, 1)
        await _rate(client, rng, CLIENTS)
        for _ in range(rounds):
            one.append(await _rate(client, rng, 1))
            many.append(await _rate(client, rng, CLIENTS))
    return {
        "clients": CLIENTS,
        "tokens": TOKENS,
        "rounds": rounds,
        "serial_tokens_per_second": statistics.median(one),
        "together_tokens_per_second": statistics.median(many),
        "ratio": statistics.median(b / a for a, b in zip(one, many, strict=True)),
    }


async def _rate(client: httpx.AsyncClient, rng: random.Random, clients: int) -> float:
    """As many answers as there are clients at most, by so many at once."""
    start = time.perf_counter()
    tokens = 0
    waiting = [unlike(rng, 12) for _ in range(CLIENTS)]

    async def ask() -> None:
        nonlocal tokens
        while waiting:
            found = await answer(client, waiting.pop(), max_tokens=TOKENS, temperature=0)
            assert found.usage is not None
            tokens += found.usage["completion_tokens"]

    await asyncio.gather(*(ask() for _ in range(clients)))
    return tokens / (time.perf_counter() - start)


async def rest(host: Host, *, seconds: float) -> dict[str, Any]:
    """Memory while the model is being loaded, CPU time while it waits, memory after it was unloaded."""
    async with host.client() as client:
        await host.ready(client)
        fresh = host.process.memory_info().rss
        await answer(client, "Once", max_tokens=8, temperature=0)
        await asyncio.sleep(SETTLE_S)
        loaded = host.resident_bytes()
        spent, start = host.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        share = (host.cpu_s() - spent) / (time.monotonic() - start)
        await client.post("/v1/models/unload", json={"model": "demo"})
        await asyncio.sleep(1)
        unloaded = host.process.memory_info().rss
    return {
        "seconds": seconds,
        "fresh_mb": fresh / 1e6,
        "loaded_mb": [size / 1e6 for size in loaded],
        "cpu_share_of_a_core": share,
        "unloaded_mb": unloaded / 1e6,
        "processes_left": len(host.workers()),
    }
