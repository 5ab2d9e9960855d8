"""What one worker is told: what to load, and, while it runs, another plan and another pace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgert.errors import PlanError
from edgert.folders import cache_folder
from edgert.service.contract import PlacedBlocks
from edgert.service.pool.events import EventLog
from edgert.service.pool.workers import Worker
from edgert.service.protocol import Load, Pace, PlanOffer, PlanUsed, Ready, UsePlan
from edgert.service.settings import ModelSettings, Settings

_PACE_STEP = 0.02  # smaller changes are not worth a message


class Steering:
    """The plan and the pace of one model's worker.

    Attributes:
        plan: the name of the one in use; empty while nothing is.
    """

    def __init__(self, name: str, events: EventLog) -> None:
        self._name = name
        self._events = events
        self._offers: list[PlanOffer] = []
        self._asked: str | None = None
        self._pace = 1.0
        self.plan = ""

    def begin(self, ready: Ready) -> None:
        """Another worker is usable."""
        self._offers, self._asked, self._pace = list(ready.plans), None, 1.0
        self.plan = ready.plan

    @property
    def offers(self) -> list[PlanOffer]:
        """Plans that it can be switched to, without those that it has refused."""
        return self._offers

    @property
    def units(self) -> list[str]:
        """The hardware of the plan in use."""
        return next((offer.units for offer in self._offers if offer.name == self.plan), [])

    @property
    def blocks(self) -> tuple[PlacedBlocks, ...]:
        """Where blocks run."""
        rows = next((offer.blocks for offer in self._offers if offer.name == self.plan), [])
        return tuple(PlacedBlocks(**row) for row in rows)

    def use_plan(self, worker: Worker, name: str) -> None:
        """Ask for a plan, unless it is in use, was asked for, or is none that is offered."""
        if name not in (self.plan, self._asked) and any(offer.name == name for offer in self._offers):
            self._asked = name
            worker.send(UsePlan(name))

    def set_pace(self, worker: Worker, share: float) -> None:
        """Ask for a share of the time, unless it is nearly the one in force."""
        if abs(share - self._pace) > _PACE_STEP or (share == 1.0) != (self._pace == 1.0):
            self._pace = share
            worker.send(Pace(share))

    def used(self, message: PlanUsed) -> None:
        """The worker's answer about a plan."""
        self._asked = None
        if message.error is not None:
            self._offers = [offer for offer in self._offers if offer.name != message.name]
            self._events.add("plan", self._name, f"no switch to plan {message.name}: {message.error}")
        elif message.name != self.plan:
            self._events.add("plan", self._name, f"plan {message.name} instead of {self.plan}")
            self.plan = message.name


def load_message(common: Settings, own: ModelSettings, avoid: Mapping[str, str]) -> Load:
    """What a worker is told to load; `avoid` is hardware in quarantine, with the reason.

    Raises:
        PlanError: the plan's file cannot be read.
    """
    plan: dict[str, Any] | None = None
    device, objective = own.device, own.objective
    if device is None and objective is None and own.plan is None:
        device, objective = common.device, common.objective
    if own.plan is not None:
        try:
            plan = json.loads(own.plan.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {own.plan}: {error}") from error
    return Load(
        str(own.path),
        plan=plan,
        device=device,
        objective=objective,
        avoid=dict(avoid),
        kv_bytes=common.kv_bytes,
        max_tokens=common.max_tokens,
        park=str(park_folder(own.path)) if common.park else None,
        max_sequences=common.max_sequences,
        prefill_chunk=common.prefill_chunk,
        preempt_us=common.preempt_ms * 1e3,
        threads=common.threads,
        device_timeout_s=common.device_timeout_s,
        declared_watts=dict(common.declared_watts),
        low_priority=common.low_priority,
        verify=common.verify,
        sandbox=common.sandbox,
    )


def park_folder(bundle: Path) -> Path:
    """Where a bundle's idle caches are parked."""
    return cache_folder() / "parked" / hashlib.sha256(str(bundle.absolute()).encode()).hexdigest()[:16]
