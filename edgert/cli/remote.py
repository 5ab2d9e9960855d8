"""What the verbs share that talk to a running service."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.service.client import Client


def add_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", metavar="URL", help="the service: http://HOST:PORT or unix:PATH (default: yours)")
    parser.add_argument("--json", action="store_true", help="print the service's answer as JSON")


@contextmanager
def client(options: argparse.Namespace) -> Iterator[Client]:
    from edgert.service.client import Client

    with Client(options.url) as found:
        yield found


def print_json(data: Any) -> None:
    """JSON in ASCII, so that it is JSON in whatever encoding the output has."""
    print(json.dumps(data, indent=1))


def loaded_line(model: dict[str, Any]) -> str:
    """One model in words, after it was loaded or unloaded."""
    plan = f", {model['plan']}" if model["plan"] else ""
    return f"{model['name']}: {model['state']}{plan}" + "".join(f"\nwarning: {text}" for text in model["warnings"])
