"""What the devices of a machine can do, as numbers that say where they come from: one JSON file a machine."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from edgert.errors import DeviceError, UnknownDeviceError, UsageError
from edgert.fields import build

Provenance = Literal["measured", "estimated", "modelled"]
PROVENANCES: tuple[Provenance, ...] = ("measured", "estimated", "modelled")  # best first
FORMAT_VERSION = 1


@dataclass(frozen=True)
class DeviceModel:
    """A device as a roofline: a few rates, from which `edgert.cost` reckons what a submodel takes.

    Attributes:
        name: what `sim:NAME` calls it: 1 to 64 letters, digits, `_`, `.` and `-`; not `f32` or `f16`.
        bandwidth_gbps: 10^9 bytes a second at which it reads weights, keys and values; what it reaches, not the peak.
        compute_gops: 10^9 operations a second that it reaches in matrix products, a multiply-add being two.
        launch_us: what every call of a submodel costs beside the work, 0 or more.
        transfer_gbps: 10^9 bytes a second at which tensors pass to and from it, keys and values that change hands too.
        active_w: watts above the machine's base while it computes; None where nobody knows.
        idle_w: the same while it waits.
        precision: of keys, values and of what crosses a submodel's boundary.
        provenance: of all these numbers, the worst of them.
        source: where they are from, and which are assumptions.
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

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]{1,64}", self.name, re.ASCII) or self.name in {"f32", "f16"}:
            raise UsageError(f"device model: name is {self.name[:64]!r}, expected 1 to 64 of A-Z a-z 0-9 _ . -")
        for field in ("bandwidth_gbps", "compute_gops", "transfer_gbps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"device model {self.name}: {field} is {value}, expected a finite number above 0")
        for field in ("launch_us", "active_w", "idle_w"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"device model {self.name}: {field} is {value}, expected a finite number, 0 or more")


@dataclass(frozen=True)
class Profile:
    """What is known of one machine.

    Attributes:
        version: of the format, `FORMAT_VERSION`.
        machine: the machine's name.
        devices: one model a device; their names differ.
    """

    version: int
    machine: str
    devices: tuple[DeviceModel, ...]

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
            profile = build(cls, data, "profile")
            if len({model.name for model in profile.devices}) < len(profile.devices):
                raise ValueError("two of its devices have the same name")
        except (OSError, ValueError, RecursionError) as error:
            raise DeviceError(f"profile {path}: {error}") from error
        return profile


def named(name: str) -> DeviceModel:
    """A device model of the profiles that come with edgert; `UnknownDeviceError` lists them where it is not there."""
    models = _shipped()
    if name not in models:
        raise UnknownDeviceError(f"device model {name!r} is not known; known: {', '.join(models)}")
    return models[name]


def names() -> tuple[str, ...]:
    """The device models that come with edgert."""
    return tuple(_shipped())


@cache
def _shipped() -> dict[str, DeviceModel]:
    folder = files("edgert") / "profiles"
    paths = sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return {model.name: model for path in paths for model in Profile.read(path).devices}
