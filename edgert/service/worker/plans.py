"""Which plan a worker runs, and which others it could: from what `Load` asks to what `Ready` offers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace

from edgert.bundle import Bundle
from edgert.choice import choose_plan, library, quickest_plan
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import DeviceError, PlanError, UsageError
from edgert.placement import Plan
from edgert.prediction import Prediction
from edgert.scheduler import OBJECTIVES
from edgert.scheduler import Choice as LibraryPlan
from edgert.service.contract import PlacedBlocks
from edgert.service.protocol import Load, PlanOffer

log = logging.getLogger("edgert")
MOST_OFFERS = 4


def chosen(load: Load, bundle: Bundle) -> Plan:
    """The plan that a worker begins with, without the hardware that is to be avoided.

    Raises:
        UsageError: more than one of plan, device and objective, or an unknown one.
        PlanError, DeviceError: the plan or device cannot be used.
    """
    return without(_asked(load, bundle), load.avoid, bundle)


def without(plan: Plan, avoid: Mapping[str, str], bundle: Bundle) -> Plan:
    """A plan with the CPU in the place of some hardware, and a warning for each."""
    cpu = DeviceConfig.parse(DeviceKind.CPU)
    for unit, reason in avoid.items():
        if unit != cpu.unit and unit in units(plan):
            plan = plan.replaced(unit, cpu, f"{unit} is not used, {cpu} runs its blocks: {reason}")
            plan = plan.with_host(bundle.graph) if bundle.graph else plan
    return plan


def units(plan: Plan) -> list[str]:
    """The hardware that a plan uses."""
    return list(dict.fromkeys(config.unit for config in (*plan.configs, *plan.towers.values())))


def unit_of_logits(plan: Plan) -> str:
    """The hardware that computes the logits of a token."""
    return tuple(plan.phases.values())[-1][-1].config.unit


def offers(plan: Plan, bundle: Bundle, avoid: Mapping[str, str]) -> dict[str, tuple[PlanOffer, Plan]]:
    """What can be switched to, by name: the plan in use first, then the extremes of the library.

    These are the quickest one, the one that takes least energy, and the one with the least product of both.
    """
    found = library(bundle, forbidden=tuple(unit for unit in avoid if unit != DeviceKind.CPU))
    names: dict[str, tuple[PlanOffer, Plan]] = {}
    own = next((each for each in found if _same(each.plan, plan)), None)
    _offer(names, plan.rationale, plan, None if own is None else own.prediction, bundle)
    others = [each for each in found if each is not own]
    scores = [
        lambda each: each.prediction.total_us,
        lambda each: each.prediction.energy_uj or 0.0,
        lambda each: each.prediction.total_us * (each.prediction.energy_uj or 1.0),
    ]
    best: list[LibraryPlan] = [min(others, key=score) for score in scores if others]
    for each in list({id(each): each for each in best}.values())[: MOST_OFFERS - 1]:
        _offer(names, each.name, each.plan, each.prediction, bundle)
    return names


def blocks_of(plan: Plan, bundle: Bundle) -> list[PlacedBlocks]:
    """Where blocks run, for people to see."""
    found = []
    for name, placements in plan.phases.items():
        for p in placements:
            inside = () if bundle.graph is None else bundle.graph.blocks[p.first : p.last + 1]
            kinds = dict(Counter(str(block.kind) for block in inside))
            phase = "both" if plan.decode is None else name
            found.append(PlacedBlocks(phase, p.first, p.last, str(p.config), kinds))  # type: ignore[arg-type]
    return found


def _asked(load: Load, bundle: Bundle) -> Plan:
    given = {"plan": load.plan, "device": load.device, "objective": load.objective}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other; give one of them")
    if load.plan is not None:
        return choose_plan(bundle, plan=Plan.from_json(load.plan))
    if load.device is not None:
        return choose_plan(bundle, device=load.device)
    if load.objective is None:
        return quickest_plan(bundle)
    objective = next((each for each in OBJECTIVES if each == load.objective), None)
    if objective is None:
        raise UsageError(f"objective is {load.objective[:40]!r}, expected one of {', '.join(OBJECTIVES)}")
    try:
        return choose_plan(bundle, objective=objective)
    except (DeviceError, PlanError) as error:  # no profile, or one without watts: a service runs all the same
        log.warning("objective %s is not used: %s", objective, error)
        plan = quickest_plan(bundle)
        return replace(plan, warnings=(*plan.warnings, f"objective {objective} is not used: {error}"))


def _offer(
    names: dict[str, tuple[PlanOffer, Plan]], name: str, plan: Plan, prediction: Prediction | None, bundle: Bundle
) -> None:
    unique = next(each for each in (name, *(f"{name} ({n})" for n in range(2, 99))) if each not in names)
    offer = PlanOffer(
        name=unique,
        latency_us=None if prediction is None else prediction.total_us,
        energy_uj=None if prediction is None else prediction.energy_uj,
        watts=None if prediction is None else prediction.watts,
        units=units(plan),
        blocks=[asdict(placed) for placed in blocks_of(plan, bundle)],
    )
    names[unique] = offer, plan


def _same(a: Plan, b: Plan) -> bool:
    return a.phases == b.phases
