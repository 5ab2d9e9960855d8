"""`edgert plan`: which block runs where, as a table, a picture, or a file for `run --plan`."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from edgert.backends import require
from edgert.bundle import Bundle
from edgert.cli.options import Subparsers, add_placement, console, print_json, size
from edgert.cli.picture import config_columns, plan_html, plan_svg
from edgert.device import DeviceKind
from edgert.errors import BundleError, EdgertError, UsageError, cause
from edgert.graph import BlockGraph
from edgert.placement import Plan
from edgert.session import choose_plan

if TYPE_CHECKING:
    from edgert.npu.recipe import Finding

EPILOG = """\
examples
  edgert plan demo.edge
  edgert plan demo.edge --device CPU@bf16
  edgert plan demo.edge --place "attention=CPU@bf16,ffn=CPU@f32" --svg plan.svg --save plan.json
  edgert plan demo.edge --place "prefill:*=GPU@f16+static,decode:*=CPU"
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
    plan = _with_warnings(plan, bundle, graph)
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
    where = config_columns(plan)
    table = Table("block", Column("name", no_wrap=True), "weights", "MFLOP/token", "KV/token", title=bundle.facts.name)
    for heading in where:
        table.add_column(heading, overflow="fold")
    starts = {p.first for placements in plan.phases.values() for p in placements}
    for block in graph.blocks:
        if block.index in starts - {0}:
            table.add_section()
        weights = " + ".join(f"{size(n)} {kind}" for kind, n in block.weight_bytes.items())
        kv = size(block.kv_bytes_per_token) if block.kv_bytes_per_token else ""
        flops = f"{block.flops_per_token / 1e6:.2f}"
        configs = [column[block.index] for column in where.values()]
        table.add_row(str(block.index), block.name, weights, flops, kv, *configs)
    out.print(table)
    counts = " and ".join(str(len(placements)) for placements in plan.phases.values())
    out.print(f"{plan.rationale}: {counts} submodel{'' if counts == '1' else 's'}")
    out.print(plan.explain_weights(graph))
    if graph.reason:
        out.print(f"the model stays in one piece: {graph.reason}")
    for warning in plan.warnings:
        out.print(Text.assemble(("warning: ", "yellow"), warning))
    return 0


def _with_warnings(plan: Plan, bundle: Bundle, graph: BlockGraph) -> Plan:
    """The plan with a warning for each configuration that this machine lacks, and for what an NPU will not take.

    It may be meant for another machine.
    """
    missing = []
    for p in dict.fromkeys(p for placements in plan.phases.values() for p in placements):
        if p.config.kind is DeviceKind.NPU:
            missing += [str(finding) for finding in _recipe(bundle, graph, range(p.first, p.last + 1))]
    for config in plan.configs:
        try:
            require(config)
        except EdgertError as error:
            missing.append(f"when this plan was made: {error}")
    return replace(plan, warnings=tuple(dict.fromkeys((*plan.warnings, *missing))))


def _recipe(bundle: Bundle, graph: BlockGraph, blocks: range) -> list[Finding]:
    from edgert.backends.openvino import core
    from edgert.npu.recipe import check

    try:
        return check(core().read_model(bundle.model_path), graph, blocks=blocks)
    except RuntimeError as error:  # OpenVINO's only class of errors
        raise BundleError(f"bundle {bundle.path}: {bundle.model_path.name} cannot be read: {cause(error)}") from error


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
