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
from edgert.shapes import CARRIED, KEEP, NEW, PAST, QUERY, TOTAL, Axes, StaticShape, StaticShapes

# What hides a slot in an additive mask: far below any score, and within f16's range even after a score is added.
HIDDEN_SLOT = -32768.0


class StaticCompiled:
    """A submodel with static shapes. See `edgert.backends.base.Compiled`.

    Args:
        build: compiles the submodel for one shape.
        guard: wraps the runners; the cache stays outside of it, so that it outlives a device that hangs.
        axes: dimensions of the prelude and carried tensors that the submodel takes.
        caches: heads and head size of each state that grows, by id.
        shapes: what to compile for.
        head: whether this is the head alone, which takes one row at a time.
        fixed: shapes of the states that do not grow, by id. Padding would change them, so a call is made of pieces that
            fill a shape: as many chunks as there are, and single tokens.
        given: dimensions of the carried tensors that the submodel gives.
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
        fixed: Mapping[str, tuple[int, ...]] | None = None,
        given: Mapping[str, Axes] | None = None,
    ) -> None:
        self._build = build
        self.guard = guard
        self.axes = dict(axes)
        self.caches = dict(caches)
        self.fixed = dict(fixed or {})
        self.given = dict(given or {})
        # Keys and values of other submodels count as well as own ones.
        self.grows = bool(caches) or any(TOTAL in dims for dims in axes.values())
        self.shapes = shapes
        self.head = head
        self.inputs = frozenset({BOUNDARY, *axes, *([KEEP] if head else [])})
        self._compiled: OrderedDict[StaticShape, TensorCompiled] = OrderedDict()
        self._lock = threading.Lock()
        self.usual_query = 1  # of the phase that was prepared last

    def shape_for(self, tokens: int, past: int) -> StaticShape:
        shape = self.shapes.fit(tokens, past)
        return shape if self.grows else StaticShape(shape.query, 0)

    def pieces(self, tokens: int) -> list[int]:
        """The numbers of tokens of the calls that a call of so many is made of."""
        if not self.fixed:
            return [tokens]
        found = []
        for chunk in reversed((1, *self.shapes.chunks)):
            found += [chunk] * (tokens // chunk)
            tokens %= chunk
        return found

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
        return [StaticShape(q, bucket) for q in queries for bucket in (self.shapes.buckets if self.grows else (0,))]

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
        past: tokens whose keys and values are in the cache, own or other submodels'.
    """

    def __init__(self, compiled: StaticCompiled) -> None:
        self._compiled = compiled
        self._runners: dict[StaticShape, Runner] = {}  # of the current bucket
        self._inputs: dict[StaticShape, dict[str, Tensor]] = {}  # what each of them reads
        self._cache: dict[str, Tensor] = {}  # state -> [1, heads, bucket, head_dim]
        self._fixed: dict[str, Array] = {}  # state -> what it is now
        self._bucket = 0
        self.past = 0

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = as_array(inputs[BOUNDARY])
        if not self._compiled.head:
            return self._in_pieces(rows, inputs)
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

    def _in_pieces(self, rows: Array, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, axes = rows.shape[1], self._compiled.axes
        if not self._compiled.caches:  # whose past it is, the tensors of others tell
            totals = [as_array(inputs[name]).shape[a.index(TOTAL)] for name, a in axes.items() if TOTAL in a]
            self.past = totals[0] - tokens if totals else 0
        pieces = self._compiled.pieces(tokens)
        if len(pieces) == 1:
            return self._infer(rows, inputs)
        found: dict[str, list[Array]] = {}
        start, past = 0, self.past
        for count in pieces:
            end = start + count
            part: dict[str, Tensor] = {}
            for name, dims in axes.items():
                limits = {QUERY: slice(start, end), TOTAL: slice(0, past + end)}
                part[name] = as_array(inputs[name])[tuple(limits.get(str(a), slice(None)) for a in dims)]
            for name, a in self._infer(rows[:, start:end], part).items():
                found.setdefault(name, []).append(as_array(a).copy())
            start = end
            self.past = past + end
        given = self._compiled.given
        return {name: _joined(parts, given.get(name, (1, QUERY))) for name, parts in found.items()}

    def _infer(self, rows: Array, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, past = rows.shape[1], self.past
        fit = self._compiled.shape_for(tokens, past)
        shape = StaticShape(fit.query, max(fit.past, self._bucket))  # a bucket that is there stays
        if shape.past > self._bucket:
            self._move(shape.past, self.read_states(self._cache))
        runner, own = self._prepare(shape)
        target = as_array(own[BOUNDARY])
        np.copyto(target[:, :tokens], rows, casting="same_kind")
        target[:, tokens:] = target[:, tokens - 1 : tokens]  # padding that is like the rest, so no norm divides by zero
        for name, axes in self._compiled.axes.items():
            target, source = as_array(own[name]), as_array(inputs[name])
            pad(target, source, axes, tokens=tokens, past=past, slots=shape.past, hide=not name.startswith(CARRIED))
        for state, value in self._fixed.items():
            np.copyto(as_array(own[f"{PAST}{state}"]), value, casting="same_kind")
        outputs = runner.infer(own)
        for state, cache in self._cache.items():
            as_array(cache)[:, :, past : past + tokens] = as_array(outputs[f"{NEW}{state}"])[:, :, :tokens]
        for state, value in self._fixed.items():
            np.copyto(value, as_array(outputs[f"{NEW}{state}"]), casting="same_kind")
        self.past = past + tokens if self._compiled.grows else 0
        found = {}
        for name, a in ((name.removeprefix(NEW), as_array(a)) for name, a in outputs.items()):
            if name in self._compiled.given:
                found[name] = crop(a, self._compiled.given[name], tokens=tokens, past=past, slots=shape.past)
            elif name not in self._cache and name not in self._fixed:
                found[name] = a[:, :tokens]
        return found

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        rows = {state: as_array(cache)[:, :, : self.past].copy() for state, cache in self._cache.items()}
        rows |= {state: value.copy() for state, value in self._fixed.items()}
        return {state: a for state, a in rows.items() if names is None or state in names}

    def write_states(self, states: Mapping[str, Array]) -> None:
        for state, shape in self._compiled.fixed.items():
            if state in states:
                self._fixed.setdefault(state, np.zeros(shape, np.float32))[...] = states[state]
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
        for value in self._fixed.values():
            value.fill(0)

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
            own |= {f"{PAST}{state}": runner.input_tensor(f"{PAST}{state}") for state in self._compiled.fixed}
            for state, dims in self._compiled.fixed.items():
                self._fixed.setdefault(state, np.zeros(dims, np.float32))
            self._runners[shape], self._inputs[shape] = self._compiled.guard(runner), own
        return self._runners[shape], self._inputs[shape]


def _joined(parts: list[Array], axes: Axes) -> Array:
    """One tensor of those that calls for successive tokens gave; what holds all tokens the last one gave in full."""
    if TOTAL in axes or QUERY not in axes:
        return parts[-1]
    return np.concatenate(parts, axis=axes.index(QUERY))


def crop(source: Array, axes: Axes, *, tokens: int, past: int, slots: int) -> Array:
    """What of a tensor with static dimensions is no padding: `pad` the other way round."""
    rows = source
    if QUERY in axes:
        rows = rows.take(range(tokens), axis=axes.index(QUERY))
    if TOTAL in axes:
        rows = rows.take([*range(past), *range(slots, slots + tokens)], axis=axes.index(TOTAL))
    return rows


def pad(target: Array, source: Array, axes: Axes, *, tokens: int, past: int, slots: int, hide: bool = True) -> None:
    """Write a mask or a table of `tokens` rows into one with static dimensions.

    Args:
        target: with `query` rows and, in a mask, `slots + query` columns. A boolean mask is True where a row may look;
            any other is added to the scores.
        source: with `tokens` rows and, in a mask, `past + tokens` columns; a boolean one may go into one to be added.
        axes: what the dimensions are; see `edgert.static.prelude_axes`.
        tokens: new tokens; rows after them are padding, which may look anywhere, as nobody looks at it.
        past: tokens before them.
        slots: columns for the tokens before them; those that are empty are hidden.
        hide: False for keys and values of other submodels, whose empty slots are zeros; a mask hides them.
    """
    rows = [slice(None)] * len(axes)
    if QUERY in axes:
        rows[axes.index(QUERY)] = slice(0, tokens)
    if TOTAL not in axes:
        target[tuple(rows)] = source
        return
    boolean = target.dtype == np.bool_
    target.fill(True if boolean and hide else 0)
    if hide:
        target[tuple(rows)] = False if boolean else HIDDEN_SLOT
    column = axes.index(TOTAL)
    for start, first, count in ((0, 0, past), (slots, past, tokens)):
        into, out_of = list(rows), [slice(None)] * len(axes)
        into[column], out_of[column] = slice(start, start + count), slice(first, first + count)
        part = source[tuple(out_of)]
        if hide and not boolean:
            part = np.where(part, 0, HIDDEN_SLOT) if part.dtype == np.bool_ else np.maximum(part, HIDDEN_SLOT)
        target[tuple(into)] = part
