"""Drives a worker from a test: in a process of its own, or in this one."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from queue import Queue, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from edgert.service.protocol import Load, Message, Piece, Refused, Start, Started, Step, decode, encode
from edgert.service.worker.serving import Item, Serving, serve

PATIENCE_S = 60.0
T = TypeVar("T")


class Client:
    """What both have in common: messages out, and what came back.

    Attributes:
        pieces: by request, in order.
        started, refused: by request.
        others: all other messages.
    """

    def __init__(self) -> None:
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        self.started: dict[int, Started] = {}
        self.refused: dict[int, Refused] = {}
        self.others: list[Message] = []
        self._number = 0

    def send(self, message: Message) -> None:
        raise NotImplementedError

    def receive(self) -> Message:
        raise NotImplementedError

    def start(self, prompt: str | list[int] | None = None, **options: Any) -> int:
        """Ask for a generation; its number."""
        self._number += 1
        self.send(Start(self._number, prompt=prompt, **options))
        return self._number

    def read(self) -> Message:
        """The next message, which is also sorted in."""
        message = self.receive()
        if isinstance(message, Step):
            for piece in message.pieces:
                self.pieces[piece.id].append(piece)
        elif isinstance(message, Started):
            self.started[message.id] = message
        elif isinstance(message, Refused):
            self.refused[message.id] = message
        else:
            self.others.append(message)
        return message

    def wait_for(self, kind: type[T]) -> T:
        while not isinstance(message := self.read(), kind):
            pass
        return message

    def finish(self, *ids: int) -> list[str]:
        """Read until these requests have ended; their texts."""
        while not all(self.ended(id) for id in ids):
            self.read()
        return ["".join(piece.text for piece in self.pieces[id]) for id in ids]

    def ended(self, id: int) -> bool:
        return id in self.refused or bool(self.pieces[id] and self.pieces[id][-1].finish_reason)

    def tokens(self, id: int) -> list[int]:
        return [piece.token for piece in self.pieces[id] if piece.token is not None]

    def ask(self, prompt: str | list[int] | None = None, **options: Any) -> str:
        return self.finish(self.start(prompt, **options))[0]


class Process(Client):
    """A worker as the server has it. It is killed where it says nothing for a minute."""

    def __init__(self, load: Load | None) -> None:
        super().__init__()
        command = [sys.executable, "-P", "-m", "edgert.service.worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.complaints: list[bytes] = []
        threading.Thread(target=lambda: self.complaints.extend(self.process.stderr or ()), daemon=True).start()
        if load is not None:
            self.send(load)

    def send(self, message: Message) -> None:
        self.write(encode(message))

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def receive(self) -> Message:
        timer = threading.Timer(PATIENCE_S, self.process.kill)
        timer.start()
        try:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the worker ended with {self.process.wait()}: {b''.join(self.complaints)[-2000:]!r}"
        return decode(line)

    def end(self) -> int:
        """Close its input; the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Inside(Client):
    """A worker's loop on a thread of this process, so that tests can change what it is made of."""

    def __init__(self, load: Load, change: Callable[[Serving], object] = lambda serving: None) -> None:
        super().__init__()
        self._messages: Queue[Message] = Queue()
        inbox: SimpleQueue[Item] = SimpleQueue()
        self.serving = Serving(load, self._messages.put, inbox, [])
        change(self.serving)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self.exit_code = serve(self.serving)

    def send(self, message: Message) -> None:
        self.serving.receive(message)

    def receive(self) -> Message:
        return self._messages.get(timeout=PATIENCE_S)

    def end(self) -> int | None:
        self.serving.receive(None)
        self._thread.join(PATIENCE_S)
        return self.exit_code


def load_of(bundle: Path, **options: Any) -> Load:
    """Without a sandbox, which would hold the tests' own folders back."""
    return Load(str(bundle), **{"sandbox": False, "verify": False, **options})
