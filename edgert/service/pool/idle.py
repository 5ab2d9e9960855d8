"""When an idle model takes the next step down: forget caches (or park them in files), then unload.

Each step saves something at once and costs something later, if the model is asked again: forgotten caches are prefilled
again, an unloaded model is loaded again. Nobody knows when that will be, and then the best rule that is sure is that of
the ski rental: stay until staying has cost as much as the step's undoing would, then go. It never costs more than
twice what somebody who knows the future would pay (Karlin, Manasse, Rudolph, Sleator: Competitive snoopy caching,
Algorithmica 3, 1988).

What staying costs is memory, as a loaded worker without work draws no power that could be told from none: the share of
the service's memory that it holds. What undoing costs is the measured time, in which the machine is busy and somebody
waits; `UNDOING` says how much worse a second of that is than a second of all the memory being held.
"""

from __future__ import annotations

from typing import Literal

from edgert.service.settings import ModelSettings, Settings

UNDOING = 10.0
LONGEST = 8.0  # times the configured wait: a model that takes minutes to load may not stay for days
LEAST_SHARE = 0.1  # of the memory: what holds less does not stay longer for it

Rung = Literal["drop", "unload"]


def due_after_s(configured_s: float, undo_s: float, held_share: float) -> float:
    """Seconds of idleness after which a step is worth it: the configured wait, or longer where undoing is dear.

    Args:
        configured_s: what the settings say; the step is never taken earlier.
        undo_s: measured: loading the model, or prefilling its longest prompt again; 0 where not known.
        held_share: of the memory that the service may use, what the step gives back, 0 to 1.
    """
    break_even_s = UNDOING * undo_s / max(held_share, LEAST_SHARE)
    return max(configured_s, min(break_even_s, LONGEST * configured_s))


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
        self._drop_s: float | None = None  # seconds of idleness until then; None: never
        self._unload_s: float | None = None
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
        """Reckon the steps again, as things are now.

        Args:
            pinned: it stays loaded.
            prefill_s: measured, of its longest prompt; 0 where not known.
            held_share, kv_share: of the memory that the service may use, what the worker and its idle caches hold.
        """
        after_s = self._drop_after_s
        self._drop_s = None if after_s is None else due_after_s(after_s, prefill_s, min(1.0, kv_share))
        keep_s = self._usual_s if self._asked_s is None else self._asked_s
        if pinned or keep_s < 0:
            self._unload_s = None
        elif self._asked_s is not None:  # meant to the second
            self._unload_s = keep_s
        else:
            self._unload_s = due_after_s(keep_s, self.reload_s, min(1.0, held_share))

    def due(self, now_s: float) -> Rung | None:
        """The step to take now; the one that is further down goes first, as it covers the other."""
        if self.since_s is None:
            return None
        idle_s = now_s - self.since_s
        if self._unload_s is not None and idle_s >= self._unload_s:
            return "unload"
        if self._drop_s is not None and idle_s >= self._drop_s and not self.dropping:
            return "drop"
        return None

    def due_s(self) -> float | None:
        """When the next step is due, on the clock; None where none will be."""
        steps = [self._unload_s, None if self.dropping else self._drop_s]
        step_s = min((step for step in steps if step is not None), default=None)
        return None if self.since_s is None or step_s is None else self.since_s + step_s

    def unload_s(self) -> float | None:
        """When it will be unloaded, on the clock; None where it will not."""
        return None if self.since_s is None or self._unload_s is None else self.since_s + self._unload_s
