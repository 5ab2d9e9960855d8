"""Who is next: interactive requests before background ones, clients in turn, and nobody waits for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    since_s: float


_Ring = dict[str, "deque[_Entry[T]]"]  # clients in the order of their turns


class FairQueue(Generic[T]):
    """A queue of requests. Plain data: the times are the caller's.

    Clients of one class take turns, one request each, whatever they have waiting. A background request that has waited
    for `aging_s` counts as an interactive one, so that a machine that is never quiet gets to it.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._interactive: _Ring[T] = {}
        self._background: _Ring[T] = {}

    def __len__(self) -> int:
        return sum(len(line) for ring in (self._interactive, self._background) for line in ring.values())

    def __iter__(self) -> Iterator[T]:
        for ring in (self._interactive, self._background):
            for line in ring.values():
                yield from (entry.item for entry in line)

    def push(self, item: T, *, client: str, background: bool, since_s: float, front: bool = False) -> None:
        """Add a request that waits since then; `front`: before what else its client has waiting, its turn included."""
        ring = self._background if background else self._interactive
        line = ring.pop(client, None) if front else ring.get(client)
        line = deque() if line is None else line
        entry = _Entry(item, since_s)
        if not front:
            line.append(entry)
            ring[client] = line
            return
        line.appendleft(entry)
        others = dict(ring)
        ring.clear()
        ring[client] = line
        ring.update(others)

    def pop(self, now_s: float, *, background: bool = True) -> T | None:
        """The next request, None where there is none; without `background`, interactive ones only."""
        if background:
            self._promote(now_s)
        for ring in (self._interactive, self._background) if background else (self._interactive,):
            for client in ring:
                line = ring.pop(client)
                entry = line.popleft()
                if line:
                    ring[client] = line
                return entry.item
        return None

    def remove(self, item: T) -> bool:
        """Forget a request; whether it was there."""
        for ring in (self._interactive, self._background):
            for client, line in ring.items():
                for entry in line:
                    if entry.item is item:
                        line.remove(entry)
                        if not line:
                            del ring[client]
                        return True
        return False

    def urgent(self, now_s: float, *, background: bool = True) -> bool:
        """Whether one waits that a running background request should make room for."""
        if background:
            self._promote(now_s)
        return bool(self._interactive)

    def clear(self) -> list[T]:
        """Forget all; those that waited."""
        items = list(self)
        self._interactive.clear()
        self._background.clear()
        return items

    def _promote(self, now_s: float) -> None:
        for client in list(self._background):
            line = self._background[client]
            while line and now_s - line[0].since_s >= self._aging_s:
                self._interactive.setdefault(client, deque()).append(line.popleft())
            if not line:
                del self._background[client]
