"""Caches that the next prompt may share: lanes that nobody runs, the longest unused first to go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgert.batch import Lane

WORTH_COPYING = 16  # tokens: fewer are prefilled sooner than a cache is copied


class Prefixes:
    """The idle lanes.

    Args:
        most: how many are kept; the budget of `Lanes` bounds them, too.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._idle: list[Lane] = []  # the longest unused first

    def __iter__(self) -> Iterator[Lane]:
        return iter(tuple(self._idle))

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def tokens(self) -> int:
        """In all idle lanes together."""
        return sum(len(lane.tokens) for lane in self._idle)

    @property
    def kv_bytes(self) -> int:
        return sum(lane.kv_bytes for lane in self._idle)

    def take(self, tokens: Sequence[int], running: Iterable[Lane] = ()) -> Lane | None:
        """A lane that holds the longest beginning of a prompt that any has, cut back to it; None for a fresh one.

        It is cut back by at least one token of the prompt, as only a token that runs gives logits. An idle lane is
        taken itself, unless most of it would be lost: then, as where the lane is running, it is copied.

        Args:
            tokens: of the prompt.
            running: lanes that are in use.
        """
        idle = max(self._idle, key=lambda lane: common(lane.tokens, tokens), default=None)
        used = max(running, key=lambda lane: common(lane.tokens, tokens), default=None)
        shared = 0 if idle is None else common(idle.tokens, tokens)
        elsewhere = 0 if used is None else common(used.tokens, tokens)
        if used is not None and elsewhere > shared and elsewhere >= WORTH_COPYING:
            copy = used.fork()
            if copy is not None:
                copy.rewind(min(elsewhere, len(tokens) - 1))
                return copy
        if idle is None or not shared:
            return None
        if 2 * shared < len(idle.tokens):  # another conversation, or a prompt that has been answered at length
            copy = idle.fork() if shared >= WORTH_COPYING else None
            if copy is not None:
                self._touch(idle)
                copy.rewind(min(shared, len(tokens) - 1))
                return copy
            if shared < len(tokens) - 1:
                return None
        self._idle.remove(idle)
        idle.rewind(min(shared, len(tokens) - 1))
        return idle

    def put(self, lane: Lane) -> None:
        """Keep a lane that nobody runs any more; the longest unused ones make room."""
        if not lane.tokens:
            lane.close()
            return
        self._idle.append(lane)
        while len(self._idle) > self.most:
            self.close_oldest()

    def close_oldest(self) -> bool:
        """Give back the lane that was unused for longest; False where there is none."""
        if not self._idle:
            return False
        self._idle.pop(0).close()
        return True

    def close_all(self) -> int:
        """Give all back; the bytes that they took."""
        freed = self.kv_bytes
        while self.close_oldest():
            pass
        return freed

    def _touch(self, lane: Lane) -> None:
        self._idle.remove(lane)
        self._idle.append(lane)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
