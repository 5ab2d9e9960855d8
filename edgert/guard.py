"""Calls into devices whose drivers may hang, or give nonsense: a time limit, and a look at what comes back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np

from edgert.backends.base import Array, Runner, Tensor, as_array
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import DeviceHungError, DeviceNonsenseError

T = TypeVar("T")
_TRUSTED = {DeviceKind.CPU, DeviceKind.ORT}
FIRST_CALL_FACTOR = 10  # a first call may compile kernels


class GuardedRunner:
    """A runner whose calls come back in time or fail. See `edgert.backends.base.Runner`.

    The calls are made on a thread of their own. One that does not come back is left to itself, with all that it
    holds: there is no way to take a thread out of a driver.

    Args:
        runner: what is guarded.
        config: what it runs on, for messages.
        timeout_s: seconds that a call may take; ten times as many for the first one.

    Raises:
        DeviceHungError: from any method, when a call took too long, and at once from every later one.
        DeviceNonsenseError: from `infer`, when an output holds NaN.
    """

    def __init__(self, runner: Runner, config: DeviceConfig, timeout_s: float) -> None:
        self._runner = runner
        self._config = config
        self._timeout_s = timeout_s * FIRST_CALL_FACTOR
        self._later_s = timeout_s
        self._hung: DeviceHungError | None = None
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls, self._answers), daemon=True, name=f"{config}").start()
        weakref.finalize(self, self._calls.put, None)

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._call(lambda: self._runner.infer(inputs))
        self._timeout_s = self._later_s
        for name, tensor in outputs.items():
            array = as_array(tensor)
            if array.dtype.kind == "f" and _has_nan(array):
                raise DeviceNonsenseError(f"{self._config} failed: NaN in its output {name!r}")
        return outputs

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        return self._call(lambda: self._runner.read_states(names))

    def write_states(self, states: Mapping[str, Array]) -> None:
        self._call(lambda: self._runner.write_states(states))

    def rewind(self, tokens: int) -> bool:
        return self._call(lambda: self._runner.rewind(tokens))

    def reset(self) -> None:
        self._call(self._runner.reset)

    def _call(self, work: Callable[[], T]) -> T:
        if self._hung is not None:
            raise self._hung
        self._calls.put(work)
        try:
            answer, error = self._answers.get(timeout=self._timeout_s)
        except Empty:
            self._hung = DeviceHungError(f"{self._config} failed: no answer within {self._timeout_s:g} s")
            raise self._hung from None
        if error is not None:
            raise error
        result: T = answer
        return result


def _has_nan(array: Array) -> bool:
    # The sum is quicker than a look at every element; it is NaN for +inf and -inf too, and may overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        total = array.sum(dtype=np.float32)
    return bool(np.isnan(total)) and bool(np.isnan(array).any())


def guarded(runner: Runner, config: DeviceConfig, timeout_s: float) -> Runner:
    """The runner, guarded where there is a driver in between that could hang."""
    return runner if config.kind in _TRUSTED else GuardedRunner(runner, config, timeout_s)


def _serve(
    calls: SimpleQueue[Callable[[], Any] | None], answers: SimpleQueue[tuple[Any, BaseException | None]]
) -> None:
    while (work := calls.get()) is not None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))
        del work  # or it would keep the last inputs alive until the next call
