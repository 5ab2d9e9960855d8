"""The service as a systemd *user* unit: started by its socket, watched, and held to what it needs.

What a user's own manager cannot do is said where it is asked for: device and address filters need a privileged manager
(systemd.resource-control(5)), so they only count where these units are copied to the system's. What keeps the worker
off the network in either case is its own sandbox. Options that need a mount namespace work in user units only together
with PrivateUsers= (systemd.exec(5), "Sandboxing").
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgert.errors import MissingDependencyError, ServiceError, UsageError
from edgert.folders import cache_folder, config_folder
from edgert.service.settings import COMMAND_LINE, PREFIX, RULES, Origins, Settings

SERVICE, SOCKET = "edgert.service", "edgert.socket"
WATCHDOG_S = 60
EXIT_AFTER_S = 600.0  # with a socket that starts it again there is no reason to stay without a model
_PASSED = ("EDGERT_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")  # where its files are, if a shell says so
_BESIDE_WORKERS = 128 * 2**20  # the server process, and what its requests hold


def unit_folder(environ: Mapping[str, str]) -> Path:
    """Where systemd.unit(5) looks for the user's own units."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def units(
    settings: Settings,
    origins: Origins,
    environ: Mapping[str, str],
    *,
    config: Path | None = None,
    namespaces: bool = True,
) -> dict[str, str]:
    """The units' texts by name.

    Args:
        origins: what flags and environment said is written into the command; what the file says is read at each start.
        config: the file, if one was named.
        namespaces: with the options that need user namespaces, which some systems keep from users.
    """
    command = [sys.executable, "-P", "-m", "edgert", "serve", *(["--config", str(config.absolute())] if config else [])]
    if origins.get("exit_after_s", "default") == "default":
        command += ["--exit-after-s", f"{EXIT_AFTER_S:g}"]
    command += _flags(settings, origins)
    high, most = _memory(settings)
    writable = [cache_folder()] + ([settings.socket.parent] if settings.socket else [])
    service = [
        "# Written by `edgert service install`, which also replaces it.",
        "[Unit]",
        "Description=edgert: language models for local programs",
        f"Requires={SOCKET}",
        f"After={SOCKET}",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={_command(command)}",
        *(f"Environment={_word(f'{name}={environ[name]}')}" for name in _PASSED if environ.get(name)),
        f"WatchdogSec={WATCHDOG_S}",
        f"TimeoutStopSec={settings.grace_s + 15:g}",
        "# The server drains first; what is left of its workers then goes with it.",
        "KillMode=mixed",
        "Restart=on-failure",
        "RestartSec=2",
        "",
        "# Weights, caches and the server. A worker that the kernel ends is started again, so it takes nobody along.",
        f"MemoryHigh={high}",
        f"MemoryMax={most}",
        "ManagedOOMMemoryPressure=kill",
        "OOMPolicy=continue",
        "",
        "# MemoryDenyWriteExecute= is missing: OpenVINO compiles to machine code in memory.",
        "NoNewPrivileges=yes",
        "LockPersonality=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp",
        "SystemCallErrorNumber=EPERM",
        "UMask=0077",
        *(_namespaced(writable) if namespaces else ()),
        "",
        "# Only a privileged manager can enforce these; a user's own leaves them out.",
        "DevicePolicy=closed",
        "DeviceAllow=char-drm rw",
        "DeviceAllow=char-accel rw",
        "IPAddressDeny=any",
        *(f"IPAddressAllow={each}" for each in _addresses(settings)),
    ]
    listens = [f"ListenStream={_specifiers(str(settings.socket))}"] if settings.socket else []
    if settings.port is not None:
        listens.append(f"ListenStream={_address(settings)}")
    socket = [
        "# Written by `edgert service install`, which also replaces it.",
        "[Unit]",
        "Description=edgert: where local programs connect",
        "",
        "[Socket]",
        *listens,
        "SocketMode=0600",
        "DirectoryMode=0700",
        "RemoveOnStop=yes",
        "",
        "[Install]",
        "WantedBy=sockets.target",
    ]
    return {SERVICE: "\n".join(service) + "\n", SOCKET: "\n".join(socket) + "\n"}


