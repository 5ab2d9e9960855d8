"""Executes a plan: submodels compiled for their devices, and sequences that run through them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.backends import info_of, require
from edgert.backends.base import Array, Runner, Tensor, as_array
from edgert.bundle import Bundle
from edgert.chain import Chain
from edgert.device import DeviceKind
from edgert.errors import BundleError, DeviceFailedError, PlanError
from edgert.features import FEATURE_MASK, FEATURES, IMAGE_IDS, Media, Places, Taken, beginning, check_media, whole
from edgert.graph import BOUNDARY
from edgert.inplace import KernelCompiled
from edgert.kvcache import trim
from edgert.pipeline import Segment, run_chunks
from edgert.placement import Plan
from edgert.shapes import StaticShapes
from edgert.stages import Stage, build

if TYPE_CHECKING:
    import threading

    from edgert.npu.library import Library

# What `SequenceRun` can give to a submodel.
INPUTS = frozenset({
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "beam_idx", "logits_to_keep",
    FEATURES, FEATURE_MASK, IMAGE_IDS,
})  # fmt: skip
PREFILL, DECODE = 0, -1  # chains; the same one where a plan does not tell the phases apart
DEVICE_TIMEOUT_S = 60.0
MASK_TOKENS = 256  # that a sequence's mask has room for at first


class Executor:
    """A bundle's model, compiled as a plan says; opens any number of sequences, one thread each.

    Args:
        bundle: the model.
        plan: one or more placements; with one, the model is compiled uncut. An ONNX bundle takes one on `ORT`.
        shapes: for devices with static shapes.
        timeout_s: seconds that a call into a GPU or NPU may take before it counts as hung; the first may take ten
            times as long.
        complete: whether to compile what an NPU lacks, which may take minutes; otherwise that is a
            `MissingBlobError`.
        blocks: leave all submodels out that hold none of these blocks: for measuring, as the results mean nothing.

    Raises:
        PlanError: the plan does not fit the model.
        DeviceError: a device is not there or rejects its submodel.
        BundleError: the model file is damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        shapes: StaticShapes | None = None,
        timeout_s: float = DEVICE_TIMEOUT_S,
        complete: bool = False,
        blocks: Collection[int] | None = None,
    ) -> None:
        self.facts = bundle.facts
        self.plan = plan
        self.timeout_s = timeout_s
        self.shapes: StaticShapes | None = None  # those in use, where some device has static shapes
        self.taken = Taken(vocab_size=bundle.facts.vocab_size)
        self._graph = bundle.graph
        # A recurrent state cannot go back to an earlier token, nor be cut out as rows.
        self.recurrent = bundle.graph is not None and any(block.recurrent_bytes for block in bundle.graph.blocks)
        ort = [config for config in plan.configs if config.kind is DeviceKind.ORT]
        if bundle.facts.format == "onnx":
            if len(plan.placements) != 1 or not ort or plan.decode:
                asked = ", ".join(map(str, plan.configs))
                raise PlanError(f"plan: an ONNX bundle runs whole on one ORT device, not on {asked}")
            config = plan.placements[0].config
            compiled = require(config).compile(bundle.model_path, config)
            self.chains: tuple[tuple[Stage, ...], ...] = ((Stage(plan.placements[0], compiled),),)
            check_media(bundle, self.taken, self.max_chunk)
            return
        if ort:
            raise PlanError(f"plan: {ort[0]} runs ONNX bundles; this bundle holds OpenVINO IR")
        if bundle.graph is None:
            raise BundleError(f"bundle {bundle.path}: it has no block graph")
        plan.check(bundle.graph)
        library = _library(bundle, plan, complete)
        if any(config.static for config in plan.configs):
            shapes = shapes or (library and library.shapes) or StaticShapes()
            self.shapes = shapes.within(bundle.facts.context_length)
        self.chains, self.taken = build(bundle, bundle.graph, plan, self.shapes, INPUTS, timeout_s, library, blocks)
        check_media(bundle, self.taken, self.max_chunk)

    @property
    def exclusive(self) -> bool:
        """Whether every sequence holds compiled submodels, and so weights, of its own; see `backends.gpustate`."""
        return any(config.kind is DeviceKind.GPU and not config.static for config in self.plan.configs)

    @property
    def context(self) -> int:
        """The largest number of tokens of a sequence: the model's, or what static shapes have room for."""
        limit = self.facts.context_length
        return limit if self.shapes is None else min(limit, self.shapes.buckets[-1])

    @property
    def max_chunk(self) -> int:
        """The largest number of tokens that the devices take at once."""
        return self.facts.context_length if self.shapes is None else self.shapes.chunks[-1]

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """What a token's keys and values take, as the devices that decode keep them; 0 without a block graph."""
        total = 0
        for stage in self.chains[DECODE]:
            if isinstance(stage.compiled, KernelCompiled):
                total += stage.compiled.kv_bytes_per_token
            elif self._graph is not None:
                blocks = self._graph.blocks[stage.placement.first : stage.placement.last + 1]
                width = 2 if stage.placement.config.half else 1  # the block graph tells f32
                total += sum(block.kv_bytes_per_token for block in blocks) // width
        return total

    @cached_property
    def emulated(self) -> bool:
        """Whether some device is emulated, so that no timing means anything."""
        return any(info_of(config).emulated for config in self.plan.configs)

    def open(self) -> SequenceRun:
        """A new, empty sequence."""
        return SequenceRun(self)


