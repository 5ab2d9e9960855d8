"""Requests, and what became of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgert.cost import Workload
from edgert.errors import UsageError
from edgert.profile import Provenance
from edgert.switching import Switch


@dataclass(frozen=True)
class Request:
    """A prompt and its continuation that are asked for at `arrival_us`, 0 or more."""

    arrival_us: float
    load: Workload

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_us < math.inf:
            raise UsageError(f"request: arrival_us is {self.arrival_us}, expected a finite number, 0 or more")


def poisson(seed: int, count: int, mean_gap_us: float, loads: Sequence[Workload]) -> list[Request]:
    """Requests at random times, each of one of `loads`; the same for the same seed.

    Args:
        mean_gap_us: between two arrivals, on average, finite and above 0; gaps are distributed exponentially.
        loads: at least one.

    Raises:
        UsageError: an argument is out of its range.
    """
    if not 0 < mean_gap_us < math.inf:
        raise UsageError(f"poisson: mean_gap_us is {mean_gap_us}, expected a finite number above 0")
    if not loads:
        raise UsageError("poisson: there are 0 loads, the least is 1")
    source = random.Random(seed)
    now_us, requests = 0.0, []
    for _ in range(count):
        now_us += source.expovariate(1 / mean_gap_us)
        requests.append(Request(now_us, source.choice(loads)))
    return requests


@dataclass(frozen=True)
class Served:
    """A request that was served.

    Attributes:
        prompt_tokens, new_tokens: what was asked for.
        plan: the name of the plan that served it.
        arrival_us: when it came.
        start_us: when its turn came, and its plan was chosen.
        ttft_us: from its arrival to its first token.
        handover_us: between its first token and the decoding of the next, where keys and values change hands.
        tpot_us: time per output token after that; None for one token.
        end_us: when it was done.
        energy_uj: of its calls, and its part of what the machine draws in any case: while several are served, each has
            the same part. None where `Simulation.missing` names watts.
    """

    prompt_tokens: int
    new_tokens: int
    plan: str
    arrival_us: float
    start_us: float
    ttft_us: float
    handover_us: float
    tpot_us: float | None
    end_us: float
    energy_uj: float | None


@dataclass(frozen=True)
class Event:
    """Something that happened to the machine."""

    at_us: float
    what: str


@dataclass(frozen=True)
class Simulation:
    """What a machine did in virtual time, from 0 on.

    Attributes:
        served: the requests that were served, by arrival.
        unserved: how many were not, because the battery was empty.
        end_us: when the last request was done, or the battery empty.
        energy_parts_uj: of the machine, by configuration, `waiting` devices, `base`, and `background` where other
            programs run; without what is missing.
        missing: what is not known of the energy, as `CONFIGURATION: field`.
        busy_us: in which each device had a call.
        switches: the plans that were chosen, and why; the first one among them.
        events: throttling, power source, low and empty battery.
        hottest_c: degrees Celsius, for each thermal model in its order.
        battery_share: charge at the end, 0 to 1; None without a battery.
        provenance: the worst of what the times rest on. What happened is simulated whatever it says. None
            where no request got its turn.
    """

    served: tuple[Served, ...]
    unserved: int
    end_us: float
    energy_parts_uj: dict[str, float]
    missing: tuple[str, ...]
    busy_us: dict[str, float]
    switches: tuple[Switch, ...]
    events: tuple[Event, ...]
    hottest_c: tuple[float, ...]
    battery_share: float | None
    provenance: Provenance | None

    @property
    def energy_uj(self) -> float | None:
        """Of the machine over all of it; None where `missing` names watts."""
        return None if self.missing else sum(self.energy_parts_uj.values())

    @property
    def new_tokens(self) -> int:
        return sum(served.new_tokens for served in self.served)

    @property
    def tokens_per_joule(self) -> float | None:
        """New tokens of the requests that were served over the energy of all of it; None where that is not known."""
        return self.new_tokens * 1e6 / self.energy_uj if self.energy_uj else None

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of the time in which each device had a call, 0 to 1."""
        return {unit: busy_us / self.end_us if self.end_us else 0.0 for unit, busy_us in self.busy_us.items()}

    def to_json(self) -> dict[str, Any]:
        derived = ("energy_uj", "new_tokens", "tokens_per_joule", "utilisation")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}
