"""A model's matrices, the formats that each may take, and what a choice for all of them makes of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from edgert.errors import PlanError, UsageError
from edgert.graph import BlockGraph
from edgert.precision.formats import Format

ROLES = ("embedding", "head", "embedding+head", "linear")
Mix = dict[str, Format]
"""The format of each layer, by its name."""


@dataclass(frozen=True)
class Option:
    """A format that a layer may take.

    Attributes:
        format: it.
        loss: by how much the model's loss is predicted to rise by this choice alone, nats a token; 0 or more.
    """

    format: Format
    loss: float


@dataclass(frozen=True)
class Layer:
    """A matrix whose format is to be chosen.

    Attributes:
        name: of the weight's constant; unique in its model.
        role: `embedding`, `head`, `embedding+head` (a tied table) or `linear`.
        blocks: the blocks that read it, ascending; two for a tied table.
        shape: `[out, in]`, of experts `[n, out, in]`.
        options: each fits the shape, the most exact one first; no format twice.

    Raises:
        UsageError: one of these is not so.
    """

    name: str
    role: str
    blocks: tuple[int, ...]
    shape: tuple[int, ...]
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"layer {self.name}: role is {self.role[:40]!r}, expected one of {', '.join(ROLES)}")
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise UsageError(f"layer {self.name}: blocks are {list(self.blocks)}, expected ascending numbers from 0")
        if not self.options or len(self.formats) < len(self.options):
            raise UsageError(f"layer {self.name}: {len(self.options)} options, expected one or more, no format twice")
        for option in self.options:
            if not option.format.fits(self.shape):
                raise UsageError(f"layer {self.name}: {option.format.name} does not fit its shape {list(self.shape)}")
            if not (math.isfinite(option.loss) and option.loss >= 0):
                raise UsageError(
                    f"layer {self.name}: the loss of {option.format.name} is {option.loss}, expected 0 or more"
                )

    @cached_property
    def formats(self) -> dict[Format, Option]:
        """Its options by format."""
        return {option.format: option for option in self.options}

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def recipe_only(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The same layers with those formats only that suit an NPU; `UsageError` where one has none."""
    return tuple(replace(layer, options=tuple(o for o in layer.options if o.format.npu)) for layer in layers)


def mix_loss(layers: Sequence[Layer], mix: Mapping[str, Format]) -> float:
    """The sum of the predicted losses, nats a token."""
    return math.fsum(layer.formats[mix[layer.name]].loss for layer in layers)


def mix_bytes(layers: Sequence[Layer], mix: Mapping[str, Format]) -> int:
    """Bytes of all layers, a tied table once."""
    return sum(mix[layer.name].total_bytes(layer.shape) for layer in layers)


def bits_per_weight(layers: Sequence[Layer], mix: Mapping[str, Format]) -> float:
    """The mean over all weights, scales and zero points included, a tied table once; 0 for no layers."""
    return 8 * mix_bytes(layers, mix) / max(1, sum(layer.elements for layer in layers))


def graph_with(graph: BlockGraph, layers: Sequence[Layer], mix: Mapping[str, Format]) -> BlockGraph:
    """A model's blocks as they are with a mix: the same, but for `weight_bytes`.

    Args:
        graph: of the model with all these layers in f16.

    Raises:
        PlanError: the graph has no such block, or a block has fewer f16 weights than its layers.
    """
    held = [dict(block.weight_bytes) for block in graph.blocks]
    for layer in layers:
        for index in layer.blocks:
            if index >= len(held) or held[index].get("f16", 0) < 2 * layer.elements:
                raise PlanError(f"layer {layer.name}: block {index} of the graph does not hold it in f16")
            held[index]["f16"] -= 2 * layer.elements
    for layer in layers:
        for kind, size in mix[layer.name].weight_bytes(layer.shape).items():
            for index in layer.blocks:
                held[index][kind] = held[index].get(kind, 0) + size
    sizes = [{kind: size for kind, size in one.items() if size} for one in held]
    blocks = (replace(block, weight_bytes=own) for block, own in zip(graph.blocks, sizes, strict=True))
    return replace(graph, blocks=tuple(blocks))
