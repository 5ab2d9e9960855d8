"""The weight matrices of a model whose precision can be chosen, by the blocks that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import openvino as ov
from edgert.converters.compress import WeightUse, joint_role, weight_uses

from edgert.errors import ConversionError
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
        reads: the tensor that it is multiplied with, by block, node and port; None where that is no product's.
    """

    name: str
    constant: str
    role: str
    blocks: tuple[int, ...]
    shape: tuple[int, ...]
    reads: str | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)


def choosable(submodel: ov.Model) -> list[WeightUse]:
    """Where a submodel reads matrices whose precision can be chosen: all but routers, which stay at f16."""
    return [use for use in weight_uses(submodel) if use.role != "router"]


def find_matrices(graph: BlockGraph, submodels: Sequence[ov.Model]) -> list[Matrix]:
    """The matrices of a model but for routers, in the order in which they are read; `submodels` are one for each block.

    Raises:
        ConversionError: a weight is no plain constant.
    """
    places: dict[str, list[tuple[int, WeightUse]]] = {}
    for block, submodel in enumerate(submodels):
        for use in choosable(submodel):
            if len(use.constants) > 1:
                name = use.node.get_friendly_name()
                raise ConversionError(f"{name}: its weight is computed of {len(use.constants)} constants, expected one")
            places.setdefault(use.constants[0].get_friendly_name(), []).append((block, use))
    names = [f"{graph.blocks[block].name}/{_operation(use)}" for (block, use), *_ in places.values()]
    brief = ["/".join(name.split("/")[:2]) for name in names]  # without what a frontend appends
    count, found = Counter(brief), []
    for (constant, where), name, short in zip(places.items(), names, brief, strict=True):
        first, use = where[0]
        found.append(
            Matrix(
                name=short if count[short] == 1 else name,
                constant=constant,
                role=joint_role({use.role for _, use in where}),
                blocks=tuple(dict.fromkeys(block for block, _ in where)),
                shape=tuple(use.constants[0].get_output_shape(0)),
                reads=_other_side(first, use) if len(where) == 1 and use.role != "embedding" else None,
            )
        )
    return found


def _operation(use: WeightUse) -> str:
    return str(use.node.get_friendly_name()).lstrip("/")


def _other_side(block: int, use: WeightUse) -> str:
    source = use.node.input(1 - use.port.get_index()).get_source_output()
    return f"{block}:{source.get_node().get_friendly_name()}:{source.get_index()}"
