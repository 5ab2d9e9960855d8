"""What a block takes on a device configuration: time and energy, by measurement where there is one.

A block takes `max(bytes of weights / bandwidth, operations / rate(tokens))`, and its attention after that
`max(bytes of keys and values / bandwidth, operations / rate)`: a roofline
(https://doi.org/10.1145/1498765.1498785) for each of the two, as one follows the other. A submodel takes a launch, its
blocks one after the other, and the transfer of what crosses its boundary. Measured blocks are looked up instead, and
interpolated between the sizes that were measured; a whole model that was measured tells by how much its blocks are
faster or slower in their place than one by one.

Not reckoned, because block graphs do not say it: logits, token ids, masks and tables on their way to and from a device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import PlanError, UsageError
from edgert.graph import Block, BlockGraph, BlockKind
from edgert.placement import HOST, own_blocks
from edgert.profile import PROVENANCES, DeviceModel, Measurement, Profile, Provenance
from edgert.shapes import StaticShapes
from edgert.table import Floats, Table


@dataclass(frozen=True)
class Work:
    """What a block does in a call, whatever the device. Sizes of keys, values and boundary tensors are at f32.

    Attributes:
        weight_bytes: read in every call. The table of an embedding is not: of it a call reads a row a token.
        expert_share: of a mixture of experts the share of its bytes that one token uses; 1 for other blocks.
        flops_per_token: for every token; keys and values are not in it.
        flops_per_row: of the head, for every row of logits that is asked for.
        score_flops: for every pair of a query and a key.
        kv_bytes_per_token: keys and values of one token.
        recurrent_bytes: read and written in every call.
        window: keys that a query sees at most; None for all.
    """

    weight_bytes: int
    expert_share: float
    flops_per_token: int
    flops_per_row: int
    score_flops: float
    kv_bytes_per_token: int
    recurrent_bytes: int
    window: int | None

    @classmethod
    def of(cls, block: Block) -> Work:
        head = block.kind is BlockKind.HEAD
        return cls(
            weight_bytes=0 if block.kind is BlockKind.EMBED else block.total_weight_bytes,
            expert_share=_share(block) if block.kind is BlockKind.MOE else 1.0,
            flops_per_token=0 if head else block.flops_per_token,
            flops_per_row=block.flops_per_token if head else 0,
            # Where nobody knows the heads of queries, there are at least as many as of keys: two operations for each
            # element of four bytes, and for each of the two tensors.
            score_flops=block.score_flops or block.kv_bytes_per_token / 2,
            kv_bytes_per_token=block.kv_bytes_per_token,
            recurrent_bytes=block.recurrent_bytes,
            window=block.window,
        )

    @property
    def idle(self) -> bool:
        """Whether it neither reads nor computes anything to speak of, as the lookup of embeddings."""
        return not (self.weight_bytes or self.flops_per_token or self.flops_per_row or self.state_bytes(1))

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a call reads; tokens choose their experts independently and evenly."""
        return self.weight_bytes * (1 - (1 - self.expert_share) ** tokens)

    def attended(self, tokens: int, past: Floats) -> Floats:
        """Pairs of a query and a key that it sees, in a call of `tokens` after `past` others."""
        if self.window is None:
            return tokens * past + tokens * (tokens + 1) / 2
        growing: Floats = np.clip(self.window - past, 0, tokens)  # so many queries see all that is there
        return growing * past + growing * (growing + 1) / 2 + (tokens - growing) * self.window

    def state_bytes(self, tokens: int) -> int:
        """Size of the states when they hold this many tokens."""
        return self.kv_bytes_per_token * tokens + self.recurrent_bytes


def _share(block: Block) -> float:
    """The share of a mixture of experts that a token uses: elements multiplied over elements there."""
    elements = sum(size * 8 / _bits(kind) for kind, size in block.weight_bytes.items())
    return min(1.0, block.flops_per_token / 2 / elements) if elements else 1.0


def _bits(element_type: str) -> int:
    digits = re.search(r"\d+", element_type)  # the first of u4, nf4, bf16, f8e4m3
    return max(1, int(digits[0])) if digits else 8


