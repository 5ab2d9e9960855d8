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

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Ladder:
    """The steps of one model, in seconds of idleness; None: never taken.

    Attributes:
        drop_s: forget or park its caches.
        unload_s: end its worker.
    """

    drop_s: float | None
    unload_s: float | None

    def due(self, idle_s: float, *, dropped: bool) -> Rung | None:
        """The step to take now; one that is further down goes first, as it covers what lies above it."""
        if self.unload_s is not None and idle_s >= self.unload_s:
            return "unload"
        if self.drop_s is not None and idle_s >= self.drop_s and not dropped:
            return "drop"
        return None

    def next_s(self, *, dropped: bool) -> float | None:
        """Seconds of idleness at which a step is due; None where none will be."""
        steps = [self.unload_s, None if dropped else self.drop_s]
        return min((step for step in steps if step is not None), default=None)


def ladder(
    *,
    drop_after_s: float | None,
    keep_alive_s: float,
    asked: bool,
    pinned: bool,
    reload_s: float,
    prefill_s: float,
    held_share: float,
    kv_share: float,
) -> Ladder:
    """The steps of a model as it is now.

    Args:
        drop_after_s: from the settings; None for never.
        keep_alive_s: from the settings, or as a request asked; negative for ever.
        asked: whether a request asked for `keep_alive_s`: then it is meant to the second, and nothing stretches it.
        pinned: it stays loaded.
        reload_s, prefill_s: measured; 0 where not known.
        held_share, kv_share: of the memory that the service may use, what the worker and its caches hold.
    """
    drop_s = None if drop_after_s is None or drop_after_s < 0 else due_after_s(drop_after_s, prefill_s, kv_share)
    if pinned or keep_alive_s < 0:
        return Ladder(drop_s, None)
    return Ladder(drop_s, keep_alive_s if asked else due_after_s(keep_alive_s, reload_s, held_share))
