"""Running generations for one HTTP request: several at once, counted, and ended with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from edgert.errors import WorkerError
from edgert.service.api.state import Record
from edgert.service.contract import Delta, Request, Service, Usage

if TYPE_CHECKING:
    from edgert.service.api.metrics import Metrics

Numbered = tuple[int, Delta]


async def run(
    service: Service, requests: Sequence[Request], record: Record, metrics: Metrics
) -> AsyncGenerator[Numbered, None]:
    """What all of them generate, as it comes, each delta with its request's number.

    Closing it ends them all; so does an error of one.

    Raises:
        EdgertError: what `Service.generate` raises; `WorkerError` where the service gave a generation up.
    """
    record.model = requests[0].model
    if len(requests) == 1:
        async with aclosing(_observed(service, requests[0], 0, record, metrics)) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    # A slot for each: none gets ahead of a slow reader by more than one delta.
    queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue(len(requests))
    tasks = [
        asyncio.create_task(_fill(queue, number, _observed(service, request, number, record, metrics)))
        for number, request in enumerate(requests)
    ]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _fill(
    queue: asyncio.Queue[Numbered | BaseException | None], number: int, deltas: AsyncGenerator[Delta, None]
) -> None:
    async with aclosing(deltas):
        try:
            async for delta in deltas:
                await queue.put((number, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)


async def _observed(
    service: Service, request: Request, number: int, record: Record, metrics: Metrics
) -> AsyncGenerator[Delta, None]:
    began = time.perf_counter()
    first = last = None
    count = 0
    deltas = cast("AsyncGenerator[Delta, None]", service.generate(request))
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.token is not None:
                count += 1
                last = time.perf_counter()
                first = last if first is None else first
            if record.answer is not None:
                record.answer.append(delta.text)
            if delta.usage is not None:
                record.usage[number] = delta.usage
                metrics.generation(
                    request.model,
                    delta.usage,
                    None if first is None else first - began,
                    None if first is None or last is None or count < 2 else (last - first) / (count - 1),
                )
            if delta.finish_reason == "cancelled":
                raise WorkerError(f"the service gave up a generation of {request.model}")
            yield delta


async def all_of(deltas: AsyncIterator[Numbered]) -> dict[int, list[Delta]]:
    """Everything, by number."""
    found: dict[int, list[Delta]] = {}
    async for number, delta in deltas:
        found.setdefault(number, []).append(delta)
    return found


def total(usages: Sequence[Usage], prompts: int) -> Usage:
    """Usage of several generations as one.

    Args:
        usages: of each; in order.
        prompts: how many different prompts they had; choices of the same prompt are neighbours, and it counts once.
    """
    if not usages:
        return Usage()
    each = max(1, len(usages) // prompts)
    joules = [usage.joules for usage in usages]
    provenances = {usage.joules_provenance for usage in usages}
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages[::each]),
        cached_tokens=sum(usage.cached_tokens for usage in usages[::each]),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        queue_us=max(usage.queue_us for usage in usages),
        prefill_us=sum(usage.prefill_us for usage in usages),
        decode_us=sum(usage.decode_us for usage in usages),
        provenance="emulated" if any(usage.provenance == "emulated" for usage in usages) else "measured",
        joules=None if None in joules else sum(joule for joule in joules if joule is not None),
        joules_provenance=provenances.pop()
        if len(provenances) == 1
        else "unavailable"
        if None in joules
        else "estimated",
    )


def usage_json(usage: Usage) -> dict[str, Any]:
    """As OpenAI's chat and completions have it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "edgert": edgert_json(usage),
    }


def edgert_json(usage: Usage) -> dict[str, Any]:
    """Times in ms, and energy, each with where it comes from."""
    return {
        "queue_ms": round(usage.queue_us / 1e3, 3),
        "prefill_ms": round(usage.prefill_us / 1e3, 3),
        "decode_ms": round(usage.decode_us / 1e3, 3),
        "provenance": usage.provenance,
        "joules": usage.joules,
        "joules_provenance": usage.joules_provenance,
    }
