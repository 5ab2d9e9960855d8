"""How long one model has been idle, and the steps down that this leads to."""

from __future__ import annotations

from edgert.service.pool.idle import Ladder, Rung, ladder
from edgert.service.settings import ModelSettings, Settings


class Rest:
    """The idleness of one model. Plain data: the times are the caller's.

    Attributes:
        since_s: when it began; None while the model has requests, or no worker.
        dropping, dropped: whether its idle caches should be gone, and are.
        reload_s: what loading took last; 0 where nobody knows.
    """

    def __init__(self, own: ModelSettings, common: Settings) -> None:
        self._usual_s = common.keep_alive_s if own.keep_alive_s is None else own.keep_alive_s
        self._drop_after_s = common.drop_after_s
        self._asked_s: float | None = None
        self._ladder = Ladder(None, None)
        self.since_s: float | None = None
        self.dropping = self.dropped = False
        self.reload_s = 0.0

    def touch(self, keep_alive_s: float | None, now_s: float) -> None:
        """Something is asked of the model, which shall then stay for so long; None for as long as usual."""
        self._asked_s = keep_alive_s
        if self.since_s is not None:
            self.since_s = now_s

    def end(self) -> None:
        """It has requests, or no worker any more."""
        self.since_s = None
        self.dropping = self.dropped = False

    def begin(self, now_s: float) -> None:
        """It has none."""
        if self.since_s is None:
            self.since_s = now_s

    def climb(self, *, pinned: bool, prefill_s: float, held_share: float, kv_share: float) -> None:
        """Reckon the steps again, for `idle.ladder`'s arguments as they are now."""
        self._ladder = ladder(
            drop_after_s=self._drop_after_s,
            keep_alive_s=self._usual_s if self._asked_s is None else self._asked_s,
            asked=self._asked_s is not None,
            pinned=pinned,
            reload_s=self.reload_s,
            prefill_s=prefill_s,
            held_share=min(1.0, held_share),
            kv_share=min(1.0, kv_share),
        )

    def due(self, now_s: float) -> Rung | None:
        """The step to take now."""
        return None if self.since_s is None else self._ladder.due(now_s - self.since_s, dropped=self.dropping)

    def due_s(self) -> float | None:
        """When the next step is due, on the clock; None where none will be."""
        step_s = self._ladder.next_s(dropped=self.dropping)
        return None if self.since_s is None or step_s is None else self.since_s + step_s

    def unload_s(self) -> float | None:
        """When it will be unloaded, on the clock; None where it will not."""
        step_s = self._ladder.unload_s
        return None if self.since_s is None or step_s is None else self.since_s + step_s
