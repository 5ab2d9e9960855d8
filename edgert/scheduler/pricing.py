"""What plans take, as arrays: the costs of a graph's blocks on every configuration as a `labels.Chain`.

The numbers are those that `edgert.prediction.predict` adds up, so that the sum along a path is what it predicts, if the
devices take turns. Where a prefill keeps several devices busy at the same time, a chain knows nothing of it.

What waiting devices draw depends on which devices a plan uses at all. So a plan is priced among a set of pieces of
hardware that are all taken to be used: the cheapest over all sets is exact, as the set of those it uses is one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations

import numpy as np

from edgert.cost import Costs, Workload, handover_us
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import PlanError
from edgert.graph import BlockGraph, BlockKind
from edgert.placement import HOST, Plan
from edgert.scheduler.labels import Chain, Flags, Floats, Indices

TIMES = ("prefill_us", "handover_us", "decode_us")
MOST_IDLING = 4  # so many units that draw power while they wait make 16 sets; beyond, their waiting is left out


def hindrance(graph: BlockGraph, config: DeviceConfig) -> str | None:
    """Why a configuration cannot run a model's blocks; None where it can."""
    if config.static and any(block.recurrent_bytes for block in graph.blocks):
        return "static shapes pad a prompt, which would change a recurrent state"
    if config.static and not any(block.states for block in graph.blocks):
        return "static shapes are for decoders; this model keeps no keys and values"
    if config.static and len(graph.blocks) == 1:
        return "static shapes take no token ids, and this model is in one piece"
    if config.kind is DeviceKind.ORT and len(graph.blocks) > 1:
        return "onnxruntime runs whole models"
    return None


def matches(name: str, config: DeviceConfig) -> bool:
    """Whether `GPU`, `GPU.1`, `GPU@f16` or `sim:NAME` is, or includes, a configuration."""
    name = str(DeviceConfig.parse(name)) if ":" in name else name
    return name == str(config) or name.removesuffix(".0") == config.device.removesuffix(".0")


