"""`edgert plan`: which block runs where, as a table, a picture, or a file for `run --plan`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from edgert.architecture import PRECISIONS
from edgert.backends import require
from edgert.bundle import Bundle
from edgert.cli import report
from edgert.cli.model import PlannedModel, find_model
from edgert.cli.options import Subparsers, add_placement, console, find_profile, print_json
from edgert.cli.picture import config_columns, plan_svg, rows
from edgert.cli.report import FIGURES, Line, Study, figures
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import BundleError, EdgertError, PlanError, UsageError, cause
from edgert.graph import BlockGraph
from edgert.page import size
from edgert.placement import HOST, Plan
from edgert.profile import Profile
from edgert.scheduler import OBJECTIVES, Constraints, schedule, sensitivity
from edgert.scheduler.candidates import Candidates
from edgert.scheduler.labels import WIDTH
from edgert.shapes import MAX_BUCKET, MAX_CHUNK, StaticShapes

if TYPE_CHECKING:
    from rich.console import Console

    from edgert.npu.recipe import Finding

EPILOG = """\
examples
  edgert plan demo.edge
  edgert plan demo.edge --place "attention=CPU@bf16,ffn=CPU@f32" --svg plan.svg --save plan.json
  edgert plan demo.edge --place "prefill:*=GPU@f16+static,decode:*=CPU"
  edgert run demo.edge "Once" --plan plan.json

  edgert plan demo.edge --profile measured              the best plan by what `edgert profile` measured
  edgert plan qwen3-8b --profile lunarlake --html plan.html
  edgert plan ./Qwen3-8B/config.json --profile lunarlake --objective latency --max-watts 15 --explain
  edgert plan qwen3-8b --profile lunarlake --device NPU      what that plan takes, beside the others
