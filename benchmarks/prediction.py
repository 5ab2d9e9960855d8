"""How well a profile of this CPU predicts what plans take that were not measured, and whether the chosen plan is best.

    python benchmarks/prediction.py [--quick] [--keep FOLDER] [--json FILE]

Each model is profiled as `edgert profile` does it, with sizes of this file's own. Then plans, contexts and chunks that
the profile has not seen run, taking turns, and what they took is compared with what the cost model says. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from shapes import BUILD, llama_bundle, qwen3_bundle

from edgert.bundle import Bundle
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.executor import Executor, SequenceRun
from edgert.graph import BlockGraph, BlockKind
from edgert.grid import QUICK, Grid
from edgert.placement import Plan
from edgert.prediction import predict
from edgert.profile import Profile
from edgert.profiler import Profiler
from edgert.scheduler import schedule

GRID = Grid(contexts=(32, 256, 1024), chunks=(16, 64, 256))
CONTEXTS = (128, 700)  # not in the grid
PROMPTS = ((96, 48), (384, 192))  # tokens and chunk, not in the grid either
# The two that are each better in one phase; `CPU@f32` is in neither.
CONFIGS = (DeviceConfig("CPU", "f32+dq"), DeviceConfig("CPU", "bf16"))
LOAD = Workload(prompt_tokens=512, new_tokens=64, chunk=256)  # for the choice of a plan
TURNS, STEPS = 2, 8


@dataclass(frozen=True)
class Row:
    """A prediction and what was measured, in milliseconds."""

    model: str
    plan: str
    what: str
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Choice:
    """What was measured of a whole request, prompt and continuation, on a plan."""

    model: str
    plan: str
    tokens_per_second: float
    decode_tokens_per_second: float
    predicted_tokens_per_second: float
    rounds: list[float]


def plans(graph: BlockGraph, configs: tuple[DeviceConfig, ...]) -> dict[str, Plan]:
    """Every configuration alone, and mixes that no measurement has seen as they are."""
    found = {str(config): Plan.single(graph, config) for config in configs}
    first, second = configs[0], configs[-1]
    half, count = len(graph.blocks) // 2, len(graph.blocks)
    found[f"first half {second}, then {first}"] = Plan.from_configs(
        [second] * half + [first] * (count - half), "halves"
    )
    kinds = [second if block.kind is BlockKind.ATTENTION else first for block in graph.blocks]
    found[f"attention {second}, rest {first}"] = Plan.from_configs(kinds, "by kind")
    found[f"prefill {second}, decode {first}"] = Plan.from_configs([second] * count, "phases", decode=[first] * count)
    return found


def profile_of(bundle: Bundle, grid: Grid, keep: Path | None) -> Profile:
    kept = None if keep is None else keep / f"{bundle.facts.name}.json"
    if kept is not None and kept.exists():
        return Profile.read(kept)
    begin = time.monotonic()
    profiler = Profiler(bundle, CONFIGS, grid, progress=lambda text, _: print(f"  {text}", file=sys.stderr))
    profile = profiler.measure()
    print(f"profile of {bundle.facts.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if kept is not None:
        profile.write(kept)
    return profile


def compare(bundle: Bundle, graph: BlockGraph, profile: Profile) -> list[Row]:
    """Predictions beside measurements; the plans take turns."""
    costs, configs = Costs(graph, profile), profile.configs
    chosen = plans(graph, configs)
    tokens = np.random.default_rng(5).integers(0, bundle.facts.vocab_size, 4096).tolist()
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        for name, plan in chosen.items():
            run = Executor(bundle, plan).open()  # one at a time: all of them would not fit into memory
            for count in (48, 192, 1, 1):  # plugins compile kernels when they first meet a shape
                run.forward(tokens[:count])
            for kind, value in _measure(run, tokens):
                found.setdefault((name, kind), []).append(value)
            del run
    rows = []
    for (name, kind), values in found.items():
        prompt, chunk = next(((p, c) for p, c in PROMPTS if kind == f"prefill {p} by {c}"), (0, 0))
        context = next((c for c in CONTEXTS if kind == f"decode at {c}"), 0)
        if prompt:
            said = predict(costs, chosen[name], Workload(prompt, 1, chunk)).prefill_us
        else:
            said = predict(costs, chosen[name], Workload(context + STEPS // 2, 2, 256)).decode_us
        rows.append(Row(bundle.facts.name, name, kind, said / 1000, statistics.median(values)))
    return rows


def _measure(run: SequenceRun, tokens: list[int]) -> list[tuple[str, float]]:
    """Milliseconds of every prompt, and of a token at every context; prompts get longer, and so do contexts."""
    found = []
    for context, (prompt, chunk) in zip(CONTEXTS, PROMPTS, strict=True):
        run.rewind(0)
        run.prefill(tokens[:prompt], chunk=chunk)
        found.append((f"prefill {prompt} by {chunk}", run.infer_us / 1000))
        run.prefill(tokens[prompt:context], chunk=512)
        steps = []
        for step in range(STEPS + 2):
            run.forward(tokens[run.past : run.past + 1])
            if step > 1:
                steps.append(run.infer_us / 1000)
        found.append((f"decode at {context}", statistics.median(steps)))
    return found


def choose(bundle: Bundle, graph: BlockGraph, profile: Profile) -> list[Choice]:
    """The plan that the scheduler takes for the shortest request, beside every configuration alone and OpenVINO's
    default, which is what `compile_model` does with no properties."""
    costs = Costs(graph, profile)
    best = schedule(costs, "latency", load=LOAD)
    sides = {str(config): Plan.single(graph, config) for config in profile.configs}
    sides[f"chosen: {best.plan.rationale}"] = best.plan
    runs = {name: Executor(bundle, plan).open() for name, plan in sides.items()}
    tokens = (
        np.random.default_rng(6).integers(0, bundle.facts.vocab_size, LOAD.prompt_tokens + LOAD.new_tokens).tolist()
    )

    def request(run: SequenceRun) -> tuple[float, float]:
        run.rewind(0)
        run.prefill(tokens[: LOAD.prompt_tokens], chunk=LOAD.chunk)
        prefill_us, decode_us = run.infer_us, 0.0
        for token in tokens[LOAD.prompt_tokens + 1 :]:
            run.forward([token])
            decode_us += run.infer_us
        return prefill_us, decode_us

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    default = _bare_default(bundle, tokens)
    times["OpenVINO's default"] = []
    for number in range(4):
        for name, run in runs.items():
            taken = request(run)
            if number:
                times[name].append(taken)
        taken = default()
        if number:
            times["OpenVINO's default"].append(taken)
    rows = []
    for name, taken_all in times.items():
        whole = [LOAD.new_tokens * 1e6 / (p + d) for p, d in taken_all]
        said = predict(costs, sides[name], LOAD).total_us if name in sides else float("nan")
        decode = statistics.median((LOAD.new_tokens - 1) * 1e6 / d for _, d in taken_all)
        rows.append(
            Choice(bundle.facts.name, name, statistics.median(whole), decode, LOAD.new_tokens * 1e6 / said, whole)
        )
    return rows


def _bare_default(bundle: Bundle, tokens: list[int]) -> Callable[[], tuple[float, float]]:
    import openvino as ov

    request = ov.Core().compile_model(bundle.model_path, "CPU").create_infer_request()
    names = [port.get_any_name() for port in request.model_inputs]

    def feed(part: list[int], past: int) -> float:
        total = past + len(part)
        values = {
            "input_ids": np.array([part], np.int64), "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None], "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        begin = time.perf_counter_ns()
        request.infer({name: values[name] for name in names}, share_inputs=True, share_outputs=True)
        return (time.perf_counter_ns() - begin) / 1000

    def run() -> tuple[float, float]:
        request.reset_state()
        prompt = LOAD.prompt_tokens
        prefill = sum(feed(tokens[i : min(i + LOAD.chunk, prompt)], i) for i in range(0, prompt, LOAD.chunk))
        return prefill, sum(feed(tokens[i : i + 1], i - 1) for i in range(prompt + 1, len(tokens)))

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, a small grid")
    parser.add_argument("--keep", type=Path, help="keep profiles there, and take them from there")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    choices: list[Choice] = []
    for path in [qwen3_bundle()] if options.quick else [qwen3_bundle(), llama_bundle()]:
        bundle = Bundle.open(path)
        assert bundle.graph is not None
        profile = profile_of(bundle, QUICK if options.quick else GRID, options.keep)
        rows += compare(bundle, bundle.graph, profile)
        choices += choose(bundle, bundle.graph, profile)
    table = Table("model", "plan", "what", "predicted ms", "measured ms", "error")
    for row in rows:
        table.add_row(
            row.model, row.plan, row.what, f"{row.predicted_ms:.1f}", f"{row.measured_ms:.1f}", f"{row.error:+.0%}"
        )
    console = Console(width=150)
    console.print(table)
    errors = sorted(abs(row.error) for row in rows)
    console.print(f"median error {statistics.median(errors):.1%}, worst {errors[-1]:.1%}, {len(errors)} predictions")
    table = Table("model", "plan", "tok/s of a request", "rounds", "predicted", "decode tok/s")
    for choice in choices:
        spread = f"{min(choice.rounds):.1f} – {max(choice.rounds):.1f}"
        table.add_row(
            choice.model, choice.plan, f"{choice.tokens_per_second:.1f}", spread,
            f"{choice.predicted_tokens_per_second:.1f}", f"{choice.decode_tokens_per_second:.1f}",
        )  # fmt: skip
    console.print(table)
    if options.json:
        found = {"predictions": [asdict(r) for r in rows], "choices": [asdict(c) for c in choices]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
