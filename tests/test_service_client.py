"""`edgert.Client`, `edgert.AsyncClient`, and the verbs that ask a running service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_service import FakeService, words
from served import KEY, serving

import edgert
from edgert.cli import main
from edgert.errors import (
    BusyError,
    ContextOverflowError,
    DeviceHungError,
    EdgertError,
    SamplingError,
    UnknownModelError,
    UnreachableError,
    UsageError,
    WorkerError,
)
from edgert.service.contract import Delta, Health, ServiceEvent
from edgert.service.daemon.sockets import Lock

posix = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")
SERVICE = FakeService(
    {
        "count": words("one two three"),
        "thinker": [Delta("let me see", reasoning=True, token=1), *words("the answer")],
        "tools": words('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'),
        "endless": [Delta("again ", token=1)] * 100_000,
    }
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(SERVICE) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[edgert.Client]:
    SERVICE.requests.clear()
    with edgert.Client(url, key=KEY, timeout_s=30.0) as client:
        yield client


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of a user who has nothing yet."""
    for name in [name for name in os.environ if name.startswith("EDGERT_SERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "r"))
    return tmp_path


def test_whole_answers(client: edgert.Client) -> None:
    answer = client.generate("echo", "some words", max_tokens=5, seed=1)
    assert (answer.text, answer.finish_reason, answer.usage["prompt_tokens"]) == ("some words", "stop", 7)
    assert SERVICE.requests[-1].sampling["seed"] == 1
    assert client.generate("echo", [1, 2]).text == "1 2"
    assert client.chat("echo", "hi").text == "hi"
    assert client.chat("echo", [{"role": "system", "content": "be"}, {"role": "user", "content": "so"}]).text == "so"
    thought = client.chat("thinker", "hi")
    assert (thought.reasoning, thought.text) == ("let me see", "the answer")
    called = client.chat("tools", "1?", tools=TOOLS)
    assert called.finish_reason == "tool_calls"
    assert json.loads(called.tool_calls[0]["function"]["arguments"]) == {"a": 1}
    assert client.embed("echo", ["a", "b"]) == [[0.6, 0.8, 0.0], [0.6, 0.8, 1.0]]


def test_streams(client: edgert.Client) -> None:
    for parts in (list(client.stream("count", "x")), list(client.stream_chat("count", "x"))):
        assert [part.text for part in parts if part.text] == ["one ", "two ", "three"]
        assert [part.finish_reason for part in parts if part.finish_reason] == ["stop"]
        assert parts[-1].usage is not None
        assert parts[-1].usage["completion_tokens"] == 5
    thoughts = [(part.reasoning, part.text) for part in client.stream_chat("thinker", "x") if part.text]
    assert thoughts[0] == (True, "let me see")
    assert thoughts[1:] == [(False, "the "), (False, "answer")]


def test_closing_a_stream_ends_the_generation(client: edgert.Client) -> None:
    before = SERVICE.closed
    stream = client.stream("endless", "x")
    assert next(stream).text == "again "
    stream.close()  # type: ignore[attr-defined]
    for _ in range(1000):  # each asks the service something, so it has had its turn
        if SERVICE.closed > before:
            break
        client.health()
    assert SERVICE.closed == before + 1


def test_one_answer_at_a_time(client: edgert.Client) -> None:
    for name in ("n", "stream", "stream_options"):
        with pytest.raises(UsageError, match=f"{name}: the client asks for one answer"):
            client.chat("echo", "hi", **{name: 1})


def test_looking_after_models(client: edgert.Client) -> None:
    assert client.models() == ["echo", *SERVICE.scripts]
    assert client.ps()[0]["plan"] == "CPU"
    assert client.status()["version"] == "1.2.3"
    assert client.load("count", pin=True, keep_alive="5m")["pinned"]
    assert SERVICE.loaded[-1] == ("count", True, 300.0)
    assert client.unload("count")["name"] == "count"
    assert client.health()["status"] == "ok"
    SERVICE.ready = Health(False, "loading count")
    try:
        assert client.health() == {"status": "unavailable", "detail": "loading count"}
    finally:
        SERVICE.ready = Health(True)


@pytest.mark.parametrize(
    "error",
    [
        SamplingError("temperature is 101, at most 100"),
        ContextOverflowError("700 tokens, at most 512", tokens=700, limit=512),
        BusyError("the queue is full", retry_after_s=2.5),
        WorkerError("three workers failed"),
        DeviceHungError("NPU hangs"),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
def test_errors_are_the_engines_own(client: edgert.Client, error: EdgertError, after: int) -> None:
    SERVICE.error, SERVICE.error_after = error, after
    try:
        with pytest.raises(type(error), match=str(error)[:10]) as raised:
            list(client.stream_chat("count", "hi"))
    finally:
        SERVICE.error = None
    assert type(raised.value) is type(error)
    if isinstance(raised.value, ContextOverflowError):
        assert (raised.value.tokens, raised.value.limit) == (700, 512)
    if isinstance(raised.value, BusyError) and not after:
        assert raised.value.retry_after_s == 3.0  # the header has whole seconds


def test_refusals(client: edgert.Client, url: str, home: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"no model is named '\.\./etc'"):
        client.chat("../etc", "hi")
    with pytest.raises(UsageError, match="temperature"):
        client.chat("echo", "hi", temperature=-1)
    with pytest.raises(UnreachableError, match="key is missing or wrong"):
        edgert.Client(url).status()
    token = home / "c" / "edgert" / "token"
    token.parent.mkdir(parents=True)
    token.write_text(KEY.replace(" ", "-"))
    token.chmod(0o600)
    assert edgert.Client(url).target.key == KEY.replace(" ", "-")
    assert edgert.Client("http://example.org").target.key is None  # the token is for this machine only
    for bad in ("ftp://x", "127.0.0.1", "http://"):
        with pytest.raises(UsageError, match="expected http://HOST:PORT"):
            edgert.Client(bad)
    with pytest.raises(UsageError, match="expected one of them"):
        edgert.Client(url, socket="/x")


@posix
def test_nobody_there(home: Path) -> None:
    for given in ({}, {"url": "http://127.0.0.1:1"}, {"socket": home / "no.sock"}):
        with (
            pytest.raises(UnreachableError, match=r"no service answers at .*; start one with `edgert serve BUNDLE`"),
            edgert.Client(**given) as client,
        ):
            client.status()
    assert not list(home.iterdir())  # looking leaves nothing behind


def test_under_asyncio(url: str) -> None:
    async def ask() -> None:
        async with edgert.AsyncClient(url, key=KEY, timeout_s=30.0) as client:
            answers = await asyncio.gather(*(client.chat("echo", f"number {i}") for i in range(4)))
            assert [answer.text for answer in answers] == [f"number {i}" for i in range(4)]
            assert (await client.generate("echo", "on")).text == "on"
            for stream in (client.stream("count", "x"), client.stream_chat("count", "x")):
                assert "".join([part.text async for part in stream]) == "one two three"
            assert await client.embed("echo", ["a"]) == [[0.6, 0.8, 0.0]]
            assert (await client.models())[0] == "echo"
            assert (await client.ps())[0]["name"] == "echo"
            assert (await client.load("count"))["name"] == "count"
            assert (await client.unload("count"))["name"] == "count"
            assert (await client.health())["status"] == "ok"
            with pytest.raises(UnknownModelError):
                await client.chat("none", "x")
            SERVICE.news.put_nowait(ServiceEvent(1, 0.0, "load", "count", "ready"))
            async for event in client.events():
                assert (event["kind"], event["model"]) == ("load", "count")
                break

    asyncio.run(ask())


@posix
def test_verbs(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"

    def run(*arguments: str) -> tuple[int, str]:
        code = main([*arguments, "--url", f"unix:{path}"])
        out, err = capsys.readouterr()
        return code, out or err

    service = FakeService(SERVICE.scripts)
    service.past = (ServiceEvent(1, 0.0, "load", "count", "[b]ready[/b]"),)
    with serving(service, path=path):
        assert run("ps")[0] == 0
        assert json.loads(run("ps", "--json")[1])[0]["name"] == "echo"
        assert "count" in run("ps", "--all")[1]
        code, out = run("status")
        assert code == 0
        assert "edgert 1.2.3" in out
        assert "[b]ready[/b]" in out
        assert json.loads(run("status", "--json")[1])["health"]["status"] == "ok"
        code, out = run("load", "count", "--pin", "--keep-alive", "-1")
        assert (code, out) == (0, "count: ready, CPU\n")
        assert service.loaded == [("count", True, -1.0)]
        assert json.loads(run("unload", "count", "--json")[1])["state"] == "unloaded"
        assert run("load", "none") == (2, "edgert: error: no model is named 'none'\n")
        service.ready = Health(False, "NPU is silent")
        code, out = run("status")
        assert code == 1
        assert "NPU is silent" in out
    assert run("ps")[0] == 2
    assert "no service answers" in run("ps")[1]


@posix
def test_stop_ends_whoever_holds_the_lock(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["stop", "--socket", str(tmp_path / "s"), "--json"]
    assert main(asked) == 2
    assert "no service runs" in capsys.readouterr().err
    lock = Lock(tmp_path / "s.lock")
    ended: list[tuple[int, int]] = []

    def kill(process: int, number: int) -> None:
        ended.append((process, number))
        lock.release()

    monkeypatch.setattr(os, "kill", kill)
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": os.getpid()}
    assert ended == [(os.getpid(), signal.SIGTERM)]
    assert main(["stop", "--socket", "none", "--port", "0"]) == 2
    assert "port 0 may be any service's" in capsys.readouterr().err


def test_what_needs_httpx_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(EdgertError, match="httpx is not installed"):
        edgert.Client("http://127.0.0.1:1")
