"""`edgert ps`: the service's models, and what they are doing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgert.cli.remote import add_remote, client, print_json
from edgert.service.values import brief

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("ps", help="list the models that the service has loaded")
    parser.add_argument("--all", action="store_true", help="those that are not loaded, too")
    add_remote(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with client(options) as service:
        models = service.status()["models"] if options.all else service.ps()
    if options.json:
        print_json(models)
    elif models:
        from edgert.cli.options import console

        console().print(table(models))
    else:
        print("no model is loaded; `edgert ps --all` lists what can be")
    return 0


def table(models: Sequence[dict[str, Any]]) -> Table:
    """A row a model. What nobody knows is a dash, never a zero."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("model", "state", "plan", "memory", "runs", "waits", "tok/s", "J/token", "unloads in"):
        found.add_column(heading, overflow="fold")
    for model in models:
        joules = number(model["joules_per_token"])
        cells = [
            model["name"] + (" (pinned)" if model["pinned"] else ""),
            model["state"],
            (model["plan"] or "–").removeprefix("single device "),
            "–" if model["memory_bytes"] is None else brief(model["memory_bytes"]),
            str(model["running"]),
            str(model["waiting"]),
            number(model["tokens_per_second"]),
            joules if joules == "–" else f"{joules} {model['energy_provenance']}",
            "–" if model["unload_in_s"] is None else f"{model['unload_in_s']:.0f} s",
        ]
        found.add_row(*map(Text, cells))
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