def block_us(device: DeviceModel, work: Work, tokens: int, past: Floats, rows: int = 1) -> Floats:
    """Microseconds of a block by its device's roofline.

    Args:
        tokens: new tokens.
        past: tokens that are in the cache already; one number or an array of them.
        rows: rows of logits that are asked for.
    """
    rate = device.compute_gops * 1e3 * tokens / (tokens + device.half_rate_tokens)
    seen = past + tokens if work.window is None else np.minimum(past, work.window) + tokens
    reading = (work.weights_read(tokens) + 2 * device.width * work.recurrent_bytes) / (device.bandwidth_gbps * 1e3)
    computing = (work.flops_per_token * tokens + work.flops_per_row * rows) / rate
    attending = np.maximum(
        device.kv_width * work.kv_bytes_per_token * seen / ((device.kv_gbps or device.bandwidth_gbps) * 1e3),
        work.score_flops * work.attended(tokens, past) / ((device.score_gops or device.compute_gops) * 1e3),
    )
    return max(reading, computing) + attending


def call_us(
    device: DeviceModel, works: Sequence[Work], tokens: int, past: int, rows: int = 1, *, boundary_bytes: int = 0
) -> float:
    """Microseconds of one call of a submodel; `boundary_bytes` at f32 come in and go out with every token."""
    moving = device.width * boundary_bytes * tokens / (device.transfer_gbps * 1e3)
    return device.launch_us + sum(float(block_us(device, work, tokens, past, rows)) for work in works) + moving


def handover_us(device: DeviceModel, f32_bytes: float) -> float:
    """Microseconds to read states from a device, or to write them to it; their size is given at f32."""
    return device.width * f32_bytes / (device.transfer_gbps * 1e3)


