"""The application behind a real uvicorn on a loopback port or a Unix socket, for tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fake_service import FakeService

from edgert.service.api.app import create_app
from edgert.service.daemon.serve import uvicorn_config
from edgert.service.settings import Settings

KEY = "correct horse battery staple"
TIMEOUT_S = 20.0


@contextmanager
def serving(service: FakeService, *, path: Path | None = None, settings: Settings | None = None) -> Iterator[str]:
    """Runs until the block ends; gives `http://127.0.0.1:PORT`, or with `path` listens there."""
    listener = socket.socket(socket.AF_INET if path is None else socket.AF_UNIX)
    listener.bind(("127.0.0.1", 0) if path is None else str(path))
    app = create_app(service, settings or Settings(), key=KEY)
    server = _Server(uvicorn_config(app))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert server.up.wait(TIMEOUT_S)
        yield "http://localhost" if path else f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()
