"""What measuring left behind, and what it says: medians, rates, doubts."""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import UsageError
from edgert.graph import BlockGraph
from edgert.grid import Grid
from edgert.placement import own_blocks
from edgert.profile import DeviceModel, Measurement, Provenance
from edgert.rates import fit, launch_us

Key = tuple[str, int, int]
"""Signature of a block or of a whole model, new tokens, past tokens."""
SLOWED = 1.15  # a configuration that ends this much slower than it began
UNSTEADY = 0.25  # half the range between the quartiles over the median
SMALLEST_US = 1e-3
_TABLES = ("blocks", "whole", "towers")
# Bits of an element of the cache, by configuration of the CPU, where that is not the precision of what is computed.
# OpenVINO's u8, as a compiled model's KV_CACHE_PRECISION says: a scale and a zero point in f32 for a head's row of 128.
# The kernels' INT8 has a scale only (edgert.kvlayout).
KV_BITS = {"f32+dq": 8.5, "bf16": 8.5, "kernels": 8.25, "kernels+f16": 16.0}


@dataclass
class Raw:
    """Samples of one configuration, over all rounds.

    Attributes:
        blocks: microseconds of blocks, one by one.
        whole: of the model as it runs in a plan with one device.
        towers: of towers, one call; as many new tokens as they give rows.
        errors: relative difference from `CPU@f32` by signature.
        moves: of caches that were read or written: bytes, and microseconds.
        watts: above the machine's base, by phase, of the whole model.
        paces: microseconds of a decode step, when each round began and when it ended.
        cuts: the same of the model cut at every boundary; empty where that was not measured.
        calls: submodels of the whole model.
        emulated: whether the device is.
    """

    blocks: dict[Key, list[float]] = field(default_factory=dict)
    whole: dict[Key, list[float]] = field(default_factory=dict)
    towers: dict[Key, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    moves: list[tuple[float, float]] = field(default_factory=list)
    watts: dict[str, list[float]] = field(default_factory=dict)
    paces: list[float] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)
    calls: int = 1
    emulated: bool = False

    def to_json(self) -> dict[str, Any]:
        lists = {name: [[*key, value] for key, value in getattr(self, name).items()] for name in _TABLES}
        return {**self.__dict__, **lists}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Raw:
        tables: dict[str, Any] = {
            name: {(signature, tokens, past): values for signature, tokens, past, values in data[name]}
            for name in _TABLES
        }
        return cls(**{**data, **tables, "moves": [(size, us) for size, us in data["moves"]]})


@dataclass(frozen=True)
class Kept:
    """Unfinished measurements in a file, to go on with.

    Attributes:
        path: the file; None to keep none.
        configs, grid, graph: what is measured: what another measurement has left is no use.
    """

    path: Path | None
    configs: tuple[DeviceConfig, ...]
    grid: Grid
    graph: BlockGraph

    def resume(self, raw: dict[DeviceConfig, Raw]) -> tuple[dict[DeviceConfig, Raw], set[str]]:
        """What an earlier run of the same measurement has left, and what it had done; else `raw`, and nothing."""
        if self.path is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):
                data = json.loads(self.path.read_text("utf-8"))
                if data["of"] == self._what:
                    left = {config: Raw.from_json(data["raw"][str(config)]) for config in self.configs}
                    return left, set(data["done"])
        return raw, set()

    def save(self, raw: dict[DeviceConfig, Raw], done: set[str]) -> None:
        """Raises `UsageError` where the file cannot be written."""
        if self.path is None:
            return
        data = {"of": self._what, "done": sorted(done), "raw": {str(c): own.to_json() for c, own in raw.items()}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(data), "utf-8")
            beside.replace(self.path)
        except OSError as error:
            raise UsageError(f"profile {self.path} cannot be written: {error}") from error

    def discard(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @property
    def _what(self) -> dict[str, object]:
        """What is measured, as JSON gives it back."""
        grid = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.grid).items()}
        return {**grid, "model": self.graph.signature, "configs": [str(config) for config in self.configs]}


@dataclass(frozen=True)
class Summary:
    """A configuration's part of a profile."""

    device: DeviceModel
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]


