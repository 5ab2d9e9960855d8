"""One request inside the pool: what it has got so far, so that any worker can go on, and what is still to be read."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from edgert import errors
from edgert.errors import BusyError, ContextOverflowError, EdgertError, WorkerError
from edgert.service.contract import Delta, EnergyProvenance, Request, Usage
from edgert.service.contract import Embeddings as Vectors
from edgert.service.protocol import Embed, Piece, Refused, Start, Started

UNREAD = 256  # deltas; some 100 kB. Who leaves more unread is set aside, and goes on once 64 are left
CAUGHT_UP = 64


@dataclass(eq=False)
class Job:
    """What both kinds of requests have in common.

    Attributes:
        client, background, keep_alive_s: as `contract.Request`.
        since_s: when it came.
        id: its number at the worker; None while it is at none. Another one each time.
        started_s: when the worker was given it last.
        queue_us: waiting so far, without what `waiting_s` has begun.
        waiting_s: since when it waits; None while a worker computes it.
        deaths: workers that ended one after the other while they had it, without a token in between.
        interrupted: why its worker ended; until its reader is told that another one goes on.
    """

    client: str
    background: bool
    keep_alive_s: float | None
    since_s: float
    id: int | None = None
    started_s: float = 0.0
    queue_us: float = 0.0
    waiting_s: float | None = None
    deaths: int = 0
    interrupted: str | None = None
    done: bool = False

    def message(self, number: int) -> Start | Embed:
        raise NotImplementedError

    def fail(self, error: EdgertError) -> None:
        raise NotImplementedError

    def begin(self, number: int, now_s: float) -> Start | Embed:
        """It is given to a worker, under a number."""
        self.id, self.started_s = number, now_s
        return self.message(number)

    def computing(self, now_s: float) -> None:
        """The worker has begun with it."""
        if self.waiting_s is not None:
            self.queue_us += (now_s - self.waiting_s) * 1e6
            self.waiting_s = None

    def leave(self, now_s: float) -> None:
        """It is taken from its worker, or that has ended."""
        self.id = None
        if self.waiting_s is None:
            self.waiting_s = now_s


@dataclass(eq=False)
class Embedding(Job):
    """Texts that become vectors, all at once."""

    texts: Sequence[str] = ()
    result: asyncio.Future[Vectors] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def message(self, number: int) -> Embed:
        return Embed(number, list(self.texts))

    def succeed(self, vectors: Vectors) -> None:
        self.done = True
        if not self.result.done():
            self.result.set_result(vectors)

    def fail(self, error: EdgertError) -> None:
        self.done = True
        if not self.result.done():
            self.result.set_exception(error)


class Generation(Job):
    """A text that is being generated.

    Args:
        request: what was asked for.
        now_s: on the pool's clock.
        on_unread: is told when the reader has left `UNREAD` deltas, and `on_caught_up` when it has read them.
    """

    def __init__(
        self,
        request: Request,
        now_s: float,
        *,
        on_unread: Callable[[Generation], None],
        on_caught_up: Callable[[Generation], None],
    ) -> None:
        super().__init__(request.client, request.priority == "background", request.keep_alive_s, now_s)
        self.waiting_s = now_s
        self.tokens: list[int] = []
        self.aside = False  # taken from its worker because nobody reads
        sampling = dict(request.sampling)
        if sampling.get("seed") is None:  # so that another worker can go on with it
            sampling["seed"] = int.from_bytes(os.urandom(8), "little")
        prompt = request.prompt
        self._start = Start(
            0,
            prompt=prompt if prompt is None or isinstance(prompt, str) else list(prompt),
            messages=None if request.messages is None else [dict(message) for message in request.messages],
            tools=None if request.tools is None else [dict(tool) for tool in request.tools],
            sampling=sampling,
            constraint=None if request.constraint is None else request.constraint.kind,
            constraint_value=None if request.constraint is None else request.constraint.value,
            reasoning_budget=request.reasoning_budget,
            template=dict(request.template),
            background=self.background,
        )
        self._on_unread = on_unread
        self._on_caught_up = on_caught_up
        self._unread: deque[Delta] = deque()
        self._error: EdgertError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._notes: tuple[str, ...] = ()
        self._usage = Usage()  # without the worker that has it now
        self._piece = Piece(0, "")  # the last one of that worker: its times are totals
        self._known_prompt = False

    def message(self, number: int) -> Start:
        return replace(self._start, id=number, generated=list(self.tokens))

    def note(self, text: str) -> None:
        """Tell the reader something, with the next delta."""
        self._notes = (*self._notes, text)

    def started(self, message: Started, now_s: float) -> None:
        self.computing(now_s)
        if not self._known_prompt:  # what a later worker finds in its cache says nothing about this request
            self._known_prompt = True
            self._usage = replace(self._usage, prompt_tokens=message.prompt_tokens, cached_tokens=message.cached_tokens)

    def feed(self, piece: Piece, *, emulated: bool) -> float | None:
        """Pass a piece to the reader; the joules that it took, None where nobody knows."""
        joules = None
        if piece.joules is not None:
            joules = max(0.0, piece.joules - (self._piece.joules or 0.0))
        self._piece = piece
        if piece.token is not None:
            self.tokens.append(piece.token)
            self.deaths = 0
        usage = None
        if piece.finish_reason is not None:
            self.done = True
            usage = replace(self.usage(), provenance="emulated" if emulated else "measured")
        notes, self._notes = self._notes, ()
        self._unread.append(
            Delta(
                piece.text,
                piece.reasoning,
                piece.token,
                piece.token_text,
                piece.logprob,
                tuple((int(token), str(text), float(logprob)) for token, text, logprob in piece.top),
                piece.finish_reason,
                usage,
                notes,
            )
        )
        self._wake()
        if not self.done and len(self._unread) >= UNREAD:
            self._on_unread(self)
        return joules

    def leave(self, now_s: float) -> None:
        super().leave(now_s)
        self._usage = self.usage()
        self._piece = Piece(0, "", reasoning_tokens=self._piece.reasoning_tokens)

    def fail(self, error: EdgertError) -> None:
        self.done = True
        self._error = error
        self._wake()

    async def next(self) -> Delta | None:
        """The next delta, None after the last one. Raises what the request failed with."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self.done:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta = self._unread.popleft()
        if self.aside and len(self._unread) <= CAUGHT_UP:
            self._on_caught_up(self)
        return delta

    def usage(self) -> Usage:
        """Of all workers that had it."""
        before, now = self._usage, self._piece
        known = before.joules is not None or now.joules is not None
        provenance: EnergyProvenance = before.joules_provenance
        if now.joules is not None or before.joules is None:
            provenance = now.joules_provenance  # type: ignore[assignment]
        return replace(
            before,
            completion_tokens=len(self.tokens),
            reasoning_tokens=max(before.reasoning_tokens, now.reasoning_tokens),
            queue_us=self.queue_us,
            prefill_us=before.prefill_us + now.prefill_us,
            decode_us=before.decode_us + now.decode_us,
            joules=(before.joules or 0.0) + (now.joules or 0.0) if known else None,
            joules_provenance=provenance,
        )

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def error_of(kind: str, message: str) -> EdgertError:
    """The error that a worker names; `WorkerError` where there is none of that name."""
    cls = getattr(errors, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, EdgertError)):
        return WorkerError(f"{kind}: {message}")
    return cls.__new__(cls, message)  # past constructors that want to be told more


def refusal(refused: Refused) -> EdgertError:
    """As `error_of`, with what a refusal says beside it."""
    error = error_of(refused.kind, refused.message)
    if isinstance(error, ContextOverflowError):
        error.tokens, error.limit = refused.tokens, refused.limit
    elif isinstance(error, BusyError):
        error.retry_after_s = 1.0
    return error
