"""What is tried with a family, in this process: `python steps.py FAMILY OUT.json STEP ...`.

OUT is written after every step, so that what a step that never ends has left undone is all that is missing. The model
is exported once: `edgert compile` is given a copy of that.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from edgert.converters import huggingface, pretrained, quality
from edgert.converters.compress import compress
from edgert.converters.npu import require_compiler

import edgert
from edgert.architecture import PRECISIONS, Weights, from_config
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.errors import EdgertError, PlanError
from edgert.executor import Executor
from edgert.graph import Block, BlockGraph, BlockKind
from edgert.irgraph import make_names_unique
from edgert.npu.recipe import check
from edgert.partition import annotate
from edgert.placement import Placement, Plan
from edgert.shapes import StaticShapes

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny_folders import write_model
from tiny_models import ENCODERS, SLIDING_WINDOW, VOCAB_SIZE, tiny

PROMPT = 3 * SLIDING_WINDOW  # longer than any window, and than the chunks of recurrences
STEPS = 64
PIECES = [5, 1, PROMPT - 6] + [1] * STEPS
CLOSE = 1e-3
FORMULA_BYTES = 80  # numbers of a norm's formula in a block, which no configuration tells
SHAPES = StaticShapes(chunks=(16,), buckets=(64,))
NPU_PLATFORM = "4000"
CPU = DeviceConfig("CPU", "f32")
# Steps that look at what others have made, and are left out where those have failed.
NEEDS = {"placements": {"fp16"}, "fit": {"fp16", "int8", "int4"}, "npu_compile": {"fp16"}}
Outcome = dict[str, Any]


class Family:
    """One family, and what has been made of it so far."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.encoder = name in ENCODERS
        self.source = tiny(name)
        self.tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, PROMPT + STEPS))

    @cached_property
    def model(self) -> ov.Model:
        """The export in f32, as it is read from a file."""
        path = self.folder / "f32.xml"
        name = "export_encoder" if self.encoder else "export_decoder"
        with pretrained.quiet():
            model = getattr(huggingface, name)(self.source)
        copy = model.clone()
        setattr(pretrained, name, lambda *arguments: copy.clone())
        make_names_unique(model)
        ov.save_model(model, path, compress_to_fp16=False)
        return ov.Core().read_model(path)

    @cached_property
    def written(self) -> Path:
        """The folder that `edgert compile` takes."""
        with pretrained.quiet():
            return write_model(self.folder / "source", self.name)

    def steps(self) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        """In the order in which they are tried; each needs the first."""
        yield "export", self.export
        yield "parity", self.parity
        yield "fp16", lambda: self.compiled("fp16")
        yield "int8", lambda: self.compiled("int8")
        yield "int4", lambda: self.compiled("int4")
        yield "placements", self.placements
        yield "fit", self.fit
        yield "npu_recipe", self.recipe
        yield "npu_compile", self.npu
        yield "optimum", self.optimum

    def export(self) -> Outcome:
        graph = annotate(self.model)
        kinds = Counter(str(block.kind) for block in graph.blocks)
        return {"blocks": dict(kinds), "reason": graph.reason, "operations": len(self.model.get_ops())}

    def parity(self) -> Outcome:
        """A prefill and `STEPS` single tokens, then the same prompt in pieces, against transformers."""
        if self.encoder:
            pair = quality.openvino_encoder(self.model), quality.torch_encoder(self.source)
            row = quality.check_encoder(*pair, vocab_size=VOCAB_SIZE, against=quality.transformers_name())
            return {"relative_error": row["relative_error"], "batch": 2}
        with pretrained.quiet():
            expected = run(quality.torch_decoder(self.source), self.tokens, [PROMPT] + [1] * STEPS)
            # In transformers frequencies follow the length of each call (docs/models.md).
            varying = getattr(self.source.config, "rope_parameters", None) or {}
            in_pieces = expected
            if varying.get("rope_type") in {"dynamic", "longrope"}:
                in_pieces = run(quality.torch_decoder(self.source), self.tokens, PIECES)
        found = run(quality.openvino_decoder(self.model), self.tokens, [PROMPT] + [1] * STEPS)
        pieces = run(quality.openvino_decoder(self.model), self.tokens, PIECES)
        errors = relative_error(found, expected), relative_error(pieces, in_pieces)
        outcome: Outcome = {"relative_error": errors[0], "in_pieces": errors[1], "prompt": PROMPT, "steps": STEPS}
        return outcome | above(max(errors), CLOSE)

    def compiled(self, weights: Weights) -> Outcome:
        """`edgert compile`, the bundle opened twice, what it writes compared."""
        bundle, out = self.bundle(weights), self.path(weights)
        rows = {row["check"]: row["relative_error"] for row in bundle.report.checks}
        outcome: Outcome = {"checks": rows, "reason": bundle.graph.reason if bundle.graph else "no blocks"}
        texts = [self.say(out) for _ in range(2)]
        if texts[0] != texts[1]:
            outcome["error"] = f"two runs differ: {texts[0]} and {texts[1]}"
        if weights != "fp16" and not self.encoder:
            exact = run(quality.openvino_decoder(self.model), self.tokens, [PROMPT])
            packed = run(quality.openvino_decoder(ov.Core().read_model(out / "model.xml")), self.tokens, [PROMPT])
            outcome["correlation"] = float(np.corrcoef(exact.ravel(), packed.ravel())[0, 1])
        return outcome

    def path(self, weights: Weights) -> Path:
        return self.folder / f"{weights}.edge"

    def bundle(self, weights: Weights) -> Bundle:
        """What `edgert compile` makes of it, once."""
        if not self.path(weights).exists():
            _ = self.model  # so that it is exported here
            kernels = (
                None if weights == "int8" else False
            )  # once with weights for edgert's own kernels, and their check
            edgert.compile(self.written, self.path(weights), weights=weights, kernels=kernels)
        return Bundle.open(self.path(weights))

    def say(self, out: Path) -> list[Any]:
        model = edgert.load(out, device=str(CPU))
        if self.encoder:
            return [round(float(value), 6) for value in model.embed(["The quick brown fox"])[0]]
        return list(model.generate(self.tokens[0, :PROMPT].tolist(), max_tokens=12).tokens)

    def placements(self) -> Outcome:
        """Logits of other plans against those of the uncut model on the CPU."""
        bundle = self.bundle("fp16")
        graph = bundle.graph
        assert graph is not None
        expected = self.logits(bundle, Plan.single(graph, CPU))
        found: Outcome = {}
        for name, plan in plans(graph):
            try:
                plan.check(graph)
                error = relative_error(self.logits(bundle, plan), expected)
                found[name] = error if error <= CLOSE else f"relative error {error:.1e}"
            except PlanError as refused:
                found[name] = f"refused: {refused}"
        bad = [value for value in found.values() if isinstance(value, str) and not value.startswith("refused")]
        tried = [value for value in found.values() if isinstance(value, float)]
        return {"plans": found} | (
            {} if len(tried) >= 2 and not bad else {"error": "; ".join(map(str, found.values()))}
        )

    def logits(self, bundle: Bundle, plan: Plan) -> np.ndarray:
        sequence = Executor(bundle, plan, shapes=SHAPES).open()
        tokens = self.tokens[0].tolist()
        if self.encoder:
            return np.array(sequence.forward(tokens[:PROMPT], keep=PROMPT))
        rows = [sequence.forward(tokens[:13], keep=13).copy(), sequence.forward(tokens[13:20], keep=7).copy()]
        return np.concatenate([*rows, *(sequence.forward([token]).copy() for token in tokens[20:28])])

    def fit(self) -> Outcome:
        """`edgert fit`'s idea of the model, out of its configuration alone, against the bundles."""
        wrong: dict[str, str] = {}
        for weights in PRECISIONS:
            graph = self.bundle(weights).graph
            assert graph is not None
            shape = from_config(self.source.config.to_dict(), weights=weights)
            if difference := unlike(shape.graph, graph):
                wrong[weights] = difference
        return {"error": "; ".join(f"{weights}: {what}" for weights, what in wrong.items())} if wrong else {}

    def optimum(self) -> Outcome:
        """The other route, with the same gate."""
        with pretrained.quiet():
            rows = pretrained.convert(self.written, "optimum", lambda stage: None)[2]
        return {"relative_error": max(row["relative_error"] for row in rows)}

    def recipe(self) -> Outcome:
        model = compress(self.model.clone(), "int4", sym=True, group_size=-1)
        path = self.folder / "npu.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        saved = ov.Core().read_model(path)
        found = check(saved, annotate(saved))
        return {"error": "; ".join(dict.fromkeys(str(finding) for finding in found))} if found else {}

    def npu(self) -> Outcome:
        require_compiler()
        _ = self.model
        edgert.compile(
            self.written, self.folder / "npu.edge", weights="int4", npu=[NPU_PLATFORM], npu_shapes=SHAPES, force=True
        )
        return {"platform": NPU_PLATFORM}


