"""Three claims about NPUs and mixed precision, simulated with the shipped profiles. Writes docs/claims.md.

    .venv/bin/python benchmarks/claims.py [--draws 500]

Needs no device. What the profiles are unsure of is drawn from their ranges; every plan meets the same draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from charts import intervals, write
from numpy.typing import NDArray

from edgert import catalogue
from edgert.architecture import Weights
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.graph import BlockGraph
from edgert.placement import Plan
from edgert.prediction import Prediction, predict
from edgert.profile import Profile, find
from edgert.scheduler import schedule
from edgert.shapes import StaticShapes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
RUNS = Path(__file__).with_name("published_runs.json")

MODEL = "Mistral 7B v0.3"
MACHINES = {"meteorlake": "Meteor Lake", "lunarlake": "Lunar Lake", "pantherlake": "Panther Lake"}
# Prompts in few large chunks suit GPUs and NPUs best; 128 tokens have a shape of their own.
SHAPES = StaticShapes(chunks=(128, 1024), buckets=(512, 1024, 2048, 4096, 8192))
LOADS = {
    "chat": Workload(1024, 128, chunk=1024),
    "long prompt": Workload(4096, 128, chunk=1024),
    "writing": Workload(128, 512, chunk=1024),
}
# The iGPU with dynamic shapes, as in the published runs: what is padded would make it look slower than it is.
SINGLE = {"CPU": "CPU", "iGPU": "GPU@f16", "NPU": "NPU"}
RULES = {
    "attention NPU, rest CPU": "*=CPU,attention=NPU",
    "attention NPU, rest iGPU": "*=GPU@f16,embed=CPU,attention=NPU",
    "prefill NPU, decode iGPU": "prefill:*=NPU,decode:*=GPU@f16,embed=CPU",
    "prefill iGPU, decode NPU": "prefill:*=GPU@f16,decode:*=NPU,embed=CPU",
}
OFFLOAD, SAVING, MIXED = 3.8, 3.0, 2.5  # what the claims say
DRAWS, SEED = 500, 0

Floats = NDArray[np.float64]
Results = Mapping[str, Mapping[str, Mapping[str, "Outcomes"]]]  # by machine, load and plan


@dataclass(frozen=True)
class Outcomes:
    """What a plan takes for a load, one element a draw.

    Attributes:
        prefill_us, decode_us: the hand-over of keys and values between them counts as decode.
        energy_uj: of the machine.
        above_uj: without the machine's base.
    """

    prefill_us: Floats
    decode_us: Floats
    energy_uj: Floats
    above_uj: Floats

    @property
    def total_us(self) -> Floats:
        return self.prefill_us + self.decode_us

    @classmethod
    def of(cls, found: Sequence[Prediction]) -> Outcomes:
        def values(pick: Iterable[float]) -> Floats:
            return np.fromiter(pick, np.float64, len(found))

        return cls(
            values(p.prefill_us for p in found),
            values(p.handover_us + p.decode_us for p in found),
            values(sum(p.energy_parts_uj.values()) for p in found),
            values(sum(p.energy_parts_uj.values()) - p.energy_parts_uj["base"] for p in found),
        )


@cache
def graph(weights: Weights) -> BlockGraph:
    """The model's blocks at a precision; INT4 with one scale a row, as NPUs keep no other packed."""
    return next(m for m in catalogue.models() if m.name == MODEL).shape(weights, group_size=-1).graph


def mixed() -> BlockGraph:
    """Every other layer at INT8, the others at INT4: 6.1 bits a weight."""
    low, high = graph("int4"), graph("int8")
    return replace(low, blocks=tuple((high if a.index % 4 < 2 else low).blocks[a.index] for a in low.blocks))


def plans(blocks: BlockGraph) -> dict[str, Plan]:
    """The plans that are compared, those of a single device first."""
    single = {name: Plan.single(blocks, DeviceConfig.parse(config)) for name, config in SINGLE.items()}
    return single | {name: Plan.explicit(blocks, rules) for name, rules in RULES.items()}


def drawn(profile: Profile, random: np.random.Generator) -> Profile:
    """A profile with its uncertain numbers drawn from triangles over their ranges, independently."""
    devices = []
    for model in profile.devices:
        values: dict[str, Any] = {
            name: float(random.triangular(low, getattr(model, name), high))
            for name, (low, high) in model.ranges.items()
        }
        devices.append(replace(model, ranges={}, **values))
    assert profile.base_w is not None
    base_w = float(random.triangular(profile.base_range[0], profile.base_w, profile.base_range[1]))
    return replace(profile, devices=tuple(devices), base_w=base_w, base_range=())


