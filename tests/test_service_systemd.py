"""The units for systemd: what they say, that systemd reads them, and that they start what was asked for."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgert.cli import VerbParser, main
from edgert.cli.serve import add_settings, settings_of
from edgert.errors import UsageError
from edgert.service.daemon import systemd
from edgert.service.settings import read

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no systemd")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    environ = {
        "XDG_CONFIG_HOME": str(tmp_path / "c"),
        "XDG_RUNTIME_DIR": str(tmp_path / "r"),
        "EDGERT_CACHE": str(tmp_path / "k %h"),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "r").mkdir()
    return environ


def texts(home: dict[str, str], flags: dict[str, object], *, namespaces: bool = True) -> tuple[str, str]:
    made = systemd.units(*read(flags, home), home, namespaces=namespaces)
    return made["edgert.service"], made["edgert.socket"]


def command(service: str) -> list[str]:
    """The words of ExecStart, as systemd reads them."""
    line = next(line for line in service.splitlines() if line.startswith("ExecStart="))
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line.removeprefix("ExecStart="))]


def test_the_unit_starts_what_was_asked_for(home: dict[str, str], tmp_path: Path) -> None:
    bundle = tmp_path / 'a $HOME %h "b".edge'
    bundle.mkdir()
    flags = {
        "models": [f"mine={bundle}"], "keep_alive_s": "1h", "sandbox": False, "port": "11535", "memory_bytes": "8 GiB",
        "folders": [str(tmp_path / "x"), str(tmp_path / "y z")], "declared_watts": ["CPU=15", "base=4"],
    }  # fmt: skip
    environ = {**home, "EDGERT_SERVE_QUEUE": "3"}
    asked, origins = read(flags, environ)
    service = systemd.units(asked, origins, environ)["edgert.service"]
    words = command(service)
    assert words[:5] == [sys.executable, "-P", "-m", "edgert", "serve"]
    assert words[-1] == f"mine={bundle}"
    parser = VerbParser()
    add_settings(parser)
    started, _ = settings_of(parser.parse_args(words[5:]))
    models = {"mine": replace(asked.models["mine"], preload=False)}  # loaded when somebody asks for it
    assert started == replace(asked, models=models, preload=False, exit_after_s=systemd.EXIT_AFTER_S)


def test_what_the_units_say(home: dict[str, str]) -> None:
    service, socket = texts(home, {"memory_bytes": "1 GiB", "port": "11535", "grace_s": "5"})
    for line in (
        "Type=notify", "NotifyAccess=main", "WatchdogSec=60", "Restart=on-failure", "TimeoutStopSec=20",
        "KillMode=mixed",
        f"MemoryHigh={2**30 + 2**27}", "ManagedOOMMemoryPressure=kill", "OOMPolicy=continue", "NoNewPrivileges=yes",
        "ProtectSystem=strict", "ProtectHome=read-only", "PrivateTmp=yes", "PrivateDevices=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6", "DevicePolicy=closed", "DeviceAllow=char-accel rw",
        "DeviceAllow=char-drm rw", "IPAddressDeny=any", "IPAddressAllow=localhost", "LockPersonality=yes",
        f'ReadWritePaths="-{home["EDGERT_CACHE"].replace("%", "%%")}"',
        f'Environment="EDGERT_CACHE={home["EDGERT_CACHE"].replace("%", "%%")}"',
    ):  # fmt: skip
        assert line in service.splitlines()
    for line in (
        f"ListenStream={home['XDG_RUNTIME_DIR']}/edgert/edgert.sock", "ListenStream=127.0.0.1:11535", "SocketMode=0600",
        "DirectoryMode=0700", "WantedBy=sockets.target",
    ):  # fmt: skip
        assert line in socket.splitlines()
    plain, _ = texts(home, {}, namespaces=False)
    assert not re.search("^(Private|Protect)", plain, re.MULTILINE)
    assert "NoNewPrivileges=yes" in plain


def test_addresses_of_the_socket(home: dict[str, str], tmp_path: Path) -> None:
    assert "ListenStream=[::1]:7\n" in texts(home, {"host": "::1", "port": "7"})[1]
    assert "ListenStream=127.0.0.1:7\n" in texts(home, {"host": "localhost", "port": "7"})[1]
    assert "ListenStream=/" not in texts(home, {"socket": "none", "port": "7"})[1]
    with pytest.raises(UsageError, match="takes addresses only"):
        texts(home, {"host": "example.org", "port": "7", "key_file": str(tmp_path / "key")})
    with pytest.raises(UsageError, match="port is 0"):
        texts(home, {"port": "0"})


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_reads_them(home: dict[str, str], tmp_path: Path) -> None:
    written = systemd.install(systemd.units(*read({"port": "11535"}, home), home), tmp_path / "units")
    done = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "verify", *map(str, written)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_install_and_uninstall(
    home: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no systemctl there
    folder = Path(home["XDG_CONFIG_HOME"]) / "systemd" / "user"
    assert main(["service", "install", "--dry-run", "--port", "11535"]) == 0
    assert "[Socket]" in capsys.readouterr().out
    assert not folder.exists()
    assert main(["service", "install", "--now"]) == 2
    assert "systemctl, which is not here" in capsys.readouterr().err
    assert not folder.exists()
    assert main(["service", "install", "--port", "11535"]) == 0
    assert "next: systemctl --user daemon-reload" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["edgert.service", "edgert.socket"]
    assert (Path(home["XDG_CONFIG_HOME"]) / "edgert" / "token").stat().st_mode & 0o777 == 0o600
    for verb in ("status", "logs"):
        assert main(["service", verb]) == 2
        assert "does not run systemd" in capsys.readouterr().err
    assert main(["service", "uninstall"]) == 0
    assert list(folder.iterdir()) == []
    assert main(["service", "uninstall"]) == 2
    assert "is not installed" in capsys.readouterr().err


def test_systemctl_is_asked_to_listen(
    home: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bin" / "systemctl"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "asked: $@"\ntest "$2" != try-restart\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    assert main(["service", "install", "--now"]) == 2
    out, err = capfd.readouterr()
    asked = [line.removeprefix("asked: --user ") for line in out.splitlines() if line.startswith("asked")]
    assert asked == ["daemon-reload", "enable --now edgert.socket", "try-restart edgert.service"]
    assert "systemctl --user try-restart edgert.service: exit code 1" in err
