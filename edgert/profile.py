"""What the devices of a machine can do, as numbers that say where they come from: one JSON file a machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from edgert.device import DeviceConfig
from edgert.errors import DeviceError, EdgertError, UnknownDeviceError, UsageError
from edgert.fields import build
from edgert.graph import Block

Provenance = Literal["measured", "published", "estimated", "modelled"]
# Best first: measured on the machine itself; derived from somebody's published run; said by a compiler or vendor's
# model, or carried over from measurements of something else; reckoned from assumptions.
PROVENANCES: tuple[Provenance, ...] = ("measured", "published", "estimated", "modelled")
FORMAT_VERSION = 2


@dataclass(frozen=True)
class DeviceModel:
    """A device configuration as a roofline: a few rates, from which `edgert.cost` reckons what a block takes.

    Attributes:
        name: what `sim:NAME` calls it: 1 to 64 letters, digits, `_`, `.` and `-`; not `f32` or `f16`.
        bandwidth_gbps: 10^9 bytes a second at which it reads weights; what it reaches, not the peak.
        compute_gops: 10^9 operations a second that it reaches in matrix products, a multiply-add being two.
        launch_us: what every call of a submodel costs beside the work, 0 or more.
        transfer_gbps: 10^9 bytes a second at which tensors pass to and from it, keys and values that change hands too.
        active_w: watts above the machine's base while it computes; None where nobody knows.
        idle_w: the same while it waits.
        precision: of what crosses a submodel's boundary, and of keys and values that change hands.
        provenance: of all these numbers, the worst of them.
        source: where they are from, and which are assumptions.
        config: the device configuration it stands for, e.g. `NPU@f16`; None for `sim:NAME` itself.
        kv_gbps: like `bandwidth_gbps` for keys and values; None where it is the same.
        kv_bits: that an element of keys and values takes in the cache; None for those of `precision`.
        score_gops: like `compute_gops` for attention scores and their use; None where it is the same.
        half_rate_tokens: the number of tokens in a call with which half of `compute_gops` is reached; 0 where it is
            always reached.
        provenances: of single numbers, by field, where they differ from `provenance`.
        ranges: of uncertain numbers, by field: the lowest and the highest likely value.
    """

    name: str
    bandwidth_gbps: float
    compute_gops: float
    launch_us: float
    transfer_gbps: float
    active_w: float | None
    idle_w: float | None
    precision: Literal["f32", "f16"]
    provenance: Provenance
    source: str
    config: str | None = None
    kv_gbps: float | None = None
    score_gops: float | None = None
    half_rate_tokens: float = 0.0
    kv_bits: float | None = None
    provenances: dict[str, Provenance] = field(default_factory=dict)
    ranges: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]{1,64}", self.name, re.ASCII) or self.name in {"f32", "f16"}:
            raise UsageError(f"device model: name is {self.name[:64]!r}, expected 1 to 64 of A-Z a-z 0-9 _ . -")
        for name in ("bandwidth_gbps", "compute_gops", "transfer_gbps", "kv_gbps", "score_gops", "kv_bits"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"device model {self.name}: {name} is {value}, expected a finite number above 0")
        for name in ("launch_us", "active_w", "idle_w", "half_rate_tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"device model {self.name}: {name} is {value}, expected a finite number, 0 or more")
        for name, bounds in self.ranges.items():
            value = getattr(self, name) if name in _NUMBERS else None
            if value is None or len(bounds) != 2 or not bounds[0] <= value <= bounds[1]:
                raise UsageError(
                    f"device model {self.name}: the range of {name[:40]} is {list(bounds)[:4]}, expected two numbers, "
                    f"one below and one above {value}"
                )
        for name in self.provenances:
            if name not in _NUMBERS:
                raise UsageError(
                    f"device model {self.name}: provenances has {name[:40]!r}, which is none of its numbers"
                )
        _ = self.device  # raises where `config` names no configuration

    @cached_property
    def device(self) -> DeviceConfig:
        """The configuration that plans name for it."""
        return DeviceConfig.parse(self.config) if self.config else DeviceConfig("SIM", self.name)

    @property
    def width(self) -> float:
        """What crosses a boundary takes, as a share of f32."""
        return 0.5 if self.precision == "f16" else 1.0

    @property
    def kv_width(self) -> float:
        """What keys and values take in the cache, as a share of f32."""
        return self.width if self.kv_bits is None else self.kv_bits / 32

    def provenance_of(self, name: str) -> Provenance:
        """Where one of its numbers comes from."""
        return self.provenances.get(name, self.provenance)


_NUMBERS = (
    "bandwidth_gbps", "compute_gops", "launch_us", "transfer_gbps", "active_w", "idle_w", "kv_gbps", "score_gops",
    "half_rate_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """What one call of a block, or of a whole model, took as a submodel of its own.

    Attributes:
        config: the device configuration.
        block: `Block.signature`; for a whole model as one submodel `BlockGraph.signature`.
        tokens: new tokens of the call; with static shapes those that it was padded to.
        past: tokens in the cache before; with static shapes the slots.
        latency_us: median, the launch included.
        spread_us: half of the range between the quartiles.
        energy_uj: above the machine's base; None where it was not measured.
        runs: how many calls.
        provenance: `measured` on a device, `estimated` by a compiler.
        error: relative root mean square difference of the result from that of `CPU@f32`; None where not compared.
    """

    config: str
    block: str
    tokens: int
    past: int
    latency_us: float
    spread_us: float
    energy_uj: float | None
    runs: int
    provenance: Provenance
    error: float | None = None

    def __post_init__(self) -> None:
        for name, value, low in (
            ("tokens", self.tokens, 1), ("past", self.past, 0), ("runs", self.runs, 1),
            ("spread_us", self.spread_us, 0), ("energy_uj", self.energy_uj, 0), ("error", self.error, 0),
        ):  # fmt: skip
            if value is not None and not (math.isfinite(value) and value >= low):
                raise UsageError(f"measurement of {self.block[:40]}: {name} is {value}, the least is {low}")
        if not (math.isfinite(self.latency_us) and self.latency_us > 0):
            raise UsageError(f"measurement of {self.block[:40]}: latency_us is {self.latency_us}, expected above 0")


@dataclass(frozen=True)
class Slowdown:
    """Calls on `config` take `factor` times as long while `beside` works too; 1 or more."""

    config: str
    beside: str
    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise UsageError(f"slowdown of {self.config} beside {self.beside}: factor is {self.factor}, the least is 1")


@dataclass(frozen=True)
class Profile:
    """What is known of one machine.

    Attributes:
        version: of the format, `FORMAT_VERSION`.
        machine: the machine's name.
        devices: one model a device configuration; their names differ, and so do their configurations.
        base_w: what the machine draws whatever its devices do (SoC, memory), without a display; None for unknown.
        base_provenance: of `base_w`.
        base_range: lowest and highest likely `base_w`; empty where it is not uncertain.
        shared_gbps: 10^9 bytes a second that all devices together reach; None where nobody knows.
        memory_bytes: of the machine, which its devices share; None where nobody knows.
        source: where these numbers are from.
        slowdowns: of configurations that work at the same time, measured.
        measurements: of blocks and whole models.
        conditions: what it was measured under: versions, governor, power source.
        warnings: what the reader must know of the measurements.
    """

    version: int
    machine: str
    devices: tuple[DeviceModel, ...]
    base_w: float | None = None
    base_provenance: Provenance = "modelled"
    base_range: tuple[float, ...] = ()
    shared_gbps: float | None = None
    memory_bytes: int | None = None
    source: str = ""
    slowdowns: tuple[Slowdown, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    conditions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, found in (("name", [m.name for m in self.devices]), ("config", [m.device for m in self.devices])):
            if len(set(found)) < len(found):
                raise UsageError(f"two of its devices have the same {what}")
        for name, value, low in (("base_w", self.base_w, 0.0), ("shared_gbps", self.shared_gbps, 1e-9),
                                 ("memory_bytes", self.memory_bytes, 1)):  # fmt: skip
            if value is not None and not (math.isfinite(value) and value >= low):
                raise UsageError(f"{name} is {value}, expected a finite number, {low} or more")

    @property
    def configs(self) -> tuple[DeviceConfig, ...]:
        """The device configurations it knows."""
        return tuple(model.device for model in self.devices)

    def model(self, config: DeviceConfig) -> DeviceModel | None:
        """The device model of a configuration; None where there is none."""
        return next((model for model in self.devices if model.device == config), None)

    def covers(self, blocks: Sequence[Block], config: DeviceConfig, tokens: Collection[int] = ()) -> bool:
        """Whether blocks were measured on a configuration, each with these numbers of new tokens."""
        known: dict[str, set[int]] = {}
        for row in self.measurements:
            if row.config == str(config):
                known.setdefault(row.block, set()).add(row.tokens)
        found = all(block.signature in known and known[block.signature] >= set(tokens) for block in blocks)
        return found and self.model(config) is not None

    def joined(self, newer: Profile) -> Profile:
        """What both know of the same machine; where both know something, what the newer one says.

        Rates are those of the larger model, as a small one tells more of launches than of memory.
        """
        again = {(m.config, m.block) for m in newer.measurements}
        kept = tuple(m for m in self.measurements if (m.config, m.block) not in again)
        anew = {m.config for m in newer.measurements}
        devices = {m.device: m for m in self.devices}
        devices |= {m.device: m for m in newer.devices if newer._largest_us(m) >= self._largest_us(m)}
        slowdowns = {(s.config, s.beside): s for s in (*self.slowdowns, *newer.slowdowns)}
        return replace(
            newer,
            devices=tuple(devices.values()),
            base_w=self.base_w if newer.base_w is None else newer.base_w,
            base_provenance=self.base_provenance if newer.base_w is None else newer.base_provenance,
            source="; ".join(dict.fromkeys((*self.source.split("; "), *newer.source.split("; ")))),
            slowdowns=tuple(slowdowns.values()),
            measurements=(*kept, *newer.measurements),
            warnings=(*(w for w in self.warnings if not any(w.startswith(name) for name in anew)), *newer.warnings),
        )

    def _largest_us(self, model: DeviceModel) -> float:
        """The longest call with one token on a configuration."""
        own = [m.latency_us for m in self.measurements if m.config == str(model.device) and m.tokens == 1]
        return max(own, default=0.0)

    def declared(self, watts: Mapping[str, float]) -> Profile:
        """This profile with watts by device, and of the `base`, where none were measured; marked estimated."""

        def filled(model: DeviceModel) -> DeviceModel:
            power = watts.get(model.device.device)
            if power is None or (model.active_w is not None and model.provenance_of("active_w") == "measured"):
                return model
            estimated: dict[str, Provenance] = {"active_w": "estimated", "idle_w": "estimated"}
            provenances = model.provenances | estimated
            return replace(model, active_w=power, idle_w=0.0, provenances=provenances)

        profile = replace(self, devices=tuple(filled(model) for model in self.devices))
        if "base" in watts and (self.base_w is None or self.base_provenance != "measured"):
            profile = replace(profile, base_w=watts["base"], base_provenance="estimated")
        return profile

    def scaled(self, config: DeviceConfig, *, time: float = 1.0, power: float = 1.0) -> Profile:
        """This profile with one configuration that takes `time` times as long, at `power` times the watts."""

        def device(model: DeviceModel) -> DeviceModel:
            rates = {name: getattr(model, name) for name in _NUMBERS}
            faster = {
                name: rates[name] / time
                for name in ("bandwidth_gbps", "compute_gops", "transfer_gbps", "kv_gbps", "score_gops")
                if rates[name] is not None
            }
            watts = {name: rates[name] * power for name in ("active_w", "idle_w") if rates[name] is not None}
            return replace(model, **faster, **watts, launch_us=model.launch_us * time, ranges={})

        def measurement(m: Measurement) -> Measurement:
            energy_uj = None if m.energy_uj is None else m.energy_uj * time * power
            return replace(m, latency_us=m.latency_us * time, energy_uj=energy_uj)

        own = str(config)
        return replace(
            self,
            devices=tuple(device(m) if m.device == config else m for m in self.devices),
            measurements=tuple(measurement(m) if m.config == own else m for m in self.measurements),
        )

    @classmethod
    def read(cls, path: Path | Traversable) -> Profile:
        """Read a profile.

        Raises:
            DeviceError: the file is missing, no profile, or of a version that this edgert does not know.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
            # Before the fields, which another version may have others of.
            if isinstance(data, dict) and data.get("version") != FORMAT_VERSION:
                raise ValueError(f"version is {str(data.get('version'))[:20]}, this edgert reads {FORMAT_VERSION}")
            return build(cls, data, "profile")
        except (OSError, ValueError, RecursionError, EdgertError) as error:
            raise DeviceError(f"profile {path}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """As the file has it, without what is not known."""
        return _without_defaults(asdict(self))

    def write(self, path: Path) -> None:
        """Write the profile, whole or not at all; raises `UsageError` where that is not possible."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
            partial.replace(path)
        except (OSError, ValueError) as error:
            with suppress(OSError):
                partial.unlink()
            raise UsageError(f"profile {path} cannot be written: {error}") from error


def _without_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    optional = {"config", "kv_gbps", "kv_bits", "score_gops", "error", "shared_gbps", "memory_bytes"}
    return {
        key: [_without_defaults(item) if isinstance(item, dict) else item for item in value]
        if isinstance(value, (list, tuple))
        else value
        for key, value in data.items()
        if not (value is None and key in optional) and value not in ({}, (), [])
    }


def named(name: str) -> DeviceModel:
    """A device model of the profiles that come with edgert; `UnknownDeviceError` lists them where it is not there."""
    models = {model.name: model for profile in shipped().values() for model in profile.devices}
    if name not in models:
        raise UnknownDeviceError(f"device model {name!r} is not known; known: {', '.join(models)}")
    return models[name]


def names() -> tuple[str, ...]:
    """The device models that come with edgert."""
    return tuple(model.name for profile in shipped().values() for model in profile.devices)


@cache
def shipped() -> Mapping[str, Profile]:
    """The profiles that come with edgert, by the name of their file."""
    folder = files("edgert") / "profiles"
    paths = sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return {path.name.removesuffix(".json"): Profile.read(path) for path in paths}


def find(name: str) -> Profile:
    """A profile by the name of one that comes with edgert, or by the path of a file; raises `DeviceError`.

    `lunar-lake` and `Lunar Lake` are `lunarlake`.
    """
    plain = re.sub(r"[-_ ]", "", name.lower())
    if plain in shipped():
        return shipped()[plain]
    path = Path(name)
    if path.suffix == ".json" or path.exists():
        return Profile.read(path)
    raise UnknownDeviceError(f"profile {name!r} is neither a file nor one of {', '.join(shipped())}")
