"""A device that does not exist: right results, no speed.

It runs submodels on OpenVINO's CPU plugin in f32 and, in its `f16` configuration, rounds what crosses its boundary to
f16, as a GPU or NPU does. It lets plans over several devices be tried, and device failures be rehearsed, anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgert.backends.base import Tensor, as_array
from edgert.backends.openvino import BACKEND as OPENVINO
from edgert.backends.openvino import OpenVinoCompiled, OpenVinoRunner
from edgert.device import DeviceConfig, DeviceInfo
from edgert.errors import DeviceFailedError
from edgert.graph import BOUNDARY

if TYPE_CHECKING:
    import openvino as ov

_VARIANTS = ("f32", "f16")


class SimulatedRunner:
    """See `edgert.backends.base.Runner`."""

    def __init__(self, runner: OpenVinoRunner, config: DeviceConfig, fail_after: int | None) -> None:
        self._runner = runner
        self._config = config
        self._calls_left = fail_after
        self.read_states = runner.read_states
        self.write_states = runner.write_states
        self.reset = runner.reset

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._calls_left is not None:
            if self._calls_left == 0:
                raise DeviceFailedError(f"{self._config} failed: simulated device lost")
            self._calls_left -= 1
        if self._config.variant == "f32":
            return self._runner.infer(inputs)
        outputs = self._runner.infer(_through_f16(inputs))
        return _through_f16(outputs)


class SimulatedCompiled:
    """See `edgert.backends.base.Compiled`."""

    def __init__(self, compiled: OpenVinoCompiled, config: DeviceConfig, fail_after: int | None) -> None:
        self._compiled = compiled
        self._config = config
        self._fail_after = fail_after
        self.inputs = compiled.inputs
        self.states_writable = compiled.states_writable

    def runner(self) -> SimulatedRunner:
        return SimulatedRunner(self._compiled.runner(), self._config, self._fail_after)


class SimulatedBackend:
    """See `edgert.backends.base.Backend`.

    Args:
        fail_after: every runner fails after so many calls; None for a device that never fails.
    """

    def __init__(self, fail_after: int | None = None) -> None:
        self.fail_after = fail_after

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo("SIM", "simulated device (right results, no speed)", _VARIANTS, True, {})]

    def compile(self, model: ov.Model | Path, config: DeviceConfig) -> SimulatedCompiled:
        return SimulatedCompiled(OPENVINO.compile(model, DeviceConfig("CPU", "f32")), config, self.fail_after)


def _through_f16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if BOUNDARY not in tensors:
        return tensors
    return {**tensors, BOUNDARY: as_array(tensors[BOUNDARY]).astype(np.float16).astype(np.float32)}


BACKEND = SimulatedBackend()
