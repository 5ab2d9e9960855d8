"""What is asked of the solver, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from edgert.cost import Workload
from edgert.device import DeviceConfig
from edgert.errors import PlanError, UsageError
from edgert.graph import BlockGraph
from edgert.placement import Plan
from edgert.precision.formats import Format
from edgert.precision.hull import Floats, Indices
from edgert.precision.layers import Layer, Mix
from edgert.prediction import Prediction
from edgert.profile import Profile
from edgert.scheduler import Constraints, Objective
from edgert.shapes import StaticShapes

Unit = Literal["bytes", "us", "uJ"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A model whose layers want formats, and the machine that it is for.

    Attributes:
        layers: names differ; no layer is of a block that `graph` has not.
        graph: the model's blocks with all these layers in f16.
        profile: of the machine; None where nothing is known but bytes.
        objective: what is minimised, as `edgert.scheduler.Schedule.objective` says; counts with a profile only.
        constraints: that a plan has to keep; not `max_error`, as nobody has measured the errors of blocks to be.
        load: prompt and continuation that times are for.
        shapes: that devices with static shapes pad to; None where padding is not reckoned.
        configs: the configurations that may run blocks; None for all that the profile knows. The lookup of embeddings
            may stay on the CPU.

    Raises:
        UsageError, PlanError: one of these is not so.
    """

    layers: tuple[Layer, ...]
    graph: BlockGraph
    profile: Profile | None = None
    objective: Objective = "tokens_per_joule"
    constraints: Constraints = field(default_factory=Constraints)
    load: Workload = field(default_factory=Workload)
    shapes: StaticShapes | None = None
    configs: tuple[DeviceConfig, ...] | None = None

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"layers: {len(twice)} names are there twice, the first is {twice[0]}")
        for layer in self.layers:
            if layer.blocks[-1] >= len(self.graph.blocks):
                raise PlanError(
                    f"layer {layer.name}: it is of block {layer.blocks[-1]}, the graph has {len(self.graph.blocks)}"
                )
        if self.profile is None and self.configs is not None:
            raise UsageError("configs are given without a profile, which would say what they take")
        if self.profile is not None and self.constraints.max_error is not None:
            raise UsageError(
                f"max_error is {self.constraints.max_error}: it cannot be kept while formats are chosen, as errors are "
                f"measured of blocks as they are"
            )

    @property
    def unit(self) -> Unit:
        """Of `Solution.value`."""
        if self.profile is None:
            return "bytes"
        return "uJ" if self.objective == "tokens_per_joule" else "us"

    @cached_property
    def losses(self) -> Floats:
        """Of each layer's options, shape `[layers, options]`; 0 where there is none."""
        return self._padded([[option.loss for option in layer.options] for layer in self.layers], 0.0)

    @cached_property
    def bytes(self) -> Floats:
        """Of each layer in its options, shape `[layers, options]`; inf where there is none."""
        return self._padded(
            [[option.format.total_bytes(layer.shape) for option in layer.options] for layer in self.layers], np.inf
        )

    def _padded(self, rows: Sequence[Sequence[float]], filler: float) -> Floats:
        width = max((len(row) for row in rows), default=1)
        return np.array([[*row, *[filler] * (width - len(row))] for row in rows], np.float64).reshape(-1, width)

    def mix(self, choice: Indices) -> Mix:
        """The formats of an option for each layer."""
        return {layer.name: layer.options[k].format for layer, k in zip(self.layers, choice, strict=True)}

    def uniform(self, kind: Format) -> Indices:
        """The option of each layer that is this format; where a layer has not, one with about as many bits."""
        return np.array([_nearest(layer, kind) for layer in self.layers], np.intp)


def _nearest(layer: Layer, kind: Format) -> int:
    if kind in layer.formats:
        return [option.format for option in layer.options].index(kind)
    bits = [8 * option.format.total_bytes(layer.shape) / layer.elements for option in layer.options]
    return min(range(len(bits)), key=lambda k: abs(bits[k] - kind.bits))


@dataclass(frozen=True, eq=False)
class Solution:
    """A format for every layer, and with a profile a plan.

    Attributes:
        mix: format of each layer.
        loss: the sum of the predicted losses, nats a token.
        bytes: of all layers, a tied table once.
        value: what is minimised: the bytes, or what `edgert.scheduler.Schedule.value` is of the plan.
        unit: of the value.
        plan: where the blocks run; None without a profile.
        prediction: what the plan takes with this mix; None without a profile.
        recipe: the layers of blocks that the plan has on an NPU, whose formats had to suit it.
    """

    mix: Mix
    loss: float
    bytes: int
    value: float
    unit: Unit
    plan: Plan | None = None
    prediction: Prediction | None = None
    recipe: tuple[str, ...] = ()
