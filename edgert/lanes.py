"""Sequences that advance together: each step appends tokens to any of them.

A sequence here is a *lane*: its tokens with their keys and values. Lanes share a budget of memory. Where the device
gains from it one call runs the new tokens of all (`edgert.batch`); here they run one after the other, which is the same
to whoever asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from edgert.backends.base import Array
from edgert.errors import CacheFullError, ContextOverflowError, UsageError
from edgert.executor import Executor, SequenceRun
from edgert.features import Media
from edgert.kvcache import trim


class Lane(Protocol):
    """One sequence with its keys and values. Not for two threads at once, nor are two lanes of the same `Lanes`.

    Attributes:
        media: what is behind negative tokens that are still to run; see `edgert.features`.
    """

    media: Media

    @property
    def tokens(self) -> Sequence[int]:
        """Those in the cache; not to be changed."""
        ...

    @property
    def kv_bytes(self) -> int:
        """What it takes of the budget."""
        ...

    def rewind(self, length: int) -> int:
        """Keep the first `length` tokens; gives how many were kept: 0 where states do not allow going back."""
        ...

    def fork(self) -> Lane | None:
        """An independent copy; None where the states cannot be copied or there is no room for it."""
        ...

    def export(self) -> dict[str, Array]:
        """Copies of all states by id; see `edgert.executor.SequenceRun.read_states`."""
        ...

    def restore(self, tokens: Sequence[int], states: Mapping[str, Array]) -> None:
        """Become a sequence that was exported, here or from another plan of the same model.

        Raises:
            CacheFullError: there is no room for it; nothing has changed.
            DeviceFailedError: a device does not take a cache.
        """
        ...

    def close(self) -> None:
        """Give the memory back; a closed lane cannot be used. Closing it again does nothing."""
        ...


class Lanes(Protocol):
    """The sequences of one executor.

    Attributes:
        batched: whether a step of several lanes costs less than one step each.
        context: the largest number of tokens of a lane.
        max_chunk: the largest number of tokens that a step may append to one lane.
        together: whether a step must hold whole images, as their tokens see each other both ways.
        infer_us: microseconds inside the devices, of the last step.
    """

    batched: bool
    context: int
    max_chunk: int
    together: bool
    infer_us: float

    def open(self) -> Lane:
        """A new, empty lane. It takes nothing of the budget until it has tokens."""
        ...

    def step(self, work: Sequence[tuple[Lane, Sequence[int]]]) -> list[Array]:
        """Append tokens to some lanes.

        Args:
            work: each lane at most once, with 1 to `max_chunk` tokens.

        Returns:
            For each the f32 logits `[vocab]` after its last token, valid until the next step.

        Raises:
            UsageError: no tokens or too many for a lane, or a lane that is closed, comes twice, or is of others;
                nothing has run.
            ContextOverflowError: a lane would be longer than the context; nothing has run.
            CacheFullError: the budget does not hold that many tokens; nothing has run.
            DeviceFailedError: a device failed; `Lane.tokens` tell what is in the caches.
        """
        ...

    def room(self) -> int:
        """How many more tokens the budget holds, of all lanes together."""
        ...


class SerialLane:
    """See `Lane`: a `SequenceRun`, and what it costs."""

    def __init__(self, lanes: SerialLanes, run: SequenceRun) -> None:
        self.lanes = lanes
        self.run: SequenceRun | None = run

    @property
    def tokens(self) -> Sequence[int]:
        return self._open.tokens

    @property
    def media(self) -> Media:
        return self._open.media

    @media.setter
    def media(self, media: Media) -> None:
        self._open.media = media

    @property
    def kv_bytes(self) -> int:
        return 0 if self.run is None else self.run.past * self.lanes.token_bytes

    def rewind(self, length: int) -> int:
        run = self._open
        run.rewind(min(length, run.past))
        return run.past

    def fork(self) -> SerialLane | None:
        run = self._open
        if run.executor.recurrent or run.executor.exclusive or run.past > self.lanes.room():
            return None
        copy = self.lanes.open()
        if run.tokens:
            copy._open.write_states(run.tokens, self.export())
        return copy

    def export(self) -> dict[str, Array]:
        run = self._open
        states = run.read_states()
        return states if run.executor.recurrent else trim(states, run.past) or states

    def restore(self, tokens: Sequence[int], states: Mapping[str, Array]) -> None:
        self.lanes.check_room(len(tokens) - len(self.tokens))
        self._open.write_states(tokens, states)

    def close(self) -> None:
        if self.run is not None:
            self.lanes.forget(self)
            self.run = None

    @property
    def _open(self) -> SequenceRun:
        if self.run is None:
            raise UsageError("lane: it is closed")
        return self.run


class SerialLanes:
    """See `Lanes`: any plan, one sequence after the other."""

    batched = False

    def __init__(self, executor: Executor, *, kv_bytes: int) -> None:
        self.context = executor.context
        self.max_chunk = executor.max_chunk
        self.together = executor.taken.together
        self.infer_us = 0.0
        self.token_bytes = max(1, executor.kv_bytes_per_token)
        check_budget(kv_bytes, self.token_bytes)
        self._executor = executor
        self._kv_bytes = kv_bytes
        self._lanes: set[SerialLane] = set()

    def open(self) -> SerialLane:
        lane = SerialLane(self, self._executor.open())
        self._lanes.add(lane)
        return lane

    def step(self, work: Sequence[tuple[Lane, Sequence[int]]]) -> list[Array]:
        runs: list[tuple[SequenceRun, Sequence[int]]] = []
        for lane, tokens in check_work(self, work):
            if not isinstance(lane, SerialLane) or lane not in self._lanes or lane.run is None:
                raise UsageError("lane: it is closed, or of other lanes")
            runs.append((lane.run, tokens))
        self.check_room(sum(len(tokens) for _, tokens in runs))
        start = time.perf_counter_ns()
        logits = [run.forward(tokens)[-1] for run, tokens in runs]
        self.infer_us = (time.perf_counter_ns() - start) / 1000
        return logits

    def room(self) -> int:
        return self._kv_bytes // self.token_bytes - sum(len(lane.tokens) for lane in self._lanes)

    def check_room(self, more: int) -> None:
        """Raise `CacheFullError` where so many more tokens do not fit."""
        if more > self.room():
            raise CacheFullError(
                f"keys and values: {more} more tokens do not fit the budget of {self._kv_bytes} bytes, which has room "
                f"for {self.room()}"
            )

    def forget(self, lane: SerialLane) -> None:
        """A lane is closed."""
        self._lanes.discard(lane)


def check_work(lanes: Lanes, work: Sequence[tuple[Lane, Sequence[int]]]) -> Sequence[tuple[Lane, Sequence[int]]]:
    """The work of a step, if it is one; see `Lanes.step`."""
    if len({id(lane) for lane, _ in work}) < len(work):
        raise UsageError("step: a lane comes twice")
    for lane, tokens in work:
        if not 1 <= len(tokens) <= lanes.max_chunk:
            raise UsageError(f"step: {len(tokens)} tokens for a lane, expected 1 to {lanes.max_chunk}")
        if (total := len(lane.tokens) + len(tokens)) > lanes.context:
            raise ContextOverflowError(
                f"step: {total} tokens are more than the context of {lanes.context}", tokens=total, limit=lanes.context
            )
    return work


def check_budget(kv_bytes: int, token_bytes: int) -> None:
    """Raise `UsageError` where the budget does not hold the least that it could."""
    if kv_bytes < token_bytes:
        raise UsageError(f"keys and values: a budget of {kv_bytes} bytes, the least that can be had is {token_bytes}")
