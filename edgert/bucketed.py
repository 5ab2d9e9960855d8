"""Run a submodel with static shapes for any number of tokens.

`StaticCompiled` looks to the executor like any other compiled submodel. Inside it compiles the shapes it needs when it
needs them, pads what comes in, and keeps keys and values on the host, in buckets that grow with the sequence.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

import numpy as np

from edgert.backends.base import Array, Runner, Tensor, TensorCompiled, TensorRunner, as_array
from edgert.graph import BOUNDARY
from edgert.shapes import KEEP, NEW, PAST, QUERY, TOTAL, Axes, StaticShape, StaticShapes

# What hides a slot in an additive mask: far below any score, and within f16's range even after a score is added.
HIDDEN_SLOT = -32768.0


class StaticCompiled:
    """A submodel with static shapes. See `edgert.backends.base.Compiled`.

    Args:
        build: compiles the submodel for one shape.
        guard: wraps the runners; the cache stays outside of it, so that it outlives a device that hangs.
        axes: dimensions of the prelude tensors that the submodel takes.
        caches: heads and head size of each state, by id.
        shapes: what to compile for.
        head: whether this is the head alone, which takes one row at a time.
    """

    def __init__(
        self,
        build: Callable[[StaticShape], TensorCompiled],
        guard: Callable[[TensorRunner], Runner],
        axes: Mapping[str, Axes],
        caches: Mapping[str, tuple[int, int]],
        shapes: StaticShapes,
        *,
        head: bool,
    ) -> None:
        self._build = build
        self.guard = guard
        self.axes = dict(axes)
        self.caches = dict(caches)
        self.shapes = shapes
        self.head = head
        self.inputs = frozenset({BOUNDARY, *axes, *([KEEP] if head else [])})
        self._compiled: OrderedDict[StaticShape, TensorCompiled] = OrderedDict()
        self._lock = threading.Lock()
        self.usual_query = 1  # of the phase that was prepared last

    def shape_for(self, tokens: int, past: int) -> StaticShape:
        shape = self.shapes.fit(tokens, past)
        return shape if self.caches else StaticShape(shape.query, 0)

    def compiled(self, shape: StaticShape) -> TensorCompiled:
        """The submodel compiled for a shape; the one that was not used for longest is given up for a new one."""
        with self._lock:
            if shape not in self._compiled:
                self._compiled[shape] = self._build(shape)
            self._compiled.move_to_end(shape)
            # Those of one bucket, and one more while a sequence moves to its next bucket.
            while len(self._compiled) > len(self.shapes.chunks) + 2:
                self._compiled.popitem(last=False)
            return self._compiled[shape]

    @property
    def every_shape(self) -> list[StaticShape]:
        """All that it can be asked for."""
        queries = (1,) if self.head else (1, *self.shapes.chunks)
        return [StaticShape(q, bucket) for q in queries for bucket in (self.shapes.buckets if self.caches else (0,))]

    def prepare(self, *, prefill: bool) -> None:
        """Compile now what a phase begins with, so that the first sequence need not wait for it."""
        bucket = self.shapes.buckets[0]
        tokens = min(self.shapes.chunks[-1], bucket) if prefill and not self.head else 1
        shape = self.shape_for(tokens, 0)
        self.usual_query = shape.query
        self.compiled(shape)

    def runner(self) -> StaticRunner:
        return StaticRunner(self)


class StaticRunner:
    """See `edgert.backends.base.Runner`.

    Attributes:
        past: tokens whose keys and values are in the cache.
    """

    def __init__(self, compiled: StaticCompiled) -> None:
        self._compiled = compiled
        self._runners: dict[StaticShape, Runner] = {}  # of the current bucket
        self._inputs: dict[StaticShape, dict[str, Tensor]] = {}  # what each of them reads
        self._cache: dict[str, Tensor] = {}  # state -> [1, heads, bucket, head_dim]
        self._bucket = 0
        self.past = 0

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = as_array(inputs[BOUNDARY])
        if not self._compiled.head:
            return self._infer(rows, inputs)
        keep = int(as_array(inputs[KEEP])[0])
        start = rows.shape[1] - keep
        outputs = self._infer(rows[:, start : start + 1], inputs)
        if keep == 1:
            return outputs
        every = {name: [as_array(a).copy()] for name, a in outputs.items()}
        for row in range(start + 1, rows.shape[1]):
            for name, a in self._infer(rows[:, row : row + 1], inputs).items():
                every[name].append(as_array(a).copy())
        return {name: np.concatenate(arrays, axis=1) for name, arrays in every.items()}

    def _infer(self, rows: Array, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, past = rows.shape[1], self.past
        fit = self._compiled.shape_for(tokens, past)
        shape = StaticShape(fit.query, max(fit.past, self._bucket))  # a bucket that is there stays
        if shape.past > self._bucket:
            self._move(shape.past, self.read_states())
        runner, own = self._prepare(shape)
        target = as_array(own[BOUNDARY])
        np.copyto(target[:, :tokens], rows, casting="same_kind")
        target[:, tokens:] = target[:, tokens - 1 : tokens]  # padding that is like the rest, so no norm divides by zero
        for name, axes in self._compiled.axes.items():
            pad(as_array(own[name]), as_array(inputs[name]), axes, tokens=tokens, past=past, slots=shape.past)
        outputs = runner.infer(own)
        for state, cache in self._cache.items():
            as_array(cache)[:, :, past : past + tokens] = as_array(outputs[f"{NEW}{state}"])[:, :, :tokens]
        self.past = past + tokens if self._cache else 0
        rows_of = {name.removeprefix(NEW): as_array(a) for name, a in outputs.items()}
        return {name: a[:, :tokens] for name, a in rows_of.items() if name not in self._cache}

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        return {
            state: as_array(cache)[:, :, : self.past].copy()
            for state, cache in self._cache.items()
            if names is None or state in names
        }

    def write_states(self, states: Mapping[str, Array]) -> None:
        rows = {state: a for state, a in states.items() if state in self._compiled.caches}
        if rows:
            self.past = next(iter(rows.values())).shape[2]
            self._move(self._compiled.shapes.bucket(self.past), rows)

    def rewind(self, tokens: int) -> bool:
        if self._compiled.shapes.bucket(tokens) != self._bucket:  # a smaller one is quicker from now on
            return False
        self.past = min(self.past, tokens)  # what is in the slots behind it the mask hides
        return True

    def reset(self) -> None:
        self.past = 0
        for cache in self._cache.values():
            as_array(cache).fill(0)  # what a mask hides still takes part, times zero: it must be finite

    def _move(self, bucket: int, rows: Mapping[str, Array]) -> None:
        """A cache of another size, with these rows at its beginning."""
        if bucket != self._bucket:
            before = self._runners, self._inputs, self._cache, self._bucket
            self._runners, self._inputs, self._cache, self._bucket = {}, {}, {}, bucket
            try:  # now, so that the rows go into the device's own memory at once
                self._prepare(StaticShape(self._compiled.usual_query, bucket))
            except BaseException:  # the rows that are there can still be read
                self._runners, self._inputs, self._cache, self._bucket = before
                raise
        for state, a in rows.items():
            as_array(self._cache[state])[:, :, : a.shape[2]] = a

    def _prepare(self, shape: StaticShape) -> tuple[Runner, dict[str, Tensor]]:
        if shape not in self._runners:
            runner = self._compiled.compiled(shape).runner()
            own = {name: runner.input_tensor(name) for name in (BOUNDARY, *self._compiled.axes)}
            fresh = list(own.values())
            if (
                not self._runners
            ):  # the first shape of a bucket has the cache in its device's memory, the others read it
                self._cache = {state: runner.input_tensor(f"{PAST}{state}") for state in self._compiled.caches}
                fresh += self._cache.values()
            for tensor in fresh:
                as_array(tensor).fill(0)  # padding and empty slots are computed with, too
            own |= {f"{PAST}{state}": cache for state, cache in self._cache.items()}
            self._runners[shape], self._inputs[shape] = self._compiled.guard(runner), own
        return self._runners[shape], self._inputs[shape]


def pad(target: Array, source: Array, axes: Axes, *, tokens: int, past: int, slots: int) -> None:
    """Write a mask or a table of `tokens` rows into one with static dimensions.

    Args:
        target: with `query` rows and, in a mask, `slots + query` columns. A boolean mask is True where a row may look;
            any other is added to the scores.
        source: with `tokens` rows and, in a mask, `past + tokens` columns; a boolean one may go into one to be added.
        axes: what the dimensions are; see `edgert.static.prelude_axes`.
        tokens: new tokens; rows after them are padding, which may look anywhere, as nobody looks at it.
        past: tokens before them.
        slots: columns for the tokens before them; those that are empty are hidden.
    """
    rows = [slice(None)] * len(axes)
    if QUERY in axes:
        rows[axes.index(QUERY)] = slice(0, tokens)
    if TOTAL not in axes:
        target[tuple(rows)] = source
        return
    boolean = target.dtype == np.bool_
    target.fill(True if boolean else 0)
    target[tuple(rows)] = False if boolean else HIDDEN_SLOT
    column = axes.index(TOTAL)
    for start, first, count in ((0, 0, past), (slots, past, tokens)):
        into, out_of = list(rows), [slice(None)] * len(axes)
        into[column], out_of[column] = slice(start, start + count), slice(first, first + count)
        part = source[tuple(out_of)]
        if not boolean:
            part = np.where(part, 0, HIDDEN_SLOT) if part.dtype == np.bool_ else np.maximum(part, HIDDEN_SLOT)
        target[tuple(into)] = part
