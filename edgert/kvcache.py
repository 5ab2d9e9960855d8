"""Where keys and values live, and how they change hands.

A runner's states can be read as arrays and written back, so a sequence can be cut back to a common prefix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgert.backends.base import Array

TOKEN_AXIS = 2  # of [batch, heads, tokens, head_dim]


def trim(states: Mapping[str, Array], *, past: int, length: int) -> dict[str, Array] | None:
    """The caches as they were after the first `length` of `past` tokens.

    Args:
        states: caches `[batch, heads, past, head_dim]` by variable id.

    Returns:
        New arrays `[batch, heads, length, head_dim]`; None where a state is no cache of all `past` tokens (recurrent
        states, windows), so that going back needs a new prefill.
    """
    if any(a.ndim != 4 or a.shape[TOKEN_AXIS] != past for a in states.values()):
        return None
    return {name: np.ascontiguousarray(a[:, :, :length]) for name, a in states.items()}
