"""What a request asks of each device under a plan: the calls, their time, energy and use of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.cost import Costs, Workload, handover_us
from edgert.device import DeviceConfig
from edgert.placement import Placement, Plan
from edgert.prediction import contention, crossing_bytes


@dataclass(frozen=True, eq=False)
class Stage:
    """Neighbouring submodels on the same hardware, called as one.

    Attributes:
        unit: the hardware.
        configs: the device configurations.
        latency_us: of each call, when no other request is there.
        energy_uj: of each call above base and idle, by configuration; 0 where the watts are not known.
        demand_gbps: of each call, 10^9 bytes a second that it reads; 0 or more.
        slowed: how many times as long as alone its calls take because of the other stages; in `latency_us` already.
    """

    unit: str
    configs: tuple[str, ...]
    latency_us: list[float]
    energy_uj: dict[str, list[float]]
    demand_gbps: list[float]
    slowed: float = 1.0


@dataclass(frozen=True, eq=False)
class Script:
    """All calls of a request.

    Attributes:
        prefill: stages that every chunk goes through; several chunks are under way at the same time.
        handover: stages of one call each, from device to device.
        decode: stages that every token goes through.
        chunks, steps: how many there are.
        missing: what is not known of the energy, as `CONFIGURATION: field`.
    """

    prefill: tuple[Stage, ...]
    handover: tuple[Stage, ...]
    decode: tuple[Stage, ...]
    chunks: int
    steps: int
    missing: tuple[str, ...]

    def after_prefill(self) -> Iterator[tuple[Stage, int]]:
        """Calls that follow one after the other: a stage, and which of its calls."""
        for stage in self.handover:
            yield stage, 0
        for step in range(self.steps):
            for stage in self.decode:
                yield stage, step


def write_script(costs: Costs, plan: Plan, load: Workload) -> Script:
    """The calls of a request, of the same parts that `edgert.prediction.predict` adds up.

    Raises:
        PlanError: the plan does not fit the graph, or the profile does not know a configuration.
    """
    plan.check(costs.graph)
    costs.require(plan.configs)
    submodels = plan.submodels(costs.graph)
    prefill, decode = submodels[0], submodels[-1]
    missing: dict[str, None] = {}

    groups = _neighbours(prefill)
    slower = contention(costs, groups, load) if len(groups) > 1 and len(load.calls) > 1 else {}
    chunked = [_stage(costs, group, "prefill", load, missing, slower.get(unit, 1.0)) for unit, group in groups]
    changed = [p for p in prefill if p not in decode] + [p for p in decode if p not in prefill]
    moves = [_move(costs, p, load, missing) for p in changed if _states(costs, p, load)]
    single = [_stage(costs, group, "decode", load, missing) for _, group in _neighbours(decode) if len(load.steps)]
    return Script(tuple(chunked), tuple(moves), tuple(single), len(load.calls), len(load.steps), tuple(missing))


def _neighbours(placements: Sequence[Placement]) -> list[tuple[str, list[Placement]]]:
    return [(unit, list(group)) for unit, group in groupby(placements, lambda p: p.config.unit)]


def _stage(
    costs: Costs,
    group: Sequence[Placement],
    phase: str,
    load: Workload,
    missing: dict[str, None],
    slowed: float = 1.0,
) -> Stage:
    """Neighbouring submodels in all calls of a phase."""
    calls = load.calls if phase == "prefill" else [(1, int(past)) for past in load.steps]
    tokens, past = np.array(calls, np.float64).T
    latency_us, busy_us, read = (np.zeros(len(calls)) for _ in range(3))
    energies: dict[str, NDArray[np.float64]] = {}
    alike: dict[str, NDArray[np.float64] | None] = {}  # layers are
    for p in group:
        total_uj = energies.setdefault(str(p.config), np.zeros(len(calls)))
        phases = []
        for i in range(p.first, p.last + 1):
            phases.append(costs.phase(i, p.config, phase, load))
            key = f"{costs.graph.blocks[i].signature} {p.config}"
            if key not in alike:
                alike[key] = _block_uj(costs, i, p.config, tokens, past)
            energy_uj, work = alike[key], costs.works[i]
            if energy_uj is None:
                missing[f"{p.config}: active_w"] = None
            else:
                total_uj += energy_uj
            for count in np.unique(tokens):
                read[tokens == count] += work.weights_read(int(count))
            read += work.kv_bytes_per_token * (past + tokens) + work.recurrent_bytes
        model = costs.model(p.config)
        own_us = sum(found.calls_us for found in phases)
        beside_us = model.launch_us + handover_us(model, crossing_bytes(costs, p.first, p.last)) * tokens
        busy_us += own_us
        latency_us += (own_us + beside_us) * slowed
        total_uj += _beside_uj(costs, p.config, beside_us, missing)
    return Stage(
        group[0].config.unit,
        tuple(energies),
        latency_us.tolist(),
        {config: energy_uj.tolist() for config, energy_uj in energies.items()},
        (read / np.maximum(busy_us, 1e-9) / 1e3).tolist(),
        slowed,
    )


def _block_uj(
    costs: Costs, index: int, config: DeviceConfig, tokens: NDArray[np.float64], past: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Energy of a block in each call; None where nobody knows."""
    found = np.zeros(len(tokens))
    for count in np.unique(tokens):
        energy_uj = costs.block_uj(index, config, int(count), past[tokens == count])
        if energy_uj is None:
            return None
        found[tokens == count] = energy_uj
    return found


def _states(costs: Costs, p: Placement, load: Workload) -> int:
    """Bytes of the states that a submodel holds after the prompt."""
    return sum(costs.works[i].state_bytes(load.prompt_tokens) for i in range(p.first, p.last + 1))


def _move(costs: Costs, p: Placement, load: Workload, missing: dict[str, None]) -> Stage:
    """Reading the states of a submodel from its device, or writing them to it."""
    model = costs.model(p.config)
    latency_us = handover_us(model, _states(costs, p, load))
    energy_uj = _beside_uj(costs, p.config, latency_us, missing)
    config = str(p.config)
    return Stage(p.config.unit, (config,), [latency_us], {config: [energy_uj]}, [model.transfer_gbps])


def _beside_uj(costs: Costs, config: DeviceConfig, beside_us: Any, missing: dict[str, None]) -> Any:
    """Energy of what calls take beside their blocks."""
    watts = costs.model(config).active_w
    if watts is None and np.any(beside_us):
        missing[f"{config}: active_w"] = None
    return beside_us * (watts or 0.0)
