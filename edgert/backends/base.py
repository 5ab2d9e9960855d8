"""What a backend is: it finds devices, compiles submodels for them, and runs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.graph import Block

if TYPE_CHECKING:
    from pathlib import Path

    import openvino as ov

Array = NDArray[Any]
Tensor = Any
"""An array, or what a runner of some backend gave; `as_array` makes an array of either without a copy."""


def as_array(tensor: Tensor) -> Array:
    """The array that a tensor is a view of."""
    array: Array = tensor if isinstance(tensor, np.ndarray) else tensor.data
    return array


class Runner(Protocol):
    """One independent run of a compiled submodel: its own buffers and its own states. Not for two threads at once."""

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run once.

        Args:
            inputs: by input name, at least those in `Compiled.inputs`; others are ignored. A runner may put its own
                kind of tensor in the place of an array, so that the next one need not make it again.

        Returns:
            The outputs by name, in the model's order, valid until the next call: the device's buffers, no copies.

        Raises:
            DeviceFailedError: the device reported an error.
        """
        ...

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """Copies of all states, or of those that are named, by variable id.

        Keys and values are `[batch, heads, tokens, head_dim]`.
        """
        ...

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Replace the states that are named."""
        ...

    def rewind(self, tokens: int) -> bool:
        """Keep the first `tokens` of all keys and values, if that takes no more than forgetting the others.

        Returns:
            False, and nothing changed, where the states must be read, cut and written instead.
        """
        ...

    def reset(self) -> None:
        """Empty all states."""
        ...


class TensorRunner(Runner, Protocol):
    """A runner of a submodel with static shapes."""

    def input_tensor(self, name: str) -> Tensor:
        """The runner's own memory for an input, where the device reads it without a copy if it can."""
        ...


class BindingRunner(Runner, Protocol):
    """A runner that lets its caller own some inputs."""

    def bind(self, name: str, array: Array) -> None:
        """Let every later run read an input from this contiguous array, as it is then; `infer` is not given it."""
        ...


class Compiled(Protocol):
    """A submodel compiled for one device configuration; makes any number of runners."""

    @property
    def inputs(self) -> frozenset[str]: ...

    def runner(self) -> Runner: ...


class TensorCompiled(Compiled, Protocol):
    """A submodel with static shapes, compiled."""

    def runner(self) -> TensorRunner: ...


class BindingCompiled(Compiled, Protocol):
    """A compiled submodel some of whose inputs are the caller's."""

    def runner(self) -> BindingRunner: ...


class Backend(Protocol):
    """One way to execute models."""

    def devices(self, kind: DeviceKind | None = None) -> list[DeviceInfo]:
        """The devices that are present and usable now; with a kind those of that kind, and no other is looked at."""
        ...

    def compile(self, model: ov.Model | Path, config: DeviceConfig, blocks: Sequence[Block] = ()) -> Compiled:
        """Compile a submodel, or a model file, for one of the configurations of `devices()`.

        Args:
            blocks: what the submodel is made of, for backends that reckon with it.

        Raises:
            DeviceFailedError: the compiler rejected the model.
        """
        ...