def _namespaced(writable: Sequence[Path]) -> list[str]:
    return [
        "",
        "# In user units these need user namespaces; `edgert service install --no-namespaces` leaves them out.",
        "# What a user may not touch anyway, tunables and logs of the kernel, needs no option that may fail to mount.",
        "PrivateUsers=yes",
        "PrivateTmp=yes",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "ProtectControlGroups=yes",
        "ProtectKernelModules=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "PrivateDevices=yes",
        "BindPaths=-/dev/dri -/dev/accel",
        *(f"ReadWritePaths={_word(f'-{path}')}" for path in writable),
    ]


def install(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the units, each under a temporary name first; gives the files.

    Raises:
        ServiceError: they cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(folder / name)
            written.append(folder / name)
    except OSError as error:
        raise ServiceError(f"units in {folder}: cannot be written: {error.strerror}") from error
    return written


def uninstall(folder: Path) -> list[Path]:
    """Remove the units; gives those that were there."""
    found = [folder / name for name in (SERVICE, SOCKET) if (folder / name).exists()]
    for path in found:
        path.unlink()
    return found


def systemctl(*arguments: str, program: str = "systemctl") -> int:
    """Run `systemctl --user`, or journalctl, on this terminal; gives its exit code.

    Raises:
        MissingDependencyError: there is no such program.
    """
    try:
        return subprocess.run([program, "--user", *arguments], check=False).returncode
    except FileNotFoundError as error:
        raise MissingDependencyError(
            f"{program} is not here: this system does not run systemd. `edgert serve` works without it; "
            "docs/service.md says how else to start it"
        ) from error


def must(*arguments: str) -> None:
    """`systemctl`, and `ServiceError` where it fails."""
    if code := systemctl(*arguments):
        raise ServiceError(f"systemctl --user {' '.join(arguments)}: exit code {code}")


def prepare(settings: Settings, environ: Mapping[str, str]) -> None:
    """Make what the unit may not make once it runs: its folders, and the key where it listens on TCP."""
    from edgert.service.daemon.keys import ensure_token, token_file

    cache_folder().mkdir(parents=True, exist_ok=True)
    config_folder(environ).mkdir(mode=0o700, parents=True, exist_ok=True)
    if settings.port is not None and settings.key_file is None:
        ensure_token(token_file(environ))


def _flags(settings: Settings, origins: Origins) -> list[str]:
    """Flags for what a flag or the environment has set, so that the unit does the same whoever starts it."""
    found = []
    for name in RULES:
        where = origins.get(name, "default")
        if where.startswith(("--", PREFIX)):
            found += _flag(f"--{name.replace('_', '-')}", getattr(settings, name))
    if "--preload" not in found and "--no-preload" not in found:
        found.append("--no-preload")  # what connects first may only want to know the models
    given = (COMMAND_LINE, PREFIX + "MODELS")
    return found + [
        f"{name}={model.path}" for name, model in settings.models.items() if origins.get(f"models.{name}") in given
    ]


def _flag(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [part for each in value for part in (flag, str(each))]
    if isinstance(value, Mapping):
        return [part for key, each in value.items() for part in (flag, f"{key}={each!r}")]
    return [flag, "none" if value is None else str(value)]


def _memory(settings: Settings) -> tuple[str, str]:
    if settings.memory_bytes is None:
        return "60%", "70%"
    return str(settings.memory_bytes + _BESIDE_WORKERS), str(int(settings.memory_bytes * 1.15) + _BESIDE_WORKERS)


def _addresses(settings: Settings) -> list[str]:
    return ["localhost"] if settings.key_file is None else ["localhost", "any"]


def _address(settings: Settings) -> str:
    import ipaddress

    try:
        address = ipaddress.ip_address("127.0.0.1" if settings.host.lower() == "localhost" else settings.host)
    except ValueError as error:
        raise UsageError(f"host is {settings.host!r}, but a socket unit takes addresses only") from error
    if settings.port == 0:
        raise UsageError("port is 0, but a socket unit needs one that stays")
    return f"[{address}]:{settings.port}" if address.version == 6 else f"{address}:{settings.port}"


def _command(words: Sequence[str]) -> str:
    """A command line as systemd.service(5) reads it."""
    return " ".join(_word(word.replace("$", "$$")) for word in words)


def _word(text: str) -> str:
    """A word as systemd.syntax(7) and systemd.unit(5) read it."""
    if any(ord(character) < 32 for character in text):
        raise UsageError(f"{text!r} holds a control character, which a unit cannot")
    escaped = _specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    plain = escaped == text and text and not any(character in " ;'#" for character in text)
    return text if plain else f'"{escaped}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")
