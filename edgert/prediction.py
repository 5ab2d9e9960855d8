"""What a plan takes for a prompt and its continuation: time, energy, memory, and what these numbers rest on."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from edgert.cost import Costs, Entry, Phase, Workload, handover_us
from edgert.device import DeviceConfig
from edgert.placement import Placement, Plan
from edgert.profile import PROVENANCES, Provenance


@dataclass(frozen=True)
class Prediction:
    """What a plan takes for one prompt and its continuation.

    Attributes:
        load: the prompt and its continuation.
        prefill_us: until the logits of the first new token.
        decode_us: for all new tokens after the first.
        handover_us: between the two, where states change hands.
        energy_uj: of the machine over all of it; None where `missing` names watts.
        energy_parts_uj: the same by configuration, `base`, and `waiting` of devices; without what is missing.
        memory_bytes: weights, keys and values by device, at the precision in the file and of the cache.
        provenance: the worst of what the times rest on.
        energy_provenance: the same for the energy; None where that is None.
        entries: all that the times rest on.
        missing: what is not known of the energy, as `CONFIGURATION: field`.
    """

    load: Workload
    prefill_us: float
    decode_us: float
    handover_us: float
    energy_uj: float | None
    energy_parts_uj: dict[str, float] = field(repr=False)
    memory_bytes: dict[str, int]
    provenance: Provenance
    energy_provenance: Provenance | None
    entries: tuple[Entry, ...] = field(repr=False)
    missing: tuple[str, ...]

    @property
    def total_us(self) -> float:
        return self.prefill_us + self.handover_us + self.decode_us

    @property
    def tpot_us(self) -> float | None:
        """Time per output token after the first; None for one token."""
        return self.decode_us / (self.load.new_tokens - 1) if self.load.new_tokens > 1 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None where `tpot_us` is."""
        return 1e6 / self.tpot_us if self.tpot_us else None

    @property
    def tokens_per_joule(self) -> float | None:
        """New tokens over the energy of all of it, which is tokens a second per watt; None where that is not known."""
        return self.load.new_tokens * 1e6 / self.energy_uj if self.energy_uj else None

    @property
    def watts(self) -> float | None:
        """Mean over all of it."""
        return None if self.energy_uj is None else self.energy_uj / self.total_us

    def to_json(self) -> dict[str, Any]:
        derived = ("total_us", "tpot_us", "tokens_per_second", "tokens_per_joule", "watts")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def predict(costs: Costs, plan: Plan, load: Workload) -> Prediction:
    """What a plan takes.

    Where its prefill has several devices they work at the same time, chunk by chunk, and slow each other down: by what
    was measured of the two, or as far as together they would read more than the machine's memory gives.

    Raises:
        PlanError: the plan does not fit the graph, or the profile does not know a configuration; all are named.
    """
    graph, profile = costs.graph, costs.profile
    plan.check(graph)
    costs.require(plan.configs)
    submodels = plan.submodels(graph)
    prefill, decode = submodels[0], submodels[-1]
    missing: dict[str, None] = {}
    energies: list[Provenance] = []
    busy_us: dict[DeviceConfig, float] = dict.fromkeys(plan.configs, 0.0)
    parts: dict[str, float] = {str(config): 0.0 for config in plan.configs}

    def book(config: DeviceConfig, latency_us: float, phases: Sequence[Phase] = (), beside_us: float = 0.0) -> None:
        """Time of a device, and its energy: `beside_us` at its own watts, the phases at theirs."""
        busy_us[config] += latency_us
        model = costs.model(config)
        for phase in phases:
            if phase.energy_uj is not None:
                parts[str(config)] += phase.energy_uj
        if model.active_w is not None:
            parts[str(config)] += model.active_w * beside_us
            energies.extend(map(model.provenance_of, ("active_w", "idle_w")))
        if any(phase.energy_uj is None for phase in phases) or (beside_us and model.active_w is None):
            missing[f"{config}: active_w"] = None

    # Neighbours on the same hardware are one stage of the pipeline.
    stages = [(unit, list(group)) for unit, group in groupby(prefill, lambda p: p.config.unit)]
    slower = contention(costs, stages, load) if len(stages) > 1 and len(load.calls) > 1 else {}
    calls_us = np.zeros((len(load.calls), len(stages)))
    for number, (unit, group) in enumerate(stages):
        for p in group:
            span = costs.span(p.first, p.last, p.config, "prefill", load)
            beside = _beside_us(costs, p, [tokens for tokens, _ in load.calls])
            total = (span.calls_us + beside) * slower.get(unit, 1.0)
            calls_us[:, number] += total
            book(p.config, float(total.sum()), [span], float(beside.sum()))
    prefill_us = pipeline_us(calls_us.tolist(), [unit for unit, _ in stages])

    moved_us = 0.0
    for p in dict.fromkeys((*prefill, *decode)):
        if p in prefill and p in decode:  # its keys and values stay where they are
            continue
        size = costs.state_bytes(p.first, p.last, load.prompt_tokens)
        if size:
            latency_us = handover_us(costs.model(p.config), size)
            moved_us += latency_us
            book(p.config, latency_us, (), latency_us)

    decode_us = 0.0
    for p in decode:
        span = costs.span(p.first, p.last, p.config, "decode", load)
        beside_us = float(_beside_us(costs, p, [1] * (load.new_tokens - 1)).sum())
        latency_us = span.total_us + beside_us
        decode_us += latency_us
        book(p.config, latency_us, [span] if load.new_tokens > 1 else (), beside_us)

    wall_us = prefill_us + moved_us + decode_us
    parts["waiting"] = 0.0
    # Configurations of one device wait together: the device idles when none of them computes, and is counted once.
    by_unit: dict[str, list[DeviceConfig]] = {}
    for config in busy_us:
        by_unit.setdefault(config.unit, []).append(config)
    for configs in by_unit.values():
        idle_w = next((w for c in configs if (w := costs.model(c).idle_w) is not None), None)
        if idle_w is None:
            missing[f"{configs[0]}: idle_w"] = None
        else:
            parts["waiting"] += idle_w * max(0.0, wall_us - sum(busy_us[config] for config in configs))
    if profile.base_w is None:
        missing["machine: base_w"] = None
    else:
        parts["base"] = profile.base_w * wall_us
        energies.append(profile.base_provenance)

    deepest = dict(load.calls)  # the last call of each size
    last = {1: load.prompt_tokens + load.new_tokens - 2} if load.new_tokens > 1 else {}
    entries = dict.fromkeys(
        entry
        for placements, sizes in ((prefill, deepest), (decode, last))
        for p in placements
        for tokens, past in sizes.items()
        for entry in costs.entries(p.first, p.last, p.config, tokens, past)
    )
    return Prediction(
        load=load,
        prefill_us=prefill_us,
        decode_us=decode_us,
        handover_us=moved_us,
        energy_uj=None if missing else sum(parts.values()),
        energy_parts_uj=parts,
        memory_bytes=memory_bytes(costs, plan, load.prompt_tokens + load.new_tokens),
        provenance=worst(entry.provenance for entry in entries),
        energy_provenance=None if missing else worst([*energies, *(entry.provenance for entry in entries)]),
        entries=tuple(entries),
        missing=tuple(missing),
    )


