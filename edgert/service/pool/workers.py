"""One worker process: start it, talk with it, and notice when it ends, hangs, or talks nonsense.

A `Worker` reports everything through two functions that it is given: `on_message` for each message, `on_end` exactly
once. It never decides what happens next; `hosted.py` does. Times are those of an injected clock, and limits are looked
at when `watch` is called.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from edgert.service.protocol import (
    MAX_LINE_BYTES,
    Embed,
    Failed,
    Load,
    Message,
    Ping,
    Pong,
    Ready,
    Start,
    Stop,
    decode,
    encode,
)

_log = logging.getLogger("edgert.service.worker")
_READ_BYTES = 1 << 16
_MURMUR_BYTES = 4096  # of a line that does not end
_LAST_S = 1.0  # what was written longer ago has nothing to do with the end
REAP_S = 1.0  # a killed process that is still there after this hangs in a driver: nobody can wait for that
LOAD_FACTOR = 10  # times the device's time limit: loading compiles for several devices, and a first call may take long


@dataclass(frozen=True)
class Ended:
    """How a worker ended.

    Attributes:
        reason: in words, one line.
        failed: what it said last, if it said that it cannot go on.
        asked: it was stopped on purpose.
        outside: something else on the machine killed it, which says nothing about its devices.
    """

    reason: str
    failed: Failed | None = None
    asked: bool = False
    outside: bool = False


class Worker:
    """A worker process for one model.

    Args:
        name: of the model, for the log.
        command: starts the process.
        load: its first message.
        clock: seconds, monotonic.
        silence_s: a loop that owes an answer and is silent for so long counts as hung.
        stop_s: seconds to end in, once asked to.
        on_message, on_end: are told; from the event loop, never from inside a method of this class.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        load: Load,
        *,
        clock: Callable[[], float],
        silence_s: float,
        stop_s: float,
        on_message: Callable[[Message], None],
        on_end: Callable[[Ended], None],
    ) -> None:
        self.load = load
        self.ready: Ready | None = None
        self.pong: Pong | None = None
        self.started_s = clock()
        self.heard_s = self.started_s
        self._name = name
        self._command = tuple(command)
        self._clock = clock
        self._silence_s = silence_s
        self._stop_s = stop_s
        self._load_s = LOAD_FACTOR * load.device_timeout_s
        self._on_message = on_message
        self._on_end = on_end
        loop = asyncio.get_running_loop()
        self._transport: asyncio.SubprocessTransport | None = None
        self._silence: asyncio.Future[None] = loop.create_future()  # nothing more is listened to
        self._last_words: asyncio.Future[None] = loop.create_future()
        self._exit: asyncio.Future[None] = loop.create_future()
        self._line: list[bytes] = []  # what has come of one
        self._line_bytes = 0
        self._murmur = b""
        self._word: tuple[float, str] | None = None  # the last line for people, and when it came
        self._failed: Failed | None = None
        self._killed: str | None = None  # why we killed it
        self._stopping_s: float | None = None
        self._owing_s: float | None = None  # since when an answer is due and nothing has come
        self._pinged_s: float | None = None
        self._pings = 0
        self._condemned = False
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._task = loop.create_task(self._run(), name=f"worker of {name}")

    @property
    def pid(self) -> int | None:
        return None if self._transport is None else self._transport.get_pid()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end, or is being killed."""
        return self._stopping_s is not None or self._killed is not None

    def send(self, message: Message) -> None:
        """Write a message; to a process that is gone, or going, nothing happens: its end is reported anyway."""
        if isinstance(message, Start | Embed | Ping) and self._owing_s is None:
            self._owing_s = self._clock()
        pipe = self._input()
        if pipe is not None and not pipe.is_closing() and self._killed is None:
            pipe.write(encode(message))

    def ping(self) -> int:
        """Ask the loop for an answer; the number of the question."""
        self._pings += 1
        if self._pinged_s is None:
            self._pinged_s = self._clock()
        self.send(Ping(self._pings))
        return self._pings

    async def answer(self, timeout_s: float) -> bool:
        """Ask the loop for an answer; whether one came in time."""
        number = self.ping()
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._answers.pop(number, None)

    def stop(self) -> None:
        """Ask it to end; one that is not ready yet would not listen, and is killed."""
        if self.stopping:
            return
        self._stopping_s = self._clock()
        if self.ready is None:
            self.kill("stopped while loading")
            return
        self.send(Stop())
        if (pipe := self._input()) is not None:
            pipe.close()

    def kill(self, reason: str) -> None:
        """End it at once. Its end is reported as soon as the system has confirmed it."""
        if self._killed is None:
            self._killed = reason
            _resolve(self._silence)

    def silent_s(self, *, busy: bool) -> float:
        """For how long an answer has been due; `busy`: it has requests."""
        if not busy and self._pinged_s is None:
            self._owing_s = None
            return 0.0
        now = self._clock()
        if self._owing_s is None:
            self._owing_s = now
        return now - self._owing_s

    def watch(self, *, busy: bool) -> None:
        """Ask a silent loop for an answer, and kill what does not give one.

        Silence alone proves nothing: this process may have been the one that stood still. So the loop has half of the
        time to answer a question that is asked after the first half has gone; it is asked again where this was called
        much too late; and what lies here unread is read before the worker is killed, which takes a second call.
        """
        now, half_s = self._clock(), self._silence_s / 2
        if self._killed is not None:
            return
        if self._stopping_s is not None:
            if now - self._stopping_s >= self._stop_s:
                self.kill(f"did not end within {self._stop_s:g} s")
        elif self.ready is None:
            if now - self.started_s >= self._load_s:
                self.kill(f"was not ready within {self._load_s:g} s")
        elif self._pinged_s is None:
            if self.silent_s(busy=busy) >= half_s:
                self.ping()
        elif now - max(self._pinged_s, self.heard_s) >= self._silence_s:
            self._pinged_s, self._condemned = now, False
            self.ping()
        elif now - max(self._pinged_s, self.heard_s) >= half_s and not self._condemned:
            self._condemned = True
        elif self._condemned:
            self.kill(f"hung: its loop did not answer within {self._silence_s:g} s")

    def watch_at_s(self, *, busy: bool) -> float | None:
        """When `watch` has something to do, on the clock; None where no answer is due."""
        half_s = self._silence_s / 2
        if self._killed is not None:
            return None
        if self._stopping_s is not None:
            return self._stopping_s + self._stop_s
        if self.ready is None:
            return self.started_s + self._load_s
        if self._pinged_s is not None:
            return max(self._pinged_s, self.heard_s) + half_s
        self.silent_s(busy=busy)
        return None if self._owing_s is None else self._owing_s + half_s

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pipe = asyncio.subprocess.PIPE
        try:
            self._transport, _ = await loop.subprocess_exec(
                lambda: _Ears(self), *self._command, stdin=pipe, stdout=pipe, stderr=pipe, **_apart()
            )
        except OSError as error:
            self._end(Ended(f"could not be started: {error}", None, self.stopping))
            return
        _read_less(self._transport.get_pipe_transport(1))
        try:
            self.send(self.load)
        except ValueError as error:  # of `encode`
            self.kill(f"could not be told what to load: {error}")
        await self._silence
        if self._killed is not None or self._failed is not None:
            self._slay()
        if not await _within(self._exit, REAP_S):  # it closed its output and lives on
            self._slay()
            await _within(self._exit, REAP_S)
        await _within(self._last_words, REAP_S)
        code = self._transport.get_returncode()
        self._transport.close()
        self._end(self._verdict(code))

    def hear(self, data: bytes) -> None:
        """Bytes of its output."""
        if self._silence.done():
            return
        first, *lines = data.split(b"\n")
        self._line.append(first)
        self._line_bytes += len(first)
        if self._line_bytes > MAX_LINE_BYTES:
            self.kill(f"sent a line of more than {MAX_LINE_BYTES} bytes")
        for rest in lines:
            line, self._line, self._line_bytes = b"".join(self._line), [rest], len(rest)
            try:
                self._take(decode(line))
            except ValueError as error:
                self.kill(f"talks nonsense: {error}")
            except Exception as error:  # a bug of ours must not leave a process, nor its requests, to themselves
                _log.exception("worker of %s", self._name)
                self.kill(f"could not be listened to: {error!r}")
            if self._silence.done():
                return

    def overhear(self, data: bytes) -> None:
        """Bytes that are for people: pass them to the log, and remember the end."""
        *lines, self._murmur = (self._murmur + data).split(b"\n")
        if len(self._murmur) > _MURMUR_BYTES:
            lines, self._murmur = [*lines, self._murmur], b""
        for line in lines:
            text = line.decode("utf-8", "replace").strip()[:1000]
            if text:
                self._word = (self._clock(), text)
                _log.info("%s: %s", self._name, text)

    def lost(self, descriptor: int) -> None:
        """A pipe has ended."""
        if descriptor == 1:
            _resolve(self._silence)
        elif descriptor == 2:
            self.overhear(b"\n")
            _resolve(self._last_words)

    def exited(self) -> None:
        """The process has ended."""
        _resolve(self._exit)

    def _take(self, message: Message) -> None:
        self.heard_s = self._clock()
        self._condemned = False
        if self._owing_s is not None:
            self._owing_s = self.heard_s
        if isinstance(message, Pong):
            self.pong = message
            if message.id == self._pings:
                self._pinged_s = None
            waiter = self._answers.get(message.id)
            if waiter is not None and not waiter.done():
                waiter.set_result(True)
        elif isinstance(message, Failed):
            self._failed = message
            _resolve(self._silence)
            return
        elif isinstance(message, Ready):
            self.ready = message
        self._on_message(message)

    def _verdict(self, code: int | None) -> Ended:
        asked = self._stopping_s is not None
        if self._failed is not None:
            return Ended(f"{self._failed.kind}: {self._failed.message}", self._failed, asked)
        if self._killed is not None:
            return Ended(self._killed, None, asked)
        outside = code is not None and sys.platform != "win32" and code in (-signal.SIGKILL, -signal.SIGTERM)
        words = ""
        if self._word is not None and code != 0 and not outside and self._clock() - self._word[0] < _LAST_S:
            words = self._word[1]
        return Ended(f"ended by {_code(code)}" + (f": {words}" if words else ""), None, asked, outside)

    def _end(self, ended: Ended) -> None:
        for waiter in self._answers.values():
            if not waiter.done():
                waiter.set_result(False)
        self._on_end(ended)

    def _input(self) -> asyncio.WriteTransport | None:
        if self._transport is None:
            return None
        return cast("asyncio.WriteTransport | None", self._transport.get_pipe_transport(0))

    def _slay(self) -> None:
        if self._transport is None or self._transport.get_returncode() is not None:
            return
        with suppress(ProcessLookupError, PermissionError):
            if sys.platform == "win32":
                self._transport.kill()
            else:
                os.killpg(self._transport.get_pid(), signal.SIGKILL)  # and what it has started: an NPU's compiler


class _Ears(asyncio.SubprocessProtocol):
    """Hands on what asyncio tells: with streams, each token would take another round of the event loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        (self._worker.hear if fd == 1 else self._worker.overhear)(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._worker.lost(fd)

    def process_exited(self) -> None:
        self._worker.exited()


def _read_less(pipe: Any) -> None:
    """asyncio allocates 256 KiB for each read of a pipe, which the system maps anew: a good part of a token's cost."""
    if hasattr(pipe, "max_size"):
        pipe.max_size = _READ_BYTES


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _within(future: asyncio.Future[None], timeout_s: float) -> bool:
    await asyncio.wait([future], timeout=timeout_s)
    return future.done()


def _apart() -> dict[str, Any]:
    """A process group of its own: Ctrl-C in a terminal is for the server, which then lets its workers finish."""
    if sys.platform == "win32":
        import subprocess

        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def _code(code: int | None) -> str:
    if code is None:
        return "nothing: it was killed and is still there"
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}" if 0 <= code < 256 else f"exit code {code & 0xFFFFFFFF:#x}"
