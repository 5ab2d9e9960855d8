"""What a worker is told to load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgert.errors import PlanError
from edgert.folders import cache_folder
from edgert.service.pool.recovery import FALLBACK_DEVICE
from edgert.service.protocol import Load
from edgert.service.settings import ModelSettings, Settings


def load_message(common: Settings, own: ModelSettings, avoid: Mapping[str, str], *, fallback: bool) -> Load:
    """What a worker is told to load.

    Args:
        avoid: hardware in quarantine, with the reason.
        fallback: take the most careful configuration, whatever the settings say.

    Raises:
        PlanError: the plan's file cannot be read.
    """
    plan: dict[str, Any] | None = None
    if own.plan is not None and not fallback:
        try:
            plan = json.loads(own.plan.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {own.plan}: {error}") from error
    return Load(
        str(own.path),
        plan=plan,
        device=FALLBACK_DEVICE if fallback else own.device,
        objective=None if fallback else own.objective,
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
