"""How fast a mix of precisions decodes beside f16 and uniform INT8 and INT4, at one shape, in one run.

    make bench-mixed ARGS="--mix OUT.edge --keep"       # bundles made with --max-ppl-increase, or their quality.json
    make bench-mixed ARGS="--mix OUT.edge --shape FOLDER --forms f16 mix"

Quality is that of trained models, speed that of the shape, by default Qwen3-0.6B's with random weights: each of its
matrices gets the format that its nearest relative in the trained model has (`mixed_forms.py`). Every form runs on each
configuration that suits it, in a process of its own; in a round all of them take turns. Forms stay in build/bench.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bandwidth import read_gbps
from charts import Bar, bars, write
from mixed_forms import Form, Forms, read_donor
from peers import machine
from rich.console import Console
from rich.table import Table
from runtimes.catalogue import OWN, Runtime
from runtimes.measure import START_LIMIT_S, Cell, OverLimitError, Process, RuntimeFailedError, steps_ms
from shapes import BUILD, ROOT, qwen3_bundle

import edgert
from edgert.backends import devices_of
from edgert.bundle import Bundle
from edgert.device import DeviceKind

DOCUMENT = ROOT / "docs" / "mixed_speed.json"
BOOKWORM = ROOT / "examples" / "models" / "bookworm"
FORMS = ("f16", "int8", "int4", "mix")
# f16 on all that a CPU has; the others where they are fast (docs/benchmarks.md).
CONFIGS: dict[str, tuple[str, ...]] = {
    "f16": ("CPU@f32", "CPU@f32+dq", "CPU@bf16", "CPU@kernels"),
    "mix": ("CPU@kernels", "CPU@f32+dq", "CPU@bf16"),
    "int8": ("CPU@kernels",),
    "int4": ("CPU@kernels",),
}
PROMPT, NEW = 512, 34  # tokens; the first comes with the prompt, and the first step is not counted
LIMIT = 2.5  # how many times as fast as f16 a mix is to decode

Result = Mapping[str, Any]


@dataclass
class Run:
    """A form on a configuration: milliseconds to the first token and from token to token, one value a round."""

    form: Form
    config: str
    prefill: Cell = field(default_factory=Cell)
    decode: Cell = field(default_factory=Cell)

    @property
    def name(self) -> str:
        return f"{self.form.key} {self.config}"


def planned(forms: Sequence[Form], present: set[str]) -> list[Run]:
    """What is measured: each form on those of its configurations that this machine has."""
    return [Run(form, config) for form in forms for config in CONFIGS[form.key.partition("-")[0]] if config in present]


def measure(
    runs: Sequence[Run], rounds: int, threads: int, vocab_size: int, limit_s: float, log: IO[bytes], progress: Console
) -> list[float]:
    """Let all runs take turns, each round beginning with another one; the first round is not counted.

    Args:
        limit_s: for a request. A run that does not keep it, or fails, is left out from there on.

    Returns:
        The memory's bandwidth, GB/s, before each round that counts; nothing where no compiler is there.
    """
    alive: dict[str, Process] = {}
    rates = []
    try:
        for number in range(rounds + 1):
            if number and (rate := read_gbps(threads)) is not None:
                rates.append(rate)
            progress.print(f"round {number} of {rounds}", style="dim")
            shift = number % len(runs)
            for turn, run in enumerate([*runs[shift:], *runs[:shift]]):
                if run.decode.closed:
                    continue
                try:
                    if run.name not in alive:
                        runtime = Runtime(run.name, "edgert", OWN, run.form.path, {}, {"device": run.config})
                        alive[run.name] = Process(runtime, threads, vocab_size, log)
                        alive[run.name].ask(START_LIMIT_S, do="versions")
                    seed = number * len(runs) + turn
                    stamps = alive[run.name].ask(limit_s, do="run", prompt=PROMPT, seed=seed, new=NEW)["stamps_s"]
                except (OverLimitError, RuntimeFailedError) as error:
                    alive.pop(run.name).end()
                    over = isinstance(error, OverLimitError)
                    for cell in (run.prefill, run.decode):
                        cell.over_s, cell.error = (limit_s, None) if over else (None, str(error))
                    progress.print(f"  {run.name}: {error or f'over {limit_s:g} s'}", style="yellow", markup=False)
                    continue
                if number:
                    run.prefill.values.append(1000 * stamps[0])
                    run.decode.values.append(steps_ms(stamps))
    finally:
        for process in alive.values():
            process.end()
    return rates


def times_as_fast(base: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and the least and the greatest of the rounds' own ratios."""
    rounds = [b / o for b, o in zip(base, ours, strict=True)]
    return {"value": statistics.median(base) / statistics.median(ours), "low": min(rounds), "high": max(rounds)}


