"""Attacks below HTTP's surface: connections that ask nothing, and requests that two programs would read differently."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_service import FakeService
from served import KEY, serving

from edgert.service.daemon import connections

TIMEOUT_S = 20.0


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService) -> Iterator[str]:
    with serving(service) as url:
        yield url


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.4)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def head(url: str, path: str = "/health", *, method: str = "GET", more: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\n{more}\r\n".encode()


def answer(connection: socket.socket) -> bytes:
    """An answer of JSON."""
    found = b""
    while not found.endswith(b"}"):
        data = connection.recv(65536)
        assert data, found
        found += data
    return found


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side ends the connection; fails if it does not."""
    found = b""
    try:
        while data := connection.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def _ended(connection: socket.socket) -> bool:
    """Whether the other side has ended the connection, after another byte and a moment."""
    try:
        connection.sendall(b"G")
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("begin", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
def test_who_asks_nothing_is_let_go(url: str, begin: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(begin)
        assert all_of(connection) == b""


@pytest.mark.usefixtures("hasty")
def test_a_byte_now_and_then_is_no_request(url: str) -> None:
    """Slow loris: each byte came in time, and the request never."""
    with connect(url) as connection:
        connection.settimeout(0.05)
        assert any(_ended(connection) for _ in range(400))  # 20 s if nobody ends it


@pytest.mark.usefixtures("hasty")
def test_after_an_answer_a_body_that_goes_on_ends_too(url: str) -> None:
    """The key is missing, which is said before the body was there."""
    with connect(url) as connection:
        more = "Content-Type: application/json\r\nContent-Length: 1000\r\n"
        connection.sendall(head(url, "/v1/models/load", method="POST", more=more) + b"{")
        assert b"invalid_api_key" in answer(connection)
        connection.sendall(b" ")
        assert all_of(connection) == b""


@pytest.mark.usefixtures("hasty")
def test_an_answer_under_way_may_take_as_long_as_it_takes(url: str, service: FakeService) -> None:
    with connect(url) as connection, connect(url) as idle:
        connection.sendall(head(url, "/v1/events", more=f"Authorization: Bearer {KEY}\r\n"))
        found = b""
        while not found.endswith(b": edgert\n\n\r\n"):
            found += connection.recv(65536)
        assert all_of(idle) == b""  # by then the time of both is over
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):  # neither an event nor the end
            connection.recv(65536)


def test_tcp_has_a_number_of_connections(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_OVER_TCP", 3)
    kept = [connect(url) for _ in range(3)]
    try:
        for connection in kept:  # so that all three have arrived
            connection.sendall(head(url))
            assert b"200 OK" in answer(connection)
        with connect(url) as one_more:
            assert all_of(one_more) == b""
        kept[0].sendall(head(url))
        assert b"200 OK" in answer(kept[0])
    finally:
        for connection in kept:
            connection.close()


def test_the_unix_socket_has_room_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_OVER_TCP", 0)
    with serving(FakeService(), path=tmp_path / "s"), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(tmp_path / "s"))
        connection.sendall(head("http://localhost"))
        assert b"200 OK" in connection.recv(65536)


@pytest.mark.parametrize(
    "more",
    [
        "Content-Length: 5\r\nContent-Length: 6\r\n", "Content-Length: 5, 6\r\n", "Content-Length: -1\r\n",
        "Content-Length: 0x5\r\n", "Content-Length: +5\r\n", "Content-Length : 5\r\n",
        "Transfer-Encoding: gzip\r\n", "Transfer-Encoding: chunked, identity\r\n",
        "X: a\r\n b\r\nContent-Length: 5\rX: y\r\n", "X: \0\r\n",
    ],
)  # fmt: skip
def test_requests_that_two_programs_would_read_differently(url: str, service: FakeService, more: str) -> None:
    """Request smuggling: a proxy in front must not see one request where this server sees two (RFC 9112, 11.2)."""
    common = f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    second = head(url, "/v1/models/unload", method="POST", more=common + "Content-Length: 16\r\n") + b'{"model":"echo"}'
    with connect(url) as connection:
        connection.sendall(head(url, "/v1/models", more=common + more) + b"hello" + second)
        found = all_of(connection)
    assert found == b"" or b" 400 " in found.split(b"\r\n")[0] or b" 501 " in found.split(b"\r\n")[0]
    assert found.count(b"HTTP/1.1") <= 1
    assert service.unloaded == []


def test_headers_that_do_not_end(url: str) -> None:
    with connect(url) as connection:
        found = b""
        try:
            connection.sendall(head(url)[:-2] + b"X: " + b"a" * 2**22)
            found = all_of(connection)
        except OSError:  # it has been ended while this was still being written
            pass
        assert b"200 OK" not in found


def test_chunks_count_more_than_a_length(url: str, service: FakeService) -> None:
    """RFC 9112, 6.3: with both, the chunks are the body, whatever the length says."""
    common = f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    body = b'{"model":"echo"}'
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with connect(url) as connection:
        both = common + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head(url, "/v1/models/load", method="POST", more=both) + chunked)
        assert b" 200 " in connection.recv(65536).split(b"\r\n")[0]
    assert service.loaded
