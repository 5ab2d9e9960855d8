"""A service under attack, for as long as it is told: `make fuzz` (Linux).

    make fuzz ARGS="--minutes 60"

It gets requests that were right before something was done to them: to bytes of the head or the body, names, numbers,
nesting. In between it is told to load bundles that were right before, with hashes that fit what was done. Wanted: an
answer to everything that is a request, never 500, a server that stays and does not grow, and a model beside all that
which still says what it said. What breaks that is kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shutil
import string
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from service_runs.host import Host, answer
from shapes import BUILD

KEPT = BUILD.parent / "fuzz"
ANSWER_S = 60.0
PATIENCE_S = 1.0
WARM_S = 10.0
GROWTH = 1.5  # of the server: requests leave libraries, caches and statistics behind, but not without end
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"), "", "\0", "../../etc/passwd",
    "\ud800", "a" * 100_000, [], {}, [[]], {"": {}}, "file:///etc/passwd", "{{ 7 * 7 }}", "<|im_end|>", "\r\n\r\n",
)  # fmt: skip
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {
        "model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0.5,
        "stream": True, "stop": ["x"], "n": 1, "seed": 1, "logprobs": True, "top_logprobs": 2,
    }),
    ("/v1/chat/completions", {
        "model": "demo", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 9,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "auto",
    }),
    ("/v1/chat/completions", {
        "model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "priority": "background",
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    }),
    ("/v1/completions", {"model": "demo", "prompt": "Once", "max_tokens": 4, "logit_bias": {"5": 1}, "top_p": 0.9}),
    ("/v1/responses", {"model": "demo", "input": "Hello", "max_output_tokens": 16, "stream": True}),
    ("/v1/embeddings", {"model": "demo", "input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/models/load", {"model": "demo", "pin": False, "keep_alive": "5m"}),
    ("/v1/models/unload", {"model": "other"}),
)  # fmt: skip


class Broken(Exception):
    """The service did what it never may."""


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in JSON."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def changed(rng: random.Random, data: Any) -> bytes:
    """JSON, as bytes, with something else in one place."""
    data = json.loads(json.dumps(data))
    place = rng.choice(places(data)[1:])
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    manner = rng.randrange(4)
    if manner == 0:
        del parent[place[-1]]
    elif manner == 1 and isinstance(parent, dict):
        parent["".join(rng.choices(string.printable, k=rng.randrange(1, 30)))] = rng.choice(HOSTILE)
    elif manner == 2:
        for _ in range(rng.choice((3, 2000))):
            parent[place[-1]] = [parent[place[-1]]] if rng.random() < 0.5 else {"a": parent[place[-1]]}
    else:
        parent[place[-1]] = rng.choice(HOSTILE)
    try:
        return json.dumps(data).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 100_000


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(found) + 1)
        manner = rng.randrange(4)
        if manner == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif manner == 1:
            del found[at : at + rng.randrange(1, 64)]
        elif manner == 2:
            found[at:at] = found[at : at + rng.randrange(1, 64)]
        else:
            found[at:at] = rng.randbytes(rng.randrange(1, 16))
    return bytes(found)


def request(rng: random.Random) -> bytes:
    """A request that something was done to."""
    path, body = rng.choice(BODIES)
    content = changed(rng, body) if rng.random() < 0.8 else json.dumps(body).encode()
    if rng.random() < 0.3:
        content = mutated(rng, content)
    method = rng.choice(("POST",) * 8 + ("GET", "PUT", "DELETE", "OPTIONS"))
    head = {
        "Host": rng.choice(("localhost",) * 9 + ("evil.example", "")),
        "Content-Type": rng.choice(("application/json",) * 9 + ("text/plain", "application/json; charset=utf-16")),
        "Content-Length": str(rng.choice((len(content),) * 18 + (len(content) + 9, -1, 10**30))),
        "Connection": "close",
        "Origin": rng.choice(("",) * 9 + ("https://evil.example",)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items() if value)
    start = f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()
    return (mutated(rng, start) if rng.random() < 0.2 else start) + content


def mutant(rng: random.Random, source: Path, target: Path) -> str:
    """A bundle that something was done to, with the hashes and sizes of what is there; says what."""
    shutil.copytree(source, target)
    files = [path for path in target.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest = json.loads((target / "manifest.json").read_text("utf-8"))
    victim = rng.choice(
        [*files, *(path for path in files if path.suffix in (".xml", ".json")), target / "manifest.json"]
    )
    name = victim.relative_to(target).as_posix()
    if victim.name == "manifest.json":
        victim.write_bytes(changed(rng, manifest))
        return name
    if victim.suffix == ".json" and rng.random() < 0.7:
        victim.write_bytes(changed(rng, json.loads(victim.read_text("utf-8"))))
    elif victim.suffix == ".xml" and rng.random() < 0.7:
        victim.write_text(_other_number(rng, victim.read_text("utf-8")), "utf-8")
    else:
        victim.write_bytes(mutated(rng, victim.read_bytes()))
    data = victim.read_bytes()
    manifest["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (target / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return name


def _other_number(rng: random.Random, text: str) -> str:
    """A graph with another value in one attribute or dimension."""
    starts = [i for i in range(1, len(text)) if text[i].isdigit() and text[i - 1] in '">,']
    at = rng.choice(starts)
    end = at
    while text[end].isdigit():
        end += 1
    return text[:at] + rng.choice(("0", "1", "-1", "7", "4294967296", "9223372036854775807", "x")) + text[end:]


class Attack:
    """Attacks one service and counts how it answers."""

    def __init__(self, host: Host, folder: Path, bundle: Path, rng: random.Random) -> None:
        self._host, self._folder, self._bundle, self._rng = host, folder, bundle, rng
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self._number = 0

    async def run(self, seconds: float, progress: Callable[[float], None]) -> None:
        async with self._host.client() as client:
            await self._host.ready(client)
            expected = (await answer(client, "Once", max_tokens=16, temperature=0)).text
            await self._until(time.monotonic() + WARM_S, self._requests)
            before = self._host.process.memory_info().rss
            start = time.monotonic()

            async def bundles(number: int) -> None:
                progress((time.monotonic() - start) / seconds)
                await self._load(client, number)
                if (await answer(client, "Once", max_tokens=16, temperature=0)).text != expected:
                    raise Broken("the model says something else now")

            await self._until(start + seconds, *[self._requests] * 8, bundles)
            after = self._host.process.memory_info().rss
            self.counts["server MB before"], self.counts["server MB after"] = before // 10**6, after // 10**6
            if after > GROWTH * before:
                self._keep(0, Broken(f"the server grew from {before} to {after} bytes"))

    async def _until(self, end: float, *attackers: Callable[[int], Awaitable[None]]) -> None:
        """Let all of them attack again and again."""

        async def attack(do: Callable[[int], Awaitable[None]]) -> None:
            while time.monotonic() < end and self._host.process.poll() is None:
                self._number += 1
                number = self._number
                try:
                    await do(number)
                except Broken as fault:
                    self._keep(number, fault)

        await asyncio.gather(*(attack(do) for do in attackers))
        if self._host.process.poll() is not None:
            self._keep(self._number, Broken(f"the server is gone: {self._host.log()[-3000:]}"))

    async def _requests(self, number: int) -> None:
        await self._ask(request(self._rng))

    async def _ask(self, data: bytes) -> None:
        reader, writer = await asyncio.open_unix_connection(self._host.socket)
        try:
            writer.write(data)
            async with asyncio.timeout(ANSWER_S):
                first = asyncio.create_task(reader.readline())
                await asyncio.wait([first], timeout=PATIENCE_S)
                if not first.done():
                    writer.write_eof()  # whoever waits for more of a body learns that there is none
                line = await first
                rest = await reader.read(1 << 16)  # the connection may stay open behind it
        except TimeoutError:
            raise Broken(f"no answer within {ANSWER_S:g} s: {data[:3000]!r}") from None
        except ConnectionError:
            line, rest = b"", b""
        finally:
            writer.close()
        words = line.split()
        status = words[1].decode("ascii", "replace") if len(words) > 1 else "hung up"
        self.counts[status] += 1
        if status == "500" or b"Traceback" in rest:
            raise Broken(f"{status}: {rest[-2000:]!r}: {data[:3000]!r}")

    async def _load(self, client: Any, number: int) -> None:
        target = self._folder / f"mutant-{number}.edge"
        name = mutant(self._rng, self._bundle, target)
        kept = True
        try:
            response = await client.post("/v1/models/load", json={"model": target.stem}, timeout=ANSWER_S)
            self.counts[f"bundle {response.status_code}"] += 1
            if response.status_code == 500 or "Traceback" in response.text:
                raise Broken(f"bundle with another {name}: {response.status_code}: {response.text[:2000]}")
            if response.status_code == 200:
                response = await client.post(
                    "/v1/completions", json={"model": target.stem, "prompt": "a", "max_tokens": 4}
                )
                self.counts[f"mutant says {response.status_code}"] += 1
                if response.status_code == 500:
                    raise Broken(f"bundle with another {name}: {response.text[:2000]}")
            await client.post("/v1/models/unload", json={"model": target.stem})
            kept = False
        except TimeoutError as error:
            raise Broken(f"bundle with another {name}: {error!r}") from error
        finally:
            if kept:
                shutil.copytree(target, KEPT / target.name, dirs_exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)

    def _keep(self, number: int, fault: Broken) -> None:
        self.broken.append(str(fault)[:500])
        (KEPT / f"{number}.txt").write_text(str(fault), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUILD.parent / "demo.edge")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    KEPT.mkdir(parents=True, exist_ok=True)
    console = Console(markup=False, highlight=False)
    console.print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder, Host(options.bundle, "--folders", folder) as host:
        attack = Attack(host, Path(folder), options.bundle, random.Random(seed))
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("attacks", total=1.0)
            asyncio.run(attack.run(60 * options.minutes, lambda share: progress.update(task, completed=share)))
    for name, count in sorted(attack.counts.items()):
        console.print(f"{name:20} {count}")
    for fault in attack.broken:
        console.print(f"broken: {fault}")
    return 1 if attack.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
