"""A service of its own for a benchmark, what its processes take, and streams from it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

START_LIMIT_S = 120.0
FAULTY = Path(__file__).with_name("faulty_serve.py")
URL = "http://edgert"


class Host:
    """`edgert serve` on a Unix socket in a folder that goes away with it.

    Args:
        bundle: what it serves, as `demo`.
        flags: more of its command line.
        faulty: its workers do harm when they get a signal; see `faulty_worker.py`.
    """

    def __init__(self, bundle: Path, *flags: str, faulty: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="edgert-bench-")
        self.socket = Path(self._folder.name) / "edgert.sock"
        self._log = Path(self._folder.name) / "log"
        program = [str(FAULTY)] if faulty else ["-m", "edgert", "serve"]
        command = [sys.executable, *program, f"demo={bundle}", "--socket", str(self.socket), *flags]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("EDGERT_SERVE_")}
        environ["XDG_CONFIG_HOME"] = self._folder.name  # nobody's settings but ours
        with self._log.open("w") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except psutil.TimeoutExpired:
            self.process.kill()
        self._folder.cleanup()

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.process.children() if child.status() != psutil.STATUS_ZOMBIE]

    def resident_bytes(self) -> tuple[int, int]:
        """Of the server, and of its workers together."""
        return self.process.memory_info().rss, sum(worker.memory_info().rss for worker in self.workers())

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        times = [process.cpu_times() for process in (self.process, *self.workers())]
        return sum(each.user + each.system for each in times)

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), limits=httpx.Limits(max_connections=None))
        return httpx.AsyncClient(transport=transport, base_url=URL, timeout=httpx.Timeout(600.0))

    async def ready(self, client: httpx.AsyncClient) -> None:
        """Wait until it listens.

        Raises:
            RuntimeError: it ended, or takes too long.
        """
        end = time.monotonic() + START_LIMIT_S
        while True:
            try:
                await client.get("/health")
                return
            except httpx.TransportError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the service does not answer: {self.log()[-2000:]}") from None
                await asyncio.sleep(0.05)


@dataclass
class Stream:
    """One answer as it comes.

    Attributes:
        text: so far.
        at_s: when each chunk with text or an end came.
        usage: the service's own figures, once it is whole.
    """

    text: str = ""
    at_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None


@asynccontextmanager
async def asking(client: httpx.AsyncClient, prompt: str, **options: Any) -> AsyncIterator[AsyncIterator[Stream]]:
    """Ask for a completion; gives an iterator with an item for each chunk that came. Leaving it hangs up."""
    body = {"model": "demo", "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **options}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        yield _chunks(response)


async def _chunks(response: httpx.Response) -> AsyncIterator[Stream]:
    stream = Stream()
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        data = json.loads(line[6:])
        if "error" in data:
            raise RuntimeError(f"the stream ended: {data['error']}")
        stream.usage = data.get("usage") or stream.usage
        for choice in data.get("choices", ()):
            stream.text += choice.get("text") or ""
            stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
            stream.at_s.append(time.perf_counter())
        yield stream


async def answer(client: httpx.AsyncClient, prompt: str, **options: Any) -> Stream:
    """A whole answer."""
    stream = Stream()
    async with asking(client, prompt, **options) as chunks:
        async for stream in chunks:  # noqa: B007
            pass
    return stream
