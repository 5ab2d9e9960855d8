"""A GPU that keeps keys and values as its own state, and what its plugin needs to do so rightly.

OpenVINO's GPU plugin (2026.4.1) reuses the memory of a state when a run has the shapes of the compiled model's last
one. After a reset, or after a state was written, that memory is another sequence's and the logits are wrong; a state
that was never computed cannot be written; and requests of one compiled model share what they should not. All of this
was found with the plugin's own code on an emulated device (tests/test_gpu.py); nothing of it depends on the kernels. So
a sequence begins with a run of another length that is thrown away, and two sequences never share a compiled model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping

import numpy as np
import openvino as ov

from edgert.backends.base import Array, Tensor, as_array
from edgert.backends.openvino import OpenVinoCompiled, OpenVinoRunner, failing
from edgert.device import DeviceConfig
from edgert.graph import BOUNDARY


class GpuStateRunner(OpenVinoRunner):
    """See `edgert.backends.base.Runner`."""

    def __init__(self, compiled: ov.CompiledModel, outputs: list[str], config: DeviceConfig) -> None:
        super().__init__(compiled, outputs, config)
        self._empty = True
        self._prepared = False  # for states to be written

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._empty:
            tokens = as_array(inputs[BOUNDARY if BOUNDARY in inputs else "input_ids"]).shape[1]
            self._throw_away(2 if tokens == 1 else 1)
            super().reset()
            self._empty = False
        self._prepared = False
        return super().infer(inputs)

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        return {} if self._empty else super().read_states(names)

    def write_states(self, states: Mapping[str, Array]) -> None:
        if not self._prepared:
            self._throw_away(1)
        super().write_states(states)
        self._empty, self._prepared = False, True

    def reset(self) -> None:
        self._empty, self._prepared = True, False

    def _throw_away(self, tokens: int) -> None:
        """Run on so many tokens, without any before them."""
        super().reset()
        inputs: dict[str, Tensor] = {}
        for name, port in self._ports.items():
            shape = port.get_partial_shape()
            # All open dimensions but the batch are the number of new tokens, or of all tokens: here the same.
            sizes = [(tokens if axis else 1) if dim.is_dynamic else dim.get_length() for axis, dim in enumerate(shape)]
            inputs[name] = np.ones(sizes, port.get_element_type().to_dtype())
        super().infer(inputs)


class GpuStateCompiled(OpenVinoCompiled):
    """See `edgert.backends.base.Compiled`.

    Args:
        compile: compiles the submodel, once for each sequence that is alive.
    """

    def __init__(self, compile: Callable[[], ov.CompiledModel], outputs: list[str], config: DeviceConfig) -> None:
        super().__init__(compile(), outputs, config)
        self._compile = compile
        self._lock = threading.Lock()
        self._taken: Callable[[], GpuStateRunner | None] = lambda: None

    def runner(self) -> GpuStateRunner:
        with self._lock, failing(self._config):
            if self._taken() is not None:
                return GpuStateRunner(self._compile(), self._outputs, self._config)
            runner = GpuStateRunner(self._compiled, self._outputs, self._config)
            self._taken = weakref.ref(runner)
            return runner
