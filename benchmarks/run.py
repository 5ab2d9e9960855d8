"""Benchmarks: ratios of things measured side by side in one run.

    make bench                      all
    make bench ARGS="overhead"      one of: decode, overhead, start, handover, simulated

Machines are noisy and change speed while one looks on. So every comparison alternates between its sides step by step,
and what is reported is the ratio of medians and the spread of the rounds' own ratios. Speeds in the tables are of this
machine at this moment; the ratios are what can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from shapes import BUILD, ROOT, qwen3_bundle

import edgert
from edgert import backends
from edgert.backends.simulated import SimulatedBackend
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.placement import Plan
from edgert.prediction import predict
from edgert.profile import DeviceModel, Profile
from edgert.sampling import Sampler, SamplingParams
from edgert.shapes import StaticShapes

CONFIG = DeviceConfig("CPU", "f32+dq")
PROMPT_TOKENS, TURN, TURNS, ROUNDS = 128, 7, 4, 7


@dataclass(frozen=True)
class Ratio:
    """A comparison: `value` is what `name` says, `low` and `high` its extremes over the rounds."""

    name: str
    value: float
    low: float
    high: float
    target: str
    met: bool
    detail: str


class BareLoop:
    """What someone writes who has only OpenVINO: one compiled model, one infer request, arg-max."""

    def __init__(self, path: Path, tokens: list[int]) -> None:
        import openvino as ov

        from edgert.backends.openvino import core

        self._ov = ov
        compiled = core().compile_model(core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self._request = compiled.create_infer_request()
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._past = 0
        self._next = self._feed(tokens)

    def _feed(self, tokens: list[int]) -> int:
        total = self._past + len(tokens)
        values = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._past, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        for name in self._names:
            self._request.set_tensor(name, self._ov.Tensor(values[name]))
        self._request.infer(share_outputs=True)
        self._past = total
        return int(self._request.get_output_tensor(0).data[0, -1].argmax())

    def step(self) -> None:
        self._next = self._feed([self._next])


def compare(sides: dict[str, Callable[[], Callable[[], object]]]) -> dict[str, list[list[float]]]:
    """Seconds of each step, `[round][step]` for each side. A side makes a stepper that is past its prefill.

    The sides take turns of `TURN` steps. The first step of a turn is not counted: it finds the caches and the threads
    as the other side left them, which nobody who runs one model meets.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        steppers = {name: make() for name, make in sides.items()}
        rows: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(TURNS):
            for name, stepper in steppers.items():
                for step in range(TURN):
                    start = time.perf_counter()
                    stepper()
                    if step:
                        rows[name].append(time.perf_counter() - start)
        for name, row in rows.items():
            times[name].append(row)
    return times


def ratio(name: str, base: list[list[float]], ours: list[list[float]], at_least: float) -> Ratio:
    """Speed of `ours` over speed of `base`."""
    rounds = [statistics.median(b) / statistics.median(o) for b, o in zip(base, ours, strict=True)]
    medians = [statistics.median([t for row in side for t in row]) for side in (base, ours)]
    value = medians[0] / medians[1]
    detail = f"{medians[1] * 1000:.2f} against {medians[0] * 1000:.2f} ms/token"
    return Ratio(name, value, min(rounds), max(rounds), f">= {at_least}", value >= at_least, detail)


def decode() -> list[Ratio]:
    """A one-device plan against a bare loop, and the model cut at every boundary against the uncut one."""
    path = qwen3_bundle()
    tokens = np.random.default_rng(0).integers(0, 4000, PROMPT_TOKENS).tolist()
    uncut = edgert.load(path, device=CONFIG)
    assert uncut.bundle.graph is not None
    blocks = len(uncut.bundle.graph.blocks)
    cut = edgert.load(path, plan=Plan.from_configs([CONFIG] * blocks, "every boundary", merge=False))

    def stepper(model: edgert.Model) -> Callable[[], object]:
        model.release()  # no prefix reuse: each side prefills
        stream = model.stream(tokens, max_tokens=TURN * TURNS + 8)
        next(stream)
        return lambda: next(stream)

    bare = compare({"bare": lambda: BareLoop(uncut.bundle.model_path, tokens).step, "uncut": lambda: stepper(uncut)})
    both = compare({"uncut": lambda: stepper(uncut), "cut": lambda: stepper(cut)})
    return [
        ratio("decode: one-device plan / bare compile_model loop", bare["bare"], bare["uncut"], 0.98),
        ratio(f"decode: cut into {blocks} blocks / uncut", both["uncut"], both["cut"], 0.90),
    ]


