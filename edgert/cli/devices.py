"""`edgert devices`: what models can run on here, and why not on what is missing."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from edgert.cli.options import Subparsers, console, print_json
from edgert.device import DeviceInfo
from edgert.discovery import Absence, survey


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("devices", help="list devices, what each can do, and why others are absent")
    parser.add_argument("--json", action="store_true", help="as JSON: an object with the lists devices and absent")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    found, absent = survey()
    if options.json:
        devices = [{**asdict(info), "configs": [str(c) for c in info.configs]} for info in found]
        print_json({"devices": devices, "absent": [asdict(absence) for absence in absent]})
        return 0
    out = console()
    out.print(_present_table(found))
    if absent:
        out.print(_absent_table(absent))
    return 0


def _present_table(found: list[DeviceInfo]) -> Table:
    table = Table("device", "name and facts", "configurations (default first)")
    for info in found:
        name = Text(info.full_name)
        if info.emulated:
            name.append(" (emulated: right results, no speed)", "dim")
        for label, value in info.details.items():
            name.append(f"\n{label}: ", "dim").append(value)
        configs = Text("\n".join(map(str, info.configs)))
        for variant, reason in info.lacking.items():
            configs.append(f"\nnot {info.name}@{variant}: {reason}", "dim")
        table.add_row(info.name, name, configs)
        table.add_section()
    return table


def _absent_table(absent: list[Absence]) -> Table:
    table = Table("absent", "why, and what to do about it")
    for absence in absent:
        table.add_row(absence.kind, Text(absence.reason).append(f"\n-> {absence.remedy}", "cyan"))
    return table
