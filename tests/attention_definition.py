"""What CachedAttention computes, in numpy from its description: how its cache lies, and attention over it in f64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_ops import Array

BLOCK = 16  # tokens
HIDDEN = -30000.0  # an additive mask hides from here on downwards


@dataclass(frozen=True)
class Attention:
    """The attributes of the operation; `rope_dims` 0 is none."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float = 0.25
    softcap: float = 0.0
    precision: str = "i8"
    rope_dims: int = 0
    norm: bool = False
    epsilon: float = 1e-6
    causal: bool = False
    mask: bool = False
    sinks: bool = False
    batched: bool = False

    def attributes(self) -> dict[str, Any]:
        return {
            "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "value_dim": self.value_dim,
            "scale": self.scale, "softcap": self.softcap, "precision": self.precision,
            "rope": "half" if self.rope_dims else "", "norm": "rms" if self.norm else "", "epsilon": self.epsilon,
            "causal": self.causal, "mask": self.mask, "sinks": self.sinks, "batched": self.batched,
        }  # fmt: skip

    @property
    def width(self) -> int:
        return (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim

    @property
    def padded(self) -> int:
        return -(-self.value_dim // BLOCK) * BLOCK

    @property
    def block_bytes(self) -> int:
        per_dim = BLOCK if self.precision == "i8" else 2 * BLOCK
        return per_dim * (self.head_dim + self.padded) + (128 if self.precision == "i8" else 0)

    def split(self, qkv: Array) -> tuple[Array, Array, Array]:
        """`[M, heads, dim]` of queries, keys and values."""
        ends = np.cumsum([self.heads * self.head_dim, self.kv_heads * self.head_dim])
        query, key, value = np.split(qkv[0], ends, axis=1)
        return (
            query.reshape(-1, self.heads, self.head_dim),
            key.reshape(-1, self.kv_heads, self.head_dim),
            value.reshape(-1, self.kv_heads, self.value_dim),
        )

    def prepared(self, x: Array, weight: Array | None, rope: tuple[Array, Array] | None) -> Array:
        """Queries or keys `[M, heads, dim]` as they are multiplied, f64."""
        x = x.astype(np.float64)
        if weight is not None:
            x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.epsilon) * weight
        if rope is None:
            return x
        cosine, sine = (each[0][:, None, :].astype(np.float64) for each in rope)
        turned, rest = x[..., : self.rope_dims], x[..., self.rope_dims :]
        low, high = np.split(turned, 2, axis=-1)
        return np.concatenate([turned * cosine + np.concatenate([-high, low], axis=-1) * sine, rest], axis=-1)

    @np.errstate(invalid="ignore")
    def rows(self, cache: Array) -> tuple[Array, Array, Array, Array]:
        """Keys and values `[tokens, kv_heads, dim]` f64 that a cache holds, and what a step of each is worth."""
        blocks = len(cache)
        tokens = blocks * BLOCK
        keys_end = BLOCK * self.head_dim * (1 if self.precision == "i8" else 2)
        values_end = keys_end + BLOCK * self.padded * (1 if self.precision == "i8" else 2)
        key_bytes, value_bytes = (
            np.ascontiguousarray(part) for part in (cache[..., :keys_end], cache[..., keys_end:values_end])
        )
        if self.precision == "i8":
            keys = key_bytes.reshape(blocks, self.kv_heads, -1, BLOCK, 4).transpose(0, 3, 1, 2, 4)
            values = value_bytes.reshape(blocks, self.kv_heads, 4, self.padded, 4).transpose(0, 2, 4, 1, 3)
            scales = np.ascontiguousarray(cache[..., values_end:]).view(np.float32)
            key_scales, value_scales = (
                part.transpose(0, 2, 1).reshape(tokens, self.kv_heads, 1).astype(np.float64)
                for part in np.split(scales, 2, axis=-1)
            )
            keys = (keys.reshape(tokens, self.kv_heads, -1).astype(np.int64) - 128) * key_scales
            values = (values.reshape(tokens, self.kv_heads, -1).astype(np.int64) - 128) * value_scales
            return keys, values, key_scales, value_scales
        keys = _wide(key_bytes.view(np.uint16), self.precision).reshape(blocks, self.kv_heads, -1, BLOCK)
        values = _wide(value_bytes.view(np.uint16), self.precision).reshape(blocks, self.kv_heads, BLOCK, -1)
        keys = keys.transpose(0, 3, 1, 2).reshape(tokens, self.kv_heads, -1)
        values = values.transpose(0, 2, 1, 3).reshape(tokens, self.kv_heads, -1)
        bits = 11 if self.precision == "f16" else 8
        steps = [np.maximum(np.abs(each) * 2.0 ** (1 - bits), 2.0**-24) for each in (keys, values)]
        return keys, values, steps[0], steps[1]

    def owned(self, blocks: int, begin: int, end: int) -> Array:
        """Which bytes of a cache belong to the tokens `[begin, end)`."""
        token = np.zeros((blocks * BLOCK,), bool)
        token[begin:end] = True
        token = token.reshape(blocks, BLOCK)
        if self.precision == "i8":
            parts = [
                np.broadcast_to(token[:, None, :, None], (blocks, self.head_dim // 4, BLOCK, 4)),
                np.broadcast_to(token.reshape(blocks, 4, 1, 4), (blocks, 4, self.padded, 4)),
                np.broadcast_to(token[:, None, :, None], (blocks, 2, BLOCK, 4)),
            ]
        else:
            parts = [
                np.broadcast_to(token[:, None, :, None], (blocks, self.head_dim, BLOCK, 2)),
                np.broadcast_to(token[:, :, None, None], (blocks, BLOCK, self.padded, 2)),
            ]
        flat = np.concatenate([part.reshape(blocks, -1) for part in parts], axis=1)
        return np.broadcast_to(flat[:, None, :], (blocks, self.kv_heads, self.block_bytes))

    def attend(self, query: Array, keys: Array, values: Array, mask: Array | None, sinks: Array | None) -> Array:
        """f64 `[M, heads, value_dim]` over the first tokens of a cache, as many as there are.

        Args:
            query: prepared, `[M, heads, head_dim]`.
            mask: `[1, 1 or heads, 1 or M, tokens]`, additive or boolean.
        """
        group = self.heads // self.kv_heads
        added = self.added(len(query), len(keys), mask)
        with np.errstate(invalid="ignore", over="ignore"):
            scores = np.einsum("mhd,thd->hmt", query, keys.repeat(group, axis=1)) * self.scale
            if self.softcap:
                scores = self.softcap * np.tanh(scores / self.softcap)
            scores = np.where(added == -np.inf, -np.inf, scores + added)
            highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
            if sinks is not None:
                highest = np.maximum(highest, sinks.reshape(-1, 1, 1).astype(np.float64))
            weights = np.where(added == -np.inf, 0.0, np.exp(scores - np.where(highest == -np.inf, 0.0, highest)))
            total = weights.sum(axis=-1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(sinks.reshape(-1, 1, 1).astype(np.float64) - highest)
            wide = values[..., : self.value_dim].repeat(group, axis=1)
            # A hidden token adds nothing, whatever it holds.
            products = np.where(weights[..., None] == 0, 0.0, weights[..., None] * wide.transpose(1, 0, 2)[:, None])
            out = products.sum(axis=2) / np.where(total == 0, 1.0, total)
        seen = (added != -np.inf).any(axis=-1, keepdims=True)
        return np.where(seen, out, 0.0).transpose(1, 0, 2)

    def added(self, count: int, total: int, mask: Array | None) -> Array:
        """`[heads or 1, M, tokens]`: what joins the scores, -Inf where hidden."""
        if self.causal:
            see = np.arange(total)[None, :] <= np.arange(total - count, total)[:, None]
            return np.where(see, 0.0, -np.inf)[None]
        if mask is None:
            return np.zeros((1, count, total))
        full = np.broadcast_to(mask[0], (mask.shape[1], count, total))
        if full.dtype == bool:
            return np.where(full, 0.0, -np.inf)
        return np.where(full <= HIDDEN, -np.inf, full.astype(np.float64))


def _wide(bits: Array, precision: str) -> Array:
    if precision == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
