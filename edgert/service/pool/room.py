"""Memory for one more model: who has to go for it."""

from __future__ import annotations

from collections.abc import Sequence

from edgert.errors import WorkerError
from edgert.service.pool.hosted import Hosted
from edgert.service.pool.shared import Shared


def make_room(newcomer: Hosted, models: Sequence[Hosted], shared: Shared) -> bool:
    """Whether there is memory for a model's worker now. If not, room is being made: idle models that are not pinned
    are unloaded, the least recently used first; when there are none and the newcomer has waited for
    `Patience.handover_s`, the least recently used busy one takes no more requests and goes when it has finished.

    Raises:
        WorkerError: there never will be: it alone needs more than all workers may hold, or pinned models leave too
            little.
        BundleError: there is no such bundle.
    """
    needs, limit = newcomer.needs_bytes(), shared.memory_bytes
    others = [model for model in models if model is not newcomer and model.worker is not None]
    pinned = sum(model.holds_bytes() for model in others if model.pinned)
    if needs + pinned > limit:
        why = f", of which pinned models hold {pinned}" if pinned else ""
        raise WorkerError(
            f"model {newcomer.name}: may need {needs} bytes (its files and {shared.settings.kv_bytes} for KV caches), "
            f"but workers may hold {limit} together (memory_bytes){why}"
        )
    over = needs + sum(model.holds_bytes() for model in others) - limit
    if over <= 0:
        return True
    now = shared.clock()
    newcomer.room_since_s = now if newcomer.room_since_s is None else newcomer.room_since_s
    over -= sum(model.holds_bytes() for model in others if model.worker is not None and model.worker.stopping)
    candidates = sorted((m for m in others if not m.pinned and m.ready), key=lambda model: model.used_s)
    for model in candidates:
        if over > 0 and model.idle and not model.yielding:
            over -= model.holds_bytes()
            model.evict()
    if over > 0 and now - newcomer.room_since_s >= shared.patience.handover_s:
        for model in candidates:
            if over > 0 and not model.idle:
                over -= model.holds_bytes()
                model.yielding = True
    return False


def shrink(models: Sequence[Hosted], shared: Shared) -> None:
    """Keep the limit with workers that have grown: unload idle models, the least recently used first."""
    over = sum(model.holds_bytes() for model in models) - shared.memory_bytes
    over -= sum(model.holds_bytes() for model in models if model.worker is not None and model.worker.stopping)
    for model in sorted(models, key=lambda model: model.used_s):
        if over > 0 and model.idle and not model.pinned:
            over -= model.holds_bytes()
            model.evict()
