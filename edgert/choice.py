"""Which plan a bundle runs on: a given one, a single device, rules, or the best by this machine's own profile."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.backends import devices_of
from edgert.bundle import Bundle
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import DeviceError, PlanError, UsageError
from edgert.graph import BlockGraph
from edgert.placement import HOST, Placement, Plan, own_blocks, tower_config
from edgert.profile import Profile
from edgert.shapes import StaticShapes

if TYPE_CHECKING:
    from edgert.scheduler import Choice, Objective

log = logging.getLogger("edgert")


def choose_plan(
    bundle: Bundle,
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    device: str | DeviceConfig | None = None,
    place: str | None = None,
    objective: Objective | None = None,
    shapes: StaticShapes | None = None,
) -> Plan:
    """The plan that `edgert.load` uses for these arguments.

    One that was made elsewhere or earlier may want kernels that do not load here: another configuration of the CPU
    takes their place then, and the plan says so. A device or a placement that asks for them is left as it is.
    """
    if sum(option is not None for option in (plan, device, place, objective)) > 1:
        raise UsageError("plan, device, place and objective exclude each other; give one of them")
    if isinstance(plan, Plan):
        return _runnable(plan)
    if plan is not None:
        return _runnable(Plan.read(Path(plan)))
    graph = bundle.graph
    if graph is None and (place is not None or objective is not None):
        raise UsageError(f"bundle {bundle.path} runs whole: it has no blocks to place")
    if graph is not None and place is not None:
        return Plan.explicit(graph, place)
    if graph is not None and objective is not None:
        return _scheduled(bundle, graph, objective, shapes)
    default = DeviceKind.ORT if bundle.facts.format == "onnx" else DeviceKind.CPU
    config = as_config(device) or DeviceConfig.parse(str(default))
    return Plan.single(graph, config) if graph else Plan((Placement(0, 0, config),), f"single device {config}")


def quickest_plan(bundle: Bundle) -> Plan:
    """What runs a bundle where nothing is asked and nothing is measured: edgert's own kernels where they load.

    They are for decoders; all else runs as `choose_plan` says.
    """
    config = DeviceConfig.parse("CPU@kernels")
    if (
        bundle.graph is None
        or bundle.facts.task != "decoder"
        or bundle.facts.format != "openvino"
        or _lacking([config])
    ):
        return choose_plan(bundle)
    return choose_plan(bundle, device=config)


def library(bundle: Bundle, *, forbidden: Collection[str] = ()) -> tuple[Choice, ...]:
    """Plans to switch between at run time, by this machine's own profile; see `edgert.scheduler.Schedule.library`.

    Args:
        forbidden: hardware that must not be used.

    Returns:
        None at all where this machine has no fresh profile, or the model is no decoder with blocks.
    """
    from edgert import conditions
    from edgert.cost import Costs, Workload
    from edgert.scheduler import Constraints, schedule

    if bundle.graph is None or bundle.facts.task != "decoder" or not any(conditions.folder().glob("*.json")):
        return ()
    context = bundle.facts.context_length
    try:
        profile = conditions.find_cached()
        costs = Costs(bundle.graph, profile, StaticShapes().within(context))
        names = (*_lacking(profile.configs), *forbidden)
        limits = Constraints(max_memory_bytes=profile.memory_bytes, forbidden=names)
        objective: Objective = "tokens_per_joule"
        try:
            found = schedule(costs, objective, limits, Workload.fitting(context)).library
        except PlanError:  # without watts
            objective = "latency"
            found = schedule(costs, objective, limits, Workload.fitting(context)).library
        towers = _towers(bundle.graph, profile, objective, names)
        return tuple(replace(each, plan=replace(each.plan, towers=towers)) for each in found)
    except (DeviceError, PlanError, UsageError) as error:
        log.info("no plans to switch between: %s", error)
        return ()


def as_config(device: str | DeviceConfig | None) -> DeviceConfig | None:
    """A configuration, of its name where it is given as text."""
    return DeviceConfig.parse(device) if isinstance(device, str) else device


def _runnable(plan: Plan) -> Plan:
    """The plan without kernels that do not load here."""
    for name, reason in _lacking(plan.configs).items():
        other = DeviceConfig.parse(DeviceKind.CPU)
        warning = f"{name} is not used, {other} runs its blocks: {reason}"
        log.warning("%s", warning)
        plan = plan.replaced(name, other, warning)
    return plan


def _lacking(configs: Iterable[DeviceConfig]) -> dict[str, str]:
    """Which of some configurations want kernels that do not load here, and why they do not."""
    wanted = [config for config in configs if config.kernels]
    if not wanted:
        return {}
    reasons = {variant: why for info in devices_of(DeviceKind.CPU) for variant, why in info.lacking.items()}
    return {str(config): reasons[config.variant] for config in wanted if config.variant in reasons}


def _towers(
    graph: BlockGraph, profile: Profile, objective: Objective, forbidden: Collection[str]
) -> dict[str, DeviceConfig]:
    """Where towers take least time, or least energy, by what was measured; those that were not are left out."""
    found = {}
    for tower in graph.towers:
        rows = [
            (DeviceConfig.parse(m.config), m.latency_us, m.energy_uj)
            for m in profile.measurements if m.block == tower.signature
        ]  # fmt: skip
        rows = [row for row in rows if not {str(row[0]), row[0].unit, row[0].device} & set(forbidden)]
        energies = [energy for *_, energy in rows if energy is not None]
        by_energy = objective == "tokens_per_joule" and len(energies) == len(rows)
        if rows:
            best = min(rows, key=lambda row: (row[2] or 0.0) if by_energy else row[1])
            found[tower.name] = tower_config(best[0])
    return found


def _scheduled(bundle: Bundle, graph: BlockGraph, objective: Objective, shapes: StaticShapes | None) -> Plan:
    from edgert.conditions import find_cached
    from edgert.cost import Costs, Workload
    from edgert.scheduler import Constraints, schedule

    if bundle.facts.task != "decoder":
        raise UsageError(f"bundle {bundle.path}: objectives are of decoders; this is an {bundle.facts.task}")
    context, profile = bundle.facts.context_length, find_cached()
    costs = Costs(graph, profile, (shapes or StaticShapes()).within(context))
    lacking = _lacking(profile.configs)
    limits = Constraints(max_memory_bytes=profile.memory_bytes, forbidden=tuple(lacking))
    plan = schedule(costs, objective, limits, Workload.fitting(context)).plan
    plan = replace(plan, towers=_towers(graph, profile, objective, lacking))
    without = tuple(f"{name} is not used: {reason}" for name, reason in lacking.items())
    plan = replace(plan, warnings=(*plan.warnings, *without))
    unknown = [str(c) for c in plan.configs if not profile.covers(own_blocks(graph, c), c) and c != HOST]
    if not unknown:
        return plan
    warning = f"this model was not measured on {', '.join(unknown)}: the plan rests on others; run `edgert profile`"
    return replace(plan, warnings=(*plan.warnings, warning))