def _library(bundle: Bundle, plan: Plan, complete: bool) -> Library | None:
    """The compiled submodels for the plan's NPU; None where it has none."""
    npu = next((config for config in plan.configs if config.kind is DeviceKind.NPU), None)
    if npu is None:
        return None
    from edgert.npu.library import Library

    platform = info_of(npu).details.get("platform")
    if platform is None:
        raise DeviceFailedError(f"{npu}: the driver does not tell its platform, so no compiled submodel can be chosen")
    return Library(bundle, platform, complete=complete)


class SequenceRun:
    """One sequence of tokens on its way through the stages, with its KV cache.

    Attributes:
        tokens: those in the cache; see `edgert.features` for negative ones.
        media: what is behind negative tokens that are still to run.
        infer_us: time spent inside devices by the last call of `forward` or `prefill`.
        handover_us: how much of it went into moving keys and values.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        made: dict[int, Runner] = {}
        self._chains = [Chain(chain, made, executor.timeout_s) for chain in executor.chains]
        self._home = self._chains[PREFILL]  # the chain that holds the cache
        self._slices = executor.chains[PREFILL][-1].compiled.inputs >= {"logits_to_keep"}
        self._places = Places(executor.taken)
        self._decode = self._token_inputs(1, 1)  # for a single token: always the same, filled in anew
        self._token, self._position = self._decode["input_ids"], self._decode["position_ids"]
        self._ones = np.ones((1, MASK_TOKENS), np.int64)
        self.tokens: list[int] = []
        self.media: Media = {}
        self.infer_us = self.handover_us = 0.0

    @property
    def past(self) -> int:
        return len(self.tokens)

    def forward(self, tokens: Sequence[int], *, keep: int = 1) -> Array:
        """Append tokens, at once.

        Args:
            tokens: at least one, at most `Executor.max_chunk`; with those before not more than `Executor.context`.
            keep: for how many of the last tokens the output is wanted.

        Returns:
            `[keep, vocab]` logits (decoder) or `[keep, hidden]` states (encoder), f32, valid until the next call.

        Raises:
            DeviceFailedError: the sequence cannot go on here; `salvage` may tell what is left.
        """
        return self._forward(tokens, keep, self._chains[DECODE if len(tokens) == 1 else PREFILL])

    def _forward(self, tokens: Sequence[int], keep: int, chain: Chain) -> Array:
        start = time.perf_counter_ns()
        decode = len(tokens) == 1 and keep == 1 and tokens[0] >= 0
        self._enter(chain)
        inputs = self._inputs(tokens, self.past, keep)
        outputs = chain.run(inputs, range(len(chain.stages)))
        self.infer_us = (time.perf_counter_ns() - start) / 1000
        self.tokens += tokens
        if decode:  # as the devices' own tensors over the same memory, so that they need not be set again
            self._decode = {name: inputs[name] for name in self._decode}
        return self._rows(outputs, keep)

    def prefill(self, tokens: Sequence[int], *, chunk: int, cancel: threading.Event | None = None) -> Array | None:
        """Append a prompt in chunks; where the plan has several devices they work at the same time.

        Args:
            tokens: at least one.
            chunk: tokens of one call, at most `Executor.max_chunk`.
            cancel: looked at before each chunk.

        Returns:
            `[1, vocab]` logits of the last token, valid until the next call; None where it was cancelled, and then
            `tokens` of this object says how far it came.

        Raises:
            DeviceFailedError: as `forward`.
        """
        chunk = min(chunk, self.executor.max_chunk)
        parts = self._parts(tokens, chunk)
        chain = self._chains[PREFILL]
        segments = chain.segments()
        if len(parts) == 1 or len(segments) == 1:
            infer_us = handover_us = 0.0
            logits: Array | None = None
            for part in parts:
                if cancel is not None and cancel.is_set():
                    logits = None
                    break
                logits = self._forward(part, 1, chain)
                infer_us, handover_us = infer_us + self.infer_us, handover_us + self.handover_us
            self.infer_us, self.handover_us = infer_us, handover_us
            return logits
        start = time.perf_counter_ns()
        self._enter(chain)
        end = self.past + len(tokens)
        places, done = self._places.after(self.tokens, tokens), iter(parts)

        def calls(first: int, at: int = 0) -> Iterator[dict[str, Any]]:
            for part in parts:
                if cancel is not None and cancel.is_set():
                    return
                yield self._inputs(part, first + at, 1, places[..., at : at + len(part)])
                at += len(part)

        outputs = run_chunks([self._segment(chain, stages, done) for stages in segments], calls(self.past))
        self.infer_us = (time.perf_counter_ns() - start) / 1000
        return None if self.past < end or outputs is None else self._rows(outputs, 1)

    def _parts(self, tokens: Sequence[int], chunk: int) -> list[Sequence[int]]:
        """Chunks of a prompt, in which the images stay whole that must."""
        parts, start = [], 0
        while start < len(tokens):
            end = min(start + chunk, len(tokens))
            if self.executor.taken.together:
                end = whole(tokens, start, end)
            parts.append(tokens[start:end])
            start = end
        return parts

    def _segment(self, chain: Chain, stages: range, done: Iterator[Sequence[int]]) -> Segment[dict[str, Tensor]]:
        last = stages[-1] == len(chain.stages) - 1

        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs = chain.run(inputs, stages)
            if last:
                self.tokens += next(done)
                return outputs
            # The devices write the next chunk over what they gave for this one.
            return {name: as_array(tensor).copy() for name, tensor in inputs.items()}

        return Segment(chain.stages[stages[0]].placement.config.unit, run)

    def observe(self, tokens: Sequence[int], before: Callable[[], object]) -> list[tuple[float, Array]]:
        """Append tokens as `forward` does, and look at each stage.

        Args:
            before: called before each stage.

        Returns:
            For each stage the microseconds inside the device and a copy of its first output.
        """
        chain = self._chains[DECODE if len(tokens) == 1 else PREFILL]
        self._enter(chain)
        inputs = self._inputs(tokens, self.past, 1)
        seen = []
        for number in range(len(chain.stages)):
            before()
            start = time.perf_counter_ns()
            outputs = chain.run(inputs, range(number, number + 1))
            latency_us = (time.perf_counter_ns() - start) / 1000
            output = outputs.get(BOUNDARY) if BOUNDARY in outputs else next(iter(outputs.values()))
            seen.append((latency_us, as_array(output).astype(np.float32)))
        self.tokens += tokens
        return seen

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens, or to none where the states do not allow it: see `past` after."""
        if length == self.past:
            return
        self._places.reset()
        if self.executor.taken.together:
            length = beginning(self.tokens, length)
        if length and not self.executor.recurrent and self._home.rewind(length):
            del self.tokens[length:]
            return
        self._home.reset()
        self.tokens.clear()

    def read_states(self) -> dict[str, Array]:
        """Copies of all states by id: keys and values `[1, heads, tokens, head_dim]`, and what else a model keeps.

        Of an empty sequence only those that a device keeps itself, without rows.

        Raises:
            DeviceFailedError: a device does not give its cache away.
        """
        return self._home.read_states()

    def write_states(self, tokens: Sequence[int], states: Mapping[str, Array]) -> None:
        """Take over a sequence that another device computed; see `read_states`.

        Raises:
            DeviceFailedError: a device does not take a cache.
        """
        self._home.write_states(states)
        self._places.reset()
        self.tokens = list(tokens)

    def salvage(self) -> dict[str, Array] | None:
        """What is left of the states after a failure: all of them as they were before the call that failed, or None."""
        if not self.tokens or self.executor.recurrent:  # a recurrent state cannot go back to before that call
            return None
        try:
            return trim(self._home.read_states(), self.past)
        except DeviceFailedError:
            return None

    def _enter(self, chain: Chain) -> None:
        """Move the cache to the chain that a call goes through."""
        self.handover_us = 0.0
        if chain is not self._home:
            start = time.perf_counter_ns()
            if self.tokens:
                chain.take_over(self._home)
            else:
                chain.reset()
            self._home = chain
            self.handover_us = (time.perf_counter_ns() - start) / 1000

    def _inputs(self, tokens: Sequence[int], past: int, keep: int, places: Array | None = None) -> dict[str, Tensor]:
        """Inputs for tokens after `past` others; `places` are their positions, where others are on their way, too."""
        count, total = len(tokens), past + len(tokens)
        if count == 1 and keep == 1 and tokens[0] >= 0:
            inputs = {**self._decode}
            self._token[0, 0] = tokens[0]
            self._position[...] = past if self._position.ndim == 2 else self._places.after(self.tokens, tokens)[:, None]
        else:
            inputs = self._token_inputs(count, keep)
            self.executor.taken.fill(inputs, tokens, self.media)
            places = self._places.after(self.tokens, tokens) if places is None else places
            inputs["position_ids"] = np.ascontiguousarray(places[..., None, :])
        if total > self._ones.shape[1]:
            self._ones = np.ones((1, 2 * total), np.int64)
        inputs["attention_mask"] = self._ones[:, :total]
        return inputs

    def _rows(self, outputs: Mapping[str, Tensor], keep: int) -> Array:
        output = as_array(next(iter(outputs.values())))
        return output[0] if self._slices else output[0, -keep:]

    def _token_inputs(self, count: int, keep: int) -> dict[str, Tensor]:
        """All inputs but the mask, of zeros; `input_ids` and `position_ids` are to be filled in."""
        taken = self.executor.taken
        axes = (taken.axes,) if taken.axes else ()
        return {
            "input_ids": np.zeros((1, count), np.int64),
            "position_ids": np.zeros((*axes, 1, count), np.int64),
            "token_type_ids": np.zeros((1, count), np.int64),
            "beam_idx": np.zeros(1, np.int32),
            "logits_to_keep": np.array([keep], np.int64),
            **taken.zeros(count),
        }
