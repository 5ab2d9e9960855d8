"""Schedules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from test_cost import block, chain

from edgert.device import DeviceConfig
from edgert.graph import BlockGraph, BlockKind
from edgert.profile import DeviceModel, Measurement, Profile

CONFIGS = ("CPU@f32", "CPU@bf16", "GPU@f16", "GPU@f16+static", "NPU@f16")
IDLE_W = {"CPU": 1.0, "GPU": 0.5, "NPU": 0.2}


def model_of(rng: np.random.Generator, layers: int) -> BlockGraph:
    """Embedding, layers of attention and FFN, head; sizes are random, some layers are alike."""

    def sizes(scale: float) -> dict[str, object]:
        weights = int(rng.integers(1, 50) * 1e5 * scale)
        return {"weight_bytes": {"u4": weights}, "flops_per_token": 4 * weights}

    blocks = [block(0, BlockKind.EMBED, weight_bytes={"u8": int(rng.integers(1, 40) * 1e5)})]
    for _ in range(layers):
        if len(blocks) == 1 or rng.random() < 0.5:
            attention, ffn = sizes(1), sizes(3)
            states = {
                "kv_bytes_per_token": int(rng.integers(1, 9) * 2048),
                "recurrent_bytes": int(rng.integers(0, 2) * 999),
            }
        blocks.append(replace(block(len(blocks), BlockKind.ATTENTION, **attention, **states), states=("k", "v")))
        blocks.append(block(len(blocks), BlockKind.FFN, **ffn))
    blocks.append(block(len(blocks), BlockKind.HEAD, **sizes(2)))
    return chain(blocks, int(rng.integers(1, 20) * 1024))


def machine_of(rng: np.random.Generator, graph: BlockGraph, size: int, *, measured: bool = False) -> Profile:
    """Some configurations, the reference first, of random speeds; measured on every block, or not at all."""
    names = [CONFIGS[0], *rng.choice(CONFIGS[1:], size=size - 1, replace=False)]
    models, rows = [], []
    for number, name in enumerate(names):
        config = DeviceConfig.parse(str(name))
        speed = rng.uniform(0.3, 3, 6)
        models.append(
            DeviceModel(
                name=f"m{number}", bandwidth_gbps=40 * speed[0], compute_gops=2000 * speed[1], launch_us=50 * speed[2],
                transfer_gbps=10 * speed[3], active_w=10 * speed[4], idle_w=IDLE_W[config.device],
                precision="f32" if config.device == "CPU" else "f16", provenance="modelled", source="made up",
                config=str(config),
            )
        )  # fmt: skip
        for signature in dict.fromkeys(b.signature for b in graph.blocks) if measured else ():
            for tokens in (1, 64):
                latency_us = float(rng.uniform(200, 2000) * (1 + tokens / 20))
                energy_uj = float(10 * speed[4] * latency_us * rng.uniform(0.8, 1.2))
                error = 0.0 if number == 0 else float(rng.uniform(0, 0.02))
                rows.append(
                    Measurement(str(config), signature, tokens, 0, latency_us, 1.0, energy_uj, 5, "measured", error)
                )
    return Profile(2, "made up", tuple(models), base_w=float(rng.uniform(0, 8)), measurements=tuple(rows))
