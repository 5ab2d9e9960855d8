"""Options that several verbs share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgert.errors import UsageError
from edgert.profile import Profile, find

if TYPE_CHECKING:
    from rich.console import Console

# argparse does not make these types public
Subparsers = Any
Group = Any


def add_placement(parser: argparse.ArgumentParser) -> Group:
    """`--device`, `--place` and `--plan`, which exclude each other."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--device", metavar="DEVICE@VARIANT", help="run everything there, e.g. CPU@bf16, GPU, NPU")
    group.add_argument(
        "--place",
        metavar="RULES",
        help="place blocks by kind, name, index or range, e.g. attention=CPU@bf16,ffn=GPU (later rules win); "
        "prefill: or decode: before a rule limits it to that phase; towers by name, e.g. vision=NPU,*=CPU",
    )
    group.add_argument("--plan", metavar="FILE", help="a plan written by `edgert plan --save`")
    return group


def add_objective(group: Group, help: str = "the best plan for it by what `edgert profile` measured here") -> None:
    """`--objective`, by default for verbs that run a plan."""
    group.add_argument("--objective", choices=("tokens_per_joule", "latency", "throughput"), help=help)


def share(text: str) -> float:
    """`1%` or `0.01`, for argparse."""
    return positive(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def positive(text: str) -> float:
    """A number from 0, for argparse."""
    value = float(text)  # argparse makes a ValueError its own message
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def placement(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_placement` and `add_objective` were given, as `edgert.load` takes it."""
    return {name: getattr(options, name) for name in ("plan", "device", "place", "objective")}


def find_profile(name: str) -> Profile:
    """A profile by name, by file, or `measured` for this machine's own; raises `DeviceError`."""
    if name == "measured":
        from edgert.conditions import find_cached

        return find_cached()
    return find(name)


def watts(given: Sequence[str]) -> dict[str, float]:
    """`--watts CPU=15` by name; raises `UsageError` for what is not of that form."""
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not name or not 0 < value < float("inf"):
            raise UsageError(f"--watts {text}: expected NAME=WATTS with watts above 0")
        found[name] = value
    return found


def console(*, stderr: bool = False) -> Console:
    """Where verbs write for people. Names and paths may hold `[b]` or `:cat:`, so markup in texts means nothing."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_json(data: Any) -> None:
    """JSON in ASCII, so that it is JSON in whatever encoding the output has."""
    print(json.dumps(data, indent=1))
