"""Devices that OpenVINO's plugins drive: CPU, GPU, NPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edgert import native
from edgert.backends.base import Array, Tensor
from edgert.device import DEFAULT_VARIANTS, KERNEL_VARIANTS, DeviceConfig, DeviceInfo, DeviceKind
from edgert.errors import DeviceFailedError, cause
from edgert.folders import cache_folder
from edgert.graph import Block

# What each configuration means to OpenVINO, and the capability the device must report for it.
# https://docs.openvino.ai/2026/openvino-workflow/running-inference/optimize-inference/precision-control.html
_PROPERTIES: dict[DeviceKind, dict[str, tuple[dict[str, str], str]]] = {
    DeviceKind.CPU: {
        # Weights may be compressed; activations and KV cache stay f32. The reference that others are compared with.
        "f32": (
            {
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            },
            "FP32",
        ),
        # The plugin's own defaults at f32: activations of compressed layers quantized to INT8, KV cache in u8.
        "f32+dq": ({"INFERENCE_PRECISION_HINT": "f32"}, "FP32"),
        "bf16": ({"INFERENCE_PRECISION_HINT": "bf16"}, "BF16"),
        # Static shapes, keys and values as tensors: an NPU's submodels in its stead, exactly. Without snippets, because
        # in 2026.4.1 they attend wrongly where a chunk has as many tokens as the model has heads.
        "f32+static": (
            {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "SNIPPETS_MODE": "DISABLE"},
            "FP32",
        ),
        # edgert's own kernels (see edgert.native), and the plugin as in f32+dq for what they leave to it.
        **{variant: ({"INFERENCE_PRECISION_HINT": "f32"}, "FP32") for variant in KERNEL_VARIANTS},
    },
    DeviceKind.GPU: {
        "f16": ({"INFERENCE_PRECISION_HINT": "f16"}, "FP16"),  # keys and values as the device's state: gpustate.py
        "f32": ({"INFERENCE_PRECISION_HINT": "f32"}, "FP32"),
        # Keys and values as tensors in memory that the host shares: any number of sequences, from any device.
        "f16+static": ({"INFERENCE_PRECISION_HINT": "f16"}, "FP16"),
        "f32+static": ({"INFERENCE_PRECISION_HINT": "f32"}, "FP32"),
    },
    DeviceKind.NPU: {"f16": ({}, "FP16")},
}


@cache
def core() -> ov.Core:
    """The process's one OpenVINO core."""
    return ov.Core()


def use_threads(count: int) -> None:
    """Let the CPU compute with so many threads, at least 1, whatever is compiled from now on."""
    core().set_property("CPU", {"INFERENCE_NUM_THREADS": count})


class OpenVinoRunner:
    """An infer request. See `edgert.backends.base.Runner`."""

    def __init__(self, compiled: ov.CompiledModel, outputs: list[str], config: DeviceConfig) -> None:
        self._request = compiled.create_infer_request()
        self._ports = {port.get_any_name(): port for port in compiled.inputs}
        self._inputs = list(self._ports.items())
        self._bound: dict[str, ov.Tensor] = {}
        self._outputs = list(zip(outputs, compiled.outputs, strict=True))
        self._config = config
        self._copies_states: bool | None = None

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        request, bound = self._request, self._bound
        try:
            for name, port in self._inputs:
                tensor = inputs[name]
                if not isinstance(tensor, ov.Tensor):
                    tensor = inputs[name] = ov.Tensor(tensor, shared_memory=True)
                if bound.get(name) is not tensor:  # setting one costs microseconds, and a plan may have many stages
                    request.set_tensor(port, tensor)
                    bound[name] = tensor
            request.infer(share_outputs=True)
            return {name: request.get_tensor(port) for name, port in self._outputs}
        except RuntimeError as error:
            raise DeviceFailedError(f"{self._config} failed: {cause(error)}") from error

    def bind(self, name: str, array: Array) -> None:
        tensor = ov.Tensor(array, shared_memory=True)
        with failing(self._config):
            self._request.set_tensor(self._ports[name], tensor)
        self._inputs = [(other, port) for other, port in self._inputs if other != name]

    def input_tensor(self, name: str) -> ov.Tensor:
        with failing(self._config):
            tensor = self._bound[name] = self._request.get_tensor(self._ports[name])
        return tensor

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        with failing(self._config):
            states = [s for s in self._request.query_state() if names is None or s.name in names]
            if self._copies_states is None and states:
                # The CPU plugin makes a new tensor of a cache each time it is asked; what does not is copied here.
                once, again = states[0].state, states[0].state
                self._copies_states = once.data.ctypes.data != again.data.ctypes.data
            found = {state.name: state.state.data for state in states}
            return found if self._copies_states else {name: array.copy() for name, array in found.items()}

    def write_states(self, states: Mapping[str, Array]) -> None:
        with failing(self._config):
            for state in self._request.query_state():
                if state.name in states:  # a contiguous array is read in place
                    state.state = ov.Tensor(np.ascontiguousarray(states[state.name]), shared_memory=True)

    def rewind(self, tokens: int) -> bool:
        with failing(self._config):
            return not self._request.query_state()

    def reset(self) -> None:
        with failing(self._config):
            self._request.reset_state()


class OpenVinoCompiled:
    """A compiled model. See `edgert.backends.base.Compiled`."""

    def __init__(self, compiled: ov.CompiledModel, outputs: list[str], config: DeviceConfig) -> None:
        self._compiled = compiled
        self._outputs = outputs
        self._config = config
        self.inputs = frozenset(port.get_any_name() for port in compiled.inputs)

    def runner(self) -> OpenVinoRunner:
        with failing(self._config):
            return OpenVinoRunner(self._compiled, self._outputs, self._config)


