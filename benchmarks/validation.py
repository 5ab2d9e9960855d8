"""Device models against published runs: fitted on half of them, the others predicted. Writes docs/validation.md.

    .venv/bin/python benchmarks/validation.py

Needs no device: the runs are in published_runs.json beside this file, each with its source.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from charts import Point, scatter, write

from edgert import catalogue
from edgert.architecture import Weights, from_config
from edgert.cost import Costs, Work, Workload
from edgert.device import DeviceConfig
from edgert.fields import build
from edgert.graph import BlockGraph
from edgert.placement import Plan
from edgert.prediction import predict
from edgert.profile import DeviceModel, Profile
from edgert.shapes import StaticShapes

ROOT = Path(__file__).parents[1]
RUNS = Path(__file__).with_name("published_runs.json")
PAGE = ROOT / "docs" / "validation.md"

LIMITS = {"GPU": 0.15, "NPU": 0.35}  # relative error; of a CPU none was set
NEW_TOKENS = 128
SHORT_PROMPT = 32  # where a source does not say how long its prompt was
# How a row's precision is made of weights: their kind and the size of a group. GGUF's Q4_0 has 4.5 bits a weight,
# Q4_K_M about 4.9; INT4 with groups of 32 has 4.6.
WIDTHS: dict[str, tuple[Weights, int]] = {
    "INT4": ("int4", 128), "INT4-CW": ("int4", -1), "INT8": ("int8", 128), "FP16": ("fp16", 128), "Q4": ("int4", 32),
}  # fmt: skip
# OpenVINO GenAI's NPU pipeline pads a prompt to 1024 tokens and keeps room for 128 more:
# https://github.com/openvinotoolkit/openvino/blob/00d69bc522942112e7fa8293a860f9c55ec6cd0b/docs/articles_en/openvino-workflow-generative/inference-with-genai/inference-with-genai-on-npu.rst
NPU_SHAPES = StaticShapes(chunks=(1024,), buckets=(1152,))
U8_KV_BITS = 8.5  # of OpenVINO's CPU plugin, as in the profiles
PHASES = ("decode", "prefill, long prompt", "prefill, about 32 tokens")
CONFIGS = {"CPU": "CPU@f32+dq", "GPU": "GPU@f16", "NPU": "NPU@f16"}
LAUNCH_US = {"CPU": 20.0, "GPU": 100.0, "NPU": 300.0}  # as the profiles assume
# 10^9 bytes a second that the memory could give: the fastest that the SoC takes, as most sources do not name theirs.
PEAKS_GBPS = {"nseries": 38.4, "meteorlake": 119.5, "arrowlake": 134.4, "lunarlake": 136.5, "pantherlake": 153.6}
NAMES = {
    "nseries": "N-series", "meteorlake": "Meteor Lake", "arrowlake": "Arrow Lake-H", "lunarlake": "Lunar Lake",
    "pantherlake": "Panther Lake",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One model on one device, as somebody published it.

    Attributes:
        soc: a key of `PEAKS_GBPS`.
        unit: `CPU`, `GPU` or `NPU`.
        machine, model: as the source names them.
        shape: the model of edgert's catalogue with the same blocks.
        precision: a key of `WIDTHS`.
        prompt_tokens: of one or two runs; None where the source does not say.
        ttft_ms: to the first token; None where the source does not say.
        tpot_ms: for each token after it.
        source: a key of the file's `sources`.
    """

    soc: str
    unit: str
    machine: str
    model: str
    shape: str
    precision: str
    prompt_tokens: tuple[int | None, ...]
    ttft_ms: tuple[float | None, ...]
    tpot_ms: tuple[float, ...]
    source: str

    @property
    def graph(self) -> BlockGraph:
        return _graph(self.shape, *WIDTHS[self.precision])

    @property
    def foreign(self) -> bool:
        """Whether its weights are of a kind that edgert does not make for this unit."""
        return self.unit == "NPU" and self.precision != "INT4-CW"

    @property
    def kv_bits(self) -> float | None:
        """Bits of an element in the cache, None for f16: u8 and its scales on OpenVINO's CPU; llama.cpp keeps f16."""
        return None if self.unit != "CPU" else 16 if self.precision == "Q4" else U8_KV_BITS

    @property
    def prompts(self) -> list[tuple[int, float]]:
        """Lengths of prompts and times to the first token, where both are known.

        None with FP16 weights: a profile's operations a second are those of products with compressed weights, which
        these devices compute in INT8, twice as fast.
        """
        known = zip(self.prompt_tokens, self.ttft_ms, strict=True)
        return [] if self.precision == "FP16" else [(p, t) for p, t in known if p and t]

    @property
    def read_bytes(self) -> int:
        """Weights that a token reads."""
        return sum(Work.of(block).weight_bytes for block in self.graph.blocks)


