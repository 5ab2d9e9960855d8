"""The backends by kind of device; each is imported when it is first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from edgert.backends.base import Backend
from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.errors import UnknownDeviceError

_MODULES = {
    DeviceKind.CPU: "openvino",
    DeviceKind.GPU: "openvino",
    DeviceKind.NPU: "openvino",
    DeviceKind.ORT: "onnxruntime",
    DeviceKind.SIM: "simulated",
}


@cache
def _load(module: str) -> Backend:
    backend: Backend = import_module(f"edgert.backends.{module}").BACKEND
    return backend


def devices_of(kind: DeviceKind) -> list[DeviceInfo]:
    """The devices of one kind that can be used now."""
    return [info for info in _load(_MODULES[kind]).devices() if info.name.partition(".")[0] == kind]


def devices() -> list[DeviceInfo]:
    """All devices that can be used now, real ones first."""
    found: list[DeviceInfo] = []
    for module in dict.fromkeys(_MODULES.values()):
        if module != "onnxruntime" or find_spec("onnxruntime"):
            found += _load(module).devices()
    return found


def require(config: DeviceConfig) -> Backend:
    """The backend that drives a device configuration.

    Raises:
        UnknownDeviceError: there is no such device or configuration here; the message lists those of its kind.
        MissingDependencyError: the backend's package is not installed.
    """
    present = [c for info in devices_of(config.kind) for c in info.configs]
    if config not in present:
        known = ", ".join(map(str, present)) or f"no {config.kind} at all"
        raise UnknownDeviceError(f"device {config} is not available here; available: {known}")
    return _load(_MODULES[config.kind])