"""
_SMALL = 16  # blocks up to which a table shows each
_MOST_LINES = 30
# What only means something with a profile, and what it is where nothing is said.
_WITH_PROFILE: dict[str, Any] = {
    "objective": OBJECTIVES[0], "prompt_tokens": None, "new_tokens": None, "chunk": 256, "max_ttft_ms": None,
    "max_tpot_ms": None, "max_watts": None, "memory": [], "max_error": None, "forbid": [], "require": [],
    "explain": False, "sensitivity": False,
}  # fmt: skip


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("plan", help="show which block runs where, or find the best plan", epilog=EPILOG)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a bundle, a config.json or its folder, a name of the catalogue such as qwen3-8b, or a hub id",
    )
    parser.add_argument("--profile", metavar="NAME", help="of a machine: a name, a file, or `measured` for this one")
    add_placement(parser)
    parser.add_argument("--weights", choices=PRECISIONS, help="of a model without them (default: int4)")
    group = parser.add_argument_group("what the plan is to be best at (with --profile)")
    group.add_argument("--objective", choices=OBJECTIVES, help=f"default: {OBJECTIVES[0]}")
    group.add_argument(
        "--prompt", dest="prompt_tokens", type=int, metavar="TOKENS", help="of the prompt (default: 1024, or what fits)"
    )
    group.add_argument(
        "--new", dest="new_tokens", type=int, metavar="TOKENS", help="to generate (default: 256, or what fits)"
    )
    group.add_argument("--chunk", type=int, metavar="TOKENS", help="of a prefill call (default: 256)")
    group.add_argument("--max-ttft-ms", type=float, metavar="MS", help="the first token comes at the latest after")
    group.add_argument("--max-tpot-ms", type=float, metavar="MS", help="each further token takes at most")
    group.add_argument("--max-watts", type=float, metavar="W", help="mean of the machine")
    group.add_argument(
        "--memory",
        action="append",
        metavar="GB",
        help="on all devices (default: what the profile says of the machine); DEVICE=GB on one; repeatable",
    )
    group.add_argument("--max-error", type=float, metavar="X", help="relative error against CPU@f32, as measured")
    group.add_argument("--forbid", action="append", metavar="DEVICE", help="e.g. NPU or CPU@bf16; repeatable")
    group.add_argument("--require", action="append", metavar="DEVICE", help="some block runs there; repeatable")
    group.add_argument("--explain", action="store_true", default=None, help="for each block the next best place")
    group.add_argument(
        "--sensitivity", action="store_true", default=None, help="what 20 %% more or less in the profile change"
    )
    parser.add_argument("--blocks", action="store_true", help="show every block of a large model")
    parser.add_argument("--json", action="store_true", help="the plan, with --profile all that was found, as JSON")
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--svg", metavar="FILE", help="write a picture of the plan")
    parser.add_argument("--html", metavar="FILE", help="write a page with picture and table, with --profile a report")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name, default in _WITH_PROFILE.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.profile is None:
            raise UsageError(f"--{name.removesuffix('_tokens').replace('_', '-')} needs --profile")
    model = find_model(options.model, options.weights)
    plan = _given(options, model.graph)
    if options.profile is not None:
        return _scheduled(options, model, plan)
    plan = plan or Plan.single(model.graph, DeviceConfig.parse("CPU"))
    plan.check(model.graph)
    plan = _with_warnings(plan, model)
    _write_files(options, model, plan, report.plan_html(model.name, model.graph, plan))
    if options.json:
        print_json(plan.to_json())
        return 0
    out = console()
    _print_blocks(out, model, plan, each=True)
    counts = " and ".join(str(len(placements)) for placements in plan.phases.values())
    out.print(f"{plan.rationale}: {counts} submodel{'' if counts == '1' else 's'}")
    out.print(plan.explain_weights(model.graph))
    if model.graph.reason:
        out.print(f"the model stays in one piece: {model.graph.reason}")
    _print_notes(out, model.notes, plan)
    return 0


def _given(options: argparse.Namespace, graph: BlockGraph) -> Plan | None:
    """The plan that the options ask for; None where they leave it open."""
    if options.plan is not None:
        return Plan.read(Path(options.plan))
    if options.place is not None:
        return Plan.explicit(graph, options.place)
    return None if options.device is None else Plan.single(graph, DeviceConfig.parse(options.device))


def _scheduled(options: argparse.Namespace, model: PlannedModel, plan: Plan | None) -> int:
    """The best plan for a machine, or what a given one takes there, beside the baselines."""
    profile, load = find_profile(options.profile), _load(options, model)
    constraints, remarks = _constraints(options, profile)
    shapes = StaticShapes((min(max(load.chunk, 2), MAX_CHUNK),)).within(model.context_length or MAX_BUCKET)
    costs = Costs(model.graph, profile, shapes)
    try:
        found = schedule(costs, options.objective, constraints, load)
    except PlanError as error:
        raise PlanError(f"{error}{_way_out(str(error), constraints, profile)}") from error
    judged = None if plan is None else Candidates(costs, options.objective, constraints, load, WIDTH).judge(plan)
    prediction, broken = (judged.prediction, judged.broken) if judged else (found.prediction, ())
    plan = _with_warnings(plan or found.plan, model, None if options.profile == "measured" else profile)
    notes = [*model.notes, *profile.warnings, *remarks]
    needed = sum(prediction.memory_bytes.values())
    if profile.memory_bytes is not None and needed > profile.memory_bytes:
        notes.append(f"the plan needs {size(needed)}, {profile.machine} has {size(profile.memory_bytes)}")
    wanted = options.sensitivity or options.html is not None
    changes = sensitivity(costs, plan, options.objective, constraints, load) if wanted else ()
    study = Study(model.name, model.graph, profile, found, plan, prediction, broken, changes, tuple(notes))
    _write_files(options, model, plan, report.study_html(study) if options.html is not None else "")
    if options.json:
        print_json(_as_json(study))
    else:
        _print_study(options, model, study)
    return 0


def _load(options: argparse.Namespace, model: PlannedModel) -> Workload:
    """The prompt and its continuation; what is not given is as large as usual and as the model's context allows."""
    new = options.new_tokens
    if model.bundle is not None and model.bundle.facts.task == "encoder":
        if new not in (None, 1):
            raise UsageError(f"--new is {new}: {model.name} is an encoder, which generates nothing; the limit is 1")
        new = 1
    return Workload.fitting(model.context_length, options.prompt_tokens, new, options.chunk)


