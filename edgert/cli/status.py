"""`edgert status`: the whole service on one screen."""

from __future__ import annotations

import argparse
import time
from typing import Any

from edgert.cli.ps import number, table
from edgert.cli.remote import add_remote, client, print_json
from edgert.service.values import brief

EVENTS = 8  # the last ones shown


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("status", help="show how the service is: models, memory, power, events")
    add_remote(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0; 1 where the service runs but is not usable now."""
    with client(options) as service:
        status, health, place = service.status(), service.health(), str(service.target)
    ready = health["status"] == "ok"
    if options.json:
        print_json({**status, "health": health, "target": place})
        return 0 if ready else 1
    from rich.text import Text

    from edgert.cli.options import console

    out = console()
    detail = "" if ready else f": {health['status']} {health.get('detail', '')}"
    out.print(f"edgert {status['version']} at {place}, up {status['uptime_s']:.0f} s{detail}", soft_wrap=True)
    limit = status["memory_limit_bytes"]
    memory = "–" if status["memory_bytes"] is None else brief(status["memory_bytes"])
    out.print(f"memory {memory}" + (f" of {brief(limit)}" if limit else "") + f", turned away {status['rejected']}")
    power = status["power"]
    watts = f", at most {number(power['max_watts'])} W" if power["max_watts"] is not None else ""
    out.print(f"power {power['policy']}: {power['mode']}{watts}  {power['reason']}".rstrip(), soft_wrap=True)
    for unit, reason in status["quarantined"].items():
        out.print(Text(f"left alone: {unit}: {reason}", "yellow"), soft_wrap=True)
    if status["models"]:
        out.print(table(status["models"]))
    for event in status["events"][-EVENTS:]:
        when = time.strftime("%H:%M:%S", time.localtime(event["at_s"]))
        where = f" {event['model']}" if event["model"] else ""
        out.print(Text(f"{when} {event['kind']}{where}: {event['detail']}", "dim"), soft_wrap=True)
    return 0 if ready else 1
