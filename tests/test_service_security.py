"""Attacks on the service from web pages, other users and hand-made requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake_service import FakeService
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError
from served import KEY

from edgert.service.api import reading
from edgert.service.api.app import create_app
from edgert.service.api.errors import RefusedError
from edgert.service.api.reading import check, parse
from edgert.service.api.schemas import ChatRequest, CompletionRequest, EmbeddingsRequest, ResponsesRequest
from edgert.service.settings import Settings

URL = "http://127.0.0.1:11535"
PAGE = "http://localhost:5173"
AUTH = {"authorization": f"Bearer {KEY}"}
CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello there"}]}


class Visitor:
    """Asks an application as uvicorn would have it asked."""

    def __init__(self, *, key: str | None = KEY, client: tuple[str, int] | None = ("127.0.0.1", 5000), **more: Any):
        self.service = FakeService()
        self.app = create_app(self.service, Settings(**{"origins": (PAGE,), **more}), key=key)
        self.client = client

    def __call__(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, url: str = URL, **more: Any
    ) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=self.client)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                return await client.request(method, path, headers=headers, **more)

        return asyncio.run(main())


@pytest.fixture
def visit() -> Visitor:
    return Visitor()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:11535", 200), ("localhost:11535", 200), ("LOCALHOST:11535", 200), ("[::1]:11535", 200),
        ("evil.example:11535", 403), ("evil.example", 403), ("127.0.0.1", 403), ("127.0.0.1:80", 403),
        ("127.0.0.1.evil.example:11535", 403), ("localhost:11535@evil.example", 403), ("10.0.0.1:11535", 403),
        ("", 403), ("localhost:115350", 403), ("localhost:011535x", 403),
    ],
)  # fmt: skip
def test_dns_rebinding(visit: Visitor, host: str, status: int) -> None:
    """CVE-2024-28224: a page's name is made to mean this machine, and the browser sends that name."""
    for path in ("/v1/models", "/health", "/"):
        answer = visit("GET", path, headers={**AUTH, "host": host})
        assert answer.status_code == (404 if path == "/" and status == 200 and not _has_page(visit) else status)


def _has_page(visit: Visitor) -> bool:
    return any(route.path == "/" for route in visit.app.routes)  # type: ignore[attr-defined]


def test_two_hosts_are_none(visit: Visitor) -> None:
    async def main() -> int:
        transport = httpx.ASGITransport(visit.app, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            hosts = [("host", "127.0.0.1:11535"), ("host", "evil.example")]
            return (await client.get("/health", headers=hosts)).status_code

    assert asyncio.run(main()) == 403


def test_a_configured_host_and_the_address_connected_to_are_let_in() -> None:
    visit = Visitor(host="box.lan", port=80)
    assert visit("GET", "/health", headers={"host": "box.lan"}, url="http://192.0.2.7").status_code == 200
    assert visit("GET", "/health", headers={"host": "192.0.2.7"}, url="http://192.0.2.7").status_code == 200
    assert visit("GET", "/health", headers={"host": "192.0.2.8"}, url="http://192.0.2.7").status_code == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "null", "file://", "http://127.0.0.1:80", "https://localhost:5173",
        "http://localhost:5173.evil.example", "http://localhost:5173/path", "",
    ],
)  # fmt: skip
def test_foreign_pages_may_not_ask(visit: Visitor, origin: str) -> None:
    answer = visit("POST", "/v1/chat/completions", headers={**AUTH, "origin": origin}, json=CHAT)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers
    assert visit.service.requests == []


def test_own_and_listed_pages_may_ask(visit: Visitor) -> None:
    own = visit("POST", "/v1/chat/completions", headers={**AUTH, "origin": URL}, json=CHAT)
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    listed = visit("POST", "/v1/chat/completions", headers={**AUTH, "origin": PAGE}, json=CHAT)
    assert listed.status_code == 200
    assert listed.headers["access-control-allow-origin"] == PAGE
    assert "origin" in listed.headers["vary"]


def test_preflight(visit: Visitor) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
    good = visit("OPTIONS", "/v1/chat/completions", headers={"origin": PAGE, **asked})
    assert good.status_code == 204
    assert good.headers["access-control-allow-origin"] == PAGE
    assert good.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert "access-control-allow-credentials" not in good.headers
    bad = visit("OPTIONS", "/v1/chat/completions", headers={"origin": "http://evil.example", **asked})
    assert bad.status_code == 403
    assert not any(name.startswith("access-control") for name in bad.headers)


