"""Calls of CachedAttention: new tokens with masks of every kind, over caches with anything in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from attention_definition import BLOCK, Attention
from kernel_ops import Array, Operation

MASKS = ("none", "causal", "sliding", "boolean", "additive", "ragged")


def operation(attention: Attention, mask: Any = np.float32, past: Any = np.int64) -> Operation:
    inputs: list[tuple[Any, Any]] = [
        ([1, -1, attention.width], np.float32),
        ([-1, attention.kv_heads, attention.block_bytes], np.uint8),
        ([-1, 3] if attention.batched else [1], past),
    ]
    if attention.mask:
        inputs.append(([1, -1, -1, -1], mask))
    if attention.rope_dims:
        inputs += [([1, -1, -1], np.float32)] * 2
    if attention.norm:
        inputs += [([attention.head_dim], np.float32)] * 2
    if attention.sinks:
        inputs.append(([-1], np.float32))
    return Operation("CachedAttention", inputs, attention.attributes())


@dataclass
class Step:
    """New tokens after `past` others, and all that comes with them."""

    past: int
    qkv: Array
    mask: Array | None = None
    rope: tuple[Array, Array] | None = None
    norms: tuple[Array, Array] | None = None
    sinks: Array | None = None

    @property
    def count(self) -> int:
        return int(self.qkv.shape[1])

    @property
    def total(self) -> int:
        return self.past + self.count

    def tensors(self, cache: Array) -> list[Array]:
        found = [self.qkv, cache, np.array([self.past], np.int64)]
        found += [self.mask] if self.mask is not None else []
        found += self.rope or ()
        found += self.norms or ()
        return found + ([self.sinks] if self.sinks is not None else [])


def mask_of(random: np.random.Generator, kind: str, heads: int, past: int, count: int) -> Array | None:
    """`[1, 1 or heads, 1 or count, past + count]`; `ragged` has rows that see nothing, holes, and a sum on top."""
    total = past + count
    behind = np.arange(past, total)[:, None] - np.arange(total)[None, :]
    if kind in ("none", "causal"):
        return None
    if kind == "sliding":
        return np.where((behind >= 0) & (behind < 1 + random.integers(1, 40)), 0.0, -65504.0).astype(np.float32)[
            None, None
        ]
    if kind == "boolean":
        per_row = random.random() < 0.5
        see = behind >= 0 if per_row else random.random((1, total)) < 0.8
        return np.ascontiguousarray(see[None, None])
    if kind == "additive":  # slopes, a head each
        slopes = 0.1 * 2.0 ** -np.arange(heads)
        lowest = np.finfo(np.float32).min
        return np.where(behind >= 0, -slopes[:, None, None] * behind, lowest).astype(np.float32)[None]
    see = (behind >= 0) & (random.random((count, total)) < 0.5) & (random.random((count, 1)) < 0.8)
    return np.where(see, random.standard_normal((count, total)), -np.inf).astype(np.float32)[None, None]


def steps_of(
    random: np.random.Generator, attention: Attention, counts: list[int], kind: str, size: float = 1.0
) -> list[Step]:
    steps = []
    past = 0
    norms = tuple(random.standard_normal(attention.head_dim).astype(np.float32) for _ in range(2))
    sinks = random.standard_normal(attention.heads).astype(np.float32)
    for count in counts:
        angles = random.uniform(-3, 3, (1, count, attention.rope_dims))
        steps.append(
            Step(
                past,
                (random.standard_normal((1, count, attention.width)) * size).astype(np.float32),
                mask_of(random, kind, attention.heads, past, count),
                (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if attention.rope_dims else None,
                (norms[0], norms[1]) if attention.norm else None,
                sinks if attention.sinks else None,
            )
        )
        past += count
    return steps


def garbage(random: np.random.Generator, attention: Attention, tokens: int) -> Array:
    """A cache with room for `tokens` and anything in it: NaN too."""
    blocks = -(-tokens // BLOCK) + int(random.integers(2))
    cache = random.integers(0, 256, (blocks, attention.kv_heads, attention.block_bytes), np.uint8)
    cache[random.random(cache.shape) < 0.5] = 0xFF
    return cache
