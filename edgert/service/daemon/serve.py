"""The server process: listens, loads what is to be ready, tells systemd, drains at its end.

Nothing here wakes up while nothing happens: uvicorn's own loop, which looks around ten times a second, is replaced by
waiting for a signal.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from typing import Protocol, TextIO

import uvicorn
from uvicorn.server import HANDLED_SIGNALS, ServerState

from edgert.errors import EdgertError, ServiceError
from edgert.service import logs
from edgert.service.contract import Service
from edgert.service.daemon import keys, sockets
from edgert.service.daemon.connections import Connection
from edgert.service.daemon.notify import Notifier
from edgert.service.settings import Settings, is_loopback

KEEP_ALIVE_S = (
    75  # of connections without a request: programs ask again after a pause, and a closed one may cost a retry
)
FLUSH_S = 2.0  # for the last bytes of answers once all generations have ended
IDLE_LOOK_S = 60.0


class RunningService(Service, Protocol):
    """What the server needs of a service beyond what requests need."""

    async def close(self, grace_s: float) -> None: ...

    def idle_since(self) -> float | None: ...


@dataclass
class Listening:
    """Where the service listens.

    Attributes:
        path: of the Unix socket that this process made; None where it made none.
        activated: whether systemd made the sockets.
    """

    listeners: list[socket.socket] = field(default_factory=list)
    lock: sockets.Lock | None = None
    path: Path | None = None
    activated: bool = False

    def places(self) -> list[str]:
        """For people: `unix:/run/…` and URLs."""
        return [_place(each) for each in self.listeners]

    def tcp(self) -> list[tuple[str, int]]:
        """Hosts and ports."""
        names = (each.getsockname() for each in self.listeners)
        return [(name[0], name[1]) for name in names if isinstance(name, tuple)]

    def close(self) -> None:
        for each in self.listeners:
            each.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)  # under the lock, so it is nobody else's
        if self.lock is not None:
            self.lock.release()


def run(
    settings: Settings,
    *,
    environ: MutableMapping[str, str] = os.environ,
    out: TextIO = sys.stdout,
    make: Callable[[Settings], RunningService] | None = None,
) -> int:
    """Serve until a signal, or until nothing has been loaded for `exit_after_s` where systemd starts it again.

    Args:
        out: gets one line that says where it listens, and the dashboard's address if it is a terminal.
        make: what serves; None for a `Pool`.

    Raises:
        ServiceError: it cannot listen there, or the key cannot be read.
        EdgertError: none of the models that are to be ready could be loaded.
    """
    logs.configure(settings.log, prompts=settings.log_prompts)
    notifier = Notifier(environ)
    listening = listen(settings, environ)
    try:
        key = None
        if tcp := listening.tcp():
            settings = replace(settings, host=tcp[0][0], port=tcp[0][1])
            key = keys.read_key(settings.key_file) if settings.key_file else keys.ensure_token(keys.token_file(environ))
        asyncio.run(_serve(settings, listening, notifier, key, out, make))
    finally:
        listening.close()
    return 0


def listen(settings: Settings, environ: MutableMapping[str, str]) -> Listening:
    """Open the sockets, or take systemd's, which replace those of the settings.

    Raises:
        ServiceError: another service runs, an address cannot be had, or others could reach it without a `key_file`.
    """
    given = sockets.inherited(environ)
    lock = sockets.lock_file(settings)
    listening = Listening(given, sockets.Lock(lock) if lock else None, activated=bool(given))
    try:
        if not given:
            if settings.socket is not None:
                listening.listeners.append(sockets.unix_socket(settings.socket))
                listening.path = settings.socket
            if settings.port is not None:
                listening.listeners.append(sockets.tcp_socket(settings.host, settings.port))
        for host, port in listening.tcp():
            if not is_loopback(host) and settings.key_file is None:
                raise ServiceError(f"port {port} of {host}: others can reach it; that needs key_file")
    except BaseException:
        listening.close()
        raise
    return listening


async def _serve(
    settings: Settings,
    listening: Listening,
    notifier: Notifier,
    key: str | None,
    out: TextIO,
    make: Callable[[Settings], RunningService] | None,
) -> None:
    from edgert.service.api.app import create_app

    if make is None:
        from edgert.service.pool.pool import Pool

        make = Pool
    service = make(settings)
    server = Server(uvicorn_config(create_app(service, settings, key=key)), service, settings.grace_s, notifier)
    tasks = [asyncio.create_task(_write_down(service))]
    serving = asyncio.create_task(server.serve(sockets=listening.listeners))
    try:
        ready = asyncio.create_task(_prepare(service, settings, notifier))
        stopped = asyncio.create_task(server.stopped())
        tasks.append(stopped)
        await asyncio.wait({serving, ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done() or stopped.done():  # what was to be loaded is not wanted any more
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
            await serving
            return
        await ready
        _tell_where(listening, key, out)
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look through it again
        notifier.tell("READY=1", f"STATUS=listening at {', '.join(listening.places())}")
        if notifier.watchdog_s is not None:
            tasks.append(asyncio.create_task(_feed(service, notifier, notifier.watchdog_s / 3)))
        if listening.activated and settings.exit_after_s is not None:
            tasks.append(asyncio.create_task(_end_when_idle(service, server, settings.exit_after_s)))
        await serving
    finally:
        for task in tasks:
            task.cancel()
        if not serving.done():
            server.stop()
            with suppress(Exception):
                await serving


def uvicorn_config(app: Callable[..., object]) -> uvicorn.Config:
    """How uvicorn is run: plain HTTP/1.1, connections that end, no log, lifespan or header of its own."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,  # `_State` has it
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


