"""Which plans suit the moment, how much of the time may be worked, and whether background requests may.

    policy = Policy(settings)
    decision = policy.decide(reader.read(now_s), {"qwen3": Loaded(ready.plans, running=1)}, now_s, watts=14.2)

Every few seconds, with plain numbers and the caller's clock. What is to be kept low follows from the mode: a request's
time (`performance`), its energy (`saver`) or their product (`balanced`); `auto` picks the mode by what the machine
says. A mode is taken when it has been the right one at every look for a dwell time, so plans change at most once a
dwell time, and not at all for a cable that comes and goes faster. Two limits hold whatever the mode is: see
`pace.Pacer` and `pace.Budget`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgert.service.contract import PowerStatus
from edgert.service.power.machine import MachineState
from edgert.service.power.pace import Budget, Pacer
from edgert.service.protocol import PlanOffer
from edgert.service.settings import Settings
from edgert.switching import Candidate, State, Switcher

Mode = Literal["saver", "balanced", "performance"]

LOW_SHARE, CHARGED_SHARE = 0.20, 0.25  # a battery is low from the one to the other, so that it is not low by turns
CROWD = 4  # interactive requests that wait, from which time counts more than energy
RESERVE_SHARE = 0.25  # of the joules of an hour: what is left of them is for people, in saver mode


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        offers: plans that its worker can switch to.
        running: requests in work.
        waiting: interactive requests that wait.
    """

    offers: Sequence[PlanOffer]
    running: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do until the next look.

    Attributes:
        mode: in force.
        plans: by model, the plan to be on; models whose plans nobody has predictions for are left where they are.
        pace: share of the time that workers may work, `pace.MIN_PACE` to 1.
        admit_background: whether background requests may start.
        reason: why all that, in words.
    """

    mode: Mode
    plans: Mapping[str, str]
    pace: float
    admit_background: bool
    reason: str


class Policy:
    """Decides. It remembers; one policy serves one run of one service.

    Args:
        settings: `power`, `max_watts`, `joules_per_hour` and `dwell_s` of them.
    """

    def __init__(self, settings: Settings) -> None:
        self._policy, self._dwell_s = settings.power, settings.dwell_s
        self._pacer = Pacer(settings.max_watts) if settings.max_watts is not None else None
        self._budget = Budget(settings.joules_per_hour)
        self._max_watts, self._joules_per_hour = settings.max_watts, settings.joules_per_hour
        self._low = False  # the battery
        self._mode: Mode = "performance" if self._policy == "auto" else self._policy
        self._why = ""
        self._decided = False
        self._other: tuple[Mode, float] | None = None  # the mode that seems right, and since when
        self._switchers: dict[str, tuple[tuple[Candidate, ...], Switcher]] = {}
        self._machine = MachineState()
        self._reason = ""

    def spend(self, joules: float, now_s: float) -> None:
        """Tell of energy that was used since the last time."""
        self._budget.spend(joules, now_s)

    def decide(
        self, machine: MachineState, models: Mapping[str, Loaded], now_s: float, *, watts: float | None = None
    ) -> Decision:
        """What to do now.

        Args:
            machine: as it is.
            models: those that are loaded, by name.
            now_s: a clock that does not go backwards, the same as for `spend`.
            watts: mean of the whole machine over the seconds since the last look, measured; None where nobody knows.
        """
        self._machine = machine
        self._set_mode(machine, sum(m.waiting for m in models.values()), now_s)
        notes = [self._why]
        plans = {}
        for gone in self._switchers.keys() - models.keys():
            del self._switchers[gone]
        for name, model in models.items():
            plan, note = self._plan(name, model.offers, now_s)
            if plan is not None:
                plans[name] = plan
            if note:
                notes.append(note)
        pace, told = self._pace(models, plans, now_s, watts)
        self._reason = "; ".join(dict.fromkeys(notes + told))
        return Decision(self._mode, plans, pace, self._admit(machine, now_s), self._reason)

    def status(self, now_s: float) -> PowerStatus:
        """As of the last decision; the joules as of now."""
        return PowerStatus(
            policy=self._policy,
            mode=self._mode,
            reason=self._reason,
            on_battery=self._machine.on_battery,
            battery_share=self._machine.battery_share,
            throttled=self._machine.throttled,
            user_active=self._machine.user_active,
            max_watts=self._max_watts,
            joules_per_hour=self._joules_per_hour,
            spent_joules=self._budget.spent(now_s),
        )

    def _set_mode(self, machine: MachineState, waiting: int, now_s: float) -> None:
        wanted, why = self._wanted(machine, waiting, now_s)
        if wanted == self._mode or not self._decided:
            self._mode, self._why, self._other = wanted, why, None
        elif self._other is None or self._other[0] != wanted:
            self._other = wanted, now_s
        if self._other is not None and now_s - self._other[1] >= self._dwell_s:
            self._mode, self._why, self._other = wanted, why, None
        self._decided = True

    def _wanted(self, machine: MachineState, waiting: int, now_s: float) -> tuple[Mode, str]:
        """The mode that is right at this look, and why."""
        share = machine.battery_share
        limit = CHARGED_SHARE if self._low else LOW_SHARE
        self._low = bool(machine.on_battery) and share is not None and share <= limit
        left = self._budget.left_share(now_s)
        if left is not None and left < RESERVE_SHARE:
            return "saver", f"{left:.0%} left of the {self._joules_per_hour:g} J an hour"
        if self._policy != "auto":
            return self._policy, "as set"
        if self._low:
            assert share is not None
            return "saver", f"battery at {share:.0%}"
        if machine.throttled:
            # What cooling carries away bounds the watts, so requests in an hour are bounded by the energy of each.
            return "saver", "throttled by heat"
        if waiting >= CROWD:
            return "performance", f"{waiting} requests wait"
        if machine.on_battery and machine.user_active is False:
            return "saver", "on battery, and nobody is at the machine"
        if machine.on_battery:
            return "balanced", "on battery"
        return "performance", "power source unknown" if machine.on_battery is None else "on mains"

    def _plan(self, model: str, offers: Sequence[PlanOffer], now_s: float) -> tuple[str | None, str]:
        """The plan for a model, None to leave it; and what to say of it."""
        known = [o for o in offers if o.latency_us]
        note = ""
        if self._max_watts is not None and known:
            fit = [o for o in known if o.watts is not None and o.watts <= self._max_watts]
            # Where each plan must pause, its requests take energy / limit: the one of least energy is the fastest.
            told = all(o.energy_uj for o in known)
            known = fit or ([min(known, key=lambda o: o.energy_uj or 0.0)] if told else known)
            note = "" if fit else f"no plan of {model} is known to stay within {self._max_watts:g} W"
        if not known:
            self._switchers.pop(model, None)
            return None, f"{model} keeps its plan: nobody has measured this machine for it" if offers else ""
        told = all(o.energy_uj for o in known)
        if not told and len(known) > 1 and self._mode != "performance":
            note = f"the energy of {model}'s plans is not known, so time decides"
        candidates = tuple(
            Candidate(o.name, o.latency_us or 0.0, o.energy_uj if told else None, frozenset(o.units)) for o in known
        )
        held = self._switchers.get(model)
        if held is None or held[0] != candidates:
            # No dwell time here: the mode had its own, and the margin keeps plans that are about as good.
            held = self._switchers[model] = candidates, Switcher(candidates, dwell_us=0.0)
        return held[1].choose(_state(self._mode, now_s)), note

    def _pace(
        self, models: Mapping[str, Loaded], plans: Mapping[str, str], now_s: float, watts: float | None
    ) -> tuple[float, list[str]]:
        """The share of time to work, and what to say of it."""
        predicted = {
            name: next((o.watts for o in model.offers if o.name == plans.get(name)), None)
            for name, model in models.items()
        }
        work = frozenset(name for name, model in models.items() if model.running)
        told = [predicted[name] or 0.0 for name in work or models]
        # Two at once draw less than the sum, which has the idle machine in it twice: too low a pace for a few seconds.
        predicted_w = (sum(told) if work else max(told)) if told and all(told) else None
        notes = []
        pace = 1.0
        if self._pacer is not None:
            pace = self._pacer.look(now_s, frozenset(f"{name} {plans.get(name)}" for name in work), watts, predicted_w)
            if not self._pacer.informed:
                notes.append(f"{self._max_watts:g} W cannot be held: nothing measures or predicts watts here")
            elif pace < 1:
                notes.append(f"working {pace:.0%} of the time to stay within {self._max_watts:g} W")
        share = self._budget.look(now_s, bool(work), pace)
        if share < pace:
            notes.append(f"working {share:.0%} of the time to stay within {self._joules_per_hour:g} J an hour")
        return min(pace, share), notes

    def _admit(self, machine: MachineState, now_s: float) -> bool:
        """Whether background work may start: it can wait for a better moment, and people cannot."""
        left = self._budget.left_share(now_s)
        if left is not None and left < RESERVE_SHARE:
            return False
        return self._policy != "auto" or not (self._low or (machine.throttled and machine.user_active))


def _state(mode: Mode, now_s: float) -> State:
    """What makes a switcher keep low what the mode is about; see `Switcher`."""
    if mode == "saver":
        return State(now_s * 1e6, battery_share=0.0, on_battery=True)
    return State(now_s * 1e6, on_battery=mode == "balanced")
