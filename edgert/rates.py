"""Rates of a device configuration out of what its blocks took: what `DeviceModel` needs to speak of other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.cost import Work
from edgert.graph import Block, BlockGraph

Samples = Mapping[tuple[str, int, int], float]
"""Microseconds by `Block.signature`, new tokens and past tokens (0 where a block keeps none); see `Measurement`."""
_MOST = 1e6  # GB/s or GOPS of what was too fast to be told from nothing


def launch_us(blocks: Samples, whole: Samples, own: Sequence[Block], calls: int) -> float:
    """What a call costs beside its work: the sum over blocks called one by one exceeds the whole model by that.

    Args:
        blocks: of every block, one by one.
        whole: of the model, its signature in the place of a block's.
        own: the blocks that the whole model runs on the device.
        calls: submodels that the whole model is made of.

    Returns:
        Microseconds: 0 for a model in one piece, at most what the fastest block takes.
    """
    signatures = [block.signature for block in own]
    found = []
    for (_, tokens, past), together_us in whole.items() if len(signatures) > calls else ():
        if tokens > 1:
            continue
        alone = [
            us for s in signatures if (us := blocks.get((s, tokens, past), blocks.get((s, tokens, 0)))) is not None
        ]
        if len(alone) == len(signatures):
            excess = (sum(alone) - together_us) / (len(signatures) - calls)
            found.append(min(excess, min(alone)))
    return max(0.0, float(np.median(found))) if found else 0.0


def fit(samples: Samples, graph: BlockGraph, width: float) -> dict[str, float]:
    """The roofline that fits the net times of a model's blocks.

    Decode tells how fast weights are read, and its growth with the context how fast keys and values are. Prefill tells
    the operations a second, as a line through `1 / tokens` (a device with few tokens to work on is slower), and its
    growth with the context those of attention.

    Args:
        samples: net of launches.
        width: of keys and values, as a share of f32.

    Returns:
        Fields of `DeviceModel` by name.
    """
    works = {block.signature: Work.of(block) for block in graph.blocks}
    counts = {s: sum(block.signature == s for block in graph.blocks) for s in works}
    rows = [(works[s], counts[s], tokens, past, us) for (s, tokens, past), us in samples.items() if s in works]
    decode = [row for row in rows if row[2] == 1]
    prefill = [row for row in rows if row[2] > 1]
    least = {(w, tokens): min(p for v, _, t, p, _ in rows if (v, t) == (w, tokens)) for w, _, tokens, *_ in rows}
    early = [row for row in rows if row[3] == least[row[0], row[2]]]

    weights = sum(count * work.weights_read(1) for work, count, tokens, *_ in early if tokens == 1)
    reading_us = sum(count * us for work, count, tokens, _, us in early if tokens == 1 and work.weights_read(1))
    found = {"bandwidth_gbps": _rate(weights, reading_us)}
    if kv := _growth(decode, lambda work, _tokens, past: width * work.kv_bytes_per_token * past):
        found["kv_gbps"] = kv

    # Time a token over 1 / tokens: t = flops / rate * (1 + half / tokens).
    points: list[tuple[float, float]] = []
    for size in sorted({tokens for _, _, tokens, *_ in prefill}):
        own = [row for row in early if row[2] == size and row[0].flops_per_token]
        flops = sum(count * work.flops_per_token for work, count, *_ in own)
        spent_us = sum(count * us for _, count, _, _, us in own)
        if flops:
            points.append((1 / size, spent_us / size / flops))
    if len(points) > 1:
        x, y = np.array(points).T
        slope, constant = np.polyfit(x, y, 1)
        constant = max(float(constant), float(y.min()) / 2)
        found["compute_gops"] = 1e-3 / constant
        found["half_rate_tokens"] = max(0.0, float(slope) / constant)
    else:  # no prefill: what decode reaches is the least
        flops = sum(count * (w.flops_per_token + w.flops_per_row) for w, count, tokens, *_ in early if tokens == 1)
        found["compute_gops"] = 1e-3 / points[0][1] if points else _rate(flops, reading_us)
    if score := _growth(prefill, lambda work, tokens, past: work.score_flops * float(work.attended(tokens, past))):
        found["score_gops"] = score
    return found


def _growth(rows: Sequence[tuple[Work, int, int, int, float]], amount: Any) -> float | None:
    """10^9 a second of an amount that grows with the past, by the slope of time over it; None where nothing grows."""
    points: dict[tuple[int, int], NDArray[np.float64]] = {}
    for work, count, tokens, past, us in rows:
        if work.kv_bytes_per_token:
            key = (tokens, past)
            points[key] = points.get(key, np.zeros(2)) + count * np.array([amount(work, tokens, past), us])
    rates = []
    for size in {tokens for tokens, _ in points}:
        own = np.array([value for (tokens, _), value in sorted(points.items()) if tokens == size])
        if len(own) > 1 and (spread := own[-1] - own[0])[0] > 0:
            rates.append(_rate(spread[0], max(spread[1], 0.0)))
    return float(np.median(rates)) if rates else None


def _rate(amount: float, latency_us: float) -> float:
    return min(_MOST, amount / latency_us / 1e3) if latency_us > 0 and amount > 0 else _MOST
