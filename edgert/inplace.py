"""Run a submodel whose keys and values are the host's, and are changed in place by edgert's own kernels.

The kernels take one cache a layer as an input and write the new rows into it, so the cache is no state of the device:
it grows here, and it is read, replaced and cut back here, without a run. States of the model that no cache stands for
are the device's, as everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgert.backends.base import Array, BindingCompiled, Tensor
from edgert.device import DeviceConfig
from edgert.errors import DeviceFailedError
from edgert.graph import BOUNDARY
from edgert.kvcache import TOKEN_AXIS
from edgert.kvlayout import BLOCK_TOKENS, CACHE, PAST, blocks_of

if TYPE_CHECKING:
    from edgert.kernel_lowering import LoweredCache

_LEAST_BLOCKS = 16  # of a cache that is not empty


class KernelCompiled:
    """A submodel with edgert's kernels in it. See `edgert.backends.base.Compiled`.

    Args:
        compiled: with an input `cache.N` for each of `caches`, and `past`, i64 `[1]`, if anything asks for it.
        caches: in the order of their numbers.
        context: tokens that a cache never need be larger than.
        config: what it runs on, for messages.
        weights: memory that the submodel reads as long as it is there.
    """

    def __init__(
        self,
        compiled: BindingCompiled,
        caches: Sequence[LoweredCache],
        context: int,
        config: DeviceConfig,
        weights: Sequence[Array] = (),
    ) -> None:
        self._compiled = compiled
        self._weights = weights
        self.caches = tuple(caches)
        self.context = context
        self.config = config
        self.owned = {PAST, *(f"{CACHE}{number}" for number in range(len(caches)))} & compiled.inputs
        self.inputs = compiled.inputs - self.owned

    def runner(self) -> KernelRunner:
        return KernelRunner(self, self._compiled)


class KernelRunner:
    """See `edgert.backends.base.Runner`.

    Attributes:
        past: tokens whose keys and values are in the caches.
    """

    def __init__(self, compiled: KernelCompiled, below: BindingCompiled) -> None:
        self._compiled = compiled
        self._runner = below.runner()
        self._rows = BOUNDARY if BOUNDARY in compiled.inputs else "input_ids"  # has as many rows as there are tokens
        self._caches = [cache.layout.empty(0) for cache in compiled.caches]
        self._room = 0  # tokens that every cache can hold
        self._past = np.zeros(1, np.int64)  # where the kernels read it
        self.past = 0
        if PAST in compiled.owned:
            self._runner.bind(PAST, self._past)

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        end = self.past + inputs[self._rows].shape[1]
        if end > self._room:
            self._reserve(end)
        self._past[0] = self.past
        outputs = self._runner.infer(inputs)
        self.past = end if self._caches else 0
        return outputs

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        states = self._runner.read_states(names)
        for cache, array in zip(self._compiled.caches, self._caches, strict=True):
            if names is None or cache.key_state in names:
                states[cache.key_state] = cache.layout.read_keys(array, self.past)
            if names is None or cache.value_state in names:
                states[cache.value_state] = cache.layout.read_values(array, self.past)
        return states

    def write_states(self, states: Mapping[str, Array]) -> None:
        self._runner.write_states(states)
        lengths = {
            states[name].shape[TOKEN_AXIS]
            for cache in self._compiled.caches
            for name in (cache.key_state, cache.value_state)
            if name in states
        }
        if not lengths:
            return
        if len(lengths) > 1:
            raise ValueError(f"keys and values are of {sorted(lengths)} tokens, expected the same number of all")
        (tokens,) = lengths
        self._reserve(tokens)
        for cache, array in zip(self._compiled.caches, self._caches, strict=True):
            if cache.key_state in states:
                cache.layout.write_keys(array, states[cache.key_state])
            if cache.value_state in states:
                cache.layout.write_values(array, states[cache.value_state])
        self.past = tokens

    def rewind(self, tokens: int) -> bool:
        if not self._runner.rewind(tokens):  # it keeps states of its own
            return False
        self.past = min(self.past, tokens)
        return True

    def reset(self) -> None:
        self._runner.reset()
        self.past = 0

    def _reserve(self, tokens: int) -> None:
        """Make room in every cache, each time at least twice as much, and keep what is in them."""
        if tokens <= self._room:
            return
        needed, used = blocks_of(tokens), blocks_of(self.past)
        wanted = max(needed, 2 * blocks_of(self._room), _LEAST_BLOCKS)
        blocks = max(needed, min(wanted, blocks_of(self._compiled.context)))
        try:
            for number, cache in enumerate(self._compiled.caches):
                larger = cache.layout.empty(blocks)
                larger[:used] = self._caches[number][:used]
                self._runner.bind(f"{CACHE}{number}", larger)
                self._caches[number] = larger
        except MemoryError as error:
            config = self._compiled.config
            raise DeviceFailedError(f"{config} failed: no memory for the keys and values of {tokens} tokens") from error
        self._room = blocks * BLOCK_TOKENS
