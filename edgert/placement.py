"""A plan: which block runs on which device configuration. Data only; `explain()` says it in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.device import DeviceConfig
from edgert.errors import PlanError
from edgert.fields import build
from edgert.graph import BlockGraph, BlockKind


@dataclass(frozen=True)
class Placement:
    """Blocks `first` to `last` (both included) run on `config` as one submodel."""

    first: int
    last: int
    config: DeviceConfig


@dataclass(frozen=True)
class Plan:
    """Where each block of a model runs.

    Attributes:
        placements: in order, without gap or overlap; neighbours differ in their configuration unless the plan was
            made to cut there.
        rationale: one line that says where the plan comes from.
        warnings: what the reader must know, e.g. a device that was asked for and is not used.
    """

    placements: tuple[Placement, ...]
    rationale: str
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_configs(cls, configs: list[DeviceConfig], rationale: str, *, merge: bool = True) -> Plan:
        """A plan from one configuration a block; `merge=False` keeps a cut at every boundary."""
        placements: list[Placement] = []
        for index, config in enumerate(configs):
            if merge and placements and placements[-1].config == config:
                placements[-1] = Placement(placements[-1].first, index, config)
            else:
                placements.append(Placement(index, index, config))
        return cls(tuple(placements), rationale)

    @classmethod
    def single(cls, graph: BlockGraph, config: DeviceConfig) -> Plan:
        """Everything on one device configuration: the uncut model."""
        return cls.from_configs([config] * len(graph.blocks), f"single device {config}")

    @classmethod
    def explicit(cls, graph: BlockGraph, rules: str) -> Plan:
        """A plan from rules such as `attention=CPU@bf16,ffn=CPU@f32,3-5=GPU`.

        Left of `=` stands a block kind, a block name (`ffn.2`), an index, a range of indices, or `*`. Later rules win.
        A block that no rule names runs where the block before it runs, or, at the start, where the next one does.

        Raises:
            PlanError: a rule cannot be read or names no block of the graph.
            UnknownDeviceError: a configuration is not of the form DEVICE@VARIANT.
        """
        configs: list[DeviceConfig | None] = [None] * len(graph.blocks)
        for rule in (part.strip() for part in rules.split(",") if part.strip()):
            selector, equals, target = (piece.strip() for piece in rule.partition("="))
            if not equals or not selector or not target:
                raise PlanError(f"placement rule {rule!r}: expected SELECTOR=DEVICE@VARIANT")
            config = DeviceConfig.parse(target)
            chosen = _select(graph, selector)
            if not chosen:
                names = ", ".join(dict.fromkeys(str(b.kind) for b in graph.blocks))
                raise PlanError(
                    f"placement rule {rule!r} matches no block; the model has {len(graph.blocks)} of kinds {names}"
                )
            for index in chosen:
                configs[index] = config
        first = next((c for c in configs if c is not None), None)
        if first is None:
            raise PlanError("placement: no rule given")
        filled: list[DeviceConfig] = []
        for given in configs:
            filled.append(given or (filled[-1] if filled else first))
        return cls.from_configs(filled, f"explicit placement {rules}")

    def check(self, graph: BlockGraph) -> None:
        """Raise `PlanError` unless the placements cover the graph's blocks once each, in order."""
        expected = 0
        for p in self.placements:
            if p.first != expected or p.last < p.first:
                raise PlanError(f"plan: placement of blocks {p.first}-{p.last} where block {expected} was due")
            expected = p.last + 1
        if expected != len(graph.blocks):
            raise PlanError(f"plan: covers {expected} blocks, the model has {len(graph.blocks)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "placements": [{"first": p.first, "last": p.last, "config": str(p.config)} for p in self.placements],
            "rationale": self.rationale,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`.

        Raises:
            PlanError: a field is missing, unknown or of the wrong kind.
            UnknownDeviceError: a configuration is not of the form DEVICE@VARIANT.
        """
        try:
            file = build(_File, data, "plan")
        except (ValueError, RecursionError) as error:
            raise PlanError(str(error)) from error
        placements = tuple(Placement(r.first, r.last, DeviceConfig.parse(r.config)) for r in file.placements)
        return cls(placements, file.rationale, file.warnings)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan from a JSON file; raises `PlanError` where it is missing or no plan."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {path}: {error}") from error
        return cls.from_json(data)

    def explain(self) -> str:
        """The plan in words, one line a submodel."""
        lines = [self.rationale]
        for p in self.placements:
            blocks = f"block {p.first}" if p.first == p.last else f"blocks {p.first}-{p.last}"
            lines.append(f"  {blocks} on {p.config}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    first: int
    last: int
    config: str


@dataclass(frozen=True)
class _File:
    """`Plan.to_json`, as it stands in a file."""

    placements: tuple[_Row, ...]
    rationale: str
    warnings: tuple[str, ...] = ()


def _select(graph: BlockGraph, selector: str) -> list[int]:
    if selector == "*":
        return [b.index for b in graph.blocks]
    if selector in {str(kind) for kind in BlockKind}:
        return [b.index for b in graph.blocks if b.kind == selector]
    if match := re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", selector):
        first, last = int(match[1]), int(match[2] or match[1])
        return list(range(first, last + 1)) if last < len(graph.blocks) else []
    return [b.index for b in graph.blocks if b.name == selector]
