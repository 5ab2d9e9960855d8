"""`edgert bench`: how fast a model generates here, and what that costs in joules."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.cli.options import Subparsers, add_objective, add_placement, console, placement, print_json, watts
from edgert.energy import DECLARED, Energy, Idle, Meters, find_meters, merge, total, why_unavailable
from edgert.errors import ContextOverflowError, UsageError
from edgert.placement import Placement, Plan
from edgert.results import Timings
from edgert.session import Model, load

if TYPE_CHECKING:
    from rich.console import Console

Series = list[float] | None  # a value of each run; None where some run has none

BASE = "base"  # of --watts: the machine without its devices
SEEDS = range(8)  # prompts to try until one is not ended early by a stop token
EPILOG = """\
examples
  edgert bench demo.edge
  edgert bench demo.edge --device CPU@bf16 --prompt-tokens 512 --new-tokens 128
  sudo edgert bench demo.edge --energy                the counters are mostly root's; see docs/energy.md
  edgert bench demo.edge --energy --watts CPU=15      where nothing can be read: what you say, as an estimate

Times are those inside the devices, but for the first token's, which is from the call. A warm-up is not counted.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure speed and energy of a model", epilog=EPILOG)
    parser.add_argument("bundle", metavar="BUNDLE")
    add_objective(add_placement(parser))
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="random tokens (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="to generate (default: 64)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="runs after the warm-up (default: 5)")
    parser.add_argument("--energy", action="store_true", help="read this machine's energy counters")
    parser.add_argument(
        "--idle", type=float, default=3.0, metavar="SECONDS",
        help="with --energy, how long to measure what the machine draws at rest (default: 3; 0 is not at all)",
    )  # fmt: skip
    parser.add_argument(
        "--watts", action="append", default=[], metavar="DEVICE=WATTS",
        help="with --energy, what each device of the plan draws in the phases that use it, e.g. CPU=15, and base=4 for "
        "the rest of the machine all the time; used where nothing can be read; repeat",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON, with the values of each run")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        timings: of the whole of it.
        prefill: what it took until the first token, by domain; empty where energy is not measured.
        decode: the same for the tokens after the first.
    """

    timings: Timings
    prefill: tuple[Energy, ...]
    decode: tuple[Energy, ...]


def run(options: argparse.Namespace) -> int:
    for name, least in (("prompt_tokens", 1), ("new_tokens", 1), ("repeat", 1), ("idle", 0)):
        if not getattr(options, name) >= least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}, the least is {least}")
    declared = watts(options.watts)
    if declared and not options.energy:
        raise UsageError("--watts: nothing is measured in joules; add --energy")
    with _progress() as say:
        say("loading")
        # No fallback: a run that another device finished would measure neither.
        model = load(options.bundle, **placement(options), fallback=None)
        for warning in model.plan.warnings:
            print(f"edgert: warning: {warning}", file=sys.stderr)
        _check_watts(declared, model.plan)
        wanted = options.prompt_tokens + options.new_tokens
        if wanted > (limit := model.context_length):
            message = f"--prompt-tokens and --new-tokens are {wanted} together, the context holds {limit}"
            raise ContextOverflowError(message, tokens=wanted, limit=limit)
        say("warming up")
        prompt, emulated = _warm_up(model, options.prompt_tokens, options.new_tokens)
        meters = find_meters(declared_w=declared) if options.energy and not emulated else Meters([])
        idle = None
        if meters.present and options.idle:
            say(f"idling for {options.idle:g} s")
            idle = _idle(meters, options.idle)
        runs = []
        for number in range(1, options.repeat + 1):
            say(f"run {number} of {options.repeat}")
            runs.append(_generate(model, prompt, options.new_tokens, meters, idle))
    if options.json:
        print_json(_as_json(model, runs, idle))
    else:
        _show(console(), model, runs)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says on standard error what is being done. Drawn when that changes only: an animation would be measured too."""
    from rich.progress import Progress, TextColumn

    words, where = TextColumn("{task.description}", markup=False), console(stderr=True)
    hidden = not where.is_terminal
    with Progress(words, console=where, auto_refresh=False, transient=True, disable=hidden) as bars:
        task = bars.add_task("", total=None)
        yield lambda doing: bars.update(task, description=f"{doing} …", refresh=True)


def _check_watts(declared: Collection[str], plan: Plan) -> None:
    """Declared watts are for all devices of the plan or for none: one that is left out would count as 0."""
    used = {config.unit for config in plan.configs}
    if other := sorted(set(declared) - used - {BASE}):
        raise UsageError(f"--watts {other[0]}: the plan does not use it; it uses {', '.join(sorted(used))}")
    if declared and (left_out := sorted(used - set(declared))):
        raise UsageError(f"--watts: the plan uses {left_out[0]} too; declare what it draws, or it would count as 0")


def _warm_up(model: Model, prompt_tokens: int, new_tokens: int) -> tuple[list[int], bool]:
    """A prompt of random tokens that the model continues for as long as is wanted, or the last one tried.

    Also whether some device is emulated.
    """
    ids = np.setdiff1d(np.arange(model.facts.vocab_size), model.facts.eos_token_ids)
    for seed in SEEDS:
        prompt = np.random.default_rng(seed).choice(ids, prompt_tokens).tolist()
        timings = _generate(model, prompt, new_tokens, Meters([]), None).timings
        if timings.new_tokens == new_tokens:
            break
    return prompt, timings.provenance == "emulated"


def _idle(meters: Meters, seconds: float) -> Idle:
    with meters.measure() as window:
        time.sleep(seconds)
    return Idle.of(window.results)


def _generate(model: Model, prompt: list[int], new_tokens: int, meters: Meters, idle: Idle | None) -> Run:
    model.release()  # or the next run would find the prompt in a cache
    with meters.measure(idle) as prefill:
        pieces = model.stream(prompt, max_tokens=new_tokens, temperature=0.0)
        last = next(pieces)
    with meters.measure(idle) as decode:
        for piece in pieces:
            last = piece
    phases = list(model.plan.phases.values())
    return Run(last.timings, _of(prefill.results, phases[0]), _of(decode.results, phases[-1]))


def _of(results: Sequence[Energy], placements: Sequence[Placement]) -> tuple[Energy, ...]:
    """Without the declared watts of devices that a phase does not use."""
    counted = {f"{DECLARED}{unit}" for unit in (BASE, *(p.config.unit for p in placements))}
    return tuple(e for e in results if not e.domain.startswith(DECLARED) or e.domain in counted)


def _speeds(runs: Sequence[Run]) -> dict[str, Series]:
    """By name and unit; None for emulated devices, and for decode where no run has a second token."""
    timings = [run.timings for run in runs]
    if any(t.provenance == "emulated" for t in timings):
        return dict.fromkeys(("ttft_ms", "prefill_tokens_per_s", "tpot_ms", "decode_tokens_per_s"))
    return {
        "ttft_ms": [t.ttft_us / 1e3 for t in timings],
        "prefill_tokens_per_s": [t.prompt_tokens / t.prefill_us * 1e6 for t in timings],
        "tpot_ms": _all([t.tpot_us and t.tpot_us / 1e3 for t in timings]),
        "decode_tokens_per_s": _all([t.tokens_per_second for t in timings]),
    }


def _costs(runs: Sequence[Run]) -> dict[str, Series]:
    """By name and unit, of the machine's total; None where it is unavailable in some run."""
    prompts, news = [run.timings.prompt_tokens for run in runs], [run.timings.new_tokens - 1 for run in runs]
    prefill = list(zip(_totals([run.prefill for run in runs]), prompts, strict=True))
    decode = list(zip(_totals([run.decode for run in runs]), news, strict=True))
    per_token = _all([_joules(energy.energy_uj, tokens) for energy, tokens in decode])
    return {
        "prefill_j_per_token": _all([_joules(energy.energy_uj, tokens) for energy, tokens in prefill]),
        "decode_j_per_token": per_token,
        "decode_j_per_token_above_idle": _all([_joules(energy.above_idle_uj, tokens) for energy, tokens in decode]),
        "decode_tokens_per_s_per_w": per_token and [1 / joules for joules in per_token],
        "prefill_w": _all([energy.mean_w for energy, _ in prefill]),
        "decode_w": _all([energy.mean_w for energy, _ in decode]),
    }


def _totals(windows: Sequence[tuple[Energy, ...]]) -> list[Energy]:
    """The machine's total in each window, always of the same domains: those that all windows have."""
    domains = total(merge(windows)).domain.split(" + ")
    return [total([energy for energy in window if energy.domain in domains]) for window in windows]


def _all(values: Sequence[float | None]) -> Series:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _joules(energy_uj: float | None, tokens: int) -> float | None:
    return None if energy_uj is None or not tokens else energy_uj / 1e6 / tokens


def _domains(runs: Sequence[Run]) -> dict[str, tuple[Energy, ...]]:
    """All runs together, by phase."""
    return {"prefill": merge([run.prefill for run in runs]), "decode": merge([run.decode for run in runs])}


def _as_json(model: Model, runs: Sequence[Run], idle: Idle | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "plan": model.plan.to_json(),
        "prompt_tokens": runs[0].timings.prompt_tokens,
        "new_tokens": [run.timings.new_tokens for run in runs],
        "provenance": runs[0].timings.provenance,
        **{name: _summary(values) for name, values in _speeds(runs).items()},
        "energy": None,
    }
    if runs[0].decode:
        phases = _domains(runs)
        data["energy"] = {
            **{name: _summary(values) for name, values in _costs(runs).items()},
            "idle": None if idle is None else asdict(idle),
            "total": {phase: asdict(total(energies)) for phase, energies in phases.items()},
            "domains": {phase: [asdict(energy) for energy in energies] for phase, energies in phases.items()},
        }
    return data


def _summary(values: Series) -> dict[str, Any] | None:
    return (
        None if values is None else {"median": median(values), "min": min(values), "max": max(values), "runs": values}
    )


_LABELS = {
    "ttft_ms": ("time to first token", "ms"),
    "prefill_tokens_per_s": ("prefill", "tok/s"),
    "tpot_ms": ("time per token", "ms"),
    "decode_tokens_per_s": ("decode", "tok/s"),
    "prefill_j_per_token": ("prefill", "J/token"),
    "decode_j_per_token": ("decode", "J/token"),
    "decode_j_per_token_above_idle": ("decode, above idle", "J/token"),
    "decode_tokens_per_s_per_w": ("decode", "tok/s/W"),
    "prefill_w": ("prefill", "W"),
    "decode_w": ("decode", "W"),
}


def _show(out: Console, model: Model, runs: Sequence[Run]) -> None:
    timings = runs[0].timings
    out.print(f"{model.facts.name}: {model.plan.rationale}")
    out.print(f"{timings.prompt_tokens} prompt tokens, {timings.new_tokens} new, {len(runs)} runs after a warm-up")
    if timings.provenance == "emulated":
        out.print("emulated device: its speed and its energy say nothing of a real one", style="yellow")
        return
    if timings.new_tokens < 2:
        out.print("no second token, so nothing of decode: ask for more, or the model ended at once", style="yellow")
    energies = bool(runs[0].decode)
    _print_values(out, {**_speeds(runs), **(_costs(runs) if energies else {})})
    if energies:
        phase, whole = "decode", total(merge([run.decode for run in runs]))
        if timings.new_tokens < 2:
            phase, whole = "prefill", total(merge([run.prefill for run in runs]))
        _print_domains(out, phase, _domains(runs)[phase], whole)


def _print_values(out: Console, rows: dict[str, Series]) -> None:
    from rich.table import Column, Table

    table = Table("", Column("median", justify="right"), Column("min – max", justify="right"), "unit")
    for name, values in rows.items():
        label, unit = _LABELS[name]
        if values:
            table.add_row(label, _figure(median(values)), f"{_figure(min(values))} – {_figure(max(values))}", unit)
        elif name != "decode_j_per_token_above_idle":
            table.add_row(label, "unavailable", "", unit)
    out.print(table)


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _print_domains(out: Console, phase: str, energies: Sequence[Energy], whole: Energy) -> None:
    from rich.table import Column, Table

    if whole.energy_uj is None:
        out.print(
            f"energy is unavailable; --watts DEVICE=WATTS counts what you declare. {whole.reason}", style="yellow"
        )
        return
    out.print(f"total: {whole.domain}, {whole.provenance}; domains contain each other and are not to be added")
    table = Table("domain", Column("W", justify="right"), "provenance", "step", "source", title=f"{phase}, all runs")
    for energy in energies:
        if energy.mean_w is not None:
            step = "unknown" if energy.resolution_uj is None else f"{energy.resolution_uj:.3g} µJ"
            table.add_row(energy.domain, _figure(energy.mean_w), energy.provenance, step, energy.source)
    out.print(table)
    for line in why_unavailable(energies):
        out.print(f"unavailable: {line}", style="dim")
