"""Whole ONNX models on onnxruntime's execution providers: `ORT@CPU`, `ORT@DML`, `ORT@OpenVINO` …

The caches are inputs and outputs of the graph (`past_key_values.0.key` -> `present.0.key`). Between calls they stay in
host memory as OrtValues, and what one call gives the next one takes without a copy on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.backends.base import Array, Tensor, as_array
from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.errors import DeviceFailedError, MissingDependencyError
from edgert.graph import Block

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependencyError(f"ONNX bundles need onnxruntime: pip install edgert[onnx] ({error})") from error

if TYPE_CHECKING:
    import openvino as ov

_SUFFIX = "ExecutionProvider"
_PAST, _PRESENT = "past_key_values.", "present."
_REMOTE = "Azure"  # sends single operators to a service and runs nothing here
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRunner:
    """See `edgert.backends.base.Runner`."""

    def __init__(self, session: Any, output: str, pasts: dict[str, str], config: DeviceConfig) -> None:
        self._session = session
        self._output = output
        self._pasts = pasts  # past input -> present output
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._config = config
        self._states: dict[str, Any] = {}
        self.reset()

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = next((name for name in self._inputs if name not in self._states and name not in inputs), None)
        if missing is not None:
            raise DeviceFailedError(f"{self._config}: the model wants an input {missing!r}, which nothing gives")
        with _failing(self._config, "failed"):
            binding = self._session.io_binding()
            for name in self._inputs:
                value = self._states[name] if name in self._states else _value(as_array(inputs[name]))
                binding.bind_ortvalue_input(name, value)
            for name in (self._output, *self._pasts.values()):
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            results = binding.get_outputs()
            output = results[0].numpy()
        self._states = dict(zip(self._pasts, results[1:], strict=True))
        return {self._output: output}

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        return {n: value.numpy().copy() for n, value in self._states.items() if names is None or n in names}

    def write_states(self, states: Mapping[str, Array]) -> None:
        self._states.update({name: _value(array) for name, array in states.items()})

    def rewind(self, tokens: int) -> bool:
        return False

    def reset(self) -> None:
        for name in self._pasts:
            port = self._inputs[name]
            # Batch is 1; the other open dimension is the number of tokens, none yet.
            shape = [1, *(d if isinstance(d, int) else 0 for d in port.shape[1:])]
            if port.type not in _TYPES or 0 not in shape:
                raise DeviceFailedError(
                    f"{self._config}: cache {name!r} is {port.type} {port.shape}, expected a float or float16 tensor "
                    "with an open number of tokens"
                )
            with _failing(self._config, f"cannot hold cache {name!r}"):
                self._states[name] = _value(np.zeros(shape, _TYPES[port.type]))


class OnnxCompiled:
    """See `edgert.backends.base.Compiled`. Outputs beside the first and the caches, such as a pooler's, are ignored."""

    def __init__(self, session: Any, config: DeviceConfig) -> None:
        self._session = session
        self._config = config
        inputs, outputs = ([port.name for port in ports] for ports in (session.get_inputs(), session.get_outputs()))
        presents = {name for name in outputs if name.startswith(_PRESENT)}
        self._pasts = {name: _PRESENT + name[len(_PAST) :] for name in inputs if name.startswith(_PAST)}
        if unpaired := sorted(presents ^ set(self._pasts.values())):
            cache = unpaired[0].removeprefix(_PRESENT)
            raise DeviceFailedError(f"{config}: the model has only one of {_PAST}{cache} and {_PRESENT}{cache}")
        others = [name for name in outputs if name not in presents]
        if not others:
            raise DeviceFailedError(f"{config}: the model has no output beside its caches")
        self._output = others[0]
        self.inputs = frozenset(inputs) - set(self._pasts)

    def runner(self) -> OnnxRunner:
        return OnnxRunner(self._session, self._output, self._pasts, self._config)


class OnnxBackend:
    """See `edgert.backends.base.Backend`."""

    def devices(self, kind: DeviceKind | None = None) -> list[DeviceInfo]:
        if kind not in {None, DeviceKind.ORT}:
            return []
        variants = tuple(sorted(_providers(), key=lambda v: v != "CPU"))
        return [DeviceInfo("ORT", f"onnxruntime {ort.__version__}", variants, False, {})]

    def compile(self, model: ov.Model | Path, config: DeviceConfig, blocks: Sequence[Block] = ()) -> OnnxCompiled:
        provider = config.variant + _SUFFIX
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with _failing(config, "cannot load the model"):
            # Without fallback: else a provider that does not start is replaced by the CPU in silence.
            session = ort.InferenceSession(str(model), options, providers=[provider], enable_fallback=0)
            _check_provider(session, provider)
        return OnnxCompiled(session, config)


def _check_provider(session: Any, provider: str) -> None:
    """Raise `DeviceFailedError` unless most of the model runs on the provider that was asked for.

    Not all of it: providers leave what only computes shapes to the CPU on purpose. `session.disable_cpu_ep_fallback`
    would refuse those models, e.g. for 2 nodes of 243 that the OpenVINO provider does not take.
    """
    nodes: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        nodes[subgraph.ep_name] += len(subgraph.get_nodes())
    if session.get_providers()[0] != provider or 2 * nodes[provider] < nodes.total():
        raise DeviceFailedError(f"{provider} takes {nodes[provider]} of the model's {nodes.total()} nodes")


def _providers() -> list[str]:
    names = [name.removesuffix(_SUFFIX) for name in ort.get_available_providers()]
    return [name for name in names if name != _REMOTE]


def _value(array: Array) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


@contextmanager
def _failing(config: DeviceConfig, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime raises classes of its C++ module that share no base but Exception
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DeviceFailedError(f"{config} {what}: {first}") from error


BACKEND = OnnxBackend()