def _constraints(options: argparse.Namespace, profile: Profile) -> tuple[Constraints, list[str]]:
    """What the plan has to keep, and what the reader must know of it."""
    notes: list[str] = []
    names = {_plain(name): name for config in profile.configs for name in (str(config), config.device)}

    def named(option: str, name: str) -> str:
        """The name as the profile has it."""
        if _plain(name) not in names:
            notes.append(f"{option} {name} changes nothing: profile {profile.machine} has no such device")
        return names.get(_plain(name), name)

    pool, devices = None, {}
    for text in options.memory:
        device, equals, number = text.rpartition("=")
        expected = f"--memory is {text!r}, expected GB or DEVICE=GB"
        if equals and not device:
            raise UsageError(expected)
        try:
            limit = int(float(number) * 1e9)
        except (ValueError, OverflowError):
            raise UsageError(expected) from None
        if device:
            devices[named("--memory", device)] = limit
        else:
            pool = limit
    if pool is None and profile.memory_bytes is not None:
        pool = profile.memory_bytes
        notes.append(
            f"memory: at most {size(pool)}, which {profile.machine} has by its profile; --memory GB sets another limit"
        )
    constraints = Constraints(
        max_ttft_us=None if options.max_ttft_ms is None else options.max_ttft_ms * 1e3,
        max_tpot_us=None if options.max_tpot_ms is None else options.max_tpot_ms * 1e3,
        max_watts=options.max_watts,
        max_memory_bytes=pool,
        max_device_memory_bytes=devices,
        max_error=options.max_error,
        forbidden=tuple(named("--forbid", name) for name in options.forbid),
        required=tuple(named("--require", name) for name in options.require),
    )
    return constraints, notes


def _plain(name: str) -> str:
    """A device's or configuration's name without the ways to write it: `GPU.0@f16` is `GPU@f16`."""
    name = str(DeviceConfig.parse(name)) if ":" in name else name
    return re.sub(r"^([A-Z]+)\.0(?=@|$)", r"\1", name)


def _way_out(refusal: str, constraints: Constraints, profile: Profile) -> str:
    """What to add to a refusal: where a limit came from that nobody gave, and how to do without a device."""
    added = ""
    if "max_memory_bytes" in refusal and constraints.max_memory_bytes == profile.memory_bytes:
        added += f"; max_memory_bytes is what {profile.machine} has by its profile; --memory GB sets another limit"
    watts = ("active_w", "idle_w")
    lacking = [str(c) for c in profile.configs if any(f"{c}: {each}" in refusal for each in watts)]
    if "base_w" in refusal or len(lacking) == len(profile.configs):
        added += "; --objective latency needs no watts, and `edgert profile --watts` takes what they are"
    elif forbidden := [f"--forbid {name}" for name in lacking if name != str(HOST)]:  # there the lookup stays
        added += f"; {' '.join(forbidden)} leaves out what the plan can do without"
    return added


def _as_json(study: Study) -> dict[str, Any]:
    """What the scheduler found; `given` is the plan that was asked about, where that is another one."""
    shown = {
        "plan": study.plan.to_json(), "prediction": study.prediction.to_json(), "broken": list(study.broken),
    }  # fmt: skip
    given = shown if study.given else None
    return {
        "model": study.name,
        "machine": study.profile.machine,
        "notes": list(study.notes),
        **study.schedule.to_json(),
        **({} if given else {"plan": study.plan.to_json()}),  # with its warnings
        "given": given,
        "sensitivity": [asdict(row) for row in study.sensitivity],
    }


def _print_blocks(out: Console, model: PlannedModel, plan: Plan, *, each: bool) -> None:
    columns = config_columns(plan)
    name = Column("name", no_wrap=True) if each else Column("blocks", overflow="fold")
    table = Table(*(["block"] if each else []), name, "weights", "MFLOP/token", "KV/token", title=model.name)
    for heading in columns:
        table.add_column(heading, overflow="fold")
    starts = {p.first for placements in plan.phases.values() for p in placements} if each else set()
    for row in rows(model.graph, plan, each=each):
        first = row.blocks[0]
        if first.index in starts - {0}:
            table.add_section()
        types = " + ".join(f"{size(n)} {kind}" for kind, n in first.weight_bytes.items())
        kv = size(first.kv_bytes_per_token) if first.kv_bytes_per_token else ""
        numbers = [types if each else row.weights, f"{first.flops_per_token / 1e6:.2f}", kv]
        table.add_row(*([str(first.index)] if each else []), row.name, *numbers, *row.configs)
    if model.graph.towers:
        table.add_section()
    for tower in model.graph.towers:  # before both phases, and for pictures and sound alone
        types = " + ".join(f"{size(n)} {kind}" for kind, n in tower.weight_bytes.items())
        table.add_row(*(["tower"] if each else []), tower.name, types, "", "", str(plan.tower(tower.name)))
    out.print(table)


