"""Executes a plan: submodels compiled for their devices, and sequences that run through them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgert.backends import info_of, require
from edgert.backends.base import Array, Compiled, Tensor, as_array
from edgert.bundle import Bundle
from edgert.device import DeviceKind
from edgert.errors import BundleError, PlanError, cause
from edgert.graph import BlockGraph
from edgert.kvcache import trim
from edgert.placement import Placement, Plan

# What `SequenceRun.forward` can give to a submodel.
INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "beam_idx", "logits_to_keep"})


@dataclass(frozen=True)
class Stage:
    """A placement, compiled."""

    placement: Placement
    compiled: Compiled


class Executor:
    """A bundle's model, compiled as a plan says; opens any number of sequences, one thread each.

    Args:
        bundle: the model.
        plan: one or more placements; with one, the model is compiled uncut. An ONNX bundle takes one on `ORT`.

    Raises:
        PlanError: the plan does not fit the model.
        DeviceError: a device is not there or rejects its submodel.
        BundleError: the model file is damaged.
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self.facts = bundle.facts
        self.plan = plan
        self._recurrent = bundle.graph is not None and any(block.recurrent_bytes for block in bundle.graph.blocks)
        ort = [p for p in plan.placements if p.config.kind is DeviceKind.ORT]
        if bundle.facts.format == "onnx":
            if len(plan.placements) != 1 or not ort:
                raise PlanError(f"plan: an ONNX bundle runs whole on one ORT device, not on {plan.explain()!r}")
            config = plan.placements[0].config
            compiled = require(config).compile(bundle.model_path, config)
            self.stages = [Stage(plan.placements[0], compiled)]
        else:
            if ort:
                raise PlanError(f"plan: {ort[0].config} runs ONNX bundles; this bundle holds OpenVINO IR")
            self.stages = _compile(bundle.model_path, bundle.graph, plan)

    @property
    def trimmable(self) -> bool:
        """Whether a sequence can go back to an earlier token; recurrent states cannot, nor can some devices' caches."""
        return not self._recurrent and all(stage.compiled.states_writable for stage in self.stages)

    @property
    def emulated(self) -> bool:
        """Whether some device is emulated, so that no timing means anything."""
        return any(info_of(stage.placement.config).emulated for stage in self.stages)

    def open(self) -> SequenceRun:
        """A new, empty sequence."""
        return SequenceRun(self)


class SequenceRun:
    """One sequence of tokens on its way through the stages, with its KV cache.

    Attributes:
        past: tokens in the cache.
        infer_us: time spent inside devices by the last call of `forward`.
    """

    def __init__(self, executor: Executor) -> None:
        self._runners = [stage.compiled.runner() for stage in executor.stages]
        self._slices = executor.stages[-1].compiled.inputs >= {"logits_to_keep"}
        self._trimmable = executor.trimmable
        self._decode = _token_inputs(1, 1)
        self.past = 0
        self.infer_us = 0.0

    def forward(self, tokens: Sequence[int], *, keep: int = 1) -> Array:
        """Append tokens.

        Args:
            tokens: at least one; `past + len(tokens)` must not exceed the context.
            keep: for how many of the last tokens the output is wanted.

        Returns:
            `[keep, vocab]` logits (decoder) or `[keep, hidden]` states (encoder), f32, valid until the next call.
        """
        count, total = len(tokens), self.past + len(tokens)
        decode = count == 1 and keep == 1
        inputs = {**self._decode} if decode else _token_inputs(count, keep)
        as_array(inputs["input_ids"])[0] = tokens
        inputs["attention_mask"] = np.ones((1, total), np.int64)
        inputs["position_ids"] = np.arange(self.past, total, dtype=np.int64)[None]
        start = time.perf_counter_ns()
        for runner in self._runners:
            outputs = runner.infer(inputs)
            inputs.update(outputs)
        self.infer_us = (time.perf_counter_ns() - start) / 1000
        self.past = total
        if decode:  # as the devices' own tensors, so that what does not change need not be set again
            self._decode = {name: inputs[name] for name in self._decode}
        output = as_array(next(iter(outputs.values())))
        return output[0] if self._slices else output[0, -keep:]

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens, or to none where the states do not allow it: see `past` after."""
        if length == self.past:
            return
        if length and self._trimmable:
            kept = [trim(runner.read_states(), past=self.past, length=length) for runner in self._runners]
            if all(k is not None for k in kept):
                for runner, states in zip(self._runners, kept, strict=True):
                    runner.write_states(states or {})
                self.past = length
                return
        for runner in self._runners:
            runner.reset()
        self.past = 0


def _token_inputs(count: int, keep: int) -> dict[str, Tensor]:
    """The inputs that depend on the number of new tokens alone; `input_ids` is to be filled in."""
    return {
        "input_ids": np.zeros((1, count), np.int64),
        "token_type_ids": np.zeros((1, count), np.int64),
        "beam_idx": np.zeros(1, np.int32),
        "logits_to_keep": np.array([keep], np.int64),
    }


def _compile(path: Path, graph: BlockGraph | None, plan: Plan) -> list[Stage]:
    # OpenVINO is imported here, not above: ONNX bundles run without touching it.
    from edgert.backends.openvino import core
    from edgert.cutting import cut
    from edgert.lowering import keep_last_logits

    if graph is None:
        raise BundleError(f"bundle {path.parent}: it has no block graph")
    plan.check(graph)
    backends = [require(p.config) for p in plan.placements]  # before minutes go into compiling for another
    try:
        model = core().read_model(path)  # weights stay memory-mapped
        keep_last_logits(model, graph)
        submodels = cut(model, graph, [(p.first, p.last) for p in plan.placements])
        needed = {name for submodel in submodels for port in submodel.inputs for name in port.get_names()}
        needed -= {name for submodel in submodels for port in submodel.outputs for name in port.get_names()}
    except RuntimeError as error:  # OpenVINO's only class of errors
        raise BundleError(f"bundle {path.parent}: {path.name} cannot be read: {cause(error)}") from error
    if unknown := sorted(needed - INPUTS):
        raise BundleError(f"bundle {path.parent}: {path.name} wants an input {unknown[0]!r}, which nothing gives")
    return [
        Stage(p, backend.compile(submodel, p.config))
        for p, backend, submodel in zip(plan.placements, backends, submodels, strict=True)
    ]
