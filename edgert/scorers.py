"""Models as something that predicts tokens: a bundle on a plan, and an OpenVINO IR folder as others write it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgert.backends import require
from edgert.backends.base import as_array
from edgert.bundle import Bundle
from edgert.errors import BundleError, UsageError
from edgert.evaluation import Logits, Scorer
from edgert.executor import Executor
from edgert.placement import HOST, Plan

CHUNK = 256  # tokens at once
DECODED = 4  # where a plan decodes elsewhere, the last of so many parts of what is read goes token by token
IR_NAMES = ("openvino_model.xml", "model.xml")
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


class BundleScorer(Scorer):
    """A bundle's model on a plan. Where the plan runs single tokens elsewhere than prompts, both are used.

    Attributes:
        executor: what runs.
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        if bundle.facts.task != "decoder":
            raise UsageError(f"bundle {bundle.path}: is an {bundle.facts.task}, which predicts no tokens")
        self.executor = Executor(bundle, plan, complete=True)
        self.name = f"{bundle.path.name} on {', '.join(map(str, plan.configs))}"
        self.vocab_size = bundle.facts.vocab_size
        self.context = self.executor.context
        self._run = self.executor.open()  # one, as on some devices each holds a copy of the weights

    def logits(self, tokens: Sequence[int]) -> Logits:
        self._run.rewind(0)
        found = np.empty((len(tokens), self.vocab_size), np.float32)
        single = len(tokens) // DECODED if self.executor.plan.decode else 0
        size = min(CHUNK, self.executor.max_chunk)
        start = 0
        while start < len(tokens):
            count = min(size, len(tokens) - single - start) if start < len(tokens) - single else 1
            part = tokens[start : start + count]
            found[start : start + count] = self._run.forward(part, keep=count)
            start += count
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        self._run.rewind(0)
        logits = self._run.prefill(prompt, chunk=CHUNK)
        tokens: list[int] = []
        while True:
            assert logits is not None
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) == count:
                return tokens
            logits = self._run.forward(tokens[-1:])


class FolderScorer(Scorer):
    """A stateful decoder of an IR folder on the CPU, in f32 throughout."""

    def __init__(self, path: Path) -> None:
        model = next((path / name for name in IR_NAMES if (path / name).is_file()), None)
        if model is None:
            raise UsageError(f"model {path}: the folder has no {' or '.join(IR_NAMES)}")
        self.name = f"{path.resolve().name} on {HOST}"
        self.context = _context(path)
        compiled = require(HOST).compile(model, HOST)
        known = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
        if not {"input_ids"} <= compiled.inputs <= known:
            raise UsageError(
                f"model {path}: its inputs are {', '.join(sorted(compiled.inputs))}, expected some of "
                f"{', '.join(sorted(known))} and keys and values as states"
            )
        self._runner = compiled.runner()
        self.vocab_size = self._read([0]).shape[-1]

    def logits(self, tokens: Sequence[int]) -> Logits:
        self._runner.reset()
        return self._read(tokens).astype(np.float32)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        self._runner.reset()
        following = [int(self._read(prompt)[-1].argmax())]
        while len(following) < count:
            past = len(prompt) + len(following) - 1
            following.append(int(self._read(following[-1:], past)[-1].argmax()))
        return following

    def _read(self, tokens: Sequence[int], past: int = 0) -> Logits:
        """The device's own logits, valid until the next call."""
        end = past + len(tokens)
        outputs = self._runner.infer(
            {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(past, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        output = outputs.get("logits", next(iter(outputs.values())))
        logits: Logits = as_array(output)[0]
        return logits


def bundle_scorer(bundle: Bundle, plan: Plan) -> BundleScorer:
    """A bundle's model on a plan.

    Raises:
        UsageError: the bundle holds an encoder.
        PlanError, DeviceError, BundleError: as `Executor`.
    """
    return BundleScorer(bundle, plan)


def folder_scorer(path: str | Path) -> FolderScorer:
    """The model of an OpenVINO IR folder as optimum-intel and OpenVINO GenAI write it.

    Raises:
        UsageError: the folder holds no such model, or no decoder with states.
        DeviceFailedError: OpenVINO does not take it.
        BundleError: its config.json is damaged.
    """
    return FolderScorer(Path(path))


def exact_plan(bundle: Bundle) -> Plan:
    """The plan that others are held against: all on `CPU@f32`.

    Raises:
        UsageError: the bundle runs on onnxruntime, which has no such configuration.
    """
    if bundle.graph is None:
        raise UsageError(f"bundle {bundle.path}: runs whole on onnxruntime, so there is no {HOST} to compare with")
    return Plan.single(bundle.graph, HOST)


def _context(path: Path) -> int | None:
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
        config = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{file}: is no configuration: {error}") from error
    return next((config[name] for name in _CONTEXT_NAMES if type(config.get(name)) is int and config[name] > 0), None)
