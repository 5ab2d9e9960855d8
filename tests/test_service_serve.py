"""The life of the server process: where it listens, whom it lets in, what systemd hears, how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import FakeService

from edgert.errors import ServiceError
from edgert.service.contract import Health
from edgert.service.daemon import keys, serve, sockets
from edgert.service.daemon.notify import Notifier
from edgert.service.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets and signals")

CHILD = Path(__file__).with_name("service_child.py")
TIMEOUT_S = 30.0
UNLOADED_BYTES = 40_000_000


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    short = {"XDG_CONFIG_HOME": "c", "XDG_RUNTIME_DIR": "r", "EDGERT_CACHE": "k"}
    return {**kept, **{name: str(tmp_path / folder) for name, folder in short.items()}}


@pytest.fixture
def systemd(tmp_path: Path, home: dict[str, str]) -> Iterator[socket.socket]:
    """What NOTIFY_SOCKET names: gets what the service tells."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(TIMEOUT_S)
        channel.bind(str(tmp_path / "n"))
        home["NOTIFY_SOCKET"] = str(tmp_path / "n")
        yield channel


@pytest.fixture
def begin(home: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []

    def start(*arguments: str, pass_fds: tuple[int, ...] = (), **more: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, str(CHILD), *arguments], env={**home, **more}, pass_fds=pass_fds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def told(systemd: socket.socket, wanted: str) -> str:
    """What the service tells, when it tells what is waited for."""
    while True:
        message = systemd.recv(4096).decode()
        if wanted in message.splitlines():
            return message


def ask(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=TIMEOUT_S)


CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def test_a_service_drains_before_it_ends(
    home: dict[str, str], systemd: socket.socket, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    child = begin("fake")
    ready = told(systemd, "READY=1")
    path = Path(home["XDG_RUNTIME_DIR"]) / "edgert" / "edgert.sock"
    assert f"STATUS=listening at unix:{path}" in ready
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with ask(path) as client, client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
        lines = response.iter_lines()
        assert "begun" in "".join(next(lines) for _ in range(3))
        child.send_signal(signal.SIGTERM)
        told(systemd, "STOPPING=1")
        rest = "".join(lines)
        assert "ended" in rest
        assert "[DONE]" in rest
    assert child.wait(TIMEOUT_S) == 0
    assert not path.exists()
    with pytest.raises(httpx.ConnectError), ask(path) as client:
        client.get("/health")


def test_an_empty_server_is_small(
    systemd: socket.socket, home: dict[str, str], begin: Callable[..., subprocess.Popen[str]]
) -> None:
    child = begin("pool", EDGERT_SERVE_PORT="0")
    told(systemd, "READY=1")
    if sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
        assert int(status["VmRSS"].split()[0]) * 1024 <= UNLOADED_BYTES
    assert keys.read_key(Path(home["XDG_CONFIG_HOME"]) / "edgert" / "token")
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=TIMEOUT_S)
    places, loaded = out.splitlines()  # no terminal: no address with the key
    assert places.startswith("edgert serves at unix:")
    assert "and http://127.0.0.1:" in places
    assert loaded == "loaded:"


def test_systemds_socket_is_used_and_kept(
    tmp_path: Path, systemd: socket.socket, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        child = begin("idle", str(listener.fileno()), pass_fds=(listener.fileno(),))
        assert told(systemd, "READY=1").endswith(f"listening at unix:{path}")
        assert child.wait(TIMEOUT_S) == 0  # nothing is loaded, and systemd will start it again
        assert path.exists()
        second = begin("fake", str(listener.fileno()), pass_fds=(listener.fileno(),))
        told(systemd, "READY=1")
        with ask(path) as client:
            assert client.get("/v1/status").json()["version"] == "1.2.3"
        second.send_signal(signal.SIGINT)
        assert second.wait(TIMEOUT_S) == 0


def test_two_services_do_not_fight(
    home: dict[str, str], systemd: socket.socket, begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    first = begin("fake")
    told(systemd, "READY=1")
    lock = Path(home["XDG_RUNTIME_DIR"]) / "edgert" / "edgert.sock.lock"
    assert sockets.holder(lock) == first.pid
    with pytest.raises(ServiceError, match=f"another service runs already, as process {first.pid}"):
        sockets.Lock(lock)
    first.kill()
    first.wait(TIMEOUT_S)
    assert sockets.holder(lock) is None
    path = lock.with_suffix("")
    assert path.exists()  # left behind; the next service takes its place
    again = sockets.Lock(lock)
    with sockets.unix_socket(path) as listener:
        with pytest.raises(ServiceError, match="another program answers there"):
            sockets.unix_socket(path)
        assert listener.getsockname() == str(path)
    again.release()


def test_nobody_else_may_write_where_it_listens(tmp_path: Path) -> None:
    """Another user could put a socket of theirs in the place of ours, or a link that has a file of ours emptied."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for attempt in (sockets.Lock, sockets.unix_socket):
        with pytest.raises(ServiceError, match=r"others may write to its folder \(mode 777\)"):
            attempt(tmp_path / "open" / "s")
    assert list((tmp_path / "open").iterdir()) == []
    (tmp_path / "precious").write_text("text")
    (tmp_path / "s.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ServiceError, match=r"lock .*symbolic link"):
        sockets.Lock(tmp_path / "s.lock")
    assert (tmp_path / "precious").read_text() == "text"


def test_listening_where_it_cannot(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServiceError, match=f"port {taken.getsockname()[1]} of 127.0.0.1: "):
            sockets.tcp_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ServiceError, match=r"port 1 of 192\.0\.2\.1: "):
        sockets.tcp_socket("192.0.2.1", 1)
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match="lock "):
        sockets.Lock(tmp_path / "file" / "lock")
    with pytest.raises(ServiceError, match="others can reach it; that needs key_file"):
        serve.listen(Settings(host="0.0.0.0", port=0), {})


@pytest.mark.parametrize("address", ["path", "abstract"])
def test_telling_systemd(tmp_path: Path, address: str) -> None:
    if address == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    name = str(tmp_path / "n") if address == "path" else f"\0edgert-{os.getpid()}-{tmp_path.name}"
    environ = {"NOTIFY_SOCKET": name.replace("\0", "@"), "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(TIMEOUT_S)
        channel.bind(name)
        notifier = Notifier(environ)
        assert notifier.tell("READY=1", "STATUS=well")
        assert channel.recv(100) == b"READY=1\nSTATUS=well"
    assert notifier.watchdog_s == 3.0
    assert environ == {}  # workers get none of it
    assert not notifier.tell("STOPPING=1")  # nobody there any more
    assert not Notifier({}).tell("READY=1")
    assert Notifier({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog_s is None


class Told(Notifier):
    """Keeps what it is told, and breaks off after the first feeding, so that the loop under test ends."""

    def __init__(self) -> None:
        super().__init__({})
        self.lines: list[str] = []

    def tell(self, *lines: str) -> bool:
        self.lines += lines
        raise InterruptedError


@pytest.mark.parametrize(("state", "asked"), [("ready", 3), ("loading", 1)])
def test_the_watchdog_is_fed_only_while_workers_answer(state: str, asked: int) -> None:
    service: Any = FakeService()
    service.state = state
    answers = [Health(False, "no answer"), Health(False, "no answer"), Health(True)]
    given: list[Health] = []

    async def health() -> Health:
        given.append(answers[len(given)])
        return given[-1]

    service.health = health
    notifier = Told()
    with pytest.raises(InterruptedError):
        asyncio.run(serve._feed(service, notifier, 0.0))
    assert notifier.lines == ["WATCHDOG=1"]
    assert len(given) == asked


def test_handed_over_descriptors_are_checked(tmp_path: Path) -> None:
    mine = str(os.getpid())
    assert sockets.inherited({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    assert sockets.inherited({"LISTEN_PID": mine}) == []
    script = "import os; os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n" \
        "from edgert.service.daemon import sockets\n" \
        "try: sockets.inherited(os.environ)\n" \
        "except Exception as e: print(type(e).__name__, e)"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("ServiceError LISTEN_FDS=1: descriptor 3")


def test_the_token_is_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    token = keys.ensure_token(path)
    assert len(token) >= 43  # 256 bits
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert keys.ensure_token(path) == token == keys.read_key(path)
    assert [each.name for each in path.parent.iterdir()] == ["token"]
    path.chmod(0o644)
    with pytest.raises(ServiceError, match=r"everybody may read it \(mode 644\)"):
        keys.read_key(path)
    path.chmod(0o600)
    for text in ("", "short", "white space in the middle", "x" * 513):
        path.write_text(text)
        with pytest.raises(ServiceError, match="characters, expected 16 to 512"):
            keys.read_key(path)
    with pytest.raises(ServiceError, match=r"key .*absent"):
        keys.read_key(tmp_path / "absent")


def test_the_date_header_is_made_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = serve._State()
    for now, text in ((0.0, b"Thu, 01 Jan 1970 00:00:00 GMT"), (1e9, b"Sun, 09 Sep 2001 01:46:40 GMT")):
        monkeypatch.setattr("time.time", lambda now=now: now)
        assert state.default_headers == [(b"date", text)]
