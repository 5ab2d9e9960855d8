"""Rotary position embeddings that neither torch.export nor OpenVINO takes as transformers writes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from edgert.converters.general.adaptation import Adaptation, replaced
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class _Complex:
    """Complex numbers as two real tensors: as much of `torch.Tensor` as a rotation by complex factors uses."""

    real: torch.Tensor
    imag: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.real.device

    def __mul__(self, other: _Complex | float) -> _Complex:
        if not isinstance(other, _Complex):
            return _Complex(self.real * other, self.imag * other)
        return _Complex(
            self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real
        )

    def __getitem__(self, index: Any) -> _Complex:
        return _Complex(self.real[index], self.imag[index])

    def unsqueeze(self, axis: int) -> _Complex:
        return _Complex(self.real.unsqueeze(axis), self.imag.unsqueeze(axis))

    def to(self, device: torch.device) -> _Complex:
        return _Complex(self.real.to(device), self.imag.to(device))


def _polar(size: torch.Tensor, angle: torch.Tensor) -> _Complex:
    return _Complex(size * angle.cos(), size * angle.sin())


def _view_as_complex(pairs: torch.Tensor) -> _Complex:
    return _Complex(pairs[..., 0], pairs[..., 1])


def _view_as_real(numbers: _Complex) -> torch.Tensor:
    return torch.stack((numbers.real, numbers.imag), dim=-1)


def _turns_by_complex_factors(model: PreTrainedModel) -> bool:
    return any("polar" in _own_forward(module).__code__.co_names for module in _rotary_modules(model))


def _real_rotations(model: PreTrainedModel) -> AbstractContextManager[None]:
    return replaced(
        (torch, "polar", _polar),
        (torch, "view_as_complex", _view_as_complex),
        (torch, "view_as_real", _view_as_real),
    )


class _With:
    """A module as another one sees it, but for some attributes."""

    def __init__(self, module: torch.nn.Module, values: dict[str, Any]) -> None:
        self._module = module
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _depends_on_length(model: PreTrainedModel) -> bool:
    return any(_types_of_length(module) for module in _rotary_modules(model))


def _types_of_length(module: torch.nn.Module) -> dict[str | None, str]:
    """The kinds of rotary embedding of a module that look at the sequence, by type of layer (None: for all)."""
    kinds = module.rope_type
    found = kinds if isinstance(kinds, dict) else {None: kinds}
    return {layer: kind for layer, kind in found.items() if kind == "longrope" or "dynamic" in str(kind)}


@contextmanager
def _frequencies_from_positions(model: PreTrainedModel) -> Iterator[None]:
    with ExitStack() as stack:
        for module in _rotary_modules(model):
            if _types_of_length(module):
                stack.enter_context(replaced((module, "forward", _with_frequencies(module))))
        yield


def _with_frequencies(module: torch.nn.Module) -> Callable[..., Any]:
    """`module.forward` with frequencies that are computed in the graph from the positions of the call.

    As in `transformers.modeling_rope_utils.dynamic_rope_update`: what counts is the highest position of the call,
    whatever the cache was written with.
    """
    own = _own_forward(module)
    kinds = _types_of_length(module)
    initial = {layer: _frequencies(module, layer, kind) for layer, kind in kinds.items()}

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        more = {} if layer_type is None else {"layer_type": layer_type}
        if layer_type not in kinds:
            return own(module, x, position_ids, **more)
        inv_freq = initial[layer_type](position_ids.max() + 1)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        with torch.no_grad():
            return own(_With(module, {name: inv_freq}), x, position_ids, **more)

    return forward


def _frequencies(module: torch.nn.Module, layer: str | None, kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Inverse frequencies [head_dim / 2] as a function of the sequence's length, a scalar tensor."""
    config = module.config
    initialise = ROPE_INIT_FUNCTIONS[kind]
    more = {} if layer is None else {"layer_type": layer}
    if kind != "longrope":
        return lambda length: initialise(config, length.device, seq_len=length, **more)[0]
    parameters = config.rope_parameters if layer is None else config.rope_parameters[layer]
    switch = parameters["original_max_position_embeddings"]
    short, long = (initialise(config, None, seq_len=length, **more)[0] for length in (switch, switch + 1))
    return lambda length: torch.where(length > switch, long, short)


def _rotary_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "rope_type")]


def _own_forward(module: torch.nn.Module) -> Any:
    """The forward of a module's class without transformers' decorators."""
    return inspect.unwrap(type(module).forward)


ROPE = (
    Adaptation(
        name="real-valued rotations",
        reason="llama4, deepseek_v2: `No conversion rule found for operations: aten.polar.default`",
        until="OpenVINO's PyTorch frontend translates aten.polar and products of complex tensors",
        applies=_turns_by_complex_factors,
        apply=_real_rotations,
    ),
    Adaptation(
        name="frequencies from positions",
        reason="longrope (phi3) and dynamic: `Could not guard on data-dependent expression` of `if seq_len > original`",
        until="transformers selects the frequencies with torch.where",
        applies=_depends_on_length,
        apply=_frequencies_from_positions,
    ),
)
