"""A service in a process of its own, for tests of its life: `python service_child.py WHAT [DESCRIPTOR]`.

`fake` serves a `FakeService` whose generation ends when the service is told to close; `pool` serves the real pool,
without a model, and says at its end which heavy modules it has loaded; `idle` ends by itself when nothing is loaded.
With a descriptor, the socket there is handed over as systemd does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from fake_service import USAGE, FakeService

from edgert.service.contract import Delta, Request
from edgert.service.daemon.serve import run
from edgert.service.settings import Settings, read

HEAVY = ("numpy", "openvino", "tokenizers", "rich", "psutil", "jinja2", "pydantic")


class Living(FakeService):
    """Says "begun" at once, and "ended" once it is told to close."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.began_s = time.monotonic()

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        yield Delta("begun", token=1)
        await self.ended.wait()
        yield Delta(" ended", token=2)
        yield Delta("", finish_reason="stop", usage=USAGE)

    async def close(self, grace_s: float) -> None:
        self.ended.set()
        self.news.put_nowait(None)

    def idle_since(self) -> float | None:
        return self.began_s


def main(what: str, descriptor: str = "") -> int:
    if descriptor:
        os.dup2(int(descriptor), 3)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="edgert.socket")
    settings, _ = read({}, os.environ)
    if what == "idle":
        settings = replace(settings, exit_after_s=0.01)
    code = run(settings, make=None if what == "pool" else Living)
    print("loaded:", *(name for name in HEAVY if name in sys.modules))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
