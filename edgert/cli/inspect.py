"""`edgert inspect`: what is in a bundle."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.table import Table

from edgert.bundle import Bundle
from edgert.cli.compile import print_report
from edgert.cli.options import Subparsers, console, print_json, size


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("inspect", help="show what is in a bundle, and whether it is whole")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle, verify=options.verify)
    if options.json:
        graph = bundle.graph.to_json() if bundle.graph else None
        facts, report = asdict(bundle.facts), asdict(bundle.report)
        print_json({"model": facts, "report": report, "files": bundle.files, "graph": graph})
        return 0
    out = console()
    table = Table("fact", "value", title=str(bundle.path))
    for name, value in {**asdict(bundle.facts), "source": bundle.report.source, **bundle.report.tools}.items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
    if bundle.graph:
        table.add_row(
            "blocks", str(len(bundle.graph.blocks)) + (f" ({bundle.graph.reason})" if bundle.graph.reason else "")
        )
    out.print(table)
    print_report(out, bundle)
    files = Table("file", "size", "sha256", title="files (hashes verified)" if options.verify else "files")
    for name, entry in bundle.files.items():
        files.add_row(name, size(entry["bytes"]), entry["sha256"][:12])
    out.print(files)
    return 0
