"""The weight matrices of a model whose precision can be chosen, by the blocks that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import openvino as ov
from edgert.converters.compress import WeightUse, joint_role, weight_uses

from edgert.graph import BlockGraph


@dataclass(frozen=True)
class Matrix:
    """A weight of the f16 model.

    Attributes:
        name: the block that reads it first and the operation there, e.g. `ffn.3/linear_12`; unique.
        constant: friendly name of the constant, in the model and in every submodel of it.
        role: `embedding`, `head`, `embedding+head` (tied) or `linear`.
        blocks: indices of the blocks that read it, in order.
        shape: `[out, in]`, of experts `[experts, out, in]`.
    """

    name: str
    constant: str
    role: str
    blocks: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


def find_matrices(graph: BlockGraph, submodels: Sequence[ov.Model]) -> list[Matrix]:
    """The matrices of a model, in the order in which they are read; `submodels` are one for each block."""
    places: dict[str, list[tuple[int, WeightUse]]] = {}
    for block, submodel in enumerate(submodels):
        for use in weight_uses(submodel):
            places.setdefault(use.constants[0].get_friendly_name(), []).append((block, use))
    found = []
    for constant, where in places.items():
        first, use = where[0]
        operation = str(use.node.get_friendly_name()).partition("/")[0]  # without what a frontend appends
        found.append(
            Matrix(
                name=f"{graph.blocks[first].name}/{operation}",
                constant=constant,
                role=joint_role({use.role for _, use in where}),
                blocks=tuple(dict.fromkeys(block for block, _ in where)),
                shape=tuple(use.constants[0].get_output_shape(0)),
            )
        )
    return found
