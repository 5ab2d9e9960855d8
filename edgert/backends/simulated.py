"""A device that does not exist: right results, and the time and energy that a device model says.

It runs submodels on OpenVINO's CPU plugin in f32. `SIM@f32` is as fast as that happens to be; `SIM@f16` rounds what
crosses its boundary to f16, as a GPU or NPU does. `sim:NAME` follows the device model NAME (`edgert.profile`): a call
waits until the time has passed that `edgert.cost` reckons for it, so it can be slower than this machine's CPU but not
faster. Plans over several devices can be tried, and device failures be rehearsed, anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgert.backends.base import Array, Tensor, as_array
from edgert.backends.openvino import BACKEND as OPENVINO
from edgert.backends.openvino import OpenVinoCompiled, OpenVinoRunner, core
from edgert.cost import Work, call_us, handover_us
from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.errors import DeviceFailedError
from edgert.graph import BOUNDARY, Block
from edgert.profile import DeviceModel, named, names
from edgert.shapes import KEEP

if TYPE_CHECKING:
    import openvino as ov

_UNTIMED = ("f32", "f16", "f32+static")
_SPIN_S = 1e-3  # a sleep may end this much late


@dataclass(frozen=True)
class Fault:
    """How a simulated device breaks; it stays broken.

    Attributes:
        after_calls: calls of a runner that still succeed, 0 or more.
        kind: `error`: whatever is asked of the runner fails. `hang`: it does not return until
            `SimulatedBackend.released` is set, and fails then. `nan`: its results are NaN.
    """

    after_calls: int
    kind: Literal["error", "hang", "nan"] = "error"


class Clock:
    """The process's clock. Tests have one of their own, in which time passes when they say so."""

    def now_s(self) -> float:
        return time.perf_counter()

    def wait_until(self, deadline_s: float) -> None:
        while (left_s := deadline_s - self.now_s()) > 0:
            time.sleep(max(0.0, left_s - _SPIN_S))


class SimulatedDevice:
    """What all runners of one configuration share: the device's time, which it gives to one call after the other.

    Args:
        model: None for a device that takes no time of its own.
        fault: None for a device that never fails.
        released: ends what hangs.
    """

    def __init__(
        self,
        config: DeviceConfig,
        model: DeviceModel | None,
        clock: Clock,
        fault: Fault | None,
        released: threading.Event,
    ) -> None:
        self.config = config
        self.model = model
        self.half = model.precision == "f16" if model else config.variant == "f16"
        self._clock = clock
        self._fault = fault
        self._released = released
        self._lock = threading.Lock()
        self._free_s = 0.0

    @contextmanager
    def busy(self, latency_us: float) -> Iterator[None]:
        """Returns when the device has given this much time, which begins when earlier calls have had theirs.

        The time is booked on entry instead of holding a lock: calls are served in the order in which they came, which a
        lock does not promise, and what the CPU computes for a waiting call runs in the meantime.
        """
        with self._lock:
            end_s = self._free_s = max(self._clock.now_s(), self._free_s) + latency_us * 1e-6
        yield
        self._clock.wait_until(end_s)
        with self._lock:  # later than booked where the CPU took longer
            self._free_s = max(self._free_s, self._clock.now_s())

    def faulty(self, calls: int) -> bool:
        """Whether a runner's results are NaN after so many calls; raises or hangs where that is the fault."""
        if self._fault is None or calls < self._fault.after_calls:
            return False
        if self._fault.kind == "error":
            raise DeviceFailedError(f"{self.config} failed: simulated device lost")
        if self._fault.kind == "hang":
            self._released.wait()
            raise DeviceFailedError(f"{self.config} failed: simulated device hung")
        return True


