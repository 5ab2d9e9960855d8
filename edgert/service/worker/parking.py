"""Idle caches in files, so that they outlive their worker."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgert.bundle import Bundle
from edgert.errors import BundleError, DeviceError, UsageError
from edgert.kvcache import TOKEN_AXIS, KvCache
from edgert.service.worker.prefixes import Prefixes

if TYPE_CHECKING:
    from edgert.batch import Lane, Lanes

log = logging.getLogger("edgert")
ENDING = ".kv"


def park(lanes: Iterable[Lane], bundle: Bundle, folder: Path) -> int:
    """Write caches, the longest unused first; gives how many. What cannot be written is left out, with a warning."""
    parked = 0
    for lane in lanes:
        tokens = tuple(lane.tokens)
        name = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
        try:
            states = lane.export()
            if any(rows.ndim != 4 or rows.shape[TOKEN_AXIS] != len(tokens) for rows in states.values()):
                continue  # a recurrent state is no cache
            folder.mkdir(parents=True, exist_ok=True)
            KvCache(bundle.fingerprint, tokens, states).save(folder / f"{bundle.fingerprint}-{name}{ENDING}")
            parked += 1
        except (DeviceError, UsageError, OSError) as error:
            log.warning("a cache of %d tokens is not kept: %s", len(tokens), error)
    return parked


def take_up(folder: Path, bundle: Bundle, lanes: Lanes, idle: Prefixes) -> int:
    """Take up what `park` wrote of this bundle, as far as there is room, the newest first; gives how many.

    What was the longest unused stays that. All files are removed: a cache that is not taken up now, or of a bundle that
    was here before, is of no use later.
    """
    files = sorted(folder.glob(f"*{ENDING}"), key=_age, reverse=True)
    found: list[Lane] = []
    for path in files:
        lane = lanes.open()
        try:
            cache = _taken(path)
            _check(cache, bundle, lanes)
            lane.restore(cache.tokens, cache.states)
            found.append(lane)
        except (BundleError, DeviceError, ValueError) as error:  # ValueError: NumPy's, for rows of other sizes
            lane.close()
            log.warning("%s is not taken up: %s", path.name, error)
    for lane in reversed(found):
        idle.put(lane)
    return len(found)


def _taken(path: Path) -> KvCache:
    """A file's cache. It is removed before that is used: what ends a worker here must not end the next one, too."""
    try:
        return KvCache.load(path)
    finally:
        with suppress(OSError):
            path.unlink()


def _check(cache: KvCache, bundle: Bundle, lanes: Lanes) -> None:
    if cache.model != bundle.fingerprint:
        raise BundleError(f"KV cache: it belongs to model {cache.model}, this one is {bundle.fingerprint}")
    if not 0 < len(cache.tokens) <= lanes.context:
        raise BundleError(f"KV cache: holds {len(cache.tokens)} tokens, expected 1 to {lanes.context}")
    known = {state for block in bundle.graph.blocks for state in block.states} if bundle.graph else set(cache.states)
    if known != set(cache.states):
        raise BundleError(f"KV cache: holds {len(cache.states)} states, the model has {len(known)}")
    if not all(np.isfinite(rows).all() for rows in cache.states.values()):
        raise BundleError("KV cache: it holds infinite values or NaN")


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
