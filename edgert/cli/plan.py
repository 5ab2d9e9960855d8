"""`edgert plan`: which block runs where, as a table, a picture, or a file for `run --plan`."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from edgert.backends import require
from edgert.bundle import Bundle
from edgert.cli.options import Subparsers, add_placement, console, print_json, size
from edgert.cli.picture import plan_html, plan_svg
from edgert.errors import BundleError, EdgertError, UsageError
from edgert.placement import Plan
from edgert.session import choose_plan

EPILOG = """\
examples
  edgert plan demo.edge
  edgert plan demo.edge --device CPU@bf16
  edgert plan demo.edge --place "attention=CPU@bf16,ffn=CPU@f32" --svg plan.svg --save plan.json
  edgert run demo.edge "Once" --plan plan.json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("plan", help="show which block runs where", epilog=EPILOG)
    parser.add_argument("bundle", metavar="BUNDLE")
    add_placement(parser)
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--svg", metavar="FILE", help="write a picture of the plan")
    parser.add_argument("--html", metavar="FILE", help="write the picture and the table as a page")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    plan = choose_plan(bundle, plan=options.plan, device=options.device, place=options.place)
    graph = bundle.graph
    if graph is None and bundle.facts.format == "onnx":
        raise UsageError(f"bundle {bundle.path} runs whole on onnxruntime; it has no blocks to show")
    if graph is None:
        raise BundleError(f"bundle {bundle.path}: it has no block graph")
    plan.check(graph)
    plan = _with_warnings(plan)
    if options.save is not None:
        _write(options.save, json.dumps(plan.to_json(), indent=1) + "\n")
    if options.svg is not None:
        _write(options.svg, plan_svg(bundle.facts.name, graph, plan))
    if options.html is not None:
        _write(options.html, plan_html(bundle.facts.name, graph, plan))
    if options.json:
        print_json(plan.to_json())
        return 0
    out = console()
    table = Table("block", "name", "weights", "MFLOP/token", "KV/token", "runs on", title=bundle.facts.name)
    for number, placement in enumerate(plan.placements):
        for block in graph.blocks[placement.first : placement.last + 1]:
            weights = " + ".join(f"{size(n)} {kind}" for kind, n in block.weight_bytes.items())
            kv = size(block.kv_bytes_per_token) if block.kv_bytes_per_token else ""
            flops = f"{block.flops_per_token / 1e6:.2f}"
            table.add_row(str(block.index), block.name, weights, flops, kv, str(placement.config))
        if number < len(plan.placements) - 1:
            table.add_section()
    out.print(table)
    submodels = len(plan.placements)
    out.print(f"{plan.rationale}: {submodels} submodel{'s' if submodels > 1 else ''}")
    if graph.reason:
        out.print(f"the model stays in one piece: {graph.reason}")
    for warning in plan.warnings:
        out.print(Text.assemble(("warning: ", "yellow"), warning))
    return 0


def _with_warnings(plan: Plan) -> Plan:
    """The plan with a warning for each configuration that this machine lacks: it may be meant for another."""
    missing = []
    for config in dict.fromkeys(p.config for p in plan.placements):
        try:
            require(config)
        except EdgertError as error:
            missing.append(f"when this plan was made: {error}")
    return replace(plan, warnings=tuple(dict.fromkeys((*plan.warnings, *missing))))


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
