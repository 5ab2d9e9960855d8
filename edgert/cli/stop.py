"""`edgert stop`: end the service once its running requests have ended."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from edgert.errors import ServiceError, UnreachableError, UsageError
from edgert.service.daemon.sockets import holder, lock_file
from edgert.service.settings import read

_LOOK_S = 0.05


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "stop",
        help="end the service once its running requests have ended",
        description="End the service. It turns new requests away and finishes those that run, for `grace_s` at most. "
        "One that systemd started comes back with the next connection; `edgert service uninstall` ends that.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="as `edgert serve` was given it")
    for name in ("socket", "port"):
        parser.add_argument(f"--{name}", metavar=name.upper(), default=argparse.SUPPRESS, help="as `edgert serve`")
    parser.add_argument("--json", action="store_true", help='as JSON: {"stopped": process}')
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("socket", "port") if hasattr(options, name)}
    settings, _ = read(given, os.environ, options.config)
    lock = lock_file(settings)
    if lock is None:
        raise UsageError("port 0 may be any service's: end it where it was started")
    process = holder(lock)
    if process is None:
        raise UnreachableError(f"no service runs ({lock})")
    os.kill(process, signal.SIGTERM)  # on Windows this ends it at once
    deadline = time.monotonic() + settings.grace_s + 10
    while holder(lock) == process:
        if time.monotonic() > deadline:
            raise ServiceError(f"process {process} still runs after {settings.grace_s + 10:g} s; see its log")
        time.sleep(_LOOK_S)
    print(json.dumps({"stopped": process}) if options.json else f"stopped process {process}")
    return 0