class SimulatedRunner:
    """See `edgert.backends.base.Runner`.

    Attributes:
        busy_us: what its calls and hand-overs took of the device's time so far; 0 without a device model.
        energy_uj: of that time; None without a device model, or with one that does not know its watts.
    """

    def __init__(self, runner: OpenVinoRunner, compiled: SimulatedCompiled) -> None:
        self._runner = runner
        self._compiled = compiled
        self._device = compiled.device
        self._calls = 0
        self._past = 0
        self.busy_us = 0.0

    @property
    def energy_uj(self) -> float | None:
        model = self._device.model
        return None if model is None or model.active_w is None else model.active_w * self.busy_us

    def input_tensor(self, name: str) -> Tensor:
        return self._runner.input_tensor(name)

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        broken = self._device.faulty(self._calls)
        self._calls += 1
        counted = next((name for name in (BOUNDARY, "input_ids") if name in self._compiled.inputs), None)
        sizes = (1, 1) if counted is None else inputs[counted].shape  # a tower's call is one call
        rows = int(as_array(inputs[KEEP])[0]) if KEEP in self._compiled.inputs else sizes[1]
        with self._taking(self._call_us(tokens=sizes[1], rows=rows)):
            if self._device.half:
                outputs = _through_f16(self._runner.infer(_through_f16(inputs)))
            else:
                outputs = self._runner.infer(inputs)
        self._past += sizes[1]
        return {name: _nan(tensor) for name, tensor in outputs.items()} if broken else outputs

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        self._device.faulty(self._calls)
        states = self._runner.read_states(names)
        with self._taking(self._handover_us(4 * sum(array.size for array in states.values()))):
            return states

    def write_states(self, states: Mapping[str, Array]) -> None:
        self._device.faulty(self._calls)
        own = {name: array for name, array in states.items() if name in self._compiled.states}
        with self._taking(self._handover_us(4 * sum(array.size for array in own.values()))):
            self._runner.write_states(states)
        self._past = next((array.shape[2] for name, array in own.items() if name in self._compiled.caches), self._past)

    def rewind(self, tokens: int) -> bool:
        return False

    def reset(self) -> None:
        self._device.faulty(self._calls)
        self._runner.reset()
        self._past = 0

    @contextmanager
    def _taking(self, latency_us: float) -> Iterator[None]:
        with self._device.busy(latency_us):
            yield
        self.busy_us += latency_us

    def _call_us(self, tokens: int, rows: int) -> float:
        model = self._device.model
        if model is None:
            return 0.0
        compiled = self._compiled
        return call_us(model, compiled.works, tokens, self._past, rows, boundary_bytes=compiled.boundary_bytes)

    def _handover_us(self, f32_bytes: int) -> float:
        return handover_us(self._device.model, f32_bytes) if self._device.model else 0.0


class SimulatedCompiled:
    """See `edgert.backends.base.Compiled`."""

    def __init__(
        self, compiled: OpenVinoCompiled, device: SimulatedDevice, blocks: Sequence[Block], boundary_bytes: int
    ) -> None:
        self._compiled = compiled
        self.device = device
        self.works = [Work.of(block) for block in blocks]
        self.boundary_bytes = boundary_bytes
        self.states = {s for b in blocks for s in b.states}
        # Those that hold a row a token, and so tell how many tokens there are.
        self.caches = {s for b in blocks if b.kv_bytes_per_token and not b.recurrent_bytes for s in b.states}
        self.inputs = compiled.inputs

    def runner(self) -> SimulatedRunner:
        return SimulatedRunner(self._compiled.runner(), self)


class SimulatedBackend:
    """See `edgert.backends.base.Backend`.

    Args:
        fault: how every runner breaks; None for devices that never fail.
        models: the devices beside `SIM@f32` and `SIM@f16`; None for those of the profiles that come with edgert.
        clock: what time is.

    Attributes:
        released: set it to let calls return that hang.
    """

    def __init__(
        self, fault: Fault | None = None, *, models: Sequence[DeviceModel] | None = None, clock: Clock | None = None
    ) -> None:
        self.released = threading.Event()
        self._fault = fault
        self._models = None if models is None else {model.name: model for model in models}
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._devices: dict[DeviceConfig, SimulatedDevice] = {}

    def devices(self, kind: DeviceKind | None = None) -> list[DeviceInfo]:
        if kind not in {None, DeviceKind.SIM}:
            return []
        models = names() if self._models is None else tuple(self._models)
        return [DeviceInfo("SIM", "simulated device (right results, no speed)", (*_UNTIMED, *models), True, {})]

    def compile(self, model: ov.Model | Path, config: DeviceConfig, blocks: Sequence[Block] = ()) -> SimulatedCompiled:
        device = self._device(config)
        if device.model and not blocks:
            raise DeviceFailedError(f"{config} cannot tell the time of a model whose blocks are not known")
        if isinstance(model, Path):
            model = core().read_model(model)
        boundary_bytes = _bytes_per_token(model.inputs) + _bytes_per_token(model.outputs)
        return SimulatedCompiled(OPENVINO.compile(model, DeviceConfig("CPU", "f32")), device, blocks, boundary_bytes)

    def _device(self, config: DeviceConfig) -> SimulatedDevice:
        with self._lock:
            if config not in self._devices:
                model = None
                if config.variant not in _UNTIMED:
                    model = named(config.variant) if self._models is None else self._models[config.variant]
                self._devices[config] = SimulatedDevice(config, model, self._clock, self._fault, self.released)
            return self._devices[config]


def _bytes_per_token(ports: Sequence[ov.Output]) -> int:
    """Size of the residual stream among a submodel's ports for one token at f32; 0 where it is not there."""
    found = (port for port in ports if BOUNDARY in port.get_names())
    return next((4 * int(port.get_partial_shape()[2].get_length()) for port in found), 0)


def _nan(tensor: Tensor) -> Tensor:
    array = as_array(tensor)
    return np.full_like(array, np.nan) if array.dtype.kind == "f" else tensor


def _through_f16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if BOUNDARY not in tensors:
        return tensors
    return {**tensors, BOUNDARY: as_array(tensors[BOUNDARY]).astype(np.float16).astype(np.float32)}


BACKEND = SimulatedBackend()