def simulate(
    profile: Profile, blocks: BlockGraph, chosen: Mapping[str, Plan], loads: Mapping[str, Workload], draws: int
) -> dict[str, dict[str, Outcomes]]:
    """Outcomes by load and plan. The first draw is the profile as it is."""
    random = np.random.default_rng(SEED)
    found: dict[str, dict[str, list[Prediction]]] = {load: {plan: [] for plan in chosen} for load in loads}
    for number in range(draws):
        costs = Costs(blocks, drawn(profile, random) if number else profile, SHAPES)
        for name, load in loads.items():
            for plan_name, plan in chosen.items():
                found[name][plan_name].append(predict(costs, plan, load))
    return {load: {plan: Outcomes.of(each) for plan, each in own.items()} for load, own in found.items()}


def best(own: Mapping[str, Outcomes], what: str) -> Floats:
    """Of each draw, what the single device takes that takes the least."""
    return np.min([getattr(own[name], what) for name in SINGLE], axis=0)  # type: ignore[no-any-return]


def interval(ratio: Floats) -> str:
    """Median, and the middle nine tenths."""
    low, middle, high = np.percentile(ratio, [5, 50, 95])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def share(reached: NDArray[np.bool_]) -> str:
    return f"{reached.mean():.0%}"


def in_short(results: Results) -> str:
    """What becomes of the first two claims, each over all machines and loads."""
    lines = [
        "| claim | plan | against | median, lowest to highest | draws that reach it |",
        "|---|---|---|---|---|",
    ]

    def add(claim: str, plan: str, against: str, ratios: Sequence[Floats], target: float) -> None:
        middles = [float(np.median(r)) for r in ratios]
        shares = [float((r >= target).mean()) for r in ratios]
        lines.append(
            f"| {claim} | {plan} | {against} | {min(middles):.2f}–{max(middles):.2f} | "
            f"{min(shares):.0%}–{max(shares):.0%} |"
        )

    cells = [own for loads in results.values() for own in loads.values()]
    for plan in ("attention NPU, rest CPU", "attention NPU, rest iGPU", "NPU", "prefill NPU, decode iGPU"):
        against = {
            "CPU": [own["CPU"].total_us for own in cells],
            "best single": [best(own, "total_us") for own in cells],
        }
        for name, base in against.items():
            ratios = [b / own[plan].total_us for b, own in zip(base, cells, strict=True)]
            add(f"{OFFLOAD}x faster", plan, name, ratios, OFFLOAD)
    for part, pick in enumerate(("prefill", "decode", "in all", "in all, above base")):
        add(f"{SAVING:g}x less energy {pick}", "NPU", "iGPU", [energies(own)[part] for own in cells], SAVING)
    return "\n".join(lines) + "\n"