class Prices:
    """The costs of a graph as arrays.

    Args:
        forbidden: names of devices or configurations that are left out. The lookup of embeddings may stay on the CPU.
        required: names for each of which there is a column.
        errors: whether there is a column with the errors of blocks.

    Attributes:
        configs: those that may be used, by name.
        columns: what the chain's columns are.
        chain: the arrays.
        missing: what is not known of the energy, as `CONFIGURATION: field`.
        exact: whether the waiting of devices is in the energy.
        embeds: whether the first block is a lookup of embeddings, which may run where no other block does.
        pairs: whether a block may run somewhere else in decode than in prefill.

    Raises:
        PlanError: no configuration can run the model, or the error of a block is not known.
    """

    def __init__(
        self, costs: Costs, load: Workload, *, forbidden: Sequence[str] = (), required: Sequence[str] = (),
        errors: bool = False,
    ) -> None:  # fmt: skip
        self.costs, self.load = costs, load
        graph, profile = costs.graph, costs.profile
        able = [config for config in profile.configs if hindrance(graph, config) is None]
        found = [config for config in able if not any(matches(name, config) for name in forbidden)]
        self.embeds = len(graph.blocks) > 1 and graph.blocks[0].kind is BlockKind.EMBED
        cpu = any(config.kind is DeviceKind.CPU for config in profile.configs)
        # One submodel is not taken to run in two places; and without a second token no decode could differ.
        self.pairs = len(graph.blocks) > 1 and load.new_tokens > 1
        self._blocks_on = set(found)  # HOST may be for the lookup alone
        self.configs = tuple(sorted({*found, *([HOST] if self.embeds and cpu else [])}, key=str))
        if not found:
            known = ", ".join(map(str, profile.configs)) or "no configuration"
            raise PlanError(f"profile {profile.machine}: it knows {known}, and none of them may run this model")
        self.columns = (
            *TIMES, "energy_uj", "pieces", "error", *(f"memory {name}" for name in self.devices),
            *(f"required {name}" for name in required),
        )  # fmt: skip
        self._models = [costs.model(config) for config in self.configs]
        self._active_w = np.array([model.active_w or 0.0 for model in self._models])
        self.exact = len(self._idle_w) <= MOST_IDLING
        self._own_idle_w = np.array([self._idle_w.get(c.unit, 0.0) if self.exact else 0.0 for c in self.configs])
        self._unmeasured: list[str] = []
        self.chain = self._chain(required, errors)
        if self._unmeasured:
            raise PlanError(f"max_error: no error was measured of {_listed(self._unmeasured)}")
        for block, kind in zip(graph.blocks, self.chain.kinds, strict=True):
            if not self.chain.allowed[kind].any():
                names = ", ".join(map(str, self.configs))
                raise PlanError(
                    f"profile {profile.machine}: none of {names} may run block {block.index} ({block.name})"
                )

    @property
    def devices(self) -> tuple[str, ...]:
        """Of the configurations."""
        return tuple(dict.fromkeys(config.device for config in self.configs))

    @property
    def missing(self) -> tuple[str, ...]:
        pairs = list(zip(self.configs, self._models, strict=True))
        active = [f"{config}: active_w" for config, model in pairs if model.active_w is None]
        idle = [f"{config}: idle_w" for config in self.configs if self._waiting_w[config.unit] is None]
        base = ["machine: base_w"] if self.costs.profile.base_w is None else []
        return (*active, *idle, *base)

    @cached_property
    def sets(self) -> tuple[Flags, Floats]:
        """Sets of hardware: which configurations are in them, `[sets, n]`, and the watts of all of it, waiting.

        The first has all of them.
        """
        idling = sorted(self._idle_w) if self.exact else []
        base_w = self.costs.profile.base_w or 0.0
        masks, watts = [], []
        for left_out in (names for size in range(len(idling) + 1) for names in combinations(idling, size)):
            mask = np.array([config.unit not in left_out for config in self.configs])
            if (self.chain.allowed & mask[:, None] & mask).any(axis=(1, 2)).all():
                masks.append(mask)
                watts.append(base_w + sum(self._idle_w[unit] for unit in idling if unit not in left_out))
        return np.array(masks).reshape(-1, len(self.configs)), np.array(watts)

    def row(self, weights: Mapping[str, float]) -> Floats:
        """Weights of the columns; those that are not named weigh nothing."""
        return np.array([weights.get(column, 0.0) for column in self.columns])

    def energy(self, waiting_w: float) -> dict[str, float]:
        """Weights of the energy in microjoules, where all hardware draws this while it waits."""
        return {"energy_uj": 1.0, **dict.fromkeys(TIMES, waiting_w)}

    def memory(self) -> dict[str, float]:
        """Weights of the memory of all devices, in bytes."""
        return {f"memory {device}": 1.0 for device in self.devices}

    def plan(self, path: Indices, rationale: str) -> Plan:
        """The plan of a path `[blocks, 2]`."""
        prefill, decode = ([self.configs[c] for c in path[:, phase]] for phase in (0, 1))
        return Plan.from_configs(prefill, rationale, decode=decode)

    def path(self, plan: Plan) -> Indices:
        """The path of a plan of these configurations; `ValueError` where it has another one."""
        phases = list(plan.phases.values())
        spread = [[p.config for p in ps for _ in range(p.first, p.last + 1)] for ps in (phases[0], phases[-1])]
        return np.array([[self.configs.index(config) for config in configs] for configs in spread], np.intp).T

    @cached_property
    def _waiting_w(self) -> dict[str, float | None]:
        """By unit, what it draws while it waits: of the first configuration of which that is known."""
        found: dict[str, float | None] = {}
        for config in self.configs:
            if found.get(config.unit) is None:
                found[config.unit] = self.costs.model(config).idle_w
        return found

    @cached_property
    def _idle_w(self) -> dict[str, float]:
        return {unit: watts for unit, watts in self._waiting_w.items() if watts}

    def _chain(self, required: Sequence[str], errors: bool) -> Chain:
        graph, n = self.costs.graph, len(self.configs)
        keys = [(block.signature, block.index == 0) for block in graph.blocks]
        first = {key: keys.index(key) for key in dict.fromkeys(keys)}
        nodes = np.zeros((len(first), len(self.columns), n, n))
        allowed = np.zeros((len(first), n, n), np.bool_)
        for row, index in enumerate(first.values()):
            usable = np.array([self._may(index, config) for config in self.configs])
            allowed[row] = usable[:, None] & usable
            if not self.pairs:
                allowed[row] &= np.eye(n, dtype=np.bool_)
            nodes[row] = self._node(index, required)
            if errors:
                found = [self._error(index, c) if may else 0.0 for c, may in zip(self.configs, usable, strict=True)]
                nodes[row, self.columns.index("error")] = np.maximum.outer(found, found) ** 2
        leaving, entering = self._cuts()
        split = np.zeros((len(graph.blocks) - 1, n), np.bool_)
        if len(split) and graph.blocks[-1].kind is BlockKind.HEAD:
            split[-1] = [config.static for config in self.configs]
        return Chain(np.array([list(first).index(key) for key in keys]), nodes, allowed, leaving, entering, split)

    def _may(self, index: int, config: DeviceConfig) -> bool:
        if index or not self.embeds:
            return config in self._blocks_on and not (index == 0 and config.static)
        return config == HOST or not (config.static or config.kind is DeviceKind.GPU)

    def _error(self, index: int, config: DeviceConfig) -> float:
        block, error = self.costs.graph.blocks[index], self.costs.error(index, config)
        if error is None and config != HOST and block.kind is not BlockKind.EMBED:  # a lookup computes nothing
            self._unmeasured.append(f"{block.name} on {config}")
        return error or 0.0

    def _node(self, index: int, required: Sequence[str]) -> Floats:
        """The columns of a block, `[columns, n, n]`."""
        costs, load, n = self.costs, self.load, len(self.configs)
        block, work = costs.graph.blocks[index], costs.works[index]
        different = ~np.eye(n, dtype=np.bool_)
        columns = dict.fromkeys(self.columns, np.zeros((n, n)))
        calls = {"prefill": len(load.calls), "decode": len(load.steps)}
        launch_us = np.array([model.launch_us for model in self._models]) * (index == 0)
        for phase, shape in (("prefill", (n, 1)), ("decode", (1, n))):
            found = [costs.phase(index, config, phase, load) for config in self.configs]
            inside_us = np.array([each.total_us for each in found])
            inside_uj = np.array([each.energy_uj or 0.0 for each in found]) - self._own_idle_w * inside_us
            beside_us = calls[phase] * launch_us
            columns[f"{phase}_us"] = np.broadcast_to((inside_us + beside_us).reshape(shape), (n, n))
            columns["energy_uj"] = columns["energy_uj"] + (inside_uj + self._beside_uj(beside_us)).reshape(shape)
        if size := work.state_bytes(load.prompt_tokens):
            moving_us = np.array([handover_us(model, size) for model in self._models])
            columns["handover_us"] = np.add.outer(moving_us, moving_us) * different
            moving_uj = self._beside_uj(moving_us)
            columns["energy_uj"] = columns["energy_uj"] + np.add.outer(moving_uj, moving_uj) * different
        columns["pieces"] = different.astype(np.float64)

        growing = work.kv_bytes_per_token * (load.prompt_tokens + load.new_tokens)
        states = np.array([model.kv_width * growing + model.width * work.recurrent_bytes for model in self._models])
        # Static shapes hold the weights once for each phase, keys and values once for both.
        both = np.array([2.0 if config.static else 1.0 for config in self.configs]) * block.total_weight_bytes + states
        one = block.total_weight_bytes + states
        for device in self.devices:
            here = np.array([config.device == device for config in self.configs])
            columns[f"memory {device}"] = np.diag(here * both) + np.add.outer(here * one, here * one) * different
        for name in required if index or not self.embeds else ():
            here = np.array([matches(name, config) for config in self.configs])
            columns[f"required {name}"] = -np.logical_or.outer(here, here).astype(np.float64)
        return np.array([columns[name] for name in self.columns])

    def _cuts(self) -> tuple[Floats, Floats]:
        """What cuts take on both sides, each `[blocks - 1, columns, 2, n]`."""
        load, n = self.load, len(self.configs)
        sizes = np.array([edge.crossing_bytes_per_token for edge in self.costs.graph.edges], np.float64)
        moving_us = np.array([handover_us(model, 1.0) for model in self._models])
        launch_us = np.array([model.launch_us for model in self._models])
        leaving = np.zeros((len(sizes), len(self.columns), 2, n))
        entering = np.zeros_like(leaving)
        energy = self.columns.index("energy_uj")
        phases = (("prefill_us", load.prompt_tokens, len(load.calls)), ("decode_us", len(load.steps), len(load.steps)))
        for phase, (column, tokens, calls) in enumerate(phases):
            out_us = np.multiply.outer(sizes, moving_us) * tokens
            for side, latency_us in ((leaving, out_us), (entering, out_us + launch_us * calls)):
                side[:, self.columns.index(column), phase] = latency_us
                side[:, energy, phase] = self._beside_uj(latency_us)
        entering[:, self.columns.index("pieces")] = 1.0
        return leaving, entering

    def _beside_uj(self, latency_us: Floats) -> Floats:
        """Energy of time that is no block's, beside what the device would draw while it waits."""
        return latency_us * (self._active_w - self._own_idle_w)  # type: ignore[no-any-return]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
