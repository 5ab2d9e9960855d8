"""`edgert profile`: measures a model's blocks on this machine's devices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgert.backends import devices
from edgert.bundle import Bundle
from edgert.cli.options import Subparsers, console, print_json, watts
from edgert.conditions import conditions, path_of
from edgert.device import DeviceConfig
from edgert.energy import find_meters, total
from edgert.errors import BundleError, DeviceError, UsageError
from edgert.grid import QUICK, Grid, default_configs
from edgert.placement import own_blocks
from edgert.profile import Profile
from edgert.profiler import Profiler

EPILOG = """\
examples
  edgert profile demo.edge                             every usual configuration of every device; minutes
  edgert profile demo.edge --quick                     fewer sizes, once
  edgert profile demo.edge --device CPU@f32+dq --device CPU@bf16
  edgert profile demo.edge --watts CPU=15 --watts base=4
  edgert plan demo.edge --profile measured             what follows from it

The profile is kept in the user's cache folder, under the machine's hardware, drivers, versions, power source and
governor; where one of them changes it is stale. Measuring that was interrupted goes on where it was. What is measured
should run alone: close what else works the machine.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("profile", help="measure a model's blocks on this machine", epilog=EPILOG)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "--device", action="append", default=[], metavar="DEVICE@VARIANT", help="measure there; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    parser.add_argument("--budget", type=float, default=600.0, metavar="S", help="no repetition begins later (600)")
    parser.add_argument("--contexts", type=_numbers, metavar="N,N", help="tokens in the cache for decode")
    parser.add_argument("--chunks", type=_numbers, metavar="N,N", help="new tokens of a prefill call")
    parser.add_argument(
        "--watts",
        action="append",
        default=[],
        metavar="DEVICE=WATTS",
        help="above the machine's base, and of the base itself (base=4): used where nothing can be read, as an "
        "estimate; repeatable",
    )
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--output", metavar="FILE", help="write the profile there, too")
    parser.add_argument("--json", action="store_true", help="the profile as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    if bundle.graph is None:
        raise BundleError(f"bundle {bundle.path}: it has no block graph, so there is nothing to measure")
    if options.budget is not None and not options.budget > 0:
        raise UsageError(f"--budget is {options.budget:g}, expected seconds above 0")
    configs = [DeviceConfig.parse(name) for name in options.device] or list(default_configs(devices()))
    grid = QUICK if options.quick else Grid()
    grid = replace(grid, **{k: v for k in ("contexts", "chunks") if (v := getattr(options, k)) is not None})
    for name in ("contexts", "chunks"):
        if (given := getattr(options, name)) and given[-1] > bundle.facts.context_length:
            raise UsageError(f"--{name} goes to {given[-1]}, the model's context holds {bundle.facts.context_length}")
    declared = watts(options.watts)
    if other := sorted(declared.keys() - {"base", *(config.device for config in configs)}):
        raise UsageError(f"--watts {other[0]}: neither base nor a device that is measured")
    path = path_of(conditions())
    err = console(stderr=True)
    known: Profile | None = None
    if path.exists():
        try:
            known = Profile.read(path)
        except DeviceError as error:
            err.print(f"measured anew: {error}")
    wanted = () if known is None else (1, *grid.within(bundle.facts.context_length).chunks)
    missing = []
    for config in configs:
        sizes = () if config.static else wanted  # static shapes are measured in sizes of their own
        if options.again or known is None or not known.covers(own_blocks(bundle.graph, config), config, sizes):
            missing.append(config)
    if missing:
        meters = find_meters()
        with meters.measure() as window:  # whether they count, before minutes go by
            pass
        counted = total(window.results)
        if counted.energy_uj is None and not declared:
            err.print(f"energy: unavailable ({counted.reason}); --watts may say it")
        partial = path.with_name(f".{path.stem}-{bundle.graph.signature}.partial")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=err) as bars:
            task = bars.add_task("", total=1.0)
            profiler = Profiler(
                bundle,
                missing,
                grid,
                meters=meters if meters.present else None,
                partial=partial,
                budget_s=options.budget,
                progress=lambda text, share: bars.update(task, description=text, completed=share),
            )
            measured = profiler.measure()
            bars.update(task, description="measured", completed=1.0)
        known = measured if known is None else known.joined(measured)
        known.write(path)
        profiler.discard()
    else:
        err.print("nothing to measure: this machine's profile has this model already (--again measures it anew)")
    assert known is not None
    if declared:
        known = known.declared(declared)
        known.write(path)
    if options.output is not None:
        known.write(Path(options.output))
    if options.json:
        print_json(known.to_json())
        return 0
    _show(known, bundle, configs, path)
    return 0


def _show(profile: Profile, bundle: Bundle, configs: Sequence[DeviceConfig], path: Path) -> None:
    assert bundle.graph is not None
    out = console()
    kinds = {block.signature: str(block.kind) for block in bundle.graph.blocks}
    kinds[bundle.graph.signature] = "whole model"
    counts = [block.signature for block in bundle.graph.blocks]
    table = Table("block", "tokens", "past", title=f"{bundle.facts.name}: ms a call")
    for config in configs:
        table.add_column(str(config), justify="right")
    for signature, kind in kinds.items():
        name = kind if counts.count(signature) < 2 else f"{kind} x {counts.count(signature)}"
        own = [m for m in profile.measurements if m.block == signature]
        for tokens, past in sorted({(m.tokens, m.past) for m in own}):
            if tokens > 1 and past > min(m.past for m in own if m.tokens == tokens):
                continue  # prefill behind other chunks: in the file
            cells = {m.config: m for m in own if (m.tokens, m.past) == (tokens, past)}
            found = [cells.get(str(config)) for config in configs]
            texts = ["" if m is None else f"{m.latency_us / 1000:.2f} ± {m.spread_us / 1000:.2f}" for m in found]
            table.add_row(name, str(tokens), str(past), *texts)
        table.add_section()
    out.print(table)
    for config in configs:
        model = profile.model(config)
        if model is not None:
            power = (
                "watts unknown"
                if model.active_w is None
                else f"{model.active_w:.1f} W ({model.provenance_of('active_w')})"
            )
            out.print(
                f"{config}: launch {model.launch_us:.0f} us, weights {model.bandwidth_gbps:.1f} GB/s, prefill "
                f"{model.compute_gops:.0f} GOPS, hand-over {model.transfer_gbps:.1f} GB/s, {power}"
            )
    base = "unknown" if profile.base_w is None else f"{profile.base_w:.1f} W ({profile.base_provenance})"
    memory = "" if profile.shared_gbps is None else f"memory {profile.shared_gbps:.1f} GB/s, "
    out.print(f"machine: {memory}base {base}")
    for warning in profile.warnings:
        out.print(Text.assemble(("warning: ", "yellow"), warning))
    out.print(f"kept in {path}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 16,64") from None
