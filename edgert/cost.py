"""What a submodel takes on a device, and a plan on its devices: time and energy, transfers included.

A call takes the launch, then the longer of reading and computing (a roofline), then the transfer of what crosses its
boundary. Not reckoned, because block graphs do not say it: logits, token ids, masks and tables on their way to and from
a device; more than one query head for each head of keys in the attention scores, so their operations are a lower
bound; memory that devices compete for; what the machine draws whatever its devices do.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from edgert.errors import PlanError, UsageError
from edgert.graph import Block, BlockGraph, BlockKind
from edgert.profile import PROVENANCES, DeviceModel, Provenance

if TYPE_CHECKING:
    from edgert.device import DeviceConfig
    from edgert.placement import Placement, Plan


@dataclass(frozen=True)
class Work:
    """What a submodel does in a call, whatever the device. Sizes of keys, values and boundary tensors are at f32.

    Attributes:
        weight_bytes: read in every call. The table of an embedding is not: of it a call reads a row a token.
        expert_bytes: for each mixture of experts its bytes, and the share of them that one token uses.
        flops_per_token: for every token; keys and values are not in it.
        flops_per_row: of the head, for every row of logits that is asked for.
        kv_bytes_per_token: keys and values of one token.
        recurrent_bytes: read and written in every call.
        boundary_bytes_per_token: what comes in from other submodels and goes out to them.
    """

    weight_bytes: int
    expert_bytes: tuple[tuple[int, float], ...]
    flops_per_token: int
    flops_per_row: int
    kv_bytes_per_token: int
    recurrent_bytes: int
    boundary_bytes_per_token: int

    @classmethod
    def of(cls, blocks: Sequence[Block], *, bytes_in: int = 0, bytes_out: int = 0) -> Work:
        """The work of some blocks as one submodel; `bytes_in` and `bytes_out` cross its boundary with every token."""
        experts = [b for b in blocks if b.kind is BlockKind.MOE]
        return cls(
            weight_bytes=sum(b.total_weight_bytes for b in blocks if b.kind not in {BlockKind.MOE, BlockKind.EMBED}),
            expert_bytes=tuple((b.total_weight_bytes, _share(b)) for b in experts),
            flops_per_token=sum(b.flops_per_token for b in blocks if b.kind is not BlockKind.HEAD),
            flops_per_row=sum(b.flops_per_token for b in blocks if b.kind is BlockKind.HEAD),
            kv_bytes_per_token=sum(b.kv_bytes_per_token for b in blocks),
            recurrent_bytes=sum(b.recurrent_bytes for b in blocks),
            boundary_bytes_per_token=bytes_in + bytes_out,
        )

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a call reads; tokens choose their experts independently and evenly."""
        return self.weight_bytes + sum(size * (1 - (1 - share) ** tokens) for size, share in self.expert_bytes)

    def flops(self, tokens: int, past: int, rows: int) -> float:
        """Operations of a call. A token's scores and their use cost two each for every element of keys and values."""
        attended = tokens * past + tokens * (tokens + 1) / 2
        return self.flops_per_token * tokens + self.flops_per_row * rows + self.kv_bytes_per_token / 2 * attended

    def state_bytes(self, tokens: int) -> int:
        """Size of the states when they hold this many tokens."""
        return self.kv_bytes_per_token * tokens + self.recurrent_bytes


def _share(block: Block) -> float:
    """The share of a mixture of experts that a token uses: elements multiplied over elements there."""
    elements = sum(size * 8 / _bits(kind) for kind, size in block.weight_bytes.items())
    return min(1.0, block.flops_per_token / 2 / elements) if elements else 1.0


def _bits(element_type: str) -> int:
    digits = re.search(r"\d+", element_type)  # the first of u4, nf4, bf16, f8e4m3
    return max(1, int(digits[0])) if digits else 8


def call_us(device: DeviceModel, work: Work, tokens: int, past: int, rows: int = 1) -> float:
    """Microseconds of one call.

    Args:
        tokens: new tokens.
        past: tokens that are in the cache already.
        rows: rows of logits that are asked for.
    """
    width = _width(device)
    states = width * (work.kv_bytes_per_token * (past + tokens) + 2 * work.recurrent_bytes)
    reading = (work.weights_read(tokens) + states) / (device.bandwidth_gbps * 1e3)
    computing = work.flops(tokens, past, rows) / (device.compute_gops * 1e3)
    moving = width * work.boundary_bytes_per_token * tokens / (device.transfer_gbps * 1e3)
    return device.launch_us + max(reading, computing) + moving


def call_energy_uj(device: DeviceModel, work: Work, tokens: int, past: int, rows: int = 1) -> float | None:
    """Microjoules of one call above the machine's base; None where the device's watts are not known."""
    return None if device.active_w is None else device.active_w * call_us(device, work, tokens, past, rows)


def handover_us(device: DeviceModel, f32_bytes: float) -> float:
    """Microseconds to read states from a device, or to write them to it; their size is given at f32."""
    return _width(device) * f32_bytes / (device.transfer_gbps * 1e3)


def _width(device: DeviceModel) -> float:
    return 0.5 if device.precision == "f16" else 1.0


@dataclass(frozen=True)
class Prediction:
    """What a plan takes for one prompt and its continuation.

    Attributes:
        prefill_us: until the logits of the first new token.
        decode_us: for all new tokens after the first.
        handover_us: between the two, where states change hands.
        energy_uj: of the plan's devices above the machine's base, waiting included; None where `missing` names watts.
        provenance: the worst of the device models used.
        missing: what is not known, as `CONFIGURATION: field`.
    """

    prefill_us: float
    decode_us: float
    handover_us: float
    energy_uj: float | None
    provenance: Provenance
    missing: tuple[str, ...]

    @property
    def total_us(self) -> float:
        return self.prefill_us + self.handover_us + self.decode_us