def summary(config: DeviceConfig, raw: Raw, graph: BlockGraph) -> Summary:
    """What the samples of a configuration say."""
    provenance: Provenance = "modelled" if raw.emulated else "measured"
    blocks = {key: statistics.median(values) for key, values in raw.blocks.items()}
    whole = {key: statistics.median(values) for key, values in raw.whole.items()}
    if raw.cuts and raw.paces:
        excess_us = statistics.median(raw.cuts) - statistics.median(raw.paces)
        launch = max(0.0, excess_us / (len(graph.blocks) - raw.calls))
    else:
        launch = launch_us(blocks, whole, own_blocks(graph, config), raw.calls)
    watts = {phase: statistics.median(values) for phase, values in raw.watts.items() if values}

    def measurement(key: Key, samples: list[float], less_us: float) -> Measurement:
        signature, tokens, past = key
        latency_us = max(statistics.median(samples) - less_us, SMALLEST_US)
        phase_w = watts.get("decode" if tokens == 1 else "prefill")
        return Measurement(
            config=str(config),
            block=signature,
            tokens=tokens,
            past=past,
            latency_us=round(latency_us, 3),
            spread_us=round(_spread(samples), 3),
            energy_uj=None if phase_w is None else round(max(0.0, phase_w) * latency_us, 3),
            runs=len(samples),
            provenance=provenance,
            error=raw.errors.get(signature),
        )

    # A whole model of several submodels counts as one call: the other launches are reckoned where plans are.
    rows = [measurement(key, values, 0.0) for key, values in raw.blocks.items()]
    rows += [measurement(key, values, (raw.calls - 1) * launch) for key, values in raw.whole.items()]
    rows += [measurement(key, values, 0.0) for key, values in raw.towers.items()]
    # A model in one piece is its only block.
    net = {key: max(us - launch, SMALLEST_US) for key, us in (blocks or whole).items()}
    precision: Literal["f32", "f16"] = "f16" if config.half else "f32"
    kv_bits = KV_BITS.get(config.variant) if config.kind is DeviceKind.CPU else None
    rates = fit(net, graph, kv_bits / 32 if kv_bits else 0.5 if config.half else 1.0)
    moved, spent_us = (sum(values) for values in zip(*raw.moves, strict=True)) if raw.moves else (0.0, 0.0)
    # Nothing was moved: a device without a cache of its own is as good as memory.
    transfer = moved / spent_us / 1e3 if moved and spent_us else rates["bandwidth_gbps"]
    active = statistics.mean(watts.values()) if watts else None
    device = DeviceModel(
        name=f"{config.device}-{config.variant}".replace("+", "-").lower(),
        config=str(config),
        **{name: round(rate, 3) for name, rate in rates.items()},  # type: ignore[arg-type]
        launch_us=round(launch, 2),
        transfer_gbps=round(max(transfer, 1e-3), 3),
        active_w=None if active is None else round(max(0.0, active), 3),
        # At rest it is part of the base that was measured.
        idle_w=None if active is None else 0.0,
        precision=precision,
        kv_bits=kv_bits,
        provenance=provenance,
        source="fitted to the measurements of this profile",
    )
    return Summary(device, tuple(rows), _doubts(config, raw))


def _doubts(config: DeviceConfig, raw: Raw) -> tuple[str, ...]:
    found = []
    if len(raw.paces) > 1 and (drift := raw.paces[-1] / max(raw.paces[0], SMALLEST_US)) > SLOWED:
        found.append(
            f"{config} was {drift - 1:.0%} slower at the end than at the beginning: it throttles, or other work ran"
        )
    unsteady = [
        key for table in (raw.blocks, raw.whole) for key, values in table.items()
        if len(values) > 2 and _spread(values) > UNSTEADY * statistics.median(values)
    ]  # fmt: skip
    if len(unsteady) * 5 > len(raw.blocks) + len(raw.whole):
        found.append(
            f"{config}: {len(unsteady)} of {len(raw.blocks) + len(raw.whole)} times are unsteady; other work ran"
        )
    return tuple(found)


def _spread(samples: list[float]) -> float:
    """Half of the range between the quartiles; 0 for less than two samples."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2
