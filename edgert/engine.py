"""Keeps sequences going: finds a KV cache that can be used again, and another device when one fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from edgert.backends.base import Array
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.errors import (
    BundleError,
    DeviceError,
    DeviceFailedError,
    DeviceNonsenseError,
    MissingBlobError,
    PlanError,
    UsageError,
)
from edgert.executor import DEVICE_TIMEOUT_S, Executor, SequenceRun
from edgert.features import Media
from edgert.kvcache import KvCache, trim
from edgert.placement import Plan
from edgert.results import Clock, Event
from edgert.shapes import StaticShapes

log = logging.getLogger("edgert")
WORTH_CUTTING = 2  # a single token, e.g. one that every prompt begins with, is not worth a longer cache


class Engine:
    """A bundle on a plan, with its idle sequences; may be used from several threads.

    Args:
        chunk: tokens of a prompt that are prefilled in one go.
        max_idle: sequences that keep their KV cache when nobody runs them.
        fallback: what takes over from a device that fails; None to let the error through.
        shapes, timeout_s: see `Executor`.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        chunk: int,
        max_idle: int,
        fallback: DeviceConfig | None,
        shapes: StaticShapes | None = None,
        timeout_s: float = DEVICE_TIMEOUT_S,
    ) -> None:
        self._bundle = bundle
        self._chunk = chunk
        self._max_idle = max_idle
        self._fallback = fallback
        self._shapes = shapes
        self._timeout_s = timeout_s
        self._idle: list[SequenceRun] = []
        self._lock = threading.Lock()
        self._replacing = threading.Lock()
        self._failed: dict[str, str] = {}  # hardware and what happened to it
        self.preparing: threading.Thread | None = None  # compiles what an NPU lacks, while another device serves
        try:
            self.executor = self._execute(plan)
        except MissingBlobError as error:
            if fallback is None:
                raise
            reason = f"{error}; {fallback} serves until it is compiled"
            log.warning("%s", reason)
            self.executor = self._execute(self._without(plan, error.unit or "NPU", reason))
            self.preparing = threading.Thread(target=self._complete, args=(plan,), daemon=True)
            self.preparing.start()

    @property
    def _room(self) -> int:
        """How many sequences may be idle; where each holds a copy of the weights, one."""
        return min(self._max_idle, 1) if self.executor.exclusive else self._max_idle

    def _complete(self, plan: Plan) -> None:
        try:
            executor = self._execute(plan, complete=True)
            with self._replacing:
                for unit, reason in self._failed.items():  # what failed in the meantime stays out
                    if unit in {config.unit for config in executor.plan.configs}:
                        executor = self._execute(self._without(executor.plan, unit, reason))
                self.replace(executor)
            log.info("the submodels for the NPU are compiled; it serves from now on")
        except Exception as error:  # of whatever kind: the thread has nobody else to tell
            log.warning("the NPU stays unused: %s", error)

    def _without(self, plan: Plan, unit: str, reason: str) -> Plan:
        assert self._fallback is not None
        plan = plan.replaced(unit, self._fallback, reason)
        return plan.with_host(self._bundle.graph) if self._bundle.graph else plan

    def take(self, tokens: Sequence[int], media: Media | None = None) -> SequenceRun:
        """The idle sequence with the longest common beginning, cut back to it; a fresh one where there is none.

        It is cut back by at least one token of the prompt, as only a token that runs gives logits.

        Args:
            media: what is behind negative tokens; see `edgert.features`.
        """
        run = self._taken(tokens)
        run.media = media or {}
        return run

    def _taken(self, tokens: Sequence[int]) -> SequenceRun:
        with self._lock:
            best = max(self._idle, key=lambda run: _common(run.tokens, tokens), default=None)
            if best is not None:
                common = _common(best.tokens, tokens)
                if 2 * common < best.past and common < max(len(tokens) - 1, WORTH_CUTTING):
                    # Another conversation's cache: leave it, or, where there is no room for one more, take the oldest.
                    best = self._idle[0] if len(self._idle) >= self._room else None
            if best is not None:
                self._idle.remove(best)
        if best is None:
            return self.executor.open()
        try:
            best.rewind(min(_common(best.tokens, tokens), len(tokens) - 1))
        except DeviceFailedError:  # if the device is gone, the first call of a fresh sequence will tell
            return self.executor.open()
        return best

    def give_back(self, run: SequenceRun) -> None:
        """Keep a sequence for later prompts, the oldest ones make room."""
        run.media = {}
        with self._lock:
            if run.executor is self.executor:
                self._idle.append(run)
                del self._idle[: max(0, len(self._idle) - self._room)]

    def clear(self) -> None:
        """Drop all idle sequences."""
        with self._lock:
            self._idle.clear()

    def advance(
        self, run: SequenceRun, tokens: Sequence[int], clock: Clock, cancel: threading.Event | None = None
    ) -> tuple[SequenceRun, Array | None]:
        """Let a sequence catch up with `tokens`, which begin with its own; on another device if this one fails.

        Returns:
            The sequence, a new one if a device failed, and `[1, vocab]` logits after the last token; None where it was
            cancelled.

        Raises:
            DeviceFailedError: the device failed and nothing can take over.
        """
        while True:
            rest = tokens[run.past :]
            try:
                if len(rest) == 1:
                    logits: Array | None = run.forward(rest)
                else:
                    logits = run.prefill(rest, chunk=self._chunk, cancel=cancel)
                return run, logits
            except DeviceFailedError as error:
                run = self._fail_over(run, error, clock)
                if len(tokens) > run.executor.context:  # the fallback has less room: nothing can be done
                    raise
            finally:
                clock.devices(len(tokens) > clock.prompt_tokens, run.infer_us, run.handover_us)

    def _fail_over(self, run: SequenceRun, error: DeviceFailedError, clock: Clock) -> SequenceRun:
        unit, fallback = error.unit, self._fallback
        if unit is None or fallback is None or unit == fallback.unit or self._bundle.facts.format == "onnx":
            raise error
        with self._replacing:  # one thread compiles, the others that saw the same device fail wait for it
            self._failed.setdefault(unit, str(error))
            if unit in {config.unit for config in self.executor.plan.configs}:
                try:
                    self.replace(self._execute(self._without(self.executor.plan, unit, str(error))))
                except (DeviceError, PlanError) as second:
                    raise error from second
        states = None if isinstance(error, DeviceNonsenseError) else run.salvage()
        fresh = self.executor.open()
        if states is not None:
            try:
                fresh.write_states(run.tokens, states)
            except DeviceFailedError:  # this one fails, too: the first call will tell
                fresh = self.executor.open()
        fresh.media = run.media
        done = "keys and values were moved" if fresh.tokens else "the tokens are prefilled again"
        event = Event("failover", unit, run.past, f"{error}; {fallback} goes on, {done}")
        log.warning("failover at token %d: %s", event.tokens, event.detail)
        clock.events.append(event)
        return fresh

    def replace(self, executor: Executor) -> None:
        """Let new sequences run on another executor; those that run go on where they are."""
        with self._lock:
            self.executor = executor
            self._idle.clear()

    def export(self, tokens: Sequence[int], media: Media | None = None) -> KvCache:
        """The keys and values of a sequence; what is not in a cache yet is prefilled.

        Raises:
            UsageError: the model is recurrent.
        """
        if self.executor.recurrent:
            raise UsageError("KV cache: it cannot be exported, the model is recurrent")
        run, _ = self.advance(self.take(tokens, media), tokens, Clock("measured"))
        states = trim(run.read_states(), len(tokens))
        self.give_back(run)
        assert states is not None
        return KvCache(self._bundle.fingerprint, tuple(tokens), states)

    def adopt(self, cache: KvCache) -> None:
        """Keep a cache, from wherever it comes, for the prompts that begin with its tokens.

        Raises:
            UsageError: it belongs to another model, is longer than the context, or the model is recurrent.
        """
        if cache.model != self._bundle.fingerprint:
            raise UsageError(f"KV cache: it belongs to model {cache.model}, this one is {self._bundle.fingerprint}")
        if not cache.tokens or len(cache.tokens) > self.executor.context:
            raise UsageError(f"KV cache: holds {len(cache.tokens)} tokens, expected 1 to {self.executor.context}")
        if self.executor.recurrent:
            raise UsageError("KV cache: it cannot be imported, the model is recurrent")
        if not self._room:
            raise UsageError("KV cache: max_idle is 0, so there is no room to keep it")
        run = self.executor.open()
        self._check(cache.states, len(cache.tokens), run.read_states())
        try:
            run.write_states(cache.tokens, cache.states)
        except ValueError as error:  # NumPy's: rows of other sizes
            raise BundleError(f"KV cache: it does not fit the model: {error}") from error
        self.give_back(run)

    def _check(self, states: Mapping[str, Array], tokens: int, empty: Mapping[str, Array]) -> None:
        graph = self._bundle.graph
        known = {state for block in graph.blocks for state in block.states} if graph else set(empty)
        if known != set(states):
            raise BundleError(f"KV cache: holds {len(states)} states, the model has {len(known)}")
        for name, rows in states.items():
            own = empty.get(name, rows)  # what a device keeps itself it describes
            if rows.ndim != 4 or rows.shape != (1, own.shape[1], tokens, own.shape[3]):
                raise BundleError(f"KV cache: state {name!r} is {list(rows.shape)} for {tokens} tokens")
            if not np.isfinite(rows).all():
                raise BundleError(f"KV cache: state {name!r} holds infinite values or NaN")
        for block in graph.blocks if graph else ():
            values = sum(states[state].shape[1] * states[state].shape[3] for state in block.states)
            if block.kv_bytes_per_token not in {2 * values, 4 * values}:  # f16 or f32, whichever the model has
                raise BundleError(
                    f"KV cache: {block.name} has {values} values a token, the model {block.kv_bytes_per_token} bytes"
                )

    def _execute(self, plan: Plan, *, complete: bool = False) -> Executor:
        return Executor(self._bundle, plan, shapes=self._shapes, timeout_s=self._timeout_s, complete=complete)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
