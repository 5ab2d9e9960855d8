"""Plans in virtual time: what becomes of requests when devices are shared, hot, busy with other programs, or run down.

    load = Workload(prompt_tokens=1024, new_tokens=256)
    switcher = Switcher(candidates(costs, plans, load))
    simulation = simulate(costs, plans, poisson(1, 100, 5e6, [load]), environment, switcher)
    simulation.tokens_per_joule, simulation.switches

No clock and no chance is in it: the same input gives the same result, and a request that nothing disturbs takes what
`edgert.prediction.predict` says. docs/simulator.md says what is modelled, and what is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgert.cost import Costs, Workload
from edgert.errors import PlanError, UsageError
from edgert.placement import Plan
from edgert.prediction import memory_bytes, predict
from edgert.simulator.environment import Background, Battery, Environment, Thermal
from edgert.simulator.machine import Machine, expected_uj
from edgert.simulator.results import Event, Request, Served, Simulation, poisson
from edgert.switching import Candidate, Switcher

__all__ = [
    "Background", "Battery", "Environment", "Event", "Request", "Served", "Simulation", "Thermal", "candidates",
    "poisson", "resident_bytes", "simulate",
]  # fmt: skip


def simulate(
    costs: Costs,
    plans: Mapping[str, Plan],
    requests: Sequence[Request],
    environment: Environment | None = None,
    switcher: Switcher | None = None,
    *,
    at_once: int = 1,
) -> Simulation:
    """Serve requests in virtual time.

    Args:
        plans: all that are loaded at the start, by name; nothing is compiled later.
        requests: in any order; they are taken in the order of their arrival.
        environment: None where nothing disturbs.
        switcher: fresh, it picks the plan of every request from `plans`; None where there is one plan only.
        at_once: how many requests are served at the same time, at least 1; others wait.

    Raises:
        UsageError: an argument is out of its range; several plans and no switcher; a plan that is not loaded.
        PlanError: the plans and the sequences need more memory than the machine has; a plan does not fit the graph; the
            profile does not know a configuration, or watts that heat and battery depend on.
    """
    environment = environment or Environment()
    if not requests or at_once < 1:
        raise UsageError(f"simulate: {len(requests)} requests, {at_once} at once, the least is 1")
    if not plans or (switcher is None and len(plans) > 1):
        raise UsageError(f"simulate: {len(plans)} plans; expected one, or a switcher that picks one")
    if absent := [name for name in (switcher.names if switcher else ()) if name not in plans]:
        raise UsageError(f"simulate: the switcher may pick {', '.join(absent)}; loaded are {', '.join(plans)}")
    units = {config.unit for config in costs.profile.configs} | {c.unit for p in plans.values() for c in p.configs}
    named = {background.unit for background in environment.background} | {
        t.unit for t in environment.thermals if t.unit
    }
    if named - units:
        found = ", ".join(sorted(named - units))
        raise UsageError(f"simulate: the environment names {found}; the machine has {', '.join(sorted(units))}")
    for plan in plans.values():
        plan.check(costs.graph)
        costs.require(plan.configs)
    needed = resident_bytes(costs, plans, max(r.load.prompt_tokens + r.load.new_tokens for r in requests), at_once)
    limit = costs.profile.memory_bytes
    if limit is not None and needed > limit:
        raise PlanError(
            f"plans {', '.join(plans)} and {at_once} sequences hold {needed / 1e9:.2f} GB together, "
            f"{costs.profile.machine} has {limit / 1e9:.2f} GB"
        )
    return Machine(costs, plans, requests, environment, switcher, at_once).run()


def candidates(costs: Costs, plans: Mapping[str, Plan], load: Workload) -> list[Candidate]:
    """What a switcher picks from: plans that are all loaded, and what they take for a typical request."""
    found = []
    for name, plan in plans.items():
        prediction = predict(costs, plan, load)
        placements = [p for placements in plan.phases.values() for p in placements]
        # Looking up embeddings is no use of a device: what slows it down does not slow the plan.
        busy = [p for p in placements if not all(costs.works[i].idle for i in range(p.first, p.last + 1))]
        units = frozenset(p.config.unit for p in busy)
        found.append(Candidate(name, prediction.total_us, expected_uj(costs, plans, name, prediction), units))
    return found


def resident_bytes(costs: Costs, plans: Mapping[str, Plan], context: int, at_once: int = 1) -> int:
    """Memory of plans that are loaded together, and of sequences of `context` tokens under the plan that needs most.

    Plans share a submodel where it has the same blocks and configuration, and with static shapes the same phase.
    """
    weights: dict[object, int] = {}
    states = 0
    for plan in plans.values():
        submodels = plan.submodels(costs.graph)
        for phase, placements in (("prefill", submodels[0]), ("decode", submodels[-1])):
            for p in placements:
                blocks = costs.graph.blocks[p.first : p.last + 1]
                weights[p, phase if p.config.static else ""] = sum(block.total_weight_bytes for block in blocks)
        held = sum(copy.bytes * copy.count for copy in plan.weights(costs.graph))
        states = max(states, sum(memory_bytes(costs, plan, context).values()) - held)
    return sum(weights.values()) + at_once * states