def overhead() -> list[Ratio]:
    """Host time per token outside of `infer` at a 152k vocabulary: in a running model, and of the sampler alone."""
    model = edgert.load(qwen3_bundle(), device=CONFIG)
    tokens = np.random.default_rng(1).integers(0, 4000, 64).tolist()
    rows = []
    for name, options, limit in (
        ("greedy", {}, 0.3),
        ("top-p 0.95", {"temperature": 0.8, "top_p": 0.95, "seed": 1}, 1.0),
    ):
        samples: list[float] = []
        last = 0.0
        for piece in model.stream(tokens, max_tokens=100, **options):  # type: ignore[arg-type]
            if piece.timings.new_tokens > 5:
                samples.append((piece.timings.host_us - last) / 1000)
            last = piece.timings.host_us
        middle = statistics.median(samples)
        spread = f"host ms/token, {len(samples)} tokens, in the running model"
        rows.append(
            Ratio(f"host: {name}", middle, min(samples), max(samples), f"<= {limit} ms", middle <= limit, spread)
        )
    # Random weights give flat logits; a trained model's are peaked. Both kinds must be fast.
    random = np.random.default_rng(2)
    for kind, logits in (
        ("peaked", random.gumbel(0, 2, 151936).astype(np.float32)),
        ("flat", random.normal(0, 1, 151936).astype(np.float32)),
    ):
        sampler = Sampler(SamplingParams(temperature=0.8, top_p=0.95, seed=1))
        samples = []
        for _ in range(50):
            start = time.perf_counter()
            sampler.sample(logits, tokens)
            samples.append((time.perf_counter() - start) * 1000)
        middle = statistics.median(samples)
        rows.append(
            Ratio(f"sampler: top-p 0.95, {kind} logits", middle, min(samples), max(samples), "<= 1.0 ms",
                  middle <= 1.0, "sampler alone, ms/token")
        )  # fmt: skip
    return rows


def start() -> list[Ratio]:
    """Import time, and process start to first token of the demo bundle."""
    demo = BUILD / "demo.edge"
    if not demo.exists():
        edgert.compile(ROOT / "examples" / "models" / "bookworm", demo, weights="int4")

    def timed(*command: str) -> list[float]:
        found = []
        for _ in range(6):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found.append(time.perf_counter() - begin)
        return found[1:]  # the first one fills the page cache

    empty, imported = timed("-c", "pass"), timed("-c", "import edgert")
    first = timed("-m", "edgert", "run", str(demo), "It was", "--max-tokens", "1")
    cost = [i - statistics.median(empty) for i in imported]
    return [
        Ratio("import edgert", statistics.median(cost), min(cost), max(cost), "<= 0.3 s",
              statistics.median(cost) <= 0.3, "s more than an empty process"),
        Ratio("process start to first token", statistics.median(first), min(first), max(first), "<= 2 s",
              statistics.median(first) <= 2, "s, warm, demo bundle"),
    ]  # fmt: skip


HANDOVER_TOKENS = 1024


