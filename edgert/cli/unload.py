"""`edgert unload`: have the service give a model's memory back."""

from __future__ import annotations

import argparse
from typing import Any

from edgert.cli.remote import add_remote, client, loaded_line, print_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("unload", help="have the service unload a model once its requests have ended")
    parser.add_argument("model", metavar="NAME")
    add_remote(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with client(options) as service:
        model = service.unload(options.model)
    if options.json:
        print_json(model)
    else:
        print(loaded_line(model))
    return 0
