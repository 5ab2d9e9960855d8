"""A machine in virtual time: requests become calls, calls wait for their device and work at rates that change."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.errors import PlanError
from edgert.placement import Plan
from edgert.prediction import Prediction, predict, worst
from edgert.simulator.environment import Environment
from edgert.simulator.results import Event, Request, Served, Simulation
from edgert.simulator.script import Script, Stage, write_script
from edgert.simulator.surroundings import Surroundings
from edgert.switching import State, Switcher


@dataclass(eq=False)
class _Flight:
    """A request that is being served."""

    number: int
    request: Request
    plan: str
    script: Script
    start_us: float
    rest: Iterator[tuple[Stage, int]]  # calls after the prefill
    moves: int  # hand-overs among them
    left: set[tuple[int, int]] = field(default_factory=set)  # (chunk, stage) of the prefill that are done
    first_us: float = 0.0  # when the first token was there
    decode_us: float = 0.0  # when decoding began
    energy_uj: float = 0.0
    alone: bool = True  # all the time


@dataclass(eq=False)
class _Call:
    """A call of a stage. While it runs, at `anchor_us` it had `remaining_us` left, `rate` of which pass in each."""

    flight: _Flight
    stage: Stage
    index: int
    place: tuple[int, int] | None  # (chunk, stage) of the prefill
    remaining_us: float = 0.0
    anchor_us: float = 0.0
    rate: float = 1.0

    @property
    def end_us(self) -> float:
        return self.anchor_us + self.remaining_us / self.rate

    def watts(self) -> dict[str, float]:
        """Above base and idle, by configuration. A call takes the same energy at any rate."""
        latency_us = self.stage.latency_us[self.index]
        return {
            config: energy_uj[self.index] / latency_us * self.rate for config, energy_uj in self.stage.energy_uj.items()
        }


class Machine:
    """Serves requests, once; see `edgert.simulator.simulate`."""

    def __init__(
        self,
        costs: Costs,
        plans: Mapping[str, Plan],
        requests: Sequence[Request],
        environment: Environment,
        switcher: Switcher | None,
        at_once: int,
    ) -> None:
        self._costs, self._plans, self._needs_power = costs, plans, environment.needs_power
        self._switcher, self._at_once = switcher, at_once
        self._count = len(requests)
        self._coming = deque(enumerate(sorted(requests, key=lambda r: r.arrival_us)))
        self._waiting: deque[tuple[int, Request]] = deque()
        self._flights: list[_Flight] = []
        # (since when, request, chunk, stage, call): ties are broken as `edgert.prediction.pipeline_us` does.
        self._ready: list[tuple[float, int, int, int, _Call]] = []
        configs = tuple(dict.fromkeys(config for plan in plans.values() for config in plan.configs))
        self._queues: dict[str, deque[_Call]] = {config.unit: deque() for config in configs}
        self._running: dict[str, _Call] = {}
        self._slowdowns = {(s.config, s.beside): s.factor for s in costs.profile.slowdowns}
        self._around = Surroundings(environment, self._queues, switcher.low_share if switcher else None)

        self._missing: dict[str, None] = {}
        self._idle_w: dict[str, float] = {}
        for unit in self._queues:
            watts = idle_w(costs, configs, unit)
            if watts is None:
                self._missing[f"{next(c for c in configs if c.unit == unit)}: idle_w"] = None
            self._idle_w[unit] = watts or 0.0
        self._base_w = costs.profile.base_w or 0.0
        self._parts_uj = {str(config): 0.0 for config in configs} | {"waiting": 0.0}
        if costs.profile.base_w is None:
            self._missing["machine: base_w"] = None
        else:
            self._parts_uj["base"] = 0.0
        if environment.background:
            self._parts_uj["background"] = 0.0
        self._busy_us = dict.fromkeys(self._queues, 0.0)

        self._scripts: dict[tuple[str, Workload], Script] = {}
        self._predictions: dict[tuple[str, Workload], Prediction] = {}
        self._served: dict[int, Served] = {}
        self._events: list[Event] = []

    def run(self) -> Simulation:
        self._look()
        self._settle()
        while len(self._served) < self._count and not self._around.empty:
            self._pass_time()
            self._settle()
        served = [self._served[number] for number in sorted(self._served)]
        if self._missing:  # perhaps of a plan that came later; then no energy can be compared with another
            served = [replace(each, energy_uj=None) for each in served]
        return Simulation(
            served=tuple(served),
            unserved=self._count - len(self._served),
            end_us=self._around.now_us,
            energy_parts_uj=self._parts_uj,
            missing=tuple(self._missing),
            busy_us=self._busy_us,
            switches=tuple(self._switcher.switches) if self._switcher else (),
            events=tuple(self._events),
            hottest_c=tuple(self._around.hottest_c),
            battery_share=self._around.battery_share,
            provenance=worst(p.provenance for p in self._predictions.values()) if self._predictions else None,
        )

    def _settle(self) -> None:
        """Do all that happens now, one thing at a time; what ends, ends before anything else gets its turn."""
        now_us = self._around.now_us
        while True:
            if ended := next((call for call in self._running.values() if call.end_us <= now_us), None):
                del self._running[ended.stage.unit]
                self._follow(ended)
            elif unit := next((u for u, queue in self._queues.items() if queue and u not in self._running), None):
                call = self._running[unit] = self._queues[unit].popleft()
                call.remaining_us, call.anchor_us = call.stage.latency_us[call.index], now_us
            elif self._coming and self._coming[0][1].arrival_us <= now_us:
                self._waiting.append(self._coming.popleft())
            elif self._waiting and len(self._flights) < self._at_once:
                self._admit(*self._waiting.popleft())
            elif self._ready:
                call = heapq.heappop(self._ready)[-1]
                self._queues[call.stage.unit].append(call)
            else:
                break
        for unit, call in self._running.items():
            rate = self._around.speed(unit) * call.stage.slowed / max(call.stage.slowed, self._crowding(unit, call))
            # Only where it changes, so that calls nobody disturbs end at their start plus their time, unrounded.
            if rate != call.rate:
                call.remaining_us = max(0.0, call.remaining_us - (now_us - call.anchor_us) * call.rate)
                call.anchor_us, call.rate = now_us, rate

    def _admit(self, number: int, request: Request) -> None:
        plan = self._look() or next(iter(self._plans))
        key = plan, request.load
        if key not in self._scripts:
            self._scripts[key] = write_script(self._costs, self._plans[plan], request.load)
            self._predictions[key] = predict(self._costs, self._plans[plan], request.load)
            self._missing |= dict.fromkeys(self._scripts[key].missing)
        if self._missing and self._needs_power:
            raise PlanError(f"heat and battery need watts that the profile does not have: {', '.join(self._missing)}")
        script, now_us = self._scripts[key], self._around.now_us
        flight = _Flight(number, request, plan, script, now_us, script.after_prefill(), len(script.handover))
        self._flights.append(flight)
        if len(self._flights) > 1:
            for each in self._flights:
                each.alone = False
        self._call(flight, script.prefill[0], 0, (0, 0))

    def _call(self, flight: _Flight, stage: Stage, index: int, place: tuple[int, int] | None = None) -> None:
        call = _Call(flight, stage, index, place)
        heapq.heappush(self._ready, (self._around.now_us, flight.number, *(place or (0, 0)), call))

    def _follow(self, ended: _Call) -> None:
        """The calls that can begin because one has ended."""
        flight, script = ended.flight, ended.flight.script
        if ended.place is not None:
            chunk, stage = ended.place
            last = len(script.prefill) - 1
            flight.left.add(ended.place)
            # A chunk enters a stage when it has left the one before and the chunk before it has left this stage.
            if stage < last and (chunk == 0 or (chunk - 1, stage + 1) in flight.left):
                self._call(flight, script.prefill[stage + 1], chunk, (chunk, stage + 1))
            if chunk + 1 < script.chunks and (stage == 0 or (chunk + 1, stage - 1) in flight.left):
                self._call(flight, script.prefill[stage], chunk + 1, (chunk + 1, stage))
            if (chunk, stage) != (script.chunks - 1, last):
                return
            flight.first_us = flight.decode_us = self._around.now_us
        elif flight.moves:
            flight.moves -= 1
            flight.decode_us = self._around.now_us
        if following := next(flight.rest, None):
            self._call(flight, *following)
        else:
            self._finish(flight)

    def _finish(self, flight: _Flight) -> None:
        self._flights.remove(flight)
        now_us, request, steps = self._around.now_us, flight.request, flight.script.steps
        energy_uj = None if self._missing else flight.energy_uj
        self._served[flight.number] = Served(
            prompt_tokens=request.load.prompt_tokens,
            new_tokens=request.load.new_tokens,
            plan=flight.plan,
            arrival_us=request.arrival_us,
            start_us=flight.start_us,
            ttft_us=flight.first_us - request.arrival_us,
            handover_us=flight.decode_us - flight.first_us,
            tpot_us=(now_us - flight.decode_us) / steps if steps else None,
            end_us=now_us,
            energy_uj=energy_uj,
        )
        if self._switcher and flight.alone:
            prediction = self._predictions[flight.plan, request.load]
            planned_uj = expected_uj(self._costs, self._plans, flight.plan, prediction)
            dearer = energy_uj / planned_uj if energy_uj and planned_uj else None
            slowdown = (now_us - flight.start_us) / prediction.total_us
            self._switcher.observe(flight.plan, now_us, slowdown, dearer)

    def _look(self) -> str | None:
        """The switcher's choice in the light of what is seen now; None without a switcher."""
        if self._switcher is None:
            return None
        around = self._around
        state = State(around.now_us, around.battery_share, not around.plugged, around.throttled, len(self._waiting))
        return self._switcher.choose(state)

    def _crowding(self, unit: str, call: _Call) -> float:
        """How many times as long as alone a call takes beside those that run now, if any is another request's.

        For those of its own request `Stage.latency_us` has it already.
        """
        others = [other for name, other in self._running.items() if name != unit]
        if all(other.flight is call.flight for other in others):
            return 1.0
        pairs = [(a, b) for a in call.stage.configs for other in others for b in other.stage.configs]
        if measured := [self._slowdowns[pair] for pair in pairs if pair in self._slowdowns]:
            return max(measured)
        shared_gbps = self._costs.profile.shared_gbps
        demand_gbps = sum(c.stage.demand_gbps[c.index] * self._around.speed(u) for u, c in self._running.items())
        return demand_gbps / shared_gbps if shared_gbps else 1.0

    def _pass_time(self) -> None:
        """Go to the next moment at which something happens, and take account of what is drawn until then."""
        around = self._around
        unit_w = around.background_w()
        background_w = sum(unit_w.values())
        active_w = {unit: call.watts() for unit, call in self._running.items()}
        waiting_w = sum(watts for unit, watts in self._idle_w.items() if unit not in self._running)
        for unit, watts in self._idle_w.items():
            own_w = sum(active_w[unit].values()) if unit in active_w else watts
            unit_w[unit] = unit_w.get(unit, 0.0) + own_w
        total_w = self._base_w + sum(unit_w.values())

        ends_us = [call.end_us for call in self._running.values()]
        arrivals_us = [self._coming[0][1].arrival_us] if self._coming else []
        next_us = min([*ends_us, *arrivals_us, around.next_us(unit_w, total_w)])
        time_us = next_us - around.now_us

        for unit, call in self._running.items():
            self._busy_us[unit] += time_us
            for config, watts in active_w[unit].items():
                self._parts_uj[config] += watts * time_us
                call.flight.energy_uj += watts * time_us
        for flight in self._flights:
            flight.energy_uj += (self._base_w + waiting_w) * time_us / len(self._flights)
        drawn_w = {"waiting": waiting_w, "base": self._base_w, "background": background_w}
        for part, watts in drawn_w.items():
            if part in self._parts_uj:
                self._parts_uj[part] += watts * time_us

        happened = around.advance(next_us, unit_w, total_w)
        self._events += [Event(next_us, what) for what in happened]
        if happened:
            self._look()


def idle_w(costs: Costs, configs: Sequence[DeviceConfig], unit: str) -> float | None:
    """Watts of a device that waits: those of its first configuration that knows; None where none does."""
    return next((w for c in configs if c.unit == unit and (w := costs.model(c).idle_w) is not None), None)


def expected_uj(costs: Costs, plans: Mapping[str, Plan], name: str, prediction: Prediction) -> float | None:
    """What is predicted of a plan, and the waiting of devices which only the other plans use; None if not known."""
    own = {config.unit for config in plans[name].configs}
    configs = tuple(dict.fromkeys(config for plan in plans.values() for config in plan.configs))
    waits_w = [idle_w(costs, configs, unit) for unit in sorted({c.unit for c in configs} - own)]
    if prediction.energy_uj is None or None in waits_w:
        return None
    return prediction.energy_uj + sum(watts or 0.0 for watts in waits_w) * prediction.total_us