class OpenVinoBackend:
    """See `edgert.backends.base.Backend`."""

    def devices(self, kind: DeviceKind | None = None) -> list[DeviceInfo]:
        found = []
        # The list of all loads every plugin and wakes every driver, which a model on the CPU need not wait for.
        for name in [str(kind)] if kind is DeviceKind.CPU else core().available_devices:
            # A driver that is half there lists a device and then fails to describe it. That must not cost the others.
            with suppress(RuntimeError):
                if _kind(name) in (_PROPERTIES if kind is None else {kind}):
                    found.append(_info(name))
        return found

    def compile(self, model: ov.Model | Path, config: DeviceConfig, blocks: Sequence[Block] = ()) -> OpenVinoCompiled:
        properties = dict(_PROPERTIES[config.kind][config.variant][0])
        if (
            config.kind is DeviceKind.GPU
        ):  # its kernels take long to compile; without the weights, which are in the bundle
            properties |= {"CACHE_DIR": str(cache_folder() / "gpu"), "CACHE_MODE": "OPTIMIZE_SIZE"}
        try:
            if isinstance(model, Path):
                model = core().read_model(model)
            # Plugins fuse operations and gather their names, so of the compiled model's names any may come first.
            outputs = [port.get_any_name() for port in model.outputs]
            if config.kind is DeviceKind.GPU and model.get_sinks():
                from edgert.backends.gpustate import GpuStateCompiled

                return GpuStateCompiled(lambda: core().compile_model(model, config.device, properties), outputs, config)
            return OpenVinoCompiled(core().compile_model(model, config.device, properties), outputs, config)
        except RuntimeError as error:
            raise DeviceFailedError(f"{config} cannot compile the model: {cause(error)}") from error

    def load_blob(self, blob: Path, config: DeviceConfig) -> OpenVinoCompiled:
        """A compiled submodel out of what its compiler wrote.

        Raises:
            DeviceFailedError: the driver does not take it.
        """
        try:
            with blob.open("rb") as stream:
                compiled = core().import_model(stream, config.device)
            return OpenVinoCompiled(compiled, [port.get_any_name() for port in compiled.outputs], config)
        except (RuntimeError, OSError) as error:
            raise DeviceFailedError(f"{config} does not take {blob.name}: {cause(error)}") from error


def _kind(openvino_name: str) -> DeviceKind | None:
    kind = openvino_name.partition(".")[0]
    return DeviceKind(kind) if kind in DeviceKind.__members__ else None


@cache
def _info(name: str) -> DeviceInfo:
    kind = DeviceKind(name.partition(".")[0])
    full_name = str(core().get_property(name, "FULL_DEVICE_NAME"))
    capabilities = [str(c) for c in core().get_property(name, "OPTIMIZATION_CAPABILITIES")]
    lacking = _lacking(kind)
    variants = [v for v, (_, needed) in _PROPERTIES[kind].items() if needed in capabilities and v not in lacking]
    default = DEFAULT_VARIANTS[kind]
    return DeviceInfo(
        name=name,
        full_name=full_name,
        variants=tuple(sorted(variants, key=lambda v: v != default)),
        # An OpenCL layer that presents a CPU as a GPU says so in its name.
        emulated="emulated" in full_name.lower(),
        details={
            "capabilities": " ".join(capabilities),
            **_details(name, kind),
            **({} if variants else {"note": "not used by this version"}),
        },
        memory_bytes=_memory_bytes(name, kind),
        lacking=lacking,
    )


def _lacking(kind: DeviceKind) -> dict[str, str]:
    """Why there are no kernels, by the configurations that want them."""
    if kind is not DeviceKind.CPU:
        return {}
    reason = native.status().reason
    return {} if reason is None else dict.fromkeys(KERNEL_VARIANTS, f"the native kernels do not load: {reason}")


def _memory_bytes(name: str, kind: DeviceKind) -> int | None:
    with suppress(RuntimeError):
        if kind is not DeviceKind.CPU:
            return int(core().get_property(name, f"{kind}_DEVICE_TOTAL_MEM_SIZE"))
    return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


# What to tell of a device: what it is called, OpenVINO's property, and how its value reads.
_DETAILS: dict[DeviceKind, tuple[tuple[str, str, Callable[[Any], str]], ...]] = {
    DeviceKind.GPU: (
        ("type", "DEVICE_TYPE", lambda value: value.name.lower()),
        ("architecture", "GPU_UARCH_VERSION", str),
        ("execution units", "GPU_EXECUTION_UNITS_COUNT", str),
        ("memory", "GPU_DEVICE_TOTAL_MEM_SIZE", _gib),
        ("largest allocation", "GPU_DEVICE_MAX_ALLOC_MEM_SIZE", _gib),
    ),
    DeviceKind.NPU: (
        ("platform", "DEVICE_ARCHITECTURE", str),
        ("tiles", "NPU_MAX_TILES", str),
        ("memory", "NPU_DEVICE_TOTAL_MEM_SIZE", _gib),
        ("driver", "NPU_DRIVER_VERSION", str),
        ("compiler", "NPU_COMPILER_VERSION", lambda value: f"{value >> 16}.{value & 0xFFFF}"),
    ),
}


def _details(name: str, kind: DeviceKind) -> dict[str, str]:
    found = {}
    for label, key, read in _DETAILS.get(kind, ()):
        with suppress(RuntimeError):  # older drivers do not know every property
            found[label] = read(core().get_property(name, key))
    return found


@contextmanager
def failing(config: DeviceConfig) -> Iterator[None]:
    """Makes OpenVINO's errors `DeviceFailedError`."""
    try:
        yield
    except RuntimeError as error:  # OpenVINO's only class of errors
        raise DeviceFailedError(f"{config} failed: {cause(error)}") from error


BACKEND = OpenVinoBackend()
