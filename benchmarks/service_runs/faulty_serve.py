"""`edgert serve` with workers that do harm when they are told to: see `faulty_worker.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from edgert import cli
from edgert.service.daemon import serve
from edgert.service.pool import pool

COMMAND = (sys.executable, str(Path(__file__).with_name("faulty_worker.py")))


def run(settings: serve.Settings, **options: object) -> int:
    return served(settings, make=lambda known: pool.Pool(known, command=COMMAND))


served, serve.run = serve.run, run

if __name__ == "__main__":
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
