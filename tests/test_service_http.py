"""What a connection does to a generation, and all that is not inference: events, health, metrics, pages."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import FakeService, words
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from served import KEY, serving
from starlette.types import Message

from edgert.service.api.app import create_app
from edgert.service.contract import Delta, Health, ServiceEvent
from edgert.service.settings import Settings

AUTH = {"authorization": f"Bearer {KEY}"}
CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello there"}]}
FOREVER = [Delta("word ", token=1)] * 100_000


def post(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which the request has been written and nothing read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("more", [{"stream": True}, {"stream": True, "n": 3}, {"stream": False}, {"n": 2}])
def test_a_generation_ends_with_its_reader(more: dict[str, Any]) -> None:
    begun, closed = threading.Event(), threading.Event()
    service = FakeService({"slow": FOREVER})

    async def then(number: int) -> None:
        if number == 2:
            begun.set()
            try:
                await asyncio.Event().wait()  # the engine says nothing more
            except asyncio.CancelledError:
                closed.set()
                raise

    service.then = then
    with serving(service) as url:
        connection = post(url, "/v1/chat/completions", {**CHAT, "model": "slow", **more})
        assert begun.wait(20)
        assert not closed.is_set()
        connection.close()
        assert closed.wait(20)
        with httpx.Client(base_url=url, headers=AUTH) as client:
            text = client.get("/metrics").text
    assert 'edgert_requests_total{code="499",endpoint="/v1/chat/completions"} 1.0' in text
    assert service.closed == service.produced // 2 == more.get("n", 1)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_generated_ahead_of_a_slow_reader(count: int) -> None:
    service = FakeService({"slow": FOREVER})
    app = create_app(service, Settings(), key=None)
    body = json.dumps({**CHAT, "model": "slow", "stream": True, "n": count}).encode()
    sent: list[bytes] = []

    async def main() -> None:
        full, gone = asyncio.Event(), asyncio.Event()
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message.get("body", b""))
            if len(sent) == 10:
                full.set()
                await asyncio.Event().wait()  # as a server waits whose buffers are full

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "scheme": "http",
            "headers": [(b"host", b"127.0.0.1:1"), (b"content-type", b"application/json")], "root_path": "",
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 1),
        }  # fmt: skip
        answering = asyncio.create_task(app(scope, receive, send))
        await full.wait()
        for _ in range(200):  # turns of the loop in which a generation could run on
            await asyncio.sleep(0)
        assert service.produced <= 9 + 3 * count
        gone.set()
        await answering
        assert service.closed == count

    asyncio.run(main())


def test_headers_come_with_the_first_word_and_not_before() -> None:
    """So that an error before it has a status of its own."""
    service = FakeService({"late": words("one two")})
    first, go = threading.Event(), threading.Event()

    async def then(number: int) -> None:
        if number == 0:
            first.set()
            await asyncio.to_thread(go.wait, 20)

    service.then = then
    with serving(service) as url:
        connection = post(url, "/v1/chat/completions", {**CHAT, "model": "late", "stream": True})
        assert first.wait(20)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        connection.settimeout(20)
        go.set()
        assert connection.recv(15).startswith(b"HTTP/1.1 200 OK")
        connection.close()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_the_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    service = FakeService()
    with serving(service, path=path) as url:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url=url) as client:
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert answer.json()["choices"][0]["message"]["content"] == "hello there"
            assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(str(path))
        plain.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # HTTP/1.0 needs no Host
        assert plain.recv(15) == b"HTTP/1.1 200 OK"
        plain.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl() -> None:
    with serving(FakeService()) as url:
        command = [
            "curl",
            "-sN",
            "--max-time",
            "20",
            f"{url}/v1/chat/completions",
            "-H",
            "Content-Type: application/json",
        ]
        command += ["-H", f"Authorization: Bearer {KEY}", "-d", json.dumps({**CHAT, "stream": True})]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        events = text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "hello there"


async def ask(service: FakeService, method: str, path: str, **more: Any) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(service, Settings(), key=KEY))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:9", headers=AUTH) as client:
        return await client.request(method, path, **more)


def happened(number: int) -> ServiceEvent:
    return ServiceEvent(number, 1.5, "load", "echo", f"event {number}")


@pytest.mark.parametrize(("last", "numbers"), [(None, [4, 5]), ("1", [2, 3, 4, 5]), ("3", [4, 5]), ("x" * 50, [4, 5])])
def test_events(last: str | None, numbers: list[int]) -> None:
    service = FakeService()
    service.past = tuple(map(happened, (1, 2, 3)))

    async def main() -> str:
        for event in (happened(4), happened(5), None):
            service.news.put_nowait(event)
        headers = {} if last is None else {"last-event-id": last}
        answer = await ask(service, "GET", "/v1/events", headers=headers)
        assert answer.headers["content-type"].startswith("text/event-stream")
        return answer.text

    events = [event for event in asyncio.run(main()).split("\n\n") if event.startswith("id: ")]
    assert [int(event.split("\n")[0].removeprefix("id: ")) for event in events] == numbers
    assert json.loads(events[0].split("\n")[1].removeprefix("data: ")) == happened(numbers[0]).to_json()


@pytest.mark.parametrize(
    ("health", "state", "status", "word"),
    [
        (Health(True), "ready", 200, "ok"),
        (Health(False, "loads"), "loading", 503, "loading"),
        (Health(False, "the loop is silent"), "ready", 503, "unavailable"),
    ],
)
def test_health_is_that_of_the_engine(health: Health, state: str, status: int, word: str) -> None:
    service = FakeService()
    service.ready, service.state = health, state
    answer = asyncio.run(ask(service, "GET", "/health"))
    assert (answer.status_code, answer.json()) == (status, {"status": word, "detail": health.detail})


def test_loading_and_unloading() -> None:
    service = FakeService()
    body = {"model": "echo", "pin": True, "keep_alive": "1.5h"}
    assert asyncio.run(ask(service, "POST", "/v1/models/load", json=body)).json()["pinned"] is True
    asyncio.run(ask(service, "POST", "/v1/models/load", json={"model": "echo", "keep_alive": -1}))
    assert service.loaded == [("echo", True, 5400.0), ("echo", None, -1.0)]
    assert asyncio.run(ask(service, "POST", "/v1/models/unload", json={"model": "echo"})).json()["state"] == "unloaded"
    assert service.unloaded == ["echo"]
    assert asyncio.run(ask(service, "GET", "/v1/status")).json()["models"][0]["name"] == "echo"


def test_the_dashboard_is_served_as_it_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "a.js").write_text("1")
    (tmp_path / "secret.txt").write_text("2")
    monkeypatch.setattr("edgert.service.api.app.DASHBOARD", tmp_path)
    for path, kind in (("/", "text/html"), ("/ui/index.html", "text/html"), ("/ui/a.js", "text/javascript")):
        answer = asyncio.run(ask(FakeService(), "GET", path))
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["cache-control"] == "no-cache"
    assert asyncio.run(ask(FakeService(), "GET", "/ui/secret.txt")).status_code == 404


@pytest.mark.parametrize("keep", [False, True])
def test_the_log_has_a_line_a_request(caplog: pytest.LogCaptureFixture, keep: bool) -> None:
    caplog.set_level(logging.INFO, "edgert.service")
    app = create_app(FakeService(), Settings(log_prompts=keep), key=None)

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:9") as client:
            await client.post("/v1/chat/completions", json=CHAT)

    asyncio.run(main())
    facts = caplog.records[-1].facts  # type: ignore[attr-defined]
    assert (facts["endpoint"], facts["model"], facts["code"]) == ("/v1/chat/completions", "echo", 200)
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (7, 5)
    assert facts.get("answer") == ("hello there" if keep else None)
    assert ("hello" in str(facts.get("prompt"))) is keep


def test_nobody_asked_so_nothing_big_is_loaded() -> None:
    code = "import sys, edgert.service.api.app; print([m for m in sys.argv[1:] if m in sys.modules])"
    big = ["numpy", "openvino", "tokenizers", "rich", "pydantic", "prometheus_client", "jinja2", "psutil", "httpx"]
    found = subprocess.run([sys.executable, "-c", code, *big], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- the OpenAPI document against the application ---------------------------------------------------------------------

EXAMPLES = int(os.environ.get("EDGERT_SCHEMATHESIS_EXAMPLES", "6"))
FORMS = [
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models/load"),
    "/v1/models/unload",
]
VIEWS = ["/v1/models", "/v1/models/{name}", "/v1/status", "/v1/events", "/health", "/metrics"]
# Fields that are fine by themselves, and which no schema can tell about together.
RELATED = {
    "messages", "input", "tools", "tool_choice", "top_logprobs", "response_format", "structured_outputs", "n",
    "dimensions", "text", "chat_template_kwargs",
}  # fmt: skip


@pytest.fixture(scope="module")
def described() -> Any:
    schemathesis = pytest.importorskip("schemathesis")
    service = FakeService()

    async def over() -> AsyncIterator[ServiceEvent]:
        yield happened(1)

    service.events = over  # type: ignore[method-assign]
    app = create_app(service, Settings(host="testserver", port=80), key=KEY)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=AUTH)


def test_all_paths_are_described(described: Any) -> None:
    assert [result.ok().path for result in described.get_all_operations()] == FORMS + VIEWS


@pytest.mark.parametrize(
    ("path", "mode"), [(path, "positive") for path in FORMS + VIEWS] + [(path, "negative") for path in FORMS]
)
def test_the_document_tells_what_happens(described: Any, path: str, mode: str) -> None:
    """Requests made from the document; EDGERT_SCHEMATHESIS_EXAMPLES says how many of each kind."""
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

    operation = next(result.ok() for result in described.get_all_operations() if result.ok().path == path)

    @examples(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # to make an example smaller would take minutes
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=GenerationMode(mode)))
    def check(case: Any) -> None:
        headers = {**(case.headers or {}), **AUTH}
        excluded = [ignored_auth]  # it would send the key all the same; test_the_key does not
        answer = case.call(headers=headers)
        if mode == "positive" and answer.status_code == 400:
            assert str(answer.json()["error"]["param"]).split(".")[0] in RELATED, answer.json()
            excluded.append(positive_data_acceptance)
        case.validate_response(answer, excluded_checks=excluded, headers=headers)

    check()