@dataclass(frozen=True)
class Workload:
    """A prompt and its continuation.

    Attributes:
        prompt_tokens: at least 1, none of them in a cache.
        new_tokens: at least 1; the first comes with the prefill.
        chunk: tokens of a prefill call, at least 1; the last call takes what is left.
    """

    prompt_tokens: int = 1024
    new_tokens: int = 256
    chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, the least is 1")

    @classmethod
    def fitting(
        cls, context: int | None, prompt_tokens: int | None = None, new_tokens: int | None = None, chunk: int = 256
    ) -> Workload:
        """The usual one, or what of it a model's context holds; what is given is taken as it is.

        Raises:
            UsageError: what is given is below its limit, or more than the context holds.
        """
        limit = context or 2**30
        prompt = max(1, min(1024, limit * 3 // 4)) if prompt_tokens is None else prompt_tokens
        new = max(1, min(256, limit - prompt)) if new_tokens is None else new_tokens
        if prompt + new > limit:
            raise UsageError(f"a prompt of {prompt} and {new} new tokens are {prompt + new}; the context holds {limit}")
        return cls(prompt, new, chunk)

    @property
    def calls(self) -> list[tuple[int, int]]:
        """New tokens and past of every prefill call."""
        return [
            (min(self.chunk, self.prompt_tokens - start), start) for start in range(0, self.prompt_tokens, self.chunk)
        ]

    @property
    def steps(self) -> NDArray[np.float64]:
        """Past of every decode call."""
        return np.arange(self.prompt_tokens, self.prompt_tokens + self.new_tokens - 1, dtype=np.float64)


@dataclass(frozen=True)
class Entry:
    """Something that a cost rests on: `what` on `config`, and where the number comes from."""

    config: str
    what: str
    provenance: Provenance


class Costs:
    """What the blocks of a model take on the configurations of a profile.

    Args:
        shapes: that devices with static shapes pad to; None where padding is not reckoned.

    Raises:
        PlanError: (any method) the profile does not know the configuration; the message names it.
    """

    def __init__(self, graph: BlockGraph, profile: Profile, shapes: StaticShapes | None = None) -> None:
        self.graph = graph
        self.profile = profile
        self.shapes = shapes
        self.works = [Work.of(block) for block in graph.blocks]
        self._models: dict[DeviceConfig, DeviceModel] = {}
        self._phases: dict[Any, Phase] = {}
        self._entries: dict[Any, tuple[Entry, ...]] = {}
        self._weights_read: dict[int, NDArray[np.float64]] = {}

    def model(self, config: DeviceConfig) -> DeviceModel:
        """The device model of a configuration. The host's work is small: any configuration of the CPU tells of it."""
        if config not in self._models:
            found = self.profile.model(config)
            if found is None and config == HOST:
                found = next((m for m in self.profile.devices if m.device.kind is DeviceKind.CPU), None)
            if found is None:
                raise PlanError(f"profile {self.profile.machine}: nothing is known of {config}")
            self._models[config] = found
        return self._models[config]

    def require(self, configs: Sequence[DeviceConfig]) -> None:
        """Raise `PlanError` that names all configurations that the profile does not know."""
        unknown = []
        for config in configs:
            try:
                self.model(config)
            except PlanError:
                unknown.append(str(config))
        if unknown:
            known = ", ".join(str(model.device) for model in self.profile.devices)
            raise PlanError(
                f"profile {self.profile.machine}: nothing is known of the time on {', '.join(unknown)}; it has {known}"
            )

    def block_us(self, index: int, config: DeviceConfig, tokens: int, past: Floats) -> Floats:
        """Microseconds of a block in its place in a submodel."""
        tokens, past = self._padded(config, tokens, past)
        table = self._table(index, config, tokens)
        if table is None:
            return block_us(self.model(config), self.works[index], tokens, past)
        launch_us = self.model(config).launch_us
        alone = table.at(tokens, past)
        return np.maximum(alone - launch_us, 0.02 * alone) * self._in_place(config, tokens, past)

    def block_uj(self, index: int, config: DeviceConfig, tokens: int, past: Floats) -> Floats | None:
        """Microjoules of a block above the machine's base; None where the device's watts are not known."""
        padded_tokens, padded = self._padded(config, tokens, past)
        table, energies = self._table(index, config, padded_tokens), self._energies
        if table is not None and (key := (str(config), self.graph.blocks[index].signature)) in energies:
            # What was measured is a call by itself: its watts hold in its place too.
            watts = energies[key].at(padded_tokens, padded) / table.at(padded_tokens, padded)
            return watts * self.block_us(index, config, tokens, past)
        active_w = self.model(config).active_w
        return None if active_w is None else active_w * self.block_us(index, config, tokens, past)

    def phase(self, index: int, config: DeviceConfig, phase: str, load: Workload) -> Phase:
        """What a block takes in all calls of a phase (`prefill` or `decode`)."""
        key = (self.graph.blocks[index].signature, config, phase, load)
        if key not in self._phases:
            if phase == "prefill":
                calls = load.calls
                times: Any = [self.block_us(index, config, *call) for call in calls]
                energies: Any = [self.block_uj(index, config, *call) for call in calls]
            else:
                steps = load.steps
                times = self.block_us(index, config, 1, steps) if steps.size else 0.0
                energies = self.block_uj(index, config, 1, steps) if steps.size else 0.0
            known = energies is not None and not (isinstance(energies, list) and None in energies)
            calls_us = np.broadcast_to(
                np.asarray(times, np.float64), len(load.calls if phase == "prefill" else load.steps)
            )
            self._phases[key] = Phase(calls_us, float(np.sum(energies)) if known else None)
        return self._phases[key]

    def span(self, first: int, last: int, config: DeviceConfig, phase: str, load: Workload) -> Phase:
        """What blocks `first` to `last` take in all calls of a phase, one after the other."""
        key = (first, last, config, phase, load)
        if key not in self._phases:
            phases = [self.phase(index, config, phase, load) for index in range(first, last + 1)]
            energies = [each.energy_uj for each in phases]
            energy_uj = None if None in energies else float(sum(e for e in energies if e is not None))
            self._phases[key] = Phase(np.sum([each.calls_us for each in phases], axis=0), energy_uj)
        return self._phases[key]

    def entry(self, index: int, config: DeviceConfig, tokens: int, past: int = 0) -> Entry:
        """What the time of a block rests on. Beyond the sizes that were measured it is an estimate at best."""
        block = self.graph.blocks[index]
        padded, slots = self._padded(config, tokens, past)
        table = self._table(index, config, padded)
        if table is not None:
            found = self._measured[str(config), block.signature][0].provenance
            if not table.reaches(padded, float(slots) if block.states else 0.0):
                found = max(found, "estimated", key=PROVENANCES.index)
            return Entry(str(config), block.signature, found)
        # Rates that were fitted to other blocks on this machine are an estimate for this one.
        provenance = self.model(config).provenance
        return Entry(str(config), "rates", "estimated" if provenance == "measured" else provenance)

    def entries(self, first: int, last: int, config: DeviceConfig, tokens: int, past: int) -> tuple[Entry, ...]:
        """What the times of blocks `first` to `last` rest on, each once."""
        key = (first, last, config, tokens, past)
        if key not in self._entries:
            distinct = {block.signature: block.index for block in self.graph.blocks[first : last + 1]}
            found = (self.entry(index, config, tokens, past) for index in distinct.values())
            self._entries[key] = tuple(dict.fromkeys(found))
        return self._entries[key]

    def read_bytes(self, first: int, last: int, tokens: int, past: int) -> float:
        """What a call of blocks `first` to `last` reads: weights, and keys and values at f32."""
        if tokens not in self._weights_read:
            self._weights_read[tokens] = _sums([work.weights_read(tokens) for work in self.works])
        weights = self._weights_read[tokens]
        return float(weights[last + 1] - weights[first]) + self.state_bytes(first, last, tokens + past)

    def state_bytes(self, first: int, last: int, tokens: int) -> float:
        """The states of blocks `first` to `last`, at f32, when they hold this many tokens."""
        (growing, fixed), end = self._states, last + 1
        return float((growing[end] - growing[first]) * tokens + fixed[end] - fixed[first])

    @cached_property
    def _states(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums over blocks: bytes a token, and those that do not grow."""
        growing = _sums([work.kv_bytes_per_token for work in self.works])
        return growing, _sums([work.recurrent_bytes for work in self.works])

    def error(self, index: int, config: DeviceConfig) -> float | None:
        """The largest measured difference of a block from `CPU@f32`, see `Measurement.error`; None where not known."""
        rows = self._measured.get((str(config), self.graph.blocks[index].signature), [])
        return max((row.error for row in rows if row.error is not None), default=None)

    def _padded(self, config: DeviceConfig, tokens: int, past: Floats) -> tuple[int, Floats]:
        if self.shapes is None or not config.static:
            return tokens, past
        query = next((q for q in (1, *self.shapes.chunks) if q >= tokens), tokens)
        buckets = np.asarray(self.shapes.buckets, np.float64)
        needed = np.asarray(past) + tokens
        slots = buckets[np.minimum(np.searchsorted(buckets, needed), len(buckets) - 1)]
        return query, np.maximum(slots, needed)

    def _table(self, index: int, config: DeviceConfig, tokens: int) -> Table | None:
        table = self._tables.get((str(config), self.graph.blocks[index].signature))
        return table if table is not None and table.covers(tokens) else None

    def _in_place(self, config: DeviceConfig, tokens: int, past: Floats) -> Floats:
        """How much longer the whole model takes than its blocks, one by one and without their launches."""
        whole = self._tables.get((str(config), self.graph.signature))
        own = [self._tables.get((str(config), b.signature)) for b in own_blocks(self.graph, config)]
        if whole is None or not all(table is not None and table.covers(tokens) for table in (whole, *own)):
            return 1.0
        launch_us = self.model(config).launch_us
        alone: Floats = 0.0
        for table, count in self._counts(config).items():
            each = table.at(tokens, past)
            alone = alone + count * np.maximum(each - launch_us, 0.02 * each)
        return np.maximum(whole.at(tokens, past) - launch_us, 0.02 * alone) / alone

    def _counts(self, config: DeviceConfig) -> dict[Table, int]:
        counts: dict[Table, int] = {}
        for block in own_blocks(self.graph, config):
            table = self._tables[str(config), block.signature]
            counts[table] = counts.get(table, 0) + 1
        return counts

    @cached_property
    def _measured(self) -> dict[tuple[str, str], list[Measurement]]:
        """By configuration and signature, those of the best provenance: a measurement makes estimates worthless."""
        found: dict[tuple[str, str], list[Measurement]] = {}
        for row in self.profile.measurements:
            found.setdefault((row.config, row.block), []).append(row)
        best = {key: min((row.provenance for row in rows), key=PROVENANCES.index) for key, rows in found.items()}
        return {key: [row for row in rows if row.provenance == best[key]] for key, rows in found.items()}

    @cached_property
    def _tables(self) -> dict[tuple[str, str], Table]:
        return {key: Table({(r.tokens, r.past): r.latency_us for r in rows}) for key, rows in self._measured.items()}

    @cached_property
    def _energies(self) -> dict[tuple[str, str], Table]:
        return {
            key: Table({(r.tokens, r.past): r.energy_uj for r in rows if r.energy_uj is not None})
            for key, rows in self._measured.items()
            if all(r.energy_uj is not None for r in rows)
        }


def _sums(values: Sequence[float]) -> NDArray[np.float64]:
    """Of the first 0, 1, 2 … values."""
    return np.append(0.0, np.cumsum(values))


@dataclass(frozen=True, eq=False)
class Phase:
    """What a block takes in a phase: microseconds of each call, and microjoules in all (None where not known)."""

    calls_us: NDArray[np.float64]
    energy_uj: float | None

    @cached_property
    def total_us(self) -> float:
        return float(self.calls_us.sum())