def test_no_answer_has_a_wildcard(visit: Visitor) -> None:
    for origin in (PAGE, URL, "http://evil.example"):
        for method in ("GET", "OPTIONS"):
            answer = visit(method, "/v1/models", headers={**AUTH, "origin": origin})
            assert "*" not in answer.headers.get("access-control-allow-origin", "")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/json"]
)
def test_what_needs_no_preflight_is_no_request(visit: Visitor, kind: str) -> None:
    """A form or a script without CORS can send these kinds to any host."""
    headers = {**AUTH, "content-type": kind} if kind else AUTH
    for path in ("/v1/chat/completions", "/v1/models/unload"):
        answer = visit("POST", path, headers=headers, content=json.dumps(CHAT).encode())
        assert answer.status_code == 415
    assert visit.service.requests == visit.service.unloaded == []
    good = visit("POST", "/v1/models/unload", headers={**AUTH, "content-type": "Application/JSON; charset=utf-8"},
                 content=b'{"model": "echo"}')  # fmt: skip
    assert good.status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/load", "/v1/models/unload", "/v1/chat/completions"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_only_post_changes_anything(visit: Visitor, path: str, method: str) -> None:
    headers = {**AUTH, "content-type": "application/json"}
    answer = visit(method, f"{path}?model=echo", headers=headers, content=b'{"model":"echo"}')
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"]
    assert visit.service.loaded == visit.service.unloaded == visit.service.requests == []


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_the_key(visit: Visitor, given: str) -> None:
    headers = {"authorization": given.encode()} if given else {}
    for path in ("/v1/models", "/v1/status", "/metrics", "/openapi.json", "/v1/events", "/v1/nothing", "/ui", "//ui/x"):
        answer = visit("GET", path, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert visit("GET", "/health", headers=headers).status_code == 200  # type: ignore[arg-type]
    assert visit("GET", "/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_the_unix_socket_needs_no_key() -> None:
    visit = Visitor(client=None)
    for host in ("localhost", "edgert", "127.0.0.1", "localhost:80"):
        assert visit("GET", "/v1/models", url="http://localhost", headers={"host": host}).status_code == 200
    assert visit("GET", "/v1/models", url="http://localhost", headers={"host": "evil.example"}).status_code == 403


def test_a_tcp_client_that_is_already_gone_is_not_on_the_socket() -> None:
    """uvicorn knows no peer of a connection that was reset at once, which looks like the Unix socket."""
    visit = Visitor(client=None)
    answer = visit("POST", "/v1/models/unload", json={"model": "echo"})
    assert answer.status_code == 401
    assert visit.service.unloaded == []


def test_without_a_key_only_this_machine_is_let_in() -> None:
    assert Visitor(key=None)("GET", "/v1/models").status_code == 200
    for address in ("192.0.2.1", "::2", "testclient"):
        assert Visitor(key=None, client=(address, 5000))("GET", "/v1/models").status_code == 403


def test_headers_of_every_answer(visit: Visitor) -> None:
    for path, headers in (("/v1/models", AUTH), ("/v1/models", {}), ("/health", {}), ("/nothing", AUTH)):
        answer = visit("GET", path, headers=headers)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "..", "/etc/passwd", "echo/../echo", "a\\b", "echo\0", "%2e%2e", "file:///x", "echo.edge",
        "x" * 256,
    ],
)  # fmt: skip
def test_a_models_name_is_no_path(visit: Visitor, name: str) -> None:
    """CVE-2024-37032: names are looked up among those that are served, and nothing else is done with them."""
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "model": name}),
        ("/v1/models/load", {"model": name}),
        ("/v1/models/unload", {"model": name}),
        ("/v1/embeddings", {"model": name, "input": "x"}),
    ):
        answer = visit("POST", path, headers=AUTH, json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert visit.service.loaded == visit.service.unloaded == []


@pytest.mark.parametrize(
    "path",
    [
        "/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/..%2fapp.py", "/ui/index.html/", "/ui//etc/passwd",
        "/ui/\\..\\app.py", "/ui/", "/ui/nothing.js",
    ],
)  # fmt: skip
def test_only_the_dashboards_files_are_served(visit: Visitor, path: str) -> None:
    async def main() -> int:
        sent: list[Any] = []
        scope = {
            "type": "http", "method": "GET", "path": httpx.URL(URL + "/x").copy_with(raw_path=path.encode()).path,
            "raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"127.0.0.1:11535")],
            "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 11535), "root_path": "", "http_version": "1.1",
            "scheme": "http",
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await visit.app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(main()) in (401, 404)


def test_long_bodies_are_refused_while_they_are_read() -> None:
    visit = Visitor(body_bytes=1000)
    answer = visit("POST", "/v1/chat/completions", headers=AUTH, json={**CHAT, "user": "x" * 1000})
    assert answer.status_code == 413
    read = 0

    async def main() -> int:
        async def parts() -> Any:
            nonlocal read
            for _ in range(100):
                read += 400
                yield b" " * 400

        transport = httpx.ASGITransport(visit.app, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            headers = {**AUTH, "content-type": "application/json"}
            return (await client.post("/v1/chat/completions", headers=headers, content=parts())).status_code

    assert asyncio.run(main()) == 413
    assert read <= 2000  # all of them would be 40000


NUMBERS = ("max_tokens", "max_completion_tokens", "n", "seed", "top_k", "top_logprobs", "reasoning_budget")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [-1, -(2**63), 2**64, 10**40, 1.5, True, "5", [1], {}])
def test_negative_and_absurd_numbers(visit: Visitor, field: str, value: Any) -> None:
    """CVE-2026-21869: a negative count was taken for a large one."""
    answer = visit("POST", "/v1/chat/completions", headers=AUTH, json={**CHAT, "logprobs": True, field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert visit.service.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"model": "echo", "model": "other", "messages": []}', b'{"model": "echo", "temperature": NaN}',
        b'{"model": "echo", "temperature": 1e999}', b'{"model": "echo", "seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "echo", "x": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_broken_bodies(visit: Visitor, body: bytes) -> None:
    answer = visit("POST", "/v1/chat/completions", headers={**AUTH, "content-type": "application/json"}, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert visit.service.requests == []


def nested(levels: int, opening: str = '{"a":', end: str = "}") -> str:
    return opening * levels + "1" + end * levels


@pytest.mark.parametrize(("opening", "end"), [('{"a":', "}"), ("[", "]")])
@pytest.mark.parametrize(
    "where",
    [
        '"chat_template_kwargs": {"x": %s}', '"tools": [{"type": "function", "function": {"name": "f", "parameters": '
        '{"x": %s}}}]', '"structured_outputs": {"json": {"x": %s}}', '"unknown": {"x": %s}',
    ],
)  # fmt: skip
def test_nesting(visit: Visitor, where: str, opening: str, end: str) -> None:
    """What the HTTP side reads must also go through every parser and writer behind it."""
    for levels, status in ((80, 200), (reading.MAX_DEPTH, 400), (400, 400), (900, 400)):
        body = json.dumps(CHAT)[:-1] + ", " + where.replace("%s", nested(levels, opening, end)) + "}"
        answer = visit("POST", "/v1/chat/completions", headers={**AUTH, "content-type": "application/json"},
                       content=body.encode())  # fmt: skip
        assert answer.status_code == status
    assert len(visit.service.requests) == 1


WRONG = 3000


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": [0] * WRONG}]}, "messages.0.content.0"),
        ("chat/completions", {"messages": [0] * 2000}, "messages.0"),
        ("chat/completions", {**CHAT, "logit_bias": {f"a{i}": 1 for i in range(WRONG)}}, "logit_bias"),
        ("chat/completions", {**CHAT, "stop": [0] * WRONG}, "stop"),
        ("completions", {"prompt": [-1] * WRONG}, "prompt.0"),
        ("embeddings", {"input": [0] * 2000}, "input.0"),
        ("responses", {"input": [0] * 2000}, "input.0"),
        ("responses", {"input": "x", "metadata": {f"a{i}": 1 for i in range(WRONG)}}, "metadata"),
    ],
)
def test_a_million_mistakes_are_one(path: str, fields: dict[str, Any], param: str) -> None:
    """pydantic keeps an error for each wrong item: some 1 kB for two bytes of a body, and seconds to make them."""
    form = {"chat/completions": ChatRequest, "completions": CompletionRequest, "embeddings": EmbeddingsRequest,
            "responses": ResponsesRequest}[path]  # fmt: skip
    with pytest.raises(ValidationError) as found:
        form.model_validate({"model": "echo", **fields})
    assert found.value.error_count() <= 20
    with pytest.raises(RefusedError) as refused:
        check({"model": "echo", **fields}, form)
    assert refused.value.param == param


def test_objects_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_OBJECTS", 10)
    assert len(parse(b"[" + b",".join([b"{}"] * 10) + b"]")) == 10
    with pytest.raises(RefusedError, match="more than 10 objects"):
        parse(b"[" + b",".join([b"{}"] * 11) + b"]")


LONG = 2**20 - 200


def test_many_large_bodies_at_once_are_not_kept() -> None:
    """Each is held in memory while its request waits: 16 MiB and 80 requests would be gigabytes."""
    visit = Visitor(body_bytes=2**20)
    hold = asyncio.Event()
    statuses: list[int] = []

    async def wait(number: int) -> None:
        await hold.wait()

    visit.service.then = wait

    async def main() -> None:
        transport = httpx.ASGITransport(visit.app, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url=URL, headers=AUTH) as client:

            async def ask(length: int) -> None:
                answer = await client.post("/v1/chat/completions", json={**CHAT, "user": "u", "x": "x" * length})
                statuses.append(answer.status_code)
                if answer.status_code == 429:
                    assert answer.headers["retry-after"] == "1"

            waiting = [asyncio.create_task(ask(LONG)) for _ in range(4)]
            while len(visit.service.requests) < 4:
                await asyncio.sleep(0)
            await ask(LONG)
            assert statuses == [429]
            small = asyncio.create_task(ask(1000))
            while len(visit.service.requests) < 5:
                await asyncio.sleep(0)
            hold.set()
            await asyncio.gather(*waiting, small)
            await ask(LONG)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert statuses == [429, *[200] * 6]
    assert visit.app.state.edgert.body_bytes == 0  # type: ignore[attr-defined]


def test_too_many_messages(visit: Visitor) -> None:
    answer = visit("POST", "/v1/chat/completions", headers=AUTH, json={**CHAT, "messages": CHAT["messages"] * 2049})
    assert answer.status_code == 400
    assert "2048" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_template_variables_replace_nothing_of_the_servers(visit: Visitor, name: str) -> None:
    answer = visit("POST", "/v1/chat/completions", headers=AUTH, json={**CHAT, "chat_template_kwargs": {name: "x"}})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]


def test_an_error_of_ours_tells_nothing_of_the_prompt() -> None:
    visit = Visitor()

    async def fail(number: int) -> None:
        raise RuntimeError("the secret prompt")

    visit.service.then = fail

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(visit.app, client=("127.0.0.1", 5000), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=URL, headers=AUTH) as client:
            return await client.post("/v1/chat/completions", json=CHAT)

    answer = asyncio.run(main())
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_metrics_hold_nothing_that_clients_write(visit: Visitor) -> None:
    for path in ("/v1/models/evil-name", "/evil/path", "/ui/evil.js"):
        visit("GET", path, headers=AUTH)
    visit("POST", "/v1/chat/completions", headers=AUTH, json={**CHAT, "model": "evil-name", "user": "evil-user"})
    visit("POST", "/v1/chat/completions", headers=AUTH, json={**CHAT, "user": "evil-user"})
    text = visit("GET", "/metrics", headers=AUTH).text
    assert "evil" not in text
    assert "hello" not in text
    assert 'edgert_requests_total{code="404",endpoint="/v1/models/{name}"} 1.0' in text
    assert 'edgert_requests_total{code="404",endpoint="other"} 1.0' in text
    assert 'edgert_requests_total{code="404",endpoint="/v1/chat/completions"} 1.0' in text
    assert 'edgert_tokens_total{kind="completion",model="echo"} 5.0' in text
    assert 'edgert_joules_total{model="echo",provenance="measured"} 0.5' in text
    assert 'edgert_queue_seconds_count{model="echo"} 1.0' in text
    assert 'edgert_plan_info{model="echo",plan="CPU",state="ready"} 1.0' in text
    assert "edgert_rejected_total 2.0" in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FORMS = (ChatRequest, CompletionRequest, EmbeddingsRequest, ResponsesRequest)
FIELDS = sorted({name for form in FORMS for name in (*form.model_fields, *form.unsupported)})


@examples(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_data_or_a_refusal(body: bytes) -> None:
    with suppress(RefusedError):
        json.dumps(parse(body), allow_nan=False, ensure_ascii=False).encode()


@examples(max_examples=300, deadline=None)
@given(st.sampled_from(FORMS), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6))
def test_any_fields_make_a_form_or_a_refusal(form: Any, fields: dict[str, Any]) -> None:
    good = {"model": "echo", "input": "x", "messages": CHAT["messages"]}
    if form is CompletionRequest:
        good["prompt"] = "x"
    refused: RefusedError | None = None
    try:
        found = check({**good, **fields}, form)
    except RefusedError as error:
        refused = error
    if refused is None:
        assert found.model == {**good, **fields}["model"]
    else:
        assert refused.status == 400
        assert refused.param is None or refused.param.split(".")[0] in FIELDS