def memory_bytes(costs: Costs, plan: Plan, context: int) -> dict[str, int]:
    """Weights, keys and values that each device holds, for a sequence of `context` tokens."""
    needed: dict[str, int] = {}
    for held in plan.weights(costs.graph):
        needed[held.config.device] = needed.get(held.config.device, 0) + held.bytes * held.count
    for p in dict.fromkeys(p for placements in plan.submodels(costs.graph) for p in placements):
        model = costs.model(p.config)
        works = costs.works[p.first : p.last + 1]
        growing, fixed = (sum(w.kv_bytes_per_token for w in works) * context, sum(w.recurrent_bytes for w in works))
        needed[p.config.device] += int(model.kv_width * growing + model.width * fixed)
    return needed


def worst(provenances: Any) -> Provenance:
    """The least trustworthy of some provenances."""
    found: Provenance = max(provenances, key=PROVENANCES.index)
    return found


def crossing_bytes(costs: Costs, first: int, last: int) -> int:
    """What crosses the boundaries of a submodel with every token, at f32."""
    edges = costs.graph.edges
    return sum(edge.crossing_bytes_per_token for edge in (*edges[max(first - 1, 0) : first], *edges[last : last + 1]))


def _beside_us(costs: Costs, p: Placement, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What calls take beside their blocks: the launch, and the transfer of what crosses the boundary."""
    model = costs.model(p.config)
    moving = handover_us(model, crossing_bytes(costs, p.first, p.last))
    return model.launch_us + moving * np.asarray(tokens, np.float64)


def contention(costs: Costs, stages: Sequence[tuple[str, list[Placement]]], load: Workload) -> Mapping[str, float]:
    """By hardware, how much longer its calls take because the other devices of a pipeline work too."""
    profile = costs.profile
    measured = {
        (DeviceConfig.parse(s.config).unit, DeviceConfig.parse(s.beside).unit): s.factor for s in profile.slowdowns
    }
    demand_gbps: dict[str, float] = {}
    configs: dict[str, list[DeviceConfig]] = {}
    tokens, past = load.calls[0]
    for unit, group in stages:
        if all(work.idle for p in group for work in costs.works[p.first : p.last + 1]):
            continue  # looking up embeddings hinders nobody
        configs.setdefault(unit, []).extend(p.config for p in group)
        read = sum(costs.read_bytes(p.first, p.last, tokens, past) for p in group)
        busy_us = sum(float(costs.span(p.first, p.last, p.config, "prefill", load).calls_us[0]) for p in group)
        demand_gbps[unit] = max(demand_gbps.get(unit, 0.0), read / max(busy_us, 1e-9) / 1e3)
    common = max(1.0, sum(demand_gbps.values()) / profile.shared_gbps) if profile.shared_gbps else 1.0
    slower = {}
    for unit in configs:
        factors = [measured[unit, other] for other in configs if (unit, other) in measured]
        slower[unit] = max(factors) if factors else common if len(configs) > 1 else 1.0
    return slower


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
