"""Devices, and devices *with* the properties they are compiled with.

The unit that is placed, and later measured, is the `DeviceConfig`: the same CPU at bf16 and at f32 behaves like two
devices (the one that wins prefill may lose decode by half), so they are two names: `CPU@bf16`, `CPU@f32`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from edgert.errors import UnknownDeviceError


class DeviceKind(StrEnum):
    """What executes: OpenVINO's CPU, GPU and NPU plugins, onnxruntime's execution providers, or a simulation."""

    CPU = "CPU"
    GPU = "GPU"
    NPU = "NPU"
    ORT = "ORT"
    SIM = "SIM"


@dataclass(frozen=True, order=True)
class DeviceConfig:
    """One device with one set of compile properties, written `DEVICE@VARIANT`.

    Attributes:
        device: `CPU`, `GPU`, `GPU.1`, `NPU`, `ORT` or `SIM`; the number after the dot picks one of several.
        variant: the name of the property set, e.g. `f32`, `bf16`, `f32+dq`; for `ORT` the execution provider, for `SIM`
            a profile. `+static` in it means static shapes, with keys and values as tensors: see `edgert.static`.
    """

    device: str
    variant: str

    @classmethod
    def parse(cls, text: str) -> DeviceConfig:
        """Read `CPU@bf16`, a bare `CPU`, which takes the device's default variant, or `sim:NAME`, which is `SIM@NAME`.

        Raises:
            UnknownDeviceError: the text is not of that form, or names no kind of device.
        """
        if simulated := re.fullmatch(r"sim:([\w+.-]+)", text.strip()):
            return cls("SIM", simulated[1])
        match = re.fullmatch(r"([A-Z]+)(\.\d+)?(?:@([\w+.-]+))?", text.strip())
        if not match or match[1] not in DeviceKind.__members__:
            kinds = ", ".join(DeviceKind)
            raise UnknownDeviceError(f"device {text!r}: expected DEVICE@VARIANT with DEVICE one of {kinds}")
        return cls(match[1] + (match[2] or ""), match[3] or DEFAULT_VARIANTS[DeviceKind(match[1])])

    @property
    def kind(self) -> DeviceKind:
        return DeviceKind(self.device.partition(".")[0])

    @property
    def static(self) -> bool:
        """Whether submodels for it have static shapes, and their keys and values are the host's tensors."""
        return self.kind is DeviceKind.NPU or self.variant.endswith("+static")

    @property
    def half(self) -> bool:
        """Whether it computes in f16, so that f16 is enough for what passes to and from it."""
        return self.kind in {DeviceKind.GPU, DeviceKind.NPU} and self.variant.startswith("f16")

    @property
    def kernels(self) -> Literal["i8", "f16"] | None:
        """The precision in which edgert's own kernels keep keys and values; None where the device computes itself."""
        if self.kind is not DeviceKind.CPU or self.variant not in KERNEL_VARIANTS:
            return None
        return "f16" if self.variant.endswith("+f16") else "i8"

    @property
    def unit(self) -> str:
        """The hardware behind it: configurations with the same unit take turns, others can run at the same time."""
        return str(self) if self.kind is DeviceKind.SIM else self.device.removesuffix(".0")

    def __str__(self) -> str:
        return f"{self.device}@{self.variant}"


KERNEL_VARIANTS = ("kernels", "kernels+f16")  # of a CPU: edgert's own kernels, keys and values in INT8 or in f16

# What a bare device name means. On a CPU, f32 with INT8 dynamic quantization decodes compressed weights as fast as any
# configuration does (docs/benchmarks.md), is there on every CPU, and is exact for weights that are not compressed. On a
# GPU static shapes are the form in which sequences can be many, and come and go (backends/gpustate.py).
DEFAULT_VARIANTS = {
    DeviceKind.CPU: "f32+dq",
    DeviceKind.GPU: "f16+static",
    DeviceKind.NPU: "f16",
    DeviceKind.ORT: "CPU",
    DeviceKind.SIM: "f32",
}


@dataclass(frozen=True)
class DeviceInfo:
    """A device that is present.

    Attributes:
        name: as in `DeviceConfig.device`.
        full_name: the vendor's name of it.
        variants: the configurations it can be used in, default first.
        emulated: its results are right but its speed means nothing, so no timing of it is ever reported.
        details: further facts as text, e.g. `{"isa": "AVX2 AVX512_VNNI", "memory": "23.4 GiB"}`.
        memory_bytes: what it can use; None where that is the machine's memory, or unknown.
        lacking: configurations that such a device can have and this one has not now, with the reason in one line.
    """

    name: str
    full_name: str
    variants: tuple[str, ...]
    emulated: bool
    details: dict[str, str]
    memory_bytes: int | None = None
    lacking: dict[str, str] = field(default_factory=dict)

    @property
    def configs(self) -> tuple[DeviceConfig, ...]:
        return tuple(DeviceConfig(self.name, variant) for variant in self.variants)
