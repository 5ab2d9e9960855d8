"""`edgert devices`: what models can run on here."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from edgert.backends import devices
from edgert.cli.options import Subparsers, console, print_json


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("devices", help="list devices and their configurations")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    found = devices()
    if options.json:
        print_json([{**asdict(info), "configs": [str(c) for c in info.configs]} for info in found])
        return 0
    table = Table("device", "name", "configurations (default first)", "capabilities")
    for info in found:
        name = Text(info.full_name)
        if info.emulated:
            name.append(" (emulated: right results, no speed)", "dim")
        table.add_row(info.name, name, " ".join(map(str, info.configs)), info.details.get("capabilities", ""))
    console().print(table)
    return 0
