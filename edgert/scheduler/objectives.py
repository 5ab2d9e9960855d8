"""What is wanted of a plan: objective and constraints, as weights of a chain's columns and as judged by predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from edgert.device import DeviceConfig
from edgert.errors import PlanError, UsageError
from edgert.placement import Plan
from edgert.prediction import Prediction
from edgert.scheduler.labels import Floats
from edgert.scheduler.pricing import TIMES, Prices, matches

Objective = Literal["tokens_per_joule", "latency", "throughput"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
SLACK = 1e-9  # relative: numbers that differ by less are the same, whoever added them up
_PER_PIECE = 1e-12  # of the objective, for every submodel and every second copy: among equals, the plan with the fewest
_LATER = 1e-6  # of the time before the first token, where only the time after it counts: among equals, the fastest


@dataclass(frozen=True)
class Constraints:
    """What a plan has to keep. None, or empty, where anything will do.

    Attributes:
        max_ttft_us: microseconds until the first new token, above 0.
        max_tpot_us: microseconds for each new token after the first, above 0.
        max_watts: mean of the machine over prompt and continuation, above 0.
        max_memory_bytes: weights, keys and values on all devices, at least 1.
        max_device_memory_bytes: the same on single devices, by name (`NPU`).
        max_error: root of the sum of squares of the blocks' errors (`Measurement.error`), each in the worse of its two
            phases; above 0. A lookup of embeddings has none.
        forbidden: devices (`NPU`) or configurations (`GPU@f16`) that run no block. The lookup of embeddings for other
            devices may stay on the CPU.
        required: the same, of which each runs at least one block in a phase. The lookup of embeddings does not count.
    """

    max_ttft_us: float | None = None
    max_tpot_us: float | None = None
    max_watts: float | None = None
    max_memory_bytes: int | None = None
    max_device_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    max_error: float | None = None
    forbidden: tuple[str, ...] = ()
    required: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.limits.items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value}, expected a finite number above 0")
        for name in (*self.forbidden, *self.required, *self.max_device_memory_bytes):
            if name in self.max_device_memory_bytes and DeviceConfig.parse(name).device != name:
                raise UsageError(
                    f"max_device_memory_bytes: {name!r} is no device; {DeviceConfig.parse(name).device} is"
                )
            DeviceConfig.parse(name)  # raises where it is none

    @cached_property
    def limits(self) -> dict[str, float]:
        """All that is a number, by name."""
        names = ("max_ttft_us", "max_tpot_us", "max_watts", "max_memory_bytes", "max_error")
        found = {name: getattr(self, name) for name in names}
        found |= {f"max_device_memory_bytes {name}": most for name, most in self.max_device_memory_bytes.items()}
        return {name: value for name, value in found.items() if value is not None}


class Aim:
    """An objective and constraints for a model on a machine.

    Attributes:
        powered: whether the energy matters.

    Raises:
        UsageError: the objective is not known, or wants more new tokens than one.
        PlanError: the energy matters and is not known, or a device is required that cannot run the model.
    """

    def __init__(self, prices: Prices, objective: Objective, constraints: Constraints) -> None:
        if objective not in OBJECTIVES:
            raise UsageError(f"objective is {str(objective)[:40]!r}, expected one of {', '.join(OBJECTIVES)}")
        if objective == "throughput" and prices.load.new_tokens < 2:
            raise UsageError("throughput is that of tokens after the first: new_tokens is 1, the least is 2")
        self.prices, self.objective, self.constraints = prices, objective, constraints
        self.powered = objective == "tokens_per_joule" or constraints.max_watts is not None
        if self.powered and prices.missing:
            machine = prices.costs.profile.machine
            raise PlanError(f"profile {machine}: the energy is not known without {', '.join(prices.missing)}")
        for name in constraints.required:
            if not any(matches(name, config) for config in prices.configs):
                raise PlanError(f"required {name}: no configuration of it may run this model")

    def value(self, prediction: Prediction) -> float:
        """What is minimised: microjoules or microseconds."""
        if self.objective == "tokens_per_joule":
            return math.inf if prediction.energy_uj is None else prediction.energy_uj
        if self.objective == "latency":
            return prediction.total_us
        return prediction.decode_us + _LATER * (prediction.prefill_us + prediction.handover_us)

    def weights(self, waiting_w: float) -> Floats:
        """The same as weights of the columns; see `Prices.energy` for `waiting_w`."""
        rows = {
            "tokens_per_joule": self.prices.energy(waiting_w),
            "latency": dict.fromkeys(TIMES, 1.0),
            "throughput": {**dict.fromkeys(TIMES, _LATER), "decode_us": 1.0},
        }
        return self.settled(self.prices.row(rows[self.objective]))

    def settled(self, row: Floats) -> Floats:
        """Weights that prefer fewer pieces among equals."""
        chain = self.prices.chain
        least = np.where(chain.allowed, np.einsum("c,kcpd->kpd", row, chain.nodes), np.inf).min(axis=(1, 2))
        return row + self.prices.row({"pieces": _PER_PIECE * abs(float(least[chain.kinds].sum()))})

    def rows(self, limits: Mapping[str, float], waiting_w: float) -> tuple[Floats, Floats]:
        """Limits as weights of the columns, `[limits, columns]`, and what these sums may come to, `[limits]`.

        Args:
            limits: as `Constraints.limits` has them; what is required comes after them.
        """
        weights = [self._row(name, most, waiting_w) for name, most in limits.items()]
        rows = [self.prices.row(row) for row, _ in weights]
        rows += [self.prices.row({f"required {name}": 1.0}) for name in self.constraints.required]
        most = [most for _, most in weights] + [-1.0] * len(self.constraints.required)
        return np.array(rows).reshape(-1, len(self.prices.columns)), np.array(most)

    def _row(self, name: str, most: float, waiting_w: float) -> tuple[dict[str, float], float]:
        if name == "max_watts":
            energy = self.prices.energy(waiting_w)
            return {column: weight - most * (column in TIMES) for column, weight in energy.items()}, 0.0
        if name == "max_memory_bytes":
            return self.prices.memory(), most
        if name == "max_error":
            return {"error": 1.0}, most**2
        if name == "max_ttft_us":
            return {"prefill_us": 1.0}, most
        if name == "max_tpot_us":
            return {"decode_us": 1.0}, most * max(1, len(self.prices.load.steps))
        return {f"memory {name.split()[1]}": 1.0}, most

    def reached(self, plan: Plan, prediction: Prediction) -> dict[str, float]:
        """What a plan comes to, by the names of limits; without what does not apply to it."""
        memory = prediction.memory_bytes
        found: dict[str, float | None] = {
            "max_ttft_us": prediction.prefill_us,
            "max_tpot_us": prediction.tpot_us,
            "max_watts": prediction.watts,
            "max_memory_bytes": sum(memory.values()),
            **{f"max_device_memory_bytes {device}": size for device, size in memory.items()},
        }
        if self.constraints.max_error is not None and set(plan.configs) <= set(self.prices.configs):
            columns = self.prices.chain.totals(self.prices.path(plan))
            found["max_error"] = math.sqrt(columns[self.prices.columns.index("error")])
        return {name: value for name, value in found.items() if value is not None}

    def beyond(self, reached: Mapping[str, float]) -> tuple[str, ...]:
        """The limits that are passed, a phrase each."""
        return tuple(
            f"{name} is {most:.6g}, it reaches {reached[name]:.6g}"
            for name, most in self.constraints.limits.items()
            if reached.get(name, 0.0) > most * (1 + SLACK)
        )

    def barred(self, plan: Plan) -> tuple[str, ...]:
        """The devices that it uses and must not, or the other way round, a phrase each."""
        # A lookup of embeddings alone is no use of a device.
        placements = [p for ps in plan.phases.values() for p in ps if p.last or not self.prices.embeds]
        used = dict.fromkeys(p.config for p in placements)
        wrong = [f"{name} is forbidden" for name in self.constraints.forbidden if any(matches(name, c) for c in used)]
        wrong += [f"{n} is required" for n in self.constraints.required if not any(matches(n, c) for c in used)]
        return tuple(wrong)
