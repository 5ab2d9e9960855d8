"""`edgert load`: have the service load a model now, and keep it."""

from __future__ import annotations

import argparse
from typing import Any

from edgert.cli.remote import add_remote, client, loaded_line, print_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("load", help="have the service load a model now")
    parser.add_argument("model", metavar="NAME", help="as `edgert ps --all` lists it; never a path")
    parser.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, help="never unload it by itself; --no-pin takes that back"
    )
    parser.add_argument(
        "--keep-alive", metavar="TIME", help="how long it stays after its last request, e.g. 30m; -1: ever"
    )
    add_remote(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with client(options) as service:
        model = service.load(options.model, pin=options.pin, keep_alive=options.keep_alive)
    if options.json:
        print_json(model)
    else:
        print(loaded_line(model))
    return 0
