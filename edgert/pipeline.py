"""Send the chunks of a long prompt through devices that work at the same time.

Each piece of hardware has a thread, the first one that of the caller: while the second computes on chunk i, the first
computes on chunk i+1. Between two threads there is room for one chunk, so memory does not grow with the prompt.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.05  # how often a waiting thread looks whether another has failed


@dataclass(frozen=True)
class Segment(Generic[T]):
    """Neighbouring stages on the same hardware.

    Attributes:
        unit: the hardware; two segments with the same one take turns.
        run: computes on a chunk, and gives what the next segment needs in memory of its own.
    """

    unit: str
    run: Callable[[T], T]


def run_chunks(segments: Sequence[Segment[T]], chunks: Iterable[T]) -> T | None:
    """Send chunks through segments, in order; gives what the last one made of the last chunk, or
    None where there was no chunk.

    Args:
        chunks: taken one after the other as the first segment gets to them.

    Raises:
        What a segment or `chunks` raises, after every thread has ended.
    """
    queues: list[Queue[T | None]] = [Queue(maxsize=1) for _ in segments[1:]]  # in front of all but the first
    units = {segment.unit: _Turns() for segment in segments}
    failed: list[BaseException] = []
    last: list[T] = []

    def arriving(number: int) -> Iterator[T]:
        if number == 0:
            yield from chunks
        else:
            while (chunk := _get(queues[number - 1], failed)) is not None:
                yield chunk

    def work(number: int) -> None:
        segment = segments[number]
        try:
            for chunk in arriving(number):
                with units[segment.unit]:
                    result = segment.run(chunk)
                if number + 1 < len(segments):
                    _put(queues[number], result, failed)
                else:
                    last[:] = [result]
            if number + 1 < len(segments):
                _put(queues[number], None, failed)
        except _Stopped:
            pass
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(1, len(segments))]
    for thread in threads:
        thread.start()
    work(0)  # here, where Ctrl-C arrives: as any error it then ends the others
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return last[0] if last else None


class _Turns:
    """A lock that goes to who has waited longest. Python's own may go again and again to the one who just had it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()  # the first one has it

    def __enter__(self) -> None:
        with self._condition:
            ticket = object()
            self._queue.append(ticket)
            try:
                self._condition.wait_for(lambda: self._queue[0] is ticket)
            except BaseException:  # Ctrl-C
                self._queue.remove(ticket)
                self._condition.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._queue.popleft()
            self._condition.notify_all()


class _Stopped(Exception):
    """Another thread has failed."""


def _put(queue: Queue[T | None], chunk: T | None, failed: Sequence[BaseException]) -> None:
    while not failed:
        try:
            return queue.put(chunk, timeout=_POLL_S)
        except Full:
            continue
    raise _Stopped


def _get(queue: Queue[T | None], failed: Sequence[BaseException]) -> T | None:
    while not failed:
        try:
            return queue.get(timeout=_POLL_S)
        except Empty:
            continue
    raise _Stopped