class _State(ServerState):
    """Gives the `Date` header (RFC 9110, 6.6.1) when it is needed, instead of keeping it up to date."""

    _at = -1

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        now = int(time.time())
        if now != self._at:
            self._at = now
            self._headers = [(b"date", formatdate(now, usegmt=True).encode())]
        return self._headers

    @default_headers.setter
    def default_headers(self, value: list[tuple[bytes, bytes]]) -> None:
        self._headers = value


class Server(uvicorn.Server):
    """uvicorn's server, which sleeps while nothing happens, and drains the service at its end."""

    def __init__(self, config: uvicorn.Config, service: RunningService, grace_s: float, notifier: Notifier) -> None:
        super().__init__(config)
        self.server_state = _State()
        self._service = service
        self._grace_s = grace_s
        self._notifier = notifier
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()

    def stop(self) -> None:
        """End once the running requests have; called again, at once."""
        if self.should_exit:
            self._forced.set()
        self.should_exit = True
        self._stopping.set()

    async def stopped(self) -> None:
        """Wait until it has been told to end."""
        await self._stopping.wait()

    async def main_loop(self) -> None:
        await self.stopped()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._notifier.tell("STOPPING=1", "STATUS=finishing what runs")
        logs.event("stop", connections=len(self.server_state.connections))
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # idle ones at once, the others after their answer
        forced = asyncio.create_task(self._forced.wait())
        closing = asyncio.create_task(self._service.close(self._grace_s))
        await asyncio.wait({closing, forced}, return_when=asyncio.FIRST_COMPLETED)
        if not closing.done():
            closing.cancel()
            with suppress(asyncio.CancelledError):
                await closing
            await self._service.close(0.0)
        forced.cancel()
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=FLUSH_S)
        for task in list(self.server_state.tasks):
            task.cancel()
        await closing if not closing.cancelled() else None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
        for number in HANDLED_SIGNALS:
            try:
                loop.add_signal_handler(number, self.stop)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.stop))
        try:
            yield
        finally:
            for number, handler in before.items():
                with suppress(NotImplementedError):
                    loop.remove_signal_handler(number)
                signal.signal(number, handler)


async def _prepare(service: RunningService, settings: Settings, notifier: Notifier) -> None:
    """Load what is to be ready. One that fails is a warning, unless there is no other."""
    wanted = [model for model in settings.models.values() if model.preload]
    failed: list[EdgertError] = []
    if not wanted:
        return
    from edgert.service.api.app import warm_up

    patience = asyncio.create_task(_ask_for_patience(notifier))
    warming = asyncio.create_task(asyncio.to_thread(warm_up))  # while workers start, and not in the first request
    try:
        for model in wanted:
            notifier.tell(f"STATUS=loading {model.name}")
            try:
                await service.load(model.name, pin=True if model.pin else None)
            except EdgertError as error:
                logs.event("load failed", level=logging.ERROR, model=model.name, detail=str(error))
                failed.append(error)
        await warming
    finally:
        patience.cancel()
    if failed and len(failed) == len(wanted):
        raise failed[0]


async def _ask_for_patience(notifier: Notifier) -> None:
    """Loading may take longer than systemd waits for a start; as long as the loop runs it is asked to wait on."""
    while notifier.tell("EXTEND_TIMEOUT_USEC=30000000"):
        await asyncio.sleep(10)


async def _feed(service: RunningService, notifier: Notifier, every_s: float) -> None:
    """Feed the watchdog while the workers' loops answer.

    A model that is being loaded, or gets a new worker, has its own time limits, and one that failed has said so: to
    restart the whole service would only take the other models down too.
    """
    while True:
        health = await service.health()
        excused = any(model.state in ("loading", "recovering", "failed") for model in service.models())
        if health.ready or excused:
            notifier.tell("WATCHDOG=1")
        else:
            logs.event("health", level=logging.WARNING, detail=health.detail)
        await asyncio.sleep(every_s)


async def _end_when_idle(service: RunningService, server: Server, after_s: float) -> None:
    while True:
        since = service.idle_since()
        left = min(after_s, IDLE_LOOK_S) if since is None else since + after_s - time.monotonic()
        if left <= 0:
            logs.event("idle", detail=f"nothing was loaded for {after_s:g} s; the next connection starts it again")
            server.stop()
            return
        await asyncio.sleep(left)


async def _write_down(service: RunningService) -> None:
    async for event in service.events():
        level = logging.WARNING if event.kind in ("failure", "quarantine") else logging.INFO
        logs.event(event.kind, level=level, model=event.model, detail=event.detail)


def _tell_where(listening: Listening, key: str | None, out: TextIO) -> None:
    places = listening.places()
    print(f"edgert serves at {' and '.join(places)}", file=out)
    web = [place for place in places if place.startswith("http")]
    if web and key is not None and out.isatty():  # never where it would end up in a log
        print(f"dashboard: {web[0]}/#token={key}", file=out)
    out.flush()


def _place(listener: socket.socket) -> str:
    name = listener.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    return f"http://[{name[0]}]:{name[1]}" if ":" in name[0] else f"http://{name[0]}:{name[1]}"