def described(
    shape: str, forms: Sequence[Form], runs: Sequence[Run], rounds: int, threads: int, rates: Sequence[float]
) -> dict[str, Any]:
    """All that is known after a run.

    Every run is compared with the f16 bundle on the configuration where that decodes fastest (`against`); a mix is to
    reach `LIMIT` on one configuration.
    """
    base = min(
        (run for run in runs if run.form.key == "f16" and run.decode.median is not None),
        key=lambda run: run.decode.median or 0.0, default=None,
    )  # fmt: skip
    rows = []
    for run in runs:
        times = None
        if base is not None and run.decode.median is not None:
            times = times_as_fast(base.decode.values, run.decode.values)
        cells = {"prefill": run.prefill, "decode": run.decode}
        rows.append({
            "form": run.form.key, "config": run.config,
            **{name: {**asdict(cell), "median": cell.median} for name, cell in cells.items()}, "times": times,
        })  # fmt: skip
    asked = []
    for form in forms:
        if form.donor is not None:
            measured = [run for run in runs if run.form is form and run.decode.median is not None]
            best = min(measured, key=lambda run: run.decode.median or 0.0, default=None)
            each = {
                run.config: times_as_fast(run.decode.values, best.decode.values)["value"]
                for run in runs
                if best is not None and run.form.key == "f16" and run.decode.median is not None
            }
            value = min(each.values(), default=None)
            asked.append({
                "form": form.key, "config": best and best.config, "value": value, "each": each, "limit": LIMIT,
                "met": None if value is None else value >= LIMIT,
            })  # fmt: skip
    return {
        "shape": shape,
        "date": datetime.date.today().isoformat(),
        "provenance": "measured",
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "prompt": PROMPT,
        "steps": NEW - 2,
        "bandwidth_gbps": [*rates],
        "forms": [
            {
                "form": form.key, "bits": form.bits, "bytes": form.bytes, "formats": form.formats,
                "trained": form.donor and {"model": form.donor.name, **form.donor.quality},
            }
            for form in forms
        ],
        "against": base and base.config,
        "runs": rows,
        "asked": asked,
    }  # fmt: skip


def _text(cell: Mapping[str, Any], digits: int) -> str:
    if cell["over_s"] is not None:
        return f"over {cell['over_s']:g} s"
    if cell["median"] is None:
        return "failed" if cell["error"] else "–"
    low, high = min(cell["values"]), max(cell["values"])
    return f"{cell['median']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _times(row: Mapping[str, Any]) -> str:
    times = row["times"]
    return "–" if times is None else f"{times['value']:.2f} ({times['low']:.2f}–{times['high']:.2f})"


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of what is printed."""
    forms = {form["form"]: form for form in result["forms"]}
    heads = ["weights", "bits", "MB", "configuration", "decode, ms/token", "first token, ms"]
    rows = []
    for row in result["runs"]:
        form = forms[row["form"]]
        rows.append([
            row["form"], f"{form['bits']:.2f}", f"{form['bytes'] / 1e6:.0f}", row["config"],
            _text(row["decode"], 1), _text(row["prefill"], 0), _times(row),
        ])  # fmt: skip
    return [*heads, f"times f16 on {result['against'] or '–'}"], rows


def remarks(result: Result) -> list[str]:
    """What was asked for, and where the mixes come from."""
    lines = []
    for asked in result["asked"]:
        word = "not measured" if asked["met"] is None else "met" if asked["met"] else "missed"
        each = ", ".join(f"{value:.2f} against {config}" for config, value in asked["each"].items())
        lines.append(
            f"{asked['form']} on {asked['config'] or '–'}, times as fast as f16 in decode: {each or '–'}; asked "
            f"{asked['limit']:g} against the fastest: {word}."
        )
    for form in result["forms"]:
        if trained := form["trained"]:
            lines.append(
                f"{form['form']} is the mix of {trained['model']}, which there takes {trained['bits']:.2f} bits a "
                f"weight and costs {trained['increase']:+.2%} perplexity (at most {trained['bound']:.2%} with 95 % "
                f"confidence; budget {trained['budget']:.2%}). What it would cost a trained model of this shape is not "
                "known."
            )
    for row in result["runs"]:
        if row["decode"]["error"]:
            lines.append(f"{row['form']} {row['config']}: {row['decode']['error']}")
    return lines


def where(result: Result) -> str:
    """The machine and the circumstances."""
    machine, rates = result["machine"], result["bandwidth_gbps"]
    read = f"{statistics.median(rates):.1f} GB/s read ({min(rates):.1f}–{max(rates):.1f})" if rates else "no bandwidth"
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['isa'])}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; {result['threads']} threads; {read}; "
        f"{result['date']}; rounds: {result['rounds']}; {result['provenance']}."
    )


def terminal(result: Result) -> None:
    console = Console()
    console.print(where(result), markup=False)
    heads, rows = table(result)
    printed = Table(*heads, title=f"{result['shape']}, {result['prompt']} prompt tokens")
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
    for line in remarks(result):
        console.print(line, markup=False)


def page(result: Result) -> str:
    """docs/mixed_speed.md."""
    heads, rows = table(result)
    lines = [HEAD, f"## {result['shape']}\n", f"{where(result)}\n"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += [f"\n{line}" for line in remarks(result)]
    lines += ["\n| weights | shares of the formats |", "|---|---|"]
    for form in result["forms"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in form["formats"].items())
        lines.append(f"| {form['form']} | {shares} |")
    return "\n".join(lines) + "\n"


def picture(result: Result) -> str:
    panels = {"decode, ms/token": ("decode", 1), "first token, ms": ("prefill", 0)}
    found = {
        heading: [
            Bar(f"{row['form']}, {row['config']}", row[cell]["median"], _text(row[cell], digits).partition(" (")[0],
                row["form"].startswith("mix"))
            for row in result["runs"]
        ]
        for heading, (cell, digits) in panels.items()
    }  # fmt: skip
    title = f"{result['threads']} threads of a CPU, {result['prompt']} prompt tokens: less is better"
    return bars(title, {result["shape"]: found})


def keep(result: Result) -> None:
    """Write docs/mixed_speed.json, the page and its picture."""
    DOCUMENT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    write(DOCUMENT.with_suffix(".md"), page(result), picture(result))


HEAD = f"""# Speed of mixed precision

