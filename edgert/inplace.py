"""Run a submodel whose keys and values are the host's, and are changed in place by edgert's own kernels.

The kernels take one cache a layer as an input and write the new rows into it, so the cache is no state of the device:
it grows here, and it is read, replaced and cut back here, without a run. States of the model that no cache stands for
are the device's, as everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgert.backends.base import Array, BindingCompiled, BindingRunner, Tensor
from edgert.device import DeviceConfig
from edgert.errors import CacheFullError, DeviceFailedError
from edgert.graph import BOUNDARY
from edgert.kvcache import TOKEN_AXIS
from edgert.kvlayout import BLOCK_TOKENS, CACHE, PAST, SEQUENCES, blocks_of

if TYPE_CHECKING:
    from edgert.kernel_lowering import LoweredCache

_LEAST_BLOCKS = 16  # of a cache that is not empty


class KernelCompiled:
    """A submodel with edgert's kernels in it. See `edgert.backends.base.Compiled`.

    Args:
        compiled: with an input `cache.N` for each of `caches`, and `past`, i64 `[1]`, if anything asks for it, or
            `sequences`, if it takes several; see `edgert.kernel_lowering.LoweredModel`.
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
        self.owned = {PAST, SEQUENCES, *(f"{CACHE}{number}" for number in range(len(caches)))} & compiled.inputs
        self.inputs = compiled.inputs - self.owned

    @property
    def batched(self) -> bool:
        """Whether it takes several sequences in one call."""
        return SEQUENCES in self.owned

    @property
    def block_bytes(self) -> int:
        """What a block takes in all caches."""
        return sum(cache.layout.heads * cache.layout.block_bytes for cache in self.caches)

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in all caches."""
        return self.block_bytes // BLOCK_TOKENS

    def runner(self) -> KernelRunner:
        return KernelRunner(self, self._compiled)

    def pool(self, blocks: int) -> KernelPool:
        """Caches for several sequences, of so many blocks; only where it is `batched`."""
        return KernelPool(self, self._compiled.runner(), blocks)


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
        self._sequence = np.zeros((1, 3), np.int64)  # where the kernels read of new tokens, past ones, the first block
        self.past = 0
        if PAST in compiled.owned:
            self._runner.bind(PAST, self._sequence[0, 1:2])
        elif SEQUENCES in compiled.owned:
            self._runner.bind(SEQUENCES, self._sequence)

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count = inputs[self._rows].shape[1]
        end = self.past + count
        if end > self._room:
            self._reserve(end)
        self._sequence[0, :2] = count, self.past
        outputs = self._runner.infer(inputs)
        self.past = end if self._caches else 0
        return outputs

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        states = self._runner.read_states(names)
        return states | _read(self._compiled.caches, self._caches, self.past, names)

    def write_states(self, states: Mapping[str, Array]) -> None:
        self._runner.write_states(states)
        tokens = _tokens_of(self._compiled.caches, states)
        if tokens is None:
            return
        self._reserve(tokens)
        _write(self._compiled.caches, self._caches, states)
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


class KernelPool:
    """The caches of several sequences in one memory, and calls that run new tokens of any of them.

    It is one memory a layer, taken when it is first needed; what is never written takes none from the system.

    Args:
        compiled: takes several sequences.
        runner: of what is below it.
        blocks: that the memory of each layer has.
    """

    def __init__(self, compiled: KernelCompiled, runner: BindingRunner, blocks: int) -> None:
        self._compiled = compiled
        self._runner = runner
        self._blocks = blocks
        self._caches: list[Array] = []

    def reserve(self) -> None:
        """Take the memory, if it is not there.

        Raises:
            CacheFullError: the system does not give it.
        """
        if not self._caches:
            try:
                self._bind([cache.layout.empty(self._blocks) for cache in self._compiled.caches])
            except MemoryError as error:
                size = self._blocks * self._compiled.block_bytes
                raise CacheFullError(f"keys and values: the system does not give {size} bytes for them") from error

    def release(self) -> None:
        """Give the memory back; what was in it is lost."""
        if self._caches:
            self._bind([cache.layout.empty(0) for cache in self._compiled.caches])
            self._caches.clear()

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run once; see `edgert.backends.base.Runner.infer`. `sequences` is among the inputs."""
        return self._runner.infer(inputs)

    def move(self, source: int, target: int, count: int) -> None:
        """Copy blocks to another place, in every layer."""
        for array in self._caches:
            array[target : target + count] = array[source : source + count]

    def read_states(self, first: int, tokens: int) -> dict[str, Array]:
        """Copies of the keys and values that lie there: `[1, heads, tokens, head_dim]` by state id."""
        caches = self._caches or [cache.layout.empty(0) for cache in self._compiled.caches]
        return _read(self._compiled.caches, [array[first:] for array in caches], tokens)

    def write_states(self, first: int, states: Mapping[str, Array]) -> None:
        """Put keys and values there, which must have room for them."""
        _write(self._compiled.caches, [array[first:] for array in self._caches], states)

    def _bind(self, caches: list[Array]) -> None:
        for number, array in enumerate(caches):
            self._runner.bind(f"{CACHE}{number}", array)
        self._caches = caches


def _read(
    caches: Sequence[LoweredCache], arrays: Sequence[Array], tokens: int, names: Collection[str] | None = None
) -> dict[str, Array]:
    """The first keys and values of caches, by state id."""
    states = {}
    for cache, array in zip(caches, arrays, strict=True):
        if names is None or cache.key_state in names:
            states[cache.key_state] = cache.layout.read_keys(array, tokens)
        if names is None or cache.value_state in names:
            states[cache.value_state] = cache.layout.read_values(array, tokens)
    return states


def _write(caches: Sequence[LoweredCache], arrays: Sequence[Array], states: Mapping[str, Array]) -> None:
    """Put keys and values at the beginning of caches that have room for them."""
    for cache, array in zip(caches, arrays, strict=True):
        if cache.key_state in states:
            cache.layout.write_keys(array, states[cache.key_state])
        if cache.value_state in states:
            cache.layout.write_values(array, states[cache.value_state])


def _tokens_of(caches: Sequence[LoweredCache], states: Mapping[str, Array]) -> int | None:
    """How many tokens the keys and values are of; None where there are none."""
    names = [name for cache in caches for name in (cache.key_state, cache.value_state) if name in states]
    lengths = {states[name].shape[TOKEN_AXIS] for name in names}
    if len(lengths) > 1:
        raise ValueError(f"keys and values are of {sorted(lengths)} tokens, expected the same number of all")
    return next(iter(lengths), None)
