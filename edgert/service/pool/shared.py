"""What the models of one pool have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from edgert.service.pool.events import EventLog
from edgert.service.pool.recovery import Patience, Quarantine
from edgert.service.settings import Settings


@dataclass
class Shared:
    """What the models of one pool have in common.

    Attributes:
        command: starts a worker.
        clock: seconds, monotonic.
        wake: lets the pool look at all its models soon; from wherever something has changed.
        memory_bytes: of all workers together.
        spend: takes joules, for the power policy.
        numbers: of requests at workers; none is used twice.
        pace: share of the time that workers may be busy.
        background: whether background requests may run.
        closing: no new requests are taken.
    """

    settings: Settings
    command: Sequence[str]
    clock: Callable[[], float]
    patience: Patience
    memory_bytes: int
    wake: Callable[[], None]
    spend: Callable[[float], None]
    events: EventLog = field(default_factory=EventLog)
    quarantine: Quarantine = field(default_factory=Quarantine)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    pace: float = 1.0
    background: bool = True
    closing: bool = False