<!-- Written by benchmarks/mixed_speed.py, where the text is too. -->

![Bars for each form and configuration](mixed_speed.svg)

Quality is that of trained models, speed that of a larger shape with random weights, as no trained model of that size is
at hand. A search under a budget of perplexity chose the mix of a trained model. Each matrix of the shape then got the
format of that model's nearest one: of the same role, in a block of the same kind, at the same place in it, at the
nearest relative depth; a group that does not divide a row gave way to the nearest that does.

Each row has a process of its own, all in one run. In a round they take turns, each round begins with another one, and a
first round is not counted. Cells are medians of the rounds, in brackets the lowest and the highest.

* **bits, MB**: of a weight, and of all of them, with scales and zero points, tied ones once, without norms.
* **decode**: milliseconds a token, greedily, behind {PROMPT} prompt tokens: the median of {NEW - 2} steps, a turn's
  first step not counted. **first token**: from the call to the first token, with nothing of the prompt in a cache.
* **times f16**: how many times as fast decode is as that of the f16 bundle on the configuration where it decodes
  fastest; in brackets the least and the greatest of the rounds' own ratios.
* f16 runs on all of edgert's configurations that this CPU has; on `CPU@kernels` the products with f16 weights stay with
  OpenVINO. Joules are not measured.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs="+", type=Path, help="bundles or quality.json files (default: make bookworm's)")
    parser.add_argument("--shape", type=Path, help="a model as transformers writes it, or an f16 bundle")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=120, help="seconds for a request")
    parser.add_argument("--make", action="store_true", help="make the forms and measure nothing")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--keep", action="store_true", help=f"write it to {DOCUMENT.relative_to(ROOT)} and its page")
    options = parser.parse_args()
    progress = Console(stderr=True)
    BUILD.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        progress.print(text, style="dim", markup=False)

    shape = options.shape or qwen3_bundle().with_suffix("")
    folder = BUILD / f"{shape.resolve().name}.speed"
    try:
        donors = [read_donor(path) for path in options.mix or [_bookworm(say)]] if "mix" in options.forms else []
        if len({donor.name for donor in donors}) < len(donors):
            raise ValueError("--mix: two of them are of models with the same name")
        makers = Forms(shape, folder, say)
        forms = [makers.f16()] if "f16" in options.forms else []
        forms += [makers.uniform(weights) for weights in ("int8", "int4") if weights in options.forms]
        forms += [makers.mixed(donor) for donor in donors]
    except ValueError as error:
        parser.error(str(error))
    for form in forms:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in form.formats.items())
        progress.print(f"{form.key}: {form.bits:.2f} bits a weight, {form.bytes / 1e6:.1f} MB; {shares}", markup=False)
    if options.make:
        return 0
    cpus = devices_of(DeviceKind.CPU)
    present = {f"{cpu.name}@{variant}" for cpu in cpus for variant in cpu.variants if variant not in cpu.lacking}
    runs = planned(forms, present)
    vocab_size = Bundle.open(forms[0].path).facts.vocab_size
    with (BUILD / "mixed_speed.log").open("wb") as log:
        rates = measure(runs, options.rounds, options.threads, vocab_size, options.limit, log, progress)
    name = shape.resolve().name if options.shape else "Qwen3-0.6B's shape, random weights"
    result = described(name, forms, runs, options.rounds, options.threads, rates)
    terminal(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.keep:
        keep(result)
    return 0


def _bookworm(say: Any) -> Path:
    """The demo model within one percent, made once."""
    path = BUILD / "bookworm-1pct.edge"
    if not path.exists():
        edgert.compile(BOOKWORM, path, max_ppl_increase=0.01, progress=say)
    return path


if __name__ == "__main__":
    sys.exit(main())