@dataclass(frozen=True)
class Rates:
    """What is fitted; see `DeviceModel`. `compute_gops` is None where no run says how long a prompt took."""

    bandwidth_gbps: float
    compute_gops: float | None = None


@dataclass(frozen=True)
class Check:
    """A prediction beside what was published: `what` is `decode` or `prefill`.

    `predicted_ms` is None, and `error` with it, where nothing that was fitted tells; that counts as missed.
    """

    run: Run
    what: str
    prompt_tokens: int | None
    published_ms: float
    predicted_ms: float | None

    @property
    def error(self) -> float | None:
        return None if self.predicted_ms is None else self.predicted_ms / self.published_ms - 1

    @property
    def phase(self) -> str:
        """One of `PHASES`. With static shapes all prompts are long ones."""
        if self.what == "decode":
            return self.what
        return PHASES[1 if self.run.unit == "NPU" or (self.prompt_tokens or 0) > 2 * SHORT_PROMPT else 2]

    @property
    def missed(self) -> bool:
        limit = LIMITS.get(self.run.unit)
        return limit is not None and (self.error is None or abs(self.error) > limit)


@cache
def _graph(shape: str, weights: Weights, group_size: int) -> BlockGraph:
    config = next(model.config for model in catalogue.models() if model.name == shape)
    return from_config(config, weights=weights, group_size=group_size).graph


def read(path: Path = RUNS) -> tuple[dict[str, str], tuple[Run, ...]]:
    """Addresses of the sources, and the runs."""
    data = json.loads(path.read_text("utf-8"))
    return data["sources"], tuple(build(Run, row, "run") for row in data["runs"])


