"""Blocking work for asyncio, in threads."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """What `work` gives, run in a thread; it is given an event that is set when the task is cancelled."""
    import asyncio  # who calls this has it; for all others it would be a tenth of what importing edgert takes

    cancel = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, cancel))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancel.set()
        await asyncio.wait([task])
        task.exception()  # looked at, so asyncio does not complain of it
        raise


async def from_thread(pieces: Iterator[T], cancel: threading.Event) -> AsyncIterator[T]:
    """The pieces, each made in a thread; `cancel` is set when nobody wants more."""
    import asyncio

    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        cancel.set()
