"""A model's caches as plain tensors, whatever kind of layer they belong to.

What a layer keeps between tokens is found out by running the model once with a cache of its own making. Each tensor is
a state `N.key`, `N.value` [batch, heads, past, head_dim], `N.conv` [batch, channels, kernel] or `N.recurrent`
[batch, heads, ...], where N is the number of the layer. A layer has those that it fills: keys and values, or the inputs
of a short convolution and the state of a recurrence, or all, or none where it is a feed-forward network only or reads
the keys and values of another layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from edgert.errors import ConversionError

# What a state is called and the attribute of transformers' cache layers that holds it.
_PARTS = {"key": "keys", "value": "values", "conv": "conv_states", "recurrent": "recurrent_states"}
GROWING = ("key", "value")


@dataclass(frozen=True)
class State:
    """One tensor that a layer keeps between tokens.

    Attributes:
        layer: the number of the layer.
        part: `key`, `value`, `conv` or `recurrent`.
        example: a tensor of its shape and type; keys and values have as many tokens as were asked for.
    """

    layer: int
    part: str
    example: torch.Tensor

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.part}"

    @property
    def grows(self) -> bool:
        """Whether it has one row a token, on axis 2."""
        return self.part in GROWING


@dataclass(frozen=True)
class Layout:
    """What the cache of a model consists of.

    Attributes:
        states: all tensors, layer by layer.
        layers: for each layer whether its cache is one of attention, and whether it is one of a recurrence.
    """

    states: tuple[State, ...]
    layers: tuple[tuple[bool, bool], ...]

    @property
    def recurrent(self) -> bool:
        return any(not state.grows for state in self.states)

    @property
    def kernel(self) -> int:
        """The longest short convolution, in tokens; 0 without any."""
        return max((state.example.shape[-1] for state in self.states if state.part == "conv"), default=0)


class _Recurrent(LinearAttentionLayer):
    """A layer whose states are replaced, not written into, by what continues from them (`recurrent.py`)."""

    def update_conv_state(self, conv_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Announces the layer whose convolution and recurrence come next; `conv_states` forgets what was before."""
        _current.set(self)
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.recurrent_states = recurrent_states
        return recurrent_states


class _RecurrentAndAttention(_Recurrent, LinearAttentionAndFullAttentionLayer):
    pass


class TracedCache(DynamicCache):
    """A cache of given tensors, in which every sequence is the continuation of an earlier one.

    Layers are told that they have no state, so that they compute many tokens at once, which `recurrent.py` makes
    continue from the state they have. The model as a whole is told that there is one, so that it looks at no mask.
    """

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        return layer_idx is None


_current: ContextVar[_Recurrent] = ContextVar("current recurrent layer")


def current_layer() -> Any:
    """The layer of a `TracedCache` that announced itself last: the one that is being traced."""
    return _current.get()


def cache_argument(model: PreTrainedModel) -> str:
    """What `model.forward` calls its cache."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def layout(model: PreTrainedModel, batch: int, past: int) -> Layout:
    """What `model` keeps between tokens: a run of `batch` x `past` tokens tells.

    Raises:
        ConversionError: it keeps nothing, or something of another kind.
    """
    ids = torch.ones(batch, past, dtype=torch.long)
    with torch.no_grad():
        cache: Any = getattr(model(input_ids=ids, use_cache=True), cache_argument(model), None)
    family = model.config.model_type
    if not isinstance(getattr(cache, "layers", None), list):
        raise ConversionError(f"{family}: its cache is a {type(cache).__name__}, not one of transformers' cache layers")
    states, layers = [], []
    for number, layer in enumerate(cache.layers):
        kinds = isinstance(layer, CacheLayerMixin), isinstance(layer, LinearAttentionCacheLayerMixin)
        layers.append(kinds)
        for part, attribute in _PARTS.items():
            tensor = getattr(layer, attribute, None)
            if tensor is None:
                continue
            if part in GROWING:
                if tensor.ndim != 4:
                    shape = list(tensor.shape)
                    raise ConversionError(f"{family}: {part} of layer {number} has shape {shape}, expected 4 sizes")
                # A sliding layer has dropped some: what a window shows is the attention mask's business.
                tensor = tensor.new_zeros(batch, tensor.shape[1], past, tensor.shape[3])
            states.append(State(number, part, tensor.clone()))
    if not states:
        raise ConversionError(f"{family}: its cache has neither keys and values nor recurrent states")
    return Layout(tuple(states), tuple(layers))


def build_cache(layout: Layout, tensors: Sequence[torch.Tensor]) -> TracedCache:
    """A cache that holds `tensors`, one for each of `layout.states`."""
    cache = TracedCache()
    cache.layer_class_to_replicate = None
    for attention, recurrence in layout.layers:
        kind = DynamicLayer if not recurrence else _RecurrentAndAttention if attention else _Recurrent
        cache.layers.append(kind())
    for state, tensor in zip(layout.states, tensors, strict=True):
        layer = cache.layers[state.layer]
        setattr(layer, _PARTS[state.part], tensor)
        layer.dtype, layer.device = tensor.dtype, tensor.device
        if state.grows:
            layer.is_initialized = True
    return cache


def read_cache(layout: Layout, cache: TracedCache, before: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What `cache` holds now that the model has run.

    Raises:
        ConversionError: a state is still what it was in `before`: the layer has not gone on from it.
    """
    after = [getattr(cache.layers[state.layer], _PARTS[state.part]) for state in layout.states]
    for state, old, new in zip(layout.states, before, after, strict=True):
        if new is old:
            raise ConversionError(f"state {state.name} is not continued: the layer computes it in a way of its own")
    return after