def by_device(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by SoC and unit, those that read the most weights first: the ones that say most about a bandwidth."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.soc, run.unit), []).append(run)
    for own in found.values():
        own.sort(key=lambda run: (-run.read_bytes, run.machine, run.model, run.source))
    return found


def split(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Of a device's runs in the order of `by_device`: the first, third, fifth … to fit, the others to predict.

    An NPU's runs of INT4 with groups are never fitted: edgert makes none, as NPUs do not keep them packed.
    """
    own = [run for run in runs if not run.foreign]
    return own[::2], own[1::2] + [run for run in runs if run.foreign]


def times_ms(run: Run, prompt_tokens: int, rates: Rates) -> tuple[float, float]:
    """Predicted time to the first token, and of each token after it."""
    config = DeviceConfig.parse(CONFIGS[run.unit])
    # Where nothing was fitted the prompt's time is not asked for.
    model = DeviceModel(
        "fitted", rates.bandwidth_gbps, rates.compute_gops or 1e3, LAUNCH_US[run.unit], 20.0, None, None,
        "f32" if run.unit == "CPU" else "f16", "published", "", CONFIGS[run.unit], kv_bits=run.kv_bits,
    )  # fmt: skip
    host = replace(model, name="host", config=CONFIGS["CPU"])  # looks embeddings up, which takes no time that counts
    profile = Profile(2, run.soc, (model,) if run.unit == "CPU" else (model, host))
    costs = Costs(run.graph, profile, NPU_SHAPES if run.unit == "NPU" else None)
    load = Workload(prompt_tokens, NEW_TOKENS, chunk=prompt_tokens)
    found = predict(costs, Plan.single(run.graph, config), load)
    return found.prefill_us / 1e3, found.decode_us / (NEW_TOKENS - 1) / 1e3


def fit(runs: Sequence[Run]) -> Rates:
    """Rates of one device: medians of those with which each run by itself would be predicted.

    The bandwidth follows from decode, the operations a second from each run's longest prompt.
    """
    bandwidth = statistics.median(value for run in runs for value in bandwidths_gbps(run))
    gops = computes_gops(runs, bandwidth)
    return Rates(bandwidth, statistics.median(gops) if gops else None)


def computes_gops(runs: Iterable[Run], bandwidth_gbps: float) -> list[float]:
    """The operations a second with which each run's longest prompt would be predicted."""
    longest = [(run, *max(run.prompts)) for run in runs if run.prompts]
    return [
        _solve(lambda x, r=run, p=p: times_ms(r, p, Rates(bandwidth_gbps, x))[0], t)  # type: ignore[misc]
        for run, p, t in longest
    ]


def bandwidths_gbps(run: Run) -> list[float]:
    """The bandwidths with which its decode times would be predicted."""
    return [
        _solve(lambda x, p=p: times_ms(run, p or SHORT_PROMPT, Rates(x, 1e5))[1], t)  # type: ignore[misc]
        for p, t in zip(run.prompt_tokens, run.tpot_ms, strict=True)
    ]


def _solve(predicted_ms: Callable[[float], float], published_ms: float) -> float:
    """The rate at which the predicted time is the published one: the time is about inversely proportional to it."""
    rate = 1e2
    for _ in range(20):
        better = min(1e6, max(1e-1, rate * predicted_ms(rate) / published_ms))
        if abs(better / rate - 1) < 1e-4:
            return better
        rate = better
    return rate


def spreads(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """The middle nine tenths of the rows' bandwidths, and of their operations a second (empty without any)."""
    gops = computes_gops(runs, fit(runs).bandwidth_gbps)
    gbps = [value for run in runs for value in bandwidths_gbps(run)]
    return _middle(gbps), _middle(gops) if gops else []


def _middle(values: Sequence[float]) -> list[float]:
    low, high = np.percentile(values, [5, 95]).tolist()
    return [low, high]


def checks(runs: Iterable[Run], rates: Rates) -> list[Check]:
    """Every time that was published, with its prediction where the rates allow one."""
    found = []
    for run in runs:
        for p, tpot in zip(run.prompt_tokens, run.tpot_ms, strict=True):
            found.append(Check(run, "decode", p, tpot, times_ms(run, p or SHORT_PROMPT, rates)[1]))
        for p, ttft in run.prompts:
            known = rates.compute_gops is not None
            found.append(Check(run, "prefill", p, ttft, times_ms(run, p, rates)[0] if known else None))
    return found


def carried(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[Check]]:
    """Decode times with the share of the memory's peak that the SoC before reached, by unit and the two SoCs."""
    devices = by_device(runs)
    found = {}
    for unit in LIMITS:
        socs = [soc for soc in PEAKS_GBPS if (soc, unit) in devices]
        for before, soc in pairwise(socs):
            usual = [run for run in devices[before, unit] if not run.foreign]
            share = fit(usual).bandwidth_gbps / PEAKS_GBPS[before]
            rates = Rates(share * PEAKS_GBPS[soc])
            found[unit, before, soc] = [c for c in checks(devices[soc, unit], rates) if c.what == "decode"]
    return found


def page(path: Path = RUNS) -> tuple[str, str]:
    """The Markdown page and its picture, an SVG document."""
    sources, runs = read(path)
    devices = by_device(runs)
    halves = {device: split(own) for device, own in devices.items()}
    fitted = {device: fit(half) for device, (half, _) in halves.items()}
    predicted = [c for device, (_, rest) in halves.items() for c in checks(rest, fitted[device])]
    seen = [c for device, (half, _) in halves.items() for c in checks(half, fitted[device])]
    parts = [
        _INTRODUCTION,
        "## Result\n",
        _summary(predicted),
        "![Predicted over published decode times](validation.svg)\n",
        "## Misses\n",
        _table(c for c in predicted if c.missed),
        _READING,
        "## What was fitted\n",
        _fitted(devices, halves, fitted),
        "## From one SoC to the next\n",
        _CARRIED,
        _carried(runs),
        "## Every prediction\n",
        _table(predicted),
        "## The rows that were fitted\n",
        "How well two numbers describe all the rows that they came from.\n",
        _table(seen),
        "## Sources\n",
        "".join(f"* `{name}`: {address}\n" for name, address in sources.items()),
    ]
    return "\n".join(parts), picture(predicted)


_INTRODUCTION = """# Device models against published runs

<!-- Written by benchmarks/validation.py; the text is there. -->

The profiles of Intel's SoCs rest on runs that others published. This page asks what such a profile is worth: two
numbers a device are fitted on half of the runs (bandwidth from decode, operations a second from the time to the first
token of the longest prompt), and the other half is predicted with `edgert.cost` and
`edgert.prediction`, from the shapes in edgert's catalogue. No device was at hand.

The rule, which looks at no result: a device is a unit of a SoC. Its runs are ordered by the weights that a token reads,
most first (then by machine and model); the first, third, fifth … are fitted, the second, fourth … predicted. Both
prompts of a row go the same way.

Which runs: from OpenVINO's own tables those of a SoC's usual machine whose model has the blocks of a model in the
catalogue. From elsewhere, runs with OpenVINO (on a CPU with llama.cpp too) that name machine, model and precision and
give the speed of decode apart from the prompt's. Left out: mixtures of experts, whose weights edgert kept at INT8
where OpenVINO had INT4 when the runs were chosen; FP4; runs that their author calls slowed down (by a dock's power
supply); speeds of prompts whose length is not given. Where that needed a decision:

* **Variants.** OpenVINO's tables have up to three INT4 variants of one model with nothing to tell them apart (some
  layers may be at INT8), sorted by speed. Taken is the middle one of each prompt length, of two the slower. On the 358H
  the slowest takes up to 1.28 times as long as the fastest in decode, and 1.02 to 1.39 times with prompts of 1024.
* **Stand-ins.** zephyr, mistral-7b-v0.1, llama-3-8b, qwen2-7b, qwen2-1.5b and Qwen2.5-Coder are reckoned as the model
  of the catalogue with the same layers; vocabularies differ by up to 3 %, heads that are tied read the same bytes.
* **Doubles.** Of models with the same blocks in the 358H's table one was taken. Left out are mistral-7b-v0.1 and v0.2,
  llama-3-8b, qwen2-7b, qwen2.5-7b, qwen2.5-1.5b and the two reasoning ones of phi-4.
* **An exception.** `ai-benchmarks-12` has a first run whose memory got too hot, as its author says; the later one is of
  another model. It is kept, as there is little else of this class of machine.
* **Not found** in what could be read of the sources, so not here: a 155H's CPU with Qwen3-8B at 8.5 tokens a second,
  the 185H's iGPU with Qwen3-8B at 16.5, Mistral-7B INT4 on a 155H with 3667 ms to the first token.

Two exceptions were made after a first fit had shown that they matter. Prefill with FP16 weights is neither fitted nor
predicted: a profile has one rate for products, that of compressed weights. An NPU's run of INT4 with groups is
predicted, not fitted, as edgert makes no such model for an NPU; fitted, it made another NPU row miss, by 40 %. The
order by weights was chosen with the rows in view: in that of the alphabet, Lunar Lake's NPU would be fitted to its 0.6B
model and miss its 7B one. A third number, the tokens that reach half of the operations a second, was tried and dropped:
where it helped short prompts it made decode wait for operations.

The error is predicted over published time, less one. The limits are 15 % for iGPUs and 35 % for NPUs; for CPUs none.
"""

_CARRIED = """A SoC that nobody has run may take the share of its memory's peak that the same unit of the SoC before it
reached. Decode times of all runs, so predicted:
"""

_READING = """Why, as far as the rows tell:

* **Arrow Lake-H.** OpenVINO's INT8 run on a 255H reads 84 GB/s, its INT4 runs 51 to 53, a 285H with INT4 lies between.
  One bandwidth cannot say all three.
* **Small models.** Every token costs something that goes with the number of layers, not of bytes: Gemma 3 1B on an
  iGPU, and above all Qwen3 0.6B on an NPU, where a token takes 34 ms instead of 8 (33 ms on an Arrow Lake's, by the
  same source). Of models below 3B an NPU's profile is not to be believed.
* **An NPU with grouped INT4.** The 155H's row is of a model that edgert would not make: NPUs do not keep such weights
  packed ([npu](npu.md)).
* **Prefill.** Larger models reach more operations a second than small ones (27 to 54 TOPS on one iGPU), and one rate
  is fitted. llama-3-8b INT8 with 9900 ms has 1025 tokens: in OpenVINO's table of the 155H decoders with a little more
  than 1024 (decilm-7b and phi-3-medium too) take more than three times as long at INT8 as at INT4, others 1.2 times.
* **Meteor Lake's NPU, prefill.** The one row that was fitted has no prompt, so two others are not predicted. With the
  profile's rate, which is the 185H's, the 155H's 8790 ms would come out at about half.
* **Short prompts.** Even after 32 tokens a first token takes 2 to 27 ms longer than a later one on Panther Lake, 14 to
  175 on the others. The cost model has no such constant, so its errors there are on one side.
"""


def _summary(found: Sequence[Check]) -> str:
    lines = [
        "| unit | phase | published | predicted | median error | within the limit | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for unit in CONFIGS:
        for what in PHASES:
            own = [c for c in found if (c.run.unit, c.phase) == (unit, what)]
            if own:
                limit = LIMITS.get(unit)
                met = f"{sum(not c.missed for c in own)} of {len(own)} ({limit:.0%})" if limit else "no limit"
                errors = [c.error for c in own if c.error is not None]
                worst = max(errors, key=lambda error: abs(math.log(1 + error)))
                middle = statistics.median(map(abs, errors))
                lines.append(
                    f"| {_unit(unit)} | {what} | {len(own)} | {len(errors)} | {middle:.0%} | {met} | {worst:+.0%} |"
                )
    return "\n".join(lines) + "\n"


def _fitted(
    devices: dict[tuple[str, str], list[Run]],
    halves: dict[tuple[str, str], tuple[list[Run], list[Run]]],
    fitted: dict[tuple[str, str], Rates],
) -> str:
    lines = [
        "From the half that was fitted, and from all rows of a kind that edgert makes for the unit; in brackets the\n"
        "middle nine tenths of the rows, each by itself.\n",
        "| device | rows | GB/s | of the peak | TOPS | all rows | GB/s | TOPS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (soc, unit), own in devices.items():
        own = [run for run in own if not run.foreign]
        half, whole = fitted[soc, unit], fit(own)
        gbps, gops = spreads(own)
        lines.append(
            f"| {NAMES[soc]} {_unit(unit)} | {len(halves[soc, unit][0])} | {half.bandwidth_gbps:.1f} | "
            f"{half.bandwidth_gbps / PEAKS_GBPS[soc]:.0%} | {_rate(half)} | {len(own)} | "
            f"{whole.bandwidth_gbps:.1f} ({gbps[0]:.1f}–{gbps[1]:.1f}) | {_rate(whole)}"
            + (f" ({gops[0] / 1e3:.2f}–{gops[1] / 1e3:.2f}) |" if gops else " |")
        )
    return "\n".join(lines) + "\n"


def _rate(rates: Rates) -> str:
    return "–" if rates.compute_gops is None else f"{rates.compute_gops / 1e3:.2f}"


def _carried(runs: Sequence[Run]) -> str:
    lines = ["| unit | from | to | rows | median error | within the limit |", "|---|---|---|---|---|---|"]
    for (unit, before, soc), found in carried(runs).items():
        middle = statistics.median(c.error for c in found if c.error is not None)
        lines.append(
            f"| {_unit(unit)} | {NAMES[before]} | {NAMES[soc]} | {len(found)} | {middle:+.0%} | "
            f"{sum(not c.missed for c in found)} of {len(found)} |"
        )
    return "\n".join(lines) + "\n"


def _table(found: Iterable[Check]) -> str:
    lines = [
        "| device | model | precision | phase | prompt | published ms | predicted ms | error | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        run = c.run
        predicted = "–" if c.predicted_ms is None else f"{c.predicted_ms:.1f}"
        error = "not predicted" if c.error is None else f"{c.error:+.0%}"
        error = f"**{error}**" if c.missed else error
        lines.append(
            f"| {run.machine} {_unit(run.unit)} | {run.model} | {run.precision} | {c.what} | {c.prompt_tokens or '?'} "
            f"| {c.published_ms:.1f} | {predicted} | {error} | `{run.source}` |"
        )
    return "\n".join(lines) + "\n"


def _unit(unit: str) -> str:
    return "iGPU" if unit == "GPU" else unit


def picture(found: Sequence[Check]) -> str:
    """Predicted over published decode times; an SVG document."""
    points = [
        Point(
            c.published_ms, c.predicted_ms, _unit(c.run.unit),
            f"{c.run.machine} {_unit(c.run.unit)}, {c.run.model} {c.run.precision}: {c.error:+.0%}",
        )
        for c in found
        if c.what == "decode" and c.predicted_ms is not None
    ]  # fmt: skip
    limits = {_unit(unit): LIMITS.get(unit) for unit in ("GPU", "NPU", "CPU")}
    return scatter("Decode: predicted over published ms a token", points, limits)


if __name__ == "__main__":
    write(PAGE, *page())
    print(f"wrote {PAGE}")