def offload(results: Results) -> str:
    """The table of the first claim."""
    lines = [
        "| machine | load | plan | prefill over CPU | decode over CPU | all over CPU | decode over best | "
        f"all over best | {OFFLOAD}x over CPU | over best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for machine, loads in results.items():
        for load, own in loads.items():
            cpu = own["CPU"]
            for name, plan in own.items():
                if name == "CPU":
                    continue
                over_cpu = cpu.total_us / plan.total_us
                over_best = best(own, "total_us") / plan.total_us
                cells = [
                    interval(cpu.prefill_us / plan.prefill_us), interval(cpu.decode_us / plan.decode_us),
                    interval(over_cpu), interval(best(own, "decode_us") / plan.decode_us), interval(over_best),
                    share(over_cpu >= OFFLOAD), share(over_best >= OFFLOAD),
                ]  # fmt: skip
                lines.append(f"| {MACHINES[machine]} | {load} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def energies(own: Mapping[str, Outcomes]) -> tuple[Floats, ...]:
    """Energy on the iGPU over energy on the NPU: in prefill, decode, both, and both above the machine's base."""
    gpu, npu = own["iGPU"], own["NPU"]
    # A single device draws the same watts in both phases, as far as the profiles know.
    watts = (gpu.energy_uj / gpu.total_us) / (npu.energy_uj / npu.total_us)
    return (
        watts * gpu.prefill_us / npu.prefill_us, watts * gpu.decode_us / npu.decode_us,
        gpu.energy_uj / npu.energy_uj, gpu.above_uj / npu.above_uj,
    )  # fmt: skip


def saving(results: Results) -> str:
    """The table of the energy claim: energy on the iGPU over energy on the NPU."""
    lines = [
        f"| machine | load | prefill | decode | all | all, above base | {SAVING:g}x in prefill | in decode | in all | "
        "above base |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for machine, loads in results.items():
        for load, own in loads.items():
            ratios = energies(own)
            cells = [*(interval(r) for r in ratios), *(share(r >= SAVING) for r in ratios)]
            lines.append(f"| {MACHINES[machine]} | {load} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def precision(draws: int) -> str:
    """The table of the mixed-precision claim: FP16 over fewer bits, on one device."""
    graphs = {"FP16": graph("fp16"), "INT8": graph("int8"), "half INT8, half INT4": mixed(), "INT4": graph("int4")}
    bits = {name: 8 * _bytes(blocks) / (_bytes(graphs["FP16"]) / 2) for name, blocks in graphs.items()}
    lines = [
        f"| machine | device | weights | bits a weight | decode | prefill | chat | {MIXED}x in decode | in chat |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for machine in MACHINES:
        profile = find(machine)
        found = {
            name: simulate(profile, blocks, {k: plans(blocks)[k] for k in SINGLE}, {"chat": LOADS["chat"]}, draws)
            for name, blocks in graphs.items()
        }
        for device in SINGLE:
            for name in list(graphs)[1:]:
                base, own = found["FP16"]["chat"][device], found[name]["chat"][device]
                decode, total = base.decode_us / own.decode_us, base.total_us / own.total_us
                cells = [
                    device, name, f"{bits[name]:.1f}", interval(decode), interval(base.prefill_us / own.prefill_us),
                    interval(total), share(decode >= MIXED), share(total >= MIXED),
                ]  # fmt: skip
                lines.append(f"| {MACHINES[machine]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _bytes(blocks: BlockGraph) -> int:
    return sum(block.total_weight_bytes for block in blocks.blocks)


def published_precision() -> str:
    """What published runs of one model on one machine say of FP16 over INT4."""
    rows: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for run in json.loads(RUNS.read_text("utf-8"))["runs"]:
        if len(run["prompt_tokens"]) == 2:
            rows.setdefault((run["machine"], run["model"]), {})[run["precision"]] = run
    lines = [
        "| machine, iGPU | model | decode | prefill | decode INT8 | prefill INT8 |",
        "|---|---|---|---|---|---|",
    ]
    for (machine, model), own in rows.items():
        if "FP16" in own:
            cells = [
                f"{own['FP16'][time][1] / own[to][time][1]:.2f}"
                for to in ("INT4", "INT8")
                for time in ("tpot_ms", "ttft_ms")
            ]
            lines.append(f"| {machine} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scheduled() -> str:
    """What the scheduler chooses, with the profiles as they are."""
    lines = [
        "| machine | load | objective | plan | all over CPU | all over best | energy of best over its own |",
        "|---|---|---|---|---|---|---|",
    ]
    blocks = graph("int4")
    for machine, title in MACHINES.items():
        costs = Costs(blocks, find(machine), SHAPES)
        for name, load in LOADS.items():
            single = [predict(costs, plan, load) for plan in list(plans(blocks).values())[: len(SINGLE)]]
            for objective in ("tokens_per_joule", "latency"):
                found = schedule(costs, objective, load=load)
                own = found.prediction
                assert own.energy_uj is not None
                energy = min(p.energy_uj for p in single if p.energy_uj is not None) / own.energy_uj
                lines.append(
                    f"| {title} | {name} | {objective.replace('_', ' ')} | {_words(found.plan)} | "
                    f"{single[0].total_us / own.total_us:.2f} | "
                    f"{min(p.total_us for p in single) / own.total_us:.2f} | {energy:.2f} |"
                )
    return "\n".join(lines) + "\n"


def _words(plan: Plan) -> str:
    """Where most blocks of each phase run."""
    words = []
    for phase, placements in plan.phases.items():
        sizes: dict[str, int] = {}
        for p in placements:
            sizes[p.config.device] = sizes.get(p.config.device, 0) + p.last - p.first + 1
        places = " + ".join(f"{device} ({count})" for device, count in sizes.items())
        words.append(f"{phase}: {places}")
    return "; ".join(words)


def picture(results: Results) -> str:
    """Speed-ups of the chat load over the CPU and over the best single device, with intervals; an SVG document."""
    groups = {}
    for machine, loads in results.items():
        own = loads["chat"]
        groups[MACHINES[machine]] = {
            name: {
                kind: np.percentile(base / plan.total_us, [5, 50, 95]).tolist()
                for kind, base in (
                    ("over CPU", own["CPU"].total_us),
                    ("over best single device", best(own, "total_us")),
                )
            }
            for name, plan in own.items()
        }
    title = f"{MODEL} INT4, 1024 tokens in and 128 out: modelled speed, medians and 5–95 %"
    return intervals(title, groups, (0.1, 0.3, 1, OFFLOAD, 10), (1, OFFLOAD))


def page(draws: int = DRAWS) -> tuple[str, str]:
    """The Markdown page and its picture, an SVG document."""
    blocks = graph("int4")
    results = {machine: simulate(find(machine), blocks, plans(blocks), LOADS, draws) for machine in MACHINES}
    text = _TEXT.format(
        model=MODEL, draws=draws, in_short=in_short(results), offload=offload(results), saving=saving(results),
        precision=precision(max(2, draws // 10)), published=published_precision(), scheduled=scheduled(),
    )  # fmt: skip
    return text, picture(results)


_TEXT = """# Three claims, simulated

<!-- Written by benchmarks/claims.py; the text is there. -->

**Everything here is modelled.** Nothing ran on an NPU or a GPU. The devices' rates are fitted to what others published,
or assumed ([profiles](profiles.md)); [validation](validation.md) says how far off that is: in the median decode on an
iGPU by 5 %, long prompts by 16 %, short ones by 36 %, decode on an NPU by 31 %. **All watts are assumed**, so the table
of energies shows what follows from assumptions, and no more.

The model is {model} at INT4 with one scale a row, on all devices: NPUs keep no other INT4 packed ([npu](npu.md)).
Loads: `chat` has 1024 tokens in and 128 out, `long prompt` 4096 and 128, `writing` 128 and 512. Each cell is the
median of {draws} draws and, in brackets, the middle nine tenths of them. What a profile is unsure of (`ranges`: rates,
launches, transfers, watts; and `base_range`) is drawn from triangles over those ranges, each by itself; all plans of a
machine meet the same draws. `best` is the best single device of each draw.

## In short

{in_short}
Mixed precision, 2.5x over FP16: reached in decode with 6.1 bits a weight and fewer, never in prefill (below).

## 3.8x by moving a 7B model's attention to the NPU

It does not hold as it is said. In decode, attention reads its own weights (19 % of the model's) and keys and values
(3.6 % of the traffic after 1024 tokens at f16, 1.9 % at u8); the FFNs, which read nearly four fifths, stay where they
are. Moving attention off the CPU takes its part to a device that is hardly faster in decode, and pays 64 hand-overs a
token.

A speed-up of 3.8 and more over the *CPU* does come out where prompts are long: any plan with prefill on the iGPU or NPU
has it on Lunar and Panther Lake, where a CPU takes 12 to 40 times as long for a prompt. That is the CPU's weakness (how
fast OpenVINO's prefill is on these CPUs is among the least certain numbers here), not the NPU's merit: over the best
single device, which is the iGPU, the median of none of these plans gains anything. What does gain a little is a long
prompt that runs through iGPU and NPU as a pipeline, each with layers of its own: the scheduler finds that (last table).

{offload}
![Speed of the plans](claims.svg)

## 3 to 5 times less energy on the NPU than on the GPU

In prefill the iGPUs with matrix engines (Lunar and Panther Lake) are so much faster that they take *less* energy than
the NPU. In decode the NPU takes less in most draws, but not three times less: the machine's base, which runs as long as
the slower device takes, eats part of its low watts. Above the base the factor is larger, and the claim's lower end
comes into reach of the luckiest draws. 5x does not: the middle nine tenths of every cell end below 3.5.

{saving}
## 2.5x by mixed precision

In decode it holds: time goes with bytes, and every other layer at INT8 and the rest at INT4 is enough. In prefill there
is nothing to gain in this model, which gives a device one rate for products. What it does to answers is not in here:
that is to be measured for each model, not assumed.

{precision}
What was published of FP16 over INT4 and INT8 on one machine (`openvino-155H` and `openvino-358H` in
`benchmarks/published_runs.json`; decode and prefill after and of 1024 tokens) agrees in decode; in prefill compressed
weights gain 1.2 to 1.7x, because their products are computed in INT8:

{published}
## What the scheduler chooses

With the profiles as they are. A plan that loses to a single device is never chosen. Numbers in brackets are blocks; the
lookup of embeddings stays on the CPU.

{scheduled}
## Assumptions

* The devices of a machine do not slow each other down unless they work at once (prefill in a pipeline); then they share
  0.84 of the memory's peak.
* A submodel's launch costs 100 µs on an iGPU and 300 µs on an NPU (drawn from 30–300 and 100–1000); what crosses
  between devices is copied at half the CPU's bandwidth (drawn from half to one and a half times that).
* A device draws the same watts in prefill and decode. No heat, no limit on power shared by CPU and iGPU: under
  one, the iGPU's prefill would be slower than here.
* Keys and values are f16 on iGPU and NPU, u8 with its scales (8.5 bits) on the CPU. NPUs have static shapes: chunks of
  128 and 1024 tokens, caches in powers of two from 512. The iGPU has dynamic ones, as in the runs that were published.
* Draws are independent. Real errors go together: a machine with slow memory is slow on all devices, which moves ratios
  less than absolute numbers.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=DRAWS)
    write(PAGE, *page(parser.parse_args().draws))
    print(f"wrote {PAGE}")
