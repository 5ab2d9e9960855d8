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
    return _load(_MODULES[kind]).devices(kind)


def devices() -> list[DeviceInfo]:
    """All devices that can be used now, real ones first."""
    found: list[DeviceInfo] = []
    for module in dict.fromkeys(_MODULES.values()):
        if module != "onnxruntime" or find_spec("onnxruntime"):
            found += _load(module).devices()
    return found


def info_of(config: DeviceConfig) -> DeviceInfo:
    """The device that a configuration names; of several GPUs `GPU` is the first, `GPU.0`.

    Raises:
        UnknownDeviceError: there is no such device or configuration here; the message lists those of its kind.
        MissingDependencyError: the backend's package is not installed.
    """
    infos = devices_of(config.kind)
    for info in infos:
        if info.name in {config.device, f"{config.device}.0"} and config.variant in info.variants:
            return info
    known = ", ".join(str(c) for info in infos for c in info.configs) or f"no configuration of {config.kind}"
    reason = next((f": {why}" for info in infos if (why := info.lacking.get(config.variant))), "")
    raise UnknownDeviceError(f"device {config} is not available here{reason}; available: {known}")


def require(config: DeviceConfig) -> Backend:
    """The backend that drives a device configuration; raises as `info_of`."""
    info_of(config)
    return _load(_MODULES[config.kind])
