"""A plan: which block runs on which device configuration. Data only; `explain()` says it in words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import PlanError
from edgert.fields import build
from edgert.graph import Block, BlockGraph, BlockKind

PHASES = ("prefill", "decode")
# Where the lookup of embeddings, masks and RoPE tables are computed for other devices.
HOST = DeviceConfig("CPU", "f32")


@dataclass(frozen=True)
class Placement:
    """Blocks `first` to `last` (both included) run on `config` as one submodel."""

    first: int
    last: int
    config: DeviceConfig


@dataclass(frozen=True)
class WeightCopy:
    """Weights that one device configuration holds.

    Attributes:
        config: the configuration.
        bytes: of the blocks it runs, once.
        count: how many times it holds them: static shapes for prefill and for decode hold them once each.
    """

    config: DeviceConfig
    bytes: int
    count: int


@dataclass(frozen=True)
class Plan:
    """Where each block of a model runs.

    Attributes:
        placements: in order, without gap or overlap; neighbours differ in their configuration unless the plan was
            made to cut there.
        rationale: one line that says where the plan comes from.
        warnings: what the reader must know, e.g. a device that was asked for and is not used.
        decode: placements for single tokens, if they differ from those for a prompt; keys and values then change
            hands in between. None where `placements` serve both phases.
        towers: the configuration of each tower that has one of its own, by name; see `tower`.
    """

    placements: tuple[Placement, ...]
    rationale: str
    warnings: tuple[str, ...] = ()
    decode: tuple[Placement, ...] | None = None
    towers: Mapping[str, DeviceConfig] = field(default_factory=dict, hash=False)

    @property
    def phases(self) -> dict[str, tuple[Placement, ...]]:
        """Placements by phase: `prefill` and `decode`, or one entry where both are the same."""
        if self.decode is None:
            return {"prefill and decode": self.placements}
        return {"prefill": self.placements, "decode": self.decode}

    def tower(self, name: str) -> DeviceConfig:
        """Where a tower runs: the first configuration of the CPU that a prompt runs on where nothing is said.

        Towers are no part of `configs`: they keep no states, and are compiled when the first image or sound comes.
        """
        if name in self.towers:
            return self.towers[name]
        cpus = (p.config for p in self.placements if p.config.kind is DeviceKind.CPU)
        return tower_config(next(cpus, DeviceConfig.parse(DeviceKind.CPU)))

    @property
    def configs(self) -> tuple[DeviceConfig, ...]:
        """Every configuration that the plan's blocks use, once, in order."""
        return tuple(dict.fromkeys(p.config for placements in self.phases.values() for p in placements))

    @classmethod
    def from_configs(
        cls,
        configs: Sequence[DeviceConfig],
        rationale: str,
        *,
        decode: Sequence[DeviceConfig] | None = None,
        merge: bool = True,
    ) -> Plan:
        """A plan from one configuration a block, and another one for decode where that differs.

        `merge=False` keeps a cut at every boundary.
        """
        same = decode is None or list(decode) == list(configs)
        return cls(_merge(configs, merge), rationale, decode=None if same else _merge(decode or (), merge))

    @classmethod
    def single(cls, graph: BlockGraph, config: DeviceConfig) -> Plan:
        """Everything on one device configuration: the uncut model.

        On a GPU or NPU, and with static shapes, the lookup of embeddings stays on the CPU: it reads one row a token.
        """
        config = _suited(graph, config)
        configs, rationale = [config] * len(graph.blocks), f"single device {config}"
        if own_blocks(graph, config) != graph.blocks:
            configs[0], rationale = HOST, f"{rationale}, embedding on {HOST}"
        plan = cls.from_configs(configs, rationale)
        if config.kind in {DeviceKind.CPU, DeviceKind.NPU}:  # an NPU's compiler may take minutes: only if it is asked
            return plan
        return replace(plan, towers={tower.name: tower_config(config) for tower in graph.towers})

    @classmethod
    def explicit(cls, graph: BlockGraph, rules: str) -> Plan:
        """A plan from rules such as `attention=CPU@bf16,ffn=CPU@f32,3-5=GPU` or `prefill:*=GPU,decode:*=CPU`.

        Left of `=` stands a block kind, a block name (`ffn.2`), an index, a range of indices, or `*`, after `prefill:`
        or `decode:` where the rule is for one phase only. Later rules win. A block that no rule names runs where the
        block before it runs, or, at the start, where the next one does. The names of towers (`vision=NPU`) are no
        blocks of the chain, and have no phases.

        Raises:
            PlanError: a rule cannot be read or names no block of the graph, or no rule says where a phase runs.
            UnknownDeviceError: a configuration is not of the form DEVICE@VARIANT.
        """
        chosen: dict[str, list[DeviceConfig | None]] = {phase: [None] * len(graph.blocks) for phase in PHASES}
        towers: dict[str, DeviceConfig] = {}
        for rule in (part.strip() for part in rules.split(",") if part.strip()):
            left, equals, target = (piece.strip() for piece in rule.partition("="))
            phase, colon, selector = left.partition(":") if ":" in left else ("", "", left)
            if not equals or not selector or not target or (colon and phase not in PHASES):
                raise PlanError(f"placement rule {rule!r}: expected [prefill:|decode:]SELECTOR=DEVICE@VARIANT")
            if named := [t.name for t in graph.towers if selector in {t.name, str(t.kind)}]:
                if colon:
                    raise PlanError(f"placement rule {rule!r}: a tower runs before both phases, give no {phase}:")
                towers |= dict.fromkeys(named, tower_config(DeviceConfig.parse(target)))
                continue
            config = _suited(graph, DeviceConfig.parse(target))
            blocks = graph.select(selector)
            if not blocks:
                names = ", ".join(dict.fromkeys(str(b.kind) for b in graph.blocks))
                beside = f", and towers {', '.join(t.name for t in graph.towers)}" if graph.towers else ""
                raise PlanError(
                    f"placement rule {rule!r} matches no block; the model has {len(graph.blocks)} of kinds {names}"
                    f"{beside}"
                )
            for name in [phase] if colon else PHASES:
                for index in blocks:
                    chosen[name][index] = config
        plan = cls.from_configs(
            _fill(chosen["prefill"], "prefill"),
            f"explicit placement {rules}",
            decode=_fill(chosen["decode"], "decode"),
        )
        return replace(plan, towers=towers).with_host(graph)

    def replaced(self, unit: str, config: DeviceConfig, reason: str) -> Plan:
        """This plan with all that runs on some hardware moved to another configuration.

        Args:
            unit: the hardware (`DeviceConfig.unit`), or one configuration of it by its name.
        """

        def move(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
            configs = [
                config if unit in {p.config.unit, str(p.config)} else p.config
                for p in placements
                for _ in range(p.first, p.last + 1)
            ]
            return _merge(configs, True)

        decode = None if self.decode is None else move(self.decode)
        placements = move(self.placements)
        return replace(
            self,
            placements=placements,
            decode=None if decode == placements else decode,
            warnings=(*self.warnings, reason),
            towers={
                name: tower_config(config) if unit in {own.unit, str(own)} else own for name, own in self.towers.items()
            },
        )

    def with_host(self, graph: BlockGraph) -> Plan:
        """The plan with the embedding on the CPU wherever it was to have static shapes, which take no token ids."""
        if not graph.has_embedding:
            return self
        wrong = next((ps[0].config for ps in self.phases.values() if ps[0].config.static), None)
        if wrong is None:
            return self

        def move(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
            first, *rest = placements
            if not first.config.static:
                return placements
            kept = [replace(first, first=1)] if first.last else []
            return (Placement(0, 0, HOST), *kept, *rest)

        warning = f"block 0 (embed) runs on {HOST}: static shapes ({wrong}) take no token ids"
        decode = None if self.decode is None else move(self.decode)
        return replace(self, placements=move(self.placements), decode=decode, warnings=(*self.warnings, warning))

    def submodels(self, graph: BlockGraph, npu_starts: Collection[int] = ()) -> list[tuple[Placement, ...]]:
        """The submodels of each phase: the placements, cut further where that saves memory or work.

        Where a configuration has other limits in the other phase, both phases are cut there, so that they can share
        what was compiled and hold the weights once. With static shapes the head is a submodel of its own, as it takes
        one row where the others take a whole chunk. On an NPU a placement is cut where compiled submodels begin.

        Args:
            npu_starts: blocks at which they do.
        """
        starts: dict[DeviceConfig, set[int]] = {}
        for placements in self.phases.values():
            for p in placements:
                starts.setdefault(p.config, set()).update((p.first, p.last + 1))
        found = []
        for placements in self.phases.values():
            pieces: list[Placement] = []
            for p in placements:
                inside = {s for s in starts[p.config] if p.first < s <= p.last}
                if p.config.static and graph.blocks[p.last].kind is BlockKind.HEAD and p.first < p.last:
                    inside.add(p.last)
                if p.config.kind is DeviceKind.NPU:
                    inside |= {s for s in npu_starts if p.first < s <= p.last}
                edges = [p.first, *sorted(inside), p.last + 1]
                pieces += [replace(p, first=a, last=b - 1) for a, b in pairwise(edges)]
            found.append(tuple(pieces))
        return found

    def weights(self, graph: BlockGraph) -> list[WeightCopy]:
        """The weights that each configuration holds, at the precision in the file.

        More than the model's own bytes in all means that some are in memory more than once: other devices and other
        configurations lay them out in other ways.
        """
        pieces: dict[Placement, int] = {}  # how often they are compiled with static shapes
        for placements in self.submodels(graph):
            for p in placements:
                pieces[p] = pieces.get(p, 0) + (2 if self.decode is None else 1)
        held: dict[tuple[DeviceConfig, int], int] = {}
        for p, times in pieces.items():
            key = p.config, times if p.config.static else 1
            size = sum(block.total_weight_bytes for block in graph.blocks[p.first : p.last + 1])
            held[key] = held.get(key, 0) + size
        return [WeightCopy(config, size, count) for (config, count), size in held.items()]

    def check(self, graph: BlockGraph) -> None:
        """Raise `PlanError` unless the placements cover the graph's blocks once each, in order, in every phase."""
        for placements in self.phases.values():
            expected = 0
            for p in placements:
                if p.first != expected or p.last < p.first:
                    raise PlanError(f"plan: placement of blocks {p.first}-{p.last} where block {expected} was due")
                expected = p.last + 1
            if expected != len(graph.blocks):
                raise PlanError(f"plan: covers {expected} blocks, the model has {len(graph.blocks)}")
            if placements[0].config.static:
                raise PlanError(
                    f"plan: {graph.blocks[0].name} is on {placements[0].config}, whose static shapes take no token "
                    f"ids; place it on {HOST}" + (f" ({graph.reason})" if graph.reason else "")
                )
        if unknown := sorted(set(self.towers) - {tower.name for tower in graph.towers}):
            known = ", ".join(tower.name for tower in graph.towers) or "none"
            raise PlanError(f"plan: places a tower {unknown[0]!r}, the model has {known}")
        static = next((config for config in self.configs if config.static), None)
        for p in (p for placements in self.phases.values() for p in placements if p.config.kind is DeviceKind.NPU):
            blocks = graph.blocks[p.first : p.last + 1]
            recurrent = next((block.name for block in blocks if block.recurrent_bytes), None)
            if recurrent is not None:
                raise PlanError(f"plan: {p.config} takes no block with a recurrent state, {recurrent} has one")
        if static is not None and not graph.keeps_cache:
            raise PlanError(f"plan: static shapes ({static}) are for decoders; this model keeps no keys and values")

    def to_json(self) -> dict[str, Any]:
        data = {
            "placements": _rows(self.placements),
            "decode": None if self.decode is None else _rows(self.decode),
            "rationale": self.rationale,
            "warnings": list(self.warnings),
        }
        towers = {name: str(config) for name, config in self.towers.items()}
        return {**data, "towers": towers} if towers else data

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
        decode = None if file.decode is None else _placements(file.decode)
        towers = {name: DeviceConfig.parse(config) for name, config in file.towers.items()}
        return cls(_placements(file.placements), file.rationale, file.warnings, decode, towers)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan from a JSON file; raises `PlanError` where it is missing or no plan."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {path}: {error}") from error
        return cls.from_json(data)

    def explain(self, graph: BlockGraph | None = None) -> str:
        """The plan in words, one line a submodel; with the model's graph also what its weights take."""
        lines = [self.rationale]
        for phase, placements in self.phases.items():
            if self.decode is not None:
                lines.append(f"{phase}:")
            for p in placements:
                blocks = f"block {p.first}" if p.first == p.last else f"blocks {p.first}-{p.last}"
                lines.append(f"  {blocks} on {p.config}")
        names = self.towers if graph is None else (tower.name for tower in graph.towers)
        lines += [f"  tower {name} on {self.tower(name)}" for name in names]
        if graph is not None:
            self.check(graph)
            lines.append(self.explain_weights(graph))
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def explain_weights(self, graph: BlockGraph) -> str:
        """What the weights take on each configuration, and how much of it is there more than once, in one line."""
        held = self.weights(graph)
        own = sum(block.total_weight_bytes for block in graph.blocks)
        total = sum(copy.bytes * copy.count for copy in held)
        parts = [
            f"{copy.bytes / 1e6:.1f} MB on {copy.config}" + (f" x {copy.count} shapes" if copy.count > 1 else "")
            for copy in held
        ]
        again = f"; {(total - own) / 1e6:.1f} MB of it are copies" if total > own else ""
        return f"weights: {', '.join(parts)}{again}"


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
    decode: tuple[_Row, ...] | None = None
    towers: dict[str, str] = field(default_factory=dict)


def _rows(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    return [{"first": p.first, "last": p.last, "config": str(p.config)} for p in placements]


def _placements(rows: Sequence[_Row]) -> tuple[Placement, ...]:
    return tuple(Placement(r.first, r.last, DeviceConfig.parse(r.config)) for r in rows)


def _merge(configs: Sequence[DeviceConfig], merge: bool) -> tuple[Placement, ...]:
    placements: list[Placement] = []
    for index, config in enumerate(configs):
        if merge and placements and placements[-1].config == config:
            placements[-1] = Placement(placements[-1].first, index, config)
        else:
            placements.append(Placement(index, index, config))
    return tuple(placements)


def _fill(configs: Sequence[DeviceConfig | None], phase: str) -> list[DeviceConfig]:
    """Blocks that no rule names take the configuration of the block before, or of the first that has one."""
    first = next((c for c in configs if c is not None), None)
    if first is None:
        raise PlanError(f"placement: no rule says where {phase} runs; *=CPU would")
    filled: list[DeviceConfig] = []
    for given in configs:
        filled.append(given or (filled[-1] if filled else first))
    return filled


def _suited(graph: BlockGraph, config: DeviceConfig) -> DeviceConfig:
    """On a GPU, static shapes are a form of cache: a model without one, or in one piece, runs there as it is."""
    if config.kind is DeviceKind.GPU and config.static and not (graph.has_embedding and graph.keeps_cache):
        return replace(config, variant=config.variant.removesuffix("+static"))
    return config


def tower_config(config: DeviceConfig) -> DeviceConfig:
    """The configuration for a tower, whose shapes are static as they are, and which edgert's kernels are not for."""
    if config.kernels:
        return DeviceConfig.parse(DeviceKind.CPU)
    if config.kind is DeviceKind.GPU:
        return replace(config, variant=config.variant.removesuffix("+static"))
    return config


def own_blocks(graph: BlockGraph, config: DeviceConfig) -> tuple[Block, ...]:
    """The blocks that run on a configuration where the plan is `Plan.single`: all, or all but the embedding."""
    hosted = (config.static or config.kind is DeviceKind.GPU) and graph.has_embedding
    return graph.blocks[1:] if hosted else graph.blocks