def handover() -> list[Ratio]:
    """Keys and values of 1k tokens out of one device's cache and into another's, against the speed of a copy.

    The copy goes into memory that is there already, which is the fastest there is. The first hand-over of a sequence,
    which makes the other device's buffers, is not counted.
    """
    path = qwen3_bundle()
    tokens = np.random.default_rng(3).integers(0, 4000, HANDOVER_TOKENS).tolist()
    exact = edgert.load(path, device="CPU@f32")._engine.executor.open()
    exact.prefill(tokens, chunk=256)
    states = exact.read_states()
    size = sum(array.nbytes for array in states.values())
    there = [np.ones_like(array) for array in states.values()]
    rows = []
    for source, target in (("CPU@f32", "SIM@f32"), ("CPU@f32", "CPU@f32+static"), ("CPU@f32+static", "CPU@f32")):
        place = f"prefill:*={source},decode:*={target}"
        model = edgert.load(path, place=place, static_shapes=StaticShapes((256,), (2048,)))
        run = model._engine.executor.open()
        moves, copies = [], []
        for _ in range(2 * ROUNDS):
            run.rewind(0)
            run._enter(run._chains[0])
            run.write_states(tokens, states)
            run.forward(tokens[:1])
            moves.append(run.handover_us / 1e6)
            begin = time.perf_counter()
            for into, array in zip(there, states.values(), strict=True):
                np.copyto(into, array)
            copies.append(time.perf_counter() - begin)
        ratios = [c / m for c, m in zip(copies, moves, strict=True)][1:]
        move_s, copy_s = statistics.median(moves[1:]), statistics.median(copies[1:])
        rows.append(
            Ratio(f"hand-over of 1k tokens, {source} to {target} / copy", copy_s / move_s, min(ratios), max(ratios),
                  ">= 0.5", copy_s / move_s >= 0.5,
                  f"{size / 1e6:.0f} MB in {move_s * 1000:.0f} ms, {size / move_s / 1e9:.1f} GB/s; "
                  f"copy {size / copy_s / 1e9:.1f} GB/s")
        )  # fmt: skip
    return rows


def simulated() -> list[Ratio]:
    """Wall time of plans on simulated devices over what the cost model says of them."""
    demo = BUILD / "demo.edge"
    if not demo.exists():
        edgert.compile(ROOT / "examples" / "models" / "bookworm", demo, weights="int4")
    # Far slower than this CPU computes the demo model, so that the waiting decides.
    models = [
        DeviceModel(name, gbps, gops, 300.0, 0.05, 5.0, 1.0, "f32", "modelled", "made up for this benchmark")
        for name, gbps, gops in (("fast", 0.4, 4.0), ("slow", 0.2, 2.0))
    ]
    fast, slow = (DeviceConfig("SIM", m.name) for m in models)
    load, backend = backends._load, SimulatedBackend(models=models)
    backends._load = lambda module: backend if module == "simulated" else load(module)
    prompt, new, chunk = 256, 24, 32
    tokens = np.random.default_rng(4).integers(1, 4000, prompt).tolist()
    rows = []
    try:
        graph = edgert.Bundle.open(demo).graph
        assert graph is not None
        blocks = len(graph.blocks)
        half = [fast] * (blocks // 2) + [slow] * (blocks - blocks // 2)
        for name, plan in (
            ("one device", Plan.single(graph, fast)),
            ("two devices, pipelined prefill", Plan.from_configs(half, "halves")),
            (
                "prefill on one, decode on the other",
                Plan.from_configs([fast] * blocks, "split", decode=[slow] * blocks),
            ),
        ):
            said = predict(Costs(graph, Profile(2, "made up", tuple(models))), plan, Workload(prompt, new, chunk))
            model = edgert.load(demo, plan=plan, prefill_chunk=chunk)
            found = []
            for _ in range(ROUNDS + 1):
                model.release()
                t = model.generate(tokens, max_tokens=new, temperature=0.0).timings
                assert t.new_tokens == new
                found.append((t.prefill_us + t.decode_us) / said.total_us)
            found = found[1:]
            value = statistics.median(found)
            detail = f"{said.total_us / 1000:.0f} ms predicted ({said.provenance})"
            rows.append(
                Ratio(f"simulated plan: {name}, wall / predicted", value, min(found), max(found), "0.9 – 1.1",
                      0.9 <= value <= 1.1, detail)
            )  # fmt: skip
    finally:
        backends._load = load
    return rows


def main() -> int:
    benchmarks = {"decode": decode, "overhead": overhead, "start": start, "handover": handover, "simulated": simulated}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*benchmarks, []], help="which ones (default: all)")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    results = [row for name in options.names or benchmarks for row in benchmarks[name]()]
    table = Table("measured here", "median", "spread", "target", "", "detail")
    for row in results:
        mark = "[green]met[/]" if row.met else "[red]missed[/]"
        table.add_row(row.name, f"{row.value:.3f}", f"{row.low:.3f} – {row.high:.3f}", row.target, mark, row.detail)
    Console().print(table)
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
