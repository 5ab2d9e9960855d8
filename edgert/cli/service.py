"""`edgert service`: let systemd keep the service, started by whoever connects."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import Any

from edgert.cli.serve import add_settings, settings_of
from edgert.errors import MissingDependencyError, UsageError
from edgert.service.daemon import systemd

EPILOG = """\
examples
  edgert service install --dry-run demo.edge         what would be written
  edgert service install --now demo.edge             install, enable, and listen; a connection starts the service
  edgert service status
  edgert service logs -f
  edgert service uninstall
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("service", help="let systemd keep the service (Linux)", epilog=EPILOG)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add = verbs.add_parser(
        "install",
        help="write user units, hardened and socket-activated",
        usage="edgert service install [--now] [BUNDLE ...] [settings]",
    )
    add_settings(add)
    add.add_argument("--dry-run", action="store_true", help="print the units instead")
    add.add_argument("--now", action="store_true", help="enable and start the socket, and restart a service that runs")
    add.add_argument(
        "--no-namespaces",
        dest="namespaces",
        action="store_false",
        help="without what needs user namespaces, where the system keeps these from users",
    )
    add.set_defaults(act=_install)
    remove = verbs.add_parser("uninstall", help="stop the service and remove its units")
    remove.set_defaults(act=_uninstall)
    show = verbs.add_parser("status", help="what systemd says of it; `edgert status` asks the service itself")
    show.set_defaults(act=_status)
    logs = verbs.add_parser("logs", help="what it wrote down")
    logs.add_argument("-n", "--lines", type=int, default=100, help="the last ones (default: 100)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as more come")
    logs.set_defaults(act=_logs)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if sys.platform == "win32":
        raise UsageError("edgert service: Windows has no systemd; docs/service.md says how the Task Scheduler does it")
    return int(options.act(options))


def _install(options: argparse.Namespace) -> int:
    settings, origins = settings_of(options)
    texts = systemd.units(settings, origins, os.environ, config=options.config, namespaces=options.namespaces)
    folder = systemd.unit_folder(os.environ)
    if options.dry_run:
        for name, text in texts.items():
            print(f"# {folder / name}\n{text}")
        return 0
    if options.now and shutil.which("systemctl") is None:
        raise MissingDependencyError("--now needs systemctl, which is not here; --dry-run shows what would be written")
    systemd.prepare(settings, os.environ)
    for path in systemd.install(texts, folder):
        print(f"wrote {path}")
    if options.now:
        systemd.must("daemon-reload")
        systemd.must("enable", "--now", systemd.SOCKET)
        systemd.must("try-restart", systemd.SERVICE)
        print("edgert listens; the first connection starts it")
    else:
        print(f"next: systemctl --user daemon-reload && systemctl --user enable --now {systemd.SOCKET}")
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    folder = systemd.unit_folder(os.environ)
    if not any((folder / name).exists() for name in (systemd.SERVICE, systemd.SOCKET)):
        raise UsageError(f"edgert is not installed in {folder}")
    there = shutil.which("systemctl") is not None
    if there:
        systemd.systemctl("disable", "--now", systemd.SOCKET, systemd.SERVICE)
    for path in systemd.uninstall(folder):
        print(f"removed {path}")
    if there:
        systemd.systemctl("daemon-reload")
    return 0


def _status(options: argparse.Namespace) -> int:
    return systemd.systemctl("--no-pager", "status", systemd.SOCKET, systemd.SERVICE)


def _logs(options: argparse.Namespace) -> int:
    follow = ["--follow"] if options.follow else ["--no-pager"]
    return systemd.systemctl("--unit", systemd.SERVICE, "--lines", str(options.lines), *follow, program="journalctl")
