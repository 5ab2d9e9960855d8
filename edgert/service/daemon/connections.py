"""Connections over HTTP/1.1, with an end to those that ask nothing.

uvicorn waits for ever for a request that does not come, or comes a byte a minute, and takes as many connections as
there are descriptors: any user of the machine can connect to a loopback port, without a key, and would keep all others
out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # from the connection, or a request's first byte, until its headers are complete
MOST_OVER_TCP = 256  # connections; those over the Unix socket are the user's own, and have room beside them


class Connection(H11Protocol):
    """One connection. A request that runs, its body included, has limits of its own."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if _over_tcp(self) and sum(map(_over_tcp, self.connections)) > MOST_OVER_TCP:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._at_ease()
        super().connection_lost(exc)

    def _expect(self) -> None:
        """Let the time run while there is something to wait for, and not while an answer is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._at_ease()
        elif self._overdue is None and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._overdue = self.loop.call_later(HEAD_S, self.transport.abort)

    def _at_ease(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


def _over_tcp(connection: Any) -> bool:
    return connection.server is not None and connection.server[1] is not None
