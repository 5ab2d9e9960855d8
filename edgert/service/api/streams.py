"""Answers that take a while: nothing is computed for a client that is gone, and nothing ahead of one that is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgert.errors import EdgertError

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "x-accel-buffering": "no",  # nginx would collect events
}


class Later(Response):
    """An answer that `work` computes; it is cancelled when the client goes away."""

    def __init__(self, work: Coroutine[Any, Any, Response]) -> None:
        super().__init__()
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await while_connected(receive, self.work)
        if response is not None:
            await response(scope, receive, send)


class Stream(Response):
    """Server-sent events; the generator is closed as soon as the client is gone.

    What the first step raises becomes an ordinary answer with its status, so `events` must not wait for more than the
    engine's first word before it yields.

    Args:
        events: whole events, as bytes.
        failure: the event that tells of an error after the first.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], failure: Callable[[EdgertError], bytes]) -> None:
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self.events = events
        self.failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        try:
            try:
                event = await anext(self.events)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event, "more_body": True})
            except StopAsyncIteration:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            else:
                await self._rest(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self.events.aclose()

    async def _rest(self, send: Send) -> None:
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except EdgertError as error:
            await send({"type": "http.response.body", "body": self.failure(error), "more_body": True})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives; None if the client went away first, and then it is cancelled and has ended."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
