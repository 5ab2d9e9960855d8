"""What happened lately, for people: the last events, and those who listen."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque

from edgert.service.contract import ServiceEvent

KEPT = 200


class Subscription:
    """Events from now on, as an async iterator. A listener that does not listen loses the oldest ones."""

    def __init__(self) -> None:
        self._events: deque[ServiceEvent] = deque(maxlen=KEPT)
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> ServiceEvent:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration once what has come was read."""
        self._closed = True
        self._wake()

    def put(self, event: ServiceEvent) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventLog:
    """The last 200 events, and the listeners."""

    def __init__(self) -> None:
        self._events: deque[ServiceEvent] = deque(maxlen=KEPT)
        self._count = 0
        self._closed = False
        self._listeners: weakref.WeakSet[Subscription] = weakref.WeakSet()  # one that nobody holds is gone

    def add(self, kind: str, model: str | None, detail: str) -> None:
        self._count += 1
        event = ServiceEvent(self._count, time.time(), kind, model, " ".join(detail.split())[:500])
        self._events.append(event)
        for listener in list(self._listeners):
            listener.put(event)

    def last(self) -> tuple[ServiceEvent, ...]:
        """Oldest first."""
        return tuple(self._events)

    def listen(self) -> Subscription:
        listener = Subscription()
        if self._closed:
            listener.close()
        self._listeners.add(listener)
        return listener

    def close(self) -> None:
        """End what all listeners iterate over."""
        self._closed = True
        for listener in list(self._listeners):
            listener.close()