def predict(
    graph: BlockGraph,
    plan: Plan,
    models: Mapping[DeviceConfig, DeviceModel],
    *,
    prompt_tokens: int,
    new_tokens: int,
    chunk: int,
) -> Prediction:
    """What a plan takes.

    Args:
        models: at least those of the plan's configurations.
        prompt_tokens: at least 1, none of them in a cache.
        new_tokens: at least 1; the first comes with the prefill.
        chunk: tokens of a prefill call, at least 1; the last call takes what is left.

    Raises:
        UsageError: a number of tokens is below 1.
        PlanError: the plan does not fit the graph, or a configuration has no model; the message names all of them.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("chunk", chunk)):
        if value < 1:
            raise UsageError(f"{name} is {value}, the least is 1")
    plan.check(graph)
    if unknown := [str(config) for config in plan.configs if config not in models]:
        raise PlanError(f"plan: nothing is known of the time on {', '.join(unknown)}")
    prefill = {p: _work(graph, p) for p in plan.placements}
    decode = prefill if plan.decode is None else {p: _work(graph, p) for p in plan.decode}
    busy_us: dict[DeviceConfig, float] = dict.fromkeys(plan.configs, 0.0)

    chunks = []
    # Neighbours on the same hardware are one stage of the pipeline.
    stages = [(unit, list(group)) for unit, group in groupby(prefill.items(), lambda item: item[0].config.unit)]
    for start in range(0, prompt_tokens, chunk):
        tokens = min(chunk, prompt_tokens - start)
        chunks.append([0.0] * len(stages))
        for number, (_, group) in enumerate(stages):
            for p, work in group:
                latency_us = call_us(models[p.config], work, tokens, start)
                busy_us[p.config] += latency_us
                chunks[-1][number] += latency_us
    prefill_us = pipeline_us(chunks, [unit for unit, _ in stages])

    moved_us = 0.0
    for p, work in (*prefill.items(), *decode.items()):
        if p in prefill and p in decode:  # its keys and values stay where they are
            continue
        latency_us = handover_us(models[p.config], work.state_bytes(prompt_tokens))
        busy_us[p.config] += latency_us
        moved_us += latency_us

    decode_us = 0.0
    for past in range(prompt_tokens, prompt_tokens + new_tokens - 1):
        for p, work in decode.items():
            latency_us = call_us(models[p.config], work, 1, past)
            busy_us[p.config] += latency_us
            decode_us += latency_us

    energy_uj, missing = _energy_uj(models, busy_us, prefill_us + moved_us + decode_us)
    provenance = max((models[config].provenance for config in plan.configs), key=PROVENANCES.index)
    return Prediction(prefill_us, decode_us, moved_us, energy_uj, provenance, missing)


def pipeline_us(calls_us: Sequence[Sequence[float]], units: Sequence[str]) -> float:
    """The time in which chunks run through stages, as many at once as there are units.

    A chunk enters a stage when it has left the one before and the chunk before it has left this stage. A unit runs one
    call at a time, the one that has waited longest first. Stages never wait for room to put a result; where each unit
    has one stage that makes no difference, as the slowest stage is never short of chunks.

    Args:
        calls_us: for each chunk its time in each stage.
        units: for each stage the hardware it runs on.
    """
    last = len(units) - 1
    free_us = dict.fromkeys(units, 0.0)
    left_us: dict[tuple[int, int], float] = {}  # (chunk, stage) -> when
    ready = [(0.0, 0, 0)]  # (since when, chunk, stage)
    while ready:
        since, chunk, stage = heapq.heappop(ready)
        end = max(since, free_us[units[stage]]) + calls_us[chunk][stage]
        left_us[chunk, stage] = free_us[units[stage]] = end
        if stage < last and (chunk == 0 or (chunk - 1, stage + 1) in left_us):
            heapq.heappush(ready, (max(end, left_us.get((chunk - 1, stage + 1), 0.0)), chunk, stage + 1))
        if chunk + 1 < len(calls_us) and (stage == 0 or (chunk + 1, stage - 1) in left_us):
            heapq.heappush(ready, (max(end, left_us.get((chunk + 1, stage - 1), 0.0)), chunk + 1, stage))
    return max(left_us.values())


def _work(graph: BlockGraph, placement: Placement) -> Work:
    crossing = [0, *(edge.bytes_per_token for edge in graph.edges), 0]  # before each block, and behind the last
    first, behind = placement.first, placement.last + 1
    return Work.of(graph.blocks[first:behind], bytes_in=crossing[first], bytes_out=crossing[behind])


def _energy_uj(
    models: Mapping[DeviceConfig, DeviceModel], busy_us: Mapping[DeviceConfig, float], wall_us: float
) -> tuple[float | None, tuple[str, ...]]:
    """Microjoules of all devices over the whole time; or None, and the fields that would be needed."""
    needed = {(config, field): getattr(models[config], field) for config in busy_us for field in ("active_w", "idle_w")}
    missing = tuple(f"{config}: {field}" for (config, field), watts in needed.items() if watts is None)
    if missing:
        return None, missing
    energy_uj = sum(needed[config, "active_w"] * us for config, us in busy_us.items())
    # Configurations of one device wait together: the device idles when none of them computes, and is counted once.
    by_unit: dict[str, list[DeviceConfig]] = {}
    for config in busy_us:
        by_unit.setdefault(config.unit, []).append(config)
    for configs in by_unit.values():
        waiting_us = max(0.0, wall_us - sum(busy_us[config] for config in configs))
        energy_uj += needed[configs[0], "idle_w"] * waiting_us
    return energy_uj, ()
