"""Whole ONNX models on onnxruntime's execution providers: `ORT@CPU`, `ORT@DML`, `ORT@OpenVINO` …

The caches are inputs and outputs of the graph (`past_key_values.0.key` -> `present.0.key`); they stay on the device as
OrtValues between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.backends.base import Array
from edgert.device import DeviceConfig, DeviceInfo
from edgert.errors import DeviceFailedError, MissingDependencyError

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependencyError(f"ONNX bundles need onnxruntime: pip install edgert[onnx] ({error})") from error

if TYPE_CHECKING:
    import openvino as ov

_SUFFIX = "ExecutionProvider"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRunner:
    """See `edgert.backends.base.Runner`."""

    def __init__(self, session: Any, pasts: dict[str, str], config: DeviceConfig) -> None:
        self._session = session
        self._pasts = pasts  # past input -> present output
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._output = session.get_outputs()[0].name
        self._config = config
        self._states: dict[str, Any] = {}
        self.reset()

    def infer(self, inputs: Mapping[str, Array]) -> Array:
        binding = self._session.io_binding()
        try:
            for name in self._inputs:
                value = self._states[name] if name in self._states else _value(inputs[name])
                binding.bind_ortvalue_input(name, value)
            for name in (self._output, *self._pasts.values()):
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises classes of its C++ module that share no base but Exception
            raise DeviceFailedError(f"{self._config} failed: {str(error).splitlines()[0]}") from error
        results = binding.get_outputs()
        self._states = dict(zip(self._pasts, results[1:], strict=True))
        logits: Array = results[0].numpy()
        return logits

    def read_states(self) -> dict[str, Array]:
        return {name: value.numpy().copy() for name, value in self._states.items()}

    def write_states(self, states: Mapping[str, Array]) -> None:
        self._states.update({name: _value(array) for name, array in states.items()})

    def reset(self) -> None:
        for name in self._pasts:
            port = self._inputs[name]
            # Batch is 1; the other open dimension is the number of tokens, none yet.
            shape = [1, *(d if isinstance(d, int) else 0 for d in port.shape[1:])]
            self._states[name] = _value(np.zeros(shape, _TYPES[port.type]))


class OnnxCompiled:
    """See `edgert.backends.base.Compiled`."""

    def __init__(self, session: Any, config: DeviceConfig) -> None:
        self._session = session
        self._config = config
        names = [i.name for i in session.get_inputs()]
        presents = [o.name for o in session.get_outputs()[1:]]
        self._pasts = dict(zip([n for n in names if n.startswith("past")], presents, strict=True))
        self.inputs = frozenset(names) - set(self._pasts)

    def runner(self) -> OnnxRunner:
        return OnnxRunner(self._session, self._pasts, self._config)


class OnnxBackend:
    """See `edgert.backends.base.Backend`."""

    def devices(self) -> list[DeviceInfo]:
        variants = tuple(sorted(_providers(), key=lambda v: v != "CPU"))
        return [DeviceInfo("ORT", f"onnxruntime {ort.__version__}", variants, False, {})]

    def compile(self, model: ov.Model | Path, config: DeviceConfig) -> OnnxCompiled:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(str(model), options, providers=[config.variant + _SUFFIX])
        except Exception as error:  # see OnnxRunner.infer
            raise DeviceFailedError(f"{config} cannot load the model: {str(error).splitlines()[0]}") from error
        return OnnxCompiled(session, config)


def _providers() -> list[str]:
    return [name.removesuffix(_SUFFIX) for name in ort.get_available_providers()]


def _value(array: Array) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


BACKEND = OnnxBackend()