def plans(graph: BlockGraph) -> Iterator[tuple[str, Plan]]:
    """Plans that compute in f32, so that nothing but a mistake can make them differ."""
    count = len(graph.blocks)
    yield "each block a submodel", Plan.from_configs([CPU] * count, "each block", merge=False)
    if not any(block.states for block in graph.blocks):  # static shapes are for decoders
        pieces = (Placement(0, count // 2 - 1, CPU), Placement(count // 2, count - 1, CPU))
        yield "two pieces", Plan(pieces, "two pieces")
        return
    static = DeviceConfig("CPU", "f32+static")
    yield (
        "every other block with static shapes",
        Plan.from_configs([CPU if i % 2 == 0 else static for i in range(count)], "every other one"),
    )
    if any(block.kind is BlockKind.MOE for block in graph.blocks):
        configs = [static if block.kind is BlockKind.MOE else CPU for block in graph.blocks]
        yield "experts elsewhere", Plan.from_configs(configs, "experts elsewhere")
    if any(device.name.startswith("GPU") for device in edgert.devices()):
        gpu = DeviceConfig("GPU", "f32")
        yield "every other block on GPU@f32", Plan.from_configs([(CPU, gpu)[i % 2] for i in range(count)], "in turns")


def run(decoder: quality.Decoder, tokens: np.ndarray, chunks: list[int]) -> np.ndarray:
    """Logits `[tokens, vocabulary]` of `tokens` [1, tokens] in calls of so many."""
    ends = np.cumsum(chunks)
    return np.concatenate([decoder(tokens[:, end - size : end])[0] for size, end in zip(chunks, ends, strict=True)])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def above(error: float, limit: float) -> Outcome:
    return {} if error <= limit else {"error": f"relative error {error:.1e}, at most {limit:.0e} allowed"}


def unlike(shape: BlockGraph, compiled: BlockGraph) -> str:
    """In what a graph made of a configuration differs from that of the compiled model; empty where in nothing."""
    if compiled.reason is not None:
        return f"not cut: {compiled.reason}"
    kinds = [[str(block.kind) for block in graph.blocks] for graph in (shape, compiled)]
    if kinds[0] != kinds[1]:
        return f"blocks {' '.join(kinds[0])}, compiled {' '.join(kinds[1])}"
    for expected, found in zip(shape.blocks, compiled.blocks, strict=True):
        names = ("kv_bytes_per_token", "recurrent_bytes", "flops_per_token", "score_flops")
        for name in names:
            if getattr(expected, name) != getattr(found, name):
                return f"{found.name}: {name} {getattr(expected, name)}, compiled {getattr(found, name)}"
        if not same_weights(expected, found):
            return f"{found.name}: weights {expected.weight_bytes}, compiled {found.weight_bytes}"
    return ""


def same_weights(expected: Block, found: Block) -> bool:
    """Compressed weights to the byte; of f32 all but the numbers of a formula."""
    packed: list[dict[str, int]] = [
        {kind: size for kind, size in block.weight_bytes.items() if kind not in {"f32"}} for block in (expected, found)
    ]
    rest = found.weight_bytes.get("f32", 0) - expected.weight_bytes.get("f32", 0)
    return packed[0] == packed[1] and 0 <= rest <= FORMULA_BYTES


def short(error: Exception) -> str:
    """What an error says, in one line, without the paths of this machine."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, EdgertError) else f"{type(error).__name__}: {text}"
    return re.sub(rf"\S*{tempfile.gettempprefix()}\w+[/\\]", "", text)[:400]


def passed(steps: Mapping[str, Outcome]) -> set[str]:
    return {step for step, outcome in steps.items() if "error" not in outcome}


def media(name: str, folder: Path) -> Outcome:
    """A whole model with its towers: compiled, compared with transformers, and its shape by the configuration."""
    from tiny_multimodal import build, check

    with pretrained.quiet():
        rows = {row["check"]: row["relative_error"] for row in check(name, folder)}
        whole = build(name)
    graph = Bundle.open(folder / f"{name}.edge").graph
    shape = from_config(whole.config.to_dict(), weights="fp16")
    difference = shape.parameters + shape.tower_parameters - whole.num_parameters()
    return {
        "checks": rows, "towers": [tower.name for tower in graph.towers] if graph else [],
        "reason": graph and graph.reason,
        "parameters": "exact" if not difference else f"{difference / whole.num_parameters():+.1%}",
    }  # fmt: skip


def diffusion(name: str, folder: Path) -> Outcome:
    """The transformer of a pipeline, at each precision."""
    from tiny_diffusion import check

    rows = {row.pop("weights"): row for row in check(folder, families=[name])}
    wrong = [f"{weights}: {row['error']}" for weights, row in rows.items() if "error" in row]
    return {"rows": rows} | ({"error": "; ".join(wrong)} if wrong else {})


def main(name: str, out: Path, chosen: Sequence[str]) -> int:
    steps: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        whole = {"media": media, "diffusion": diffusion}
        own = [(step, partial(whole[step], name, Path(folder))) for step in chosen if step in whole]
        for step, work in own or Family(name, Path(folder)).steps():
            if step not in chosen or steps.keys() & NEEDS.get(step, set()) - passed(steps):
                continue
            began = time.monotonic()
            try:
                steps[step] = work()
            except Exception as error:  # whatever the library under it raises is the result
                steps[step] = {"error": short(error)}
            steps[step]["seconds"] = round(time.monotonic() - began, 1)
            unfinished = out.with_suffix(".partial")
            unfinished.write_text(json.dumps(steps), "utf-8")
            unfinished.replace(out)
            if step == "export" and "error" in steps[step]:
                break
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
