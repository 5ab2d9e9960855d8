"""Which plan a bundle runs on: a given one, a single device, rules, or the best by this machine's own profile."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.bundle import Bundle
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import UsageError
from edgert.graph import BlockGraph
from edgert.placement import HOST, Placement, Plan, own_blocks
from edgert.shapes import StaticShapes

if TYPE_CHECKING:
    from edgert.scheduler import Objective


def choose_plan(
    bundle: Bundle,
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    device: str | DeviceConfig | None = None,
    place: str | None = None,
    objective: Objective | None = None,
    shapes: StaticShapes | None = None,
) -> Plan:
    """The plan that `edgert.load` uses for these arguments."""
    if sum(option is not None for option in (plan, device, place, objective)) > 1:
        raise UsageError("plan, device, place and objective exclude each other; give one of them")
    if isinstance(plan, Plan):
        return plan
    if plan is not None:
        return Plan.read(Path(plan))
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


def as_config(device: str | DeviceConfig | None) -> DeviceConfig | None:
    """A configuration, of its name where it is given as text."""
    return DeviceConfig.parse(device) if isinstance(device, str) else device


def _scheduled(bundle: Bundle, graph: BlockGraph, objective: Objective, shapes: StaticShapes | None) -> Plan:
    from edgert.conditions import find_cached
    from edgert.scheduler import Constraints, schedule

    if bundle.facts.task != "decoder":
        raise UsageError(f"bundle {bundle.path}: objectives are of decoders; this is an {bundle.facts.task}")
    context, profile = bundle.facts.context_length, find_cached()
    costs = Costs(graph, profile, (shapes or StaticShapes()).within(context))
    limits = Constraints(max_memory_bytes=profile.memory_bytes)
    plan = schedule(costs, objective, limits, Workload.fitting(context)).plan
    unknown = [str(c) for c in plan.configs if not profile.covers(own_blocks(graph, c), c) and c != HOST]
    if not unknown:
        return plan
    warning = f"this model was not measured on {', '.join(unknown)}: the plan rests on others; run `edgert profile`"
    return replace(plan, warnings=(*plan.warnings, warning))