def _print_study(options: argparse.Namespace, model: PlannedModel, study: Study) -> None:
    out = console()
    each = options.blocks or len(model.graph.blocks) <= _SMALL
    _print_blocks(out, model, study.plan, each=each)
    lines = study.lines
    _print_plans(out, lines[:_MOST_LINES], study.title)
    if len(lines) > _MOST_LINES:
        out.print(f"{len(lines) - _MOST_LINES} more baselines: --json and --html have them all")
    _print_plans(out, study.library, "library: plans to switch between at run time")
    if options.explain:
        _print_rows(
            out,
            report.runner_ups(study, each=each),
            f"runners-up{report.whose(study)}: where else a block would run, at what price",
        )
    if options.sensitivity:
        _print_rows(out, report.changes(study), "if a number of the profile is another one")
    out.print(report.basis(study.profile, study.prediction))
    out.print(report.proof(study.schedule))
    _print_notes(out, study.notes, study.plan)


def _print_plans(out: Console, lines: Sequence[Line], title: str) -> None:
    shown = [Column(heading, justify="right", no_wrap=True) for heading in FIGURES]
    table = Table("", "plan", *shown, title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for line in lines:
        mark, style = (">", "bold") if line.chosen else ("x", "dim") if line.broken else ("", None)
        table.add_row(mark, line.name, *figures(line.prediction), style=style)
    out.print(table)
    for line in lines:
        if line.broken:
            out.print(f"x {line.name}: {line.broken}", style="dim")


def _print_rows(out: Console, cells: Sequence[Sequence[str]], title: str) -> None:
    head = [Column(heading, overflow="fold") for heading in cells[0]]
    table = Table(*head, title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in cells[1:]:
        table.add_row(*row)
    out.print(table)


def _print_notes(out: Console, notes: Sequence[str], plan: Plan) -> None:
    for note in notes:
        out.print(f"note: {note}")
    for warning in plan.warnings:
        out.print(Text.assemble(("warning: ", "yellow"), warning))


def _with_warnings(plan: Plan, model: PlannedModel, elsewhere: Profile | None = None) -> Plan:
    """The plan with a warning for each configuration that this machine lacks, and for what an NPU will not take.

    Args:
        elsewhere: of the machine that the plan is for, if that may be another one: then one warning for all that lacks.
    """
    missing = []
    for p in dict.fromkeys(p for placements in plan.phases.values() for p in placements):
        if p.config.kind is DeviceKind.NPU and model.bundle is not None:
            missing += [str(finding) for finding in _recipe(model.bundle, range(p.first, p.last + 1))]
    absent = {}
    for config in dict.fromkeys((*plan.configs, *plan.towers.values())):
        try:
            require(config)
        except EdgertError as error:
            absent[str(config)] = f"when this plan was made: {error}"
    if elsewhere is not None and absent:
        missing.append(f"made for {elsewhere.machine}, on a machine that has no {', '.join(absent)}")
    else:
        missing += absent.values()
    return replace(plan, warnings=tuple(dict.fromkeys((*plan.warnings, *missing))))


def _recipe(bundle: Bundle, blocks: range) -> list[Finding]:
    from edgert.backends.openvino import core
    from edgert.npu.recipe import check

    if bundle.graph is None:
        return []
    try:
        return check(core().read_model(bundle.model_path), bundle.graph, blocks=blocks)
    except RuntimeError as error:  # OpenVINO's only class of errors
        raise BundleError(f"bundle {bundle.path}: {bundle.model_path.name} cannot be read: {cause(error)}") from error


def _write_files(options: argparse.Namespace, model: PlannedModel, plan: Plan, page: str) -> None:
    if options.save is not None:
        _write(options.save, json.dumps(plan.to_json(), indent=1) + "\n")
    if options.svg is not None:
        _write(options.svg, plan_svg(model.name, model.graph, plan))
    if options.html is not None:
        _write(options.html, page)


def _write(name: str, text: str) -> None:
    path = Path(name)
    if not path.name:
        raise UsageError(f"output {name!r} names no file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a name or a text that is no Unicode
        with suppress(OSError, ValueError):
            partial.unlink()
        raise UsageError(f"output {name!r} cannot be written: {error}") from error
