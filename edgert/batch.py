"""Several sequences in one call of the device, and the choice between that and one after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from edgert.backends.base import Array, Tensor, as_array
from edgert.device import DeviceConfig
from edgert.errors import CacheFullError, DeviceFailedError, UsageError
from edgert.executor import Executor
from edgert.features import FEATURE_MASK, FEATURES, Media, Taken
from edgert.inplace import KernelCompiled
from edgert.kvcache import TOKEN_AXIS
from edgert.kvlayout import BLOCK_TOKENS, SEQUENCES, blocks_of
from edgert.lanes import Lane, Lanes, SerialLanes, check_budget, check_work
from edgert.regions import Region, Regions
from edgert.shapes import KEEP

__all__ = ["BatchedLane", "BatchedLanes", "Lane", "Lanes", "SerialLanes", "open_lanes"]

# What a model may take beside its caches to be run for several sequences at once.
_BATCH_INPUTS = frozenset({"input_ids", "position_ids", KEEP, FEATURES, FEATURE_MASK})
_MOST_LOGITS = 64  # rows of logits beyond the last one of the longest, which nobody may want and all take memory


def open_lanes(executor: Executor, *, kv_bytes: int) -> Lanes:
    """The lanes of an executor.

    Args:
        kv_bytes: the budget for keys and values of all lanes together.

    Raises:
        UsageError: the budget does not hold a single token.
    """
    (first, *more), *others = executor.chains
    taken = executor.taken
    if not more and not others and executor.max_chunk == executor.context and not taken.axes:
        compiled = first.compiled
        if isinstance(compiled, KernelCompiled) and compiled.batched and compiled.inputs <= _BATCH_INPUTS:
            config = first.placement.config
            return BatchedLanes(compiled, config, context=executor.context, kv_bytes=kv_bytes, taken=taken)
    return SerialLanes(executor, kv_bytes=kv_bytes)


class BatchedLane:
    """See `Lane`: a region of the pool."""

    def __init__(self, lanes: BatchedLanes, region: Region) -> None:
        self.region: Region | None = region
        self.tokens: list[int] = []
        self.media: Media = {}
        self._lanes = lanes

    @property
    def kv_bytes(self) -> int:
        return 0 if self.region is None else self.region.used * self._lanes.block_bytes

    def rewind(self, length: int) -> int:
        del self.tokens[length:]
        self._lanes.shrink(self)
        return len(self.tokens)

    def fork(self) -> BatchedLane | None:
        return self._lanes.fork(self)

    def export(self) -> dict[str, Array]:
        return self._lanes.export(self)

    def restore(self, tokens: Sequence[int], states: Mapping[str, Array]) -> None:
        self._lanes.restore(self, tokens, states)

    def close(self) -> None:
        if self.region is not None:
            self._lanes.forget(self.region)
            self.region = None
            self.tokens = []


class BatchedLanes:
    """See `Lanes`: edgert's kernels on the CPU, where one look at the weights serves the new tokens of all lanes.

    The keys and values of all lanes lie in one pool a layer, each lane's in consecutive blocks, which move when they
    must.

    Args:
        compiled: the whole model, which takes several sequences and nothing but `input_ids`, `position_ids`,
            `logits_to_keep` and `features` with their mask beside its caches.
        config: what it runs on, for messages.
        context: see `Lanes`.
        kv_bytes: the budget.
        taken: what the model takes beside tokens.
    """

    batched = True
    together = False

    def __init__(
        self,
        compiled: KernelCompiled,
        config: DeviceConfig,
        *,
        context: int,
        kv_bytes: int,
        taken: Taken | None = None,
    ) -> None:
        self._taken = taken or Taken()
        self.context = self.max_chunk = context
        self.infer_us = 0.0
        self.block_bytes = compiled.block_bytes
        check_budget(kv_bytes, self.block_bytes)
        self._kv_bytes = kv_bytes
        self._config = config
        self._regions = Regions(kv_bytes // self.block_bytes)
        self._pool = compiled.pool(self._regions.blocks)
        self._last: tuple[tuple[int, int], dict[str, Array], dict[str, Tensor]] | None = None

    def open(self) -> BatchedLane:
        return BatchedLane(self, self._regions.open())

    def step(self, work: Sequence[tuple[Lane, Sequence[int]]]) -> list[Array]:
        wants: dict[Region, int] = {}
        parts: list[_Part] = []
        for lane, tokens in check_work(self, work):
            region = self._region(lane)
            blocks = blocks_of(len(lane.tokens) + len(tokens))
            if blocks > region.used:
                wants[region] = blocks
            assert isinstance(lane, BatchedLane)
            parts.append((region, lane.tokens, tokens, lane.media))
        if wants:
            self._reserve(wants)
        self.infer_us = 0.0
        if not parts:
            return []
        if len(parts) == sum(len(tokens) for _, _, tokens, _ in parts):  # the common case, and the one to be quick in
            return list(self._run(parts))
        # The longest first: its earlier rows are those whose logits can be left out, and its attention takes longest.
        order = sorted(range(len(parts)), key=lambda i: -len(parts[i][2]))
        logits: dict[int, Array] = {}
        while order:
            now = _fitting([len(parts[i][2]) for i in order])
            found = self._run([parts[i] for i in order[:now]])
            order, done = order[now:], order[:now]
            logits |= zip(done, found.copy() if order else found, strict=True)
        return [logits[i] for i in range(len(parts))]

    def room(self) -> int:
        return self._regions.free * BLOCK_TOKENS

    def shrink(self, lane: BatchedLane) -> None:
        """A lane was cut back."""
        self._regions.shrink(self._region(lane), blocks_of(len(lane.tokens)))

    def fork(self, lane: BatchedLane) -> BatchedLane | None:
        """See `Lane.fork`."""
        source = self._region(lane)
        if source.used > self._regions.free:
            return None
        copy = self.open()
        target = self._region(copy)
        self._reserve({target: source.used})
        self._pool.move(source.first, target.first, source.used)
        copy.tokens = list(lane.tokens)
        return copy

    def export(self, lane: BatchedLane) -> dict[str, Array]:
        """See `Lane.export`."""
        return self._pool.read_states(self._region(lane).first, len(lane.tokens))

    def restore(self, lane: BatchedLane, tokens: Sequence[int], states: Mapping[str, Array]) -> None:
        """See `Lane.restore`."""
        region = self._region(lane)
        if wrong := {rows.shape[TOKEN_AXIS] for rows in states.values()} - {len(tokens)}:
            raise UsageError(f"lane: keys and values of {sorted(wrong)} tokens, there are {len(tokens)}")
        self._reserve({region: blocks_of(len(tokens))})
        self._pool.write_states(region.first, states)
        lane.tokens = list(tokens)
        self.shrink(lane)

    def forget(self, region: Region) -> None:
        """A lane is closed; with the last one all memory is given back."""
        self._regions.close(region)
        if not len(self._regions):
            self._pool.release()

    def _region(self, lane: Lane) -> Region:
        if not isinstance(lane, BatchedLane) or lane.region is None or lane.region not in self._regions:
            raise UsageError("lane: it is closed, or of other lanes")
        return lane.region

    def _reserve(self, wants: Mapping[Region, int]) -> None:
        if (missing := self._regions.missing(wants)) > 0:
            raise CacheFullError(
                f"keys and values: {missing} blocks of {BLOCK_TOKENS} tokens more than the budget of {self._kv_bytes} "
                f"bytes holds, which is {self._regions.blocks}"
            )
        self._pool.reserve()
        for move in self._regions.reserve(wants):
            self._pool.move(move.source, move.target, move.count)

    def _run(self, work: Sequence[_Part]) -> Array:
        """Append tokens to those of regions: logits `[lanes, vocab]`. The longest comes first."""
        start = time.perf_counter_ns()
        longest, count = len(work[0][2]), sum(len(tokens) for _, _, tokens, _ in work)
        arrays, inputs = self._inputs(count, len(work))
        ids, positions, sequences = arrays["input_ids"][0], arrays["position_ids"][0], arrays[SEQUENCES]
        arrays[KEEP][0] = count - longest + 1
        at, lasts = 0, []
        for number, (region, before, tokens, media) in enumerate(work):
            length, past = len(tokens), len(before)
            end = at + length
            if length == 1 and tokens[0] >= 0:
                ids[at], positions[at] = tokens[0], past
            else:
                if self._taken.width:
                    self._last = None  # the next call begins with no features, even where these cannot be had
                self._taken.fill(arrays, tokens, media, at)
                positions[at:end] = np.arange(past, past + length)
            sequences[number, 0], sequences[number, 1], sequences[number, 2] = length, past, region.first
            lasts.append(end - longest)
            at = end
        try:
            outputs = self._pool.infer(inputs)
        except DeviceFailedError as error:
            error.unit = self._config.unit
            raise
        for _, before, tokens, _ in work:
            before += tokens
        logits: Array = as_array(next(iter(outputs.values())))[0]
        self.infer_us += (time.perf_counter_ns() - start) / 1000
        return logits if count == len(work) else np.take(logits, lasts, axis=0)

    def _inputs(self, rows: int, lanes: int) -> tuple[dict[str, Array], dict[str, Tensor]]:
        """Arrays to be filled in, and what the runner is given: the same as last time where they are of the same size,
        so that the device's own tensors over their memory need not be set again."""
        if self._last is None or self._last[0] != (rows, lanes):
            arrays: dict[str, Array] = {
                "input_ids": np.zeros((1, rows), np.int64),
                "position_ids": np.zeros((1, rows), np.int64),
                KEEP: np.zeros(1, np.int64),
                SEQUENCES: np.zeros((lanes, 3), np.int64),
                **self._taken.zeros(rows),
            }
            self._last = (rows, lanes), arrays, {**arrays}
        return self._last[1], self._last[2]


_Part = tuple[Region, list[int], Sequence[int], Media]
"""Where a lane's blocks are, its tokens, those that are appended, and what is behind them."""


def _fitting(lengths: Sequence[int]) -> int:
    """How many lanes, the longest first, one call runs."""
    total = 0
    for number, length in enumerate(lengths[1:], 1):
        total += length
        if total > _MOST_LOGITS:
            return number
    return len(lengths)
