"""How the service is set up: one table of settings, filled from defaults, a file, the environment and flags."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from edgert.errors import UsageError
from edgert.folders import cache_folder, config_folder
from edgert.service import values
from edgert.service.values import Rule

PowerPolicy = Literal["saver", "balanced", "performance", "auto"]


@dataclass(frozen=True)
class ModelSettings:
    """What one model is loaded with, beyond the common settings.

    Attributes:
        path: its bundle.
        name: what requests call it.
        device, objective, plan: as `edgert.load`, one of them at most; `plan` is a file.
        preload: load it when the service starts.
        pin: never evict or unload it.
        keep_alive_s: instead of `Settings.keep_alive_s`.
    """

    path: Path
    name: str
    device: str | None = None
    objective: str | None = None
    plan: Path | None = None
    preload: bool = False
    pin: bool = False
    keep_alive_s: float | None = None


@dataclass(frozen=True)
class Settings:
    """All settings of the service. Precedence: flags, then `EDGERT_SERVE_…`, then the file, then these defaults.

    Attributes:
        models: those that are served, by name.
        device, objective: for models that name neither of these nor a plan; one of them at most.
        preload: load the bundles of the command line when the service starts, not when they are first asked for.
        folders: every `*.edge` in these folders is served under its file's name without the ending.
        socket: a Unix socket, mode 0600; None for none.
        port: TCP; None for none. `host` is where it listens: a loopback address unless `key_file` is set.
        key_file: holds the key that TCP clients must send; None for the user's token file, which is made when it is
            not there.
        origins: web pages that may ask, beside the dashboard's own, e.g. `http://localhost:5173`.
        memory_bytes: of all workers together; None for 60 % of the machine's.
        kv_bytes: of one model's KV caches.
        max_sequences: of one model at once.
        queue: requests that may wait, of each model; more are turned away.
        max_tokens: of one answer, where the request does not say.
        body_bytes: of one request, at most.
        prefill_chunk, preempt_ms, threads, device_timeout_s, declared_watts: see `protocol.Load`.
        step_timeout_s: a worker whose loop is silent for so long while it has work counts as hung.
        power: the policy; `max_watts` and `joules_per_hour` are limits, None for none.
        dwell_s: for how long another mode of the policy must have been the right one before it is taken, and its plans.
        keep_alive_s: after its last request a model stays loaded for so long; negative for ever. One that takes seconds
            to load stays longer, by the rule in `idle`; where a request says how long, it is that long.
        drop_after_s: idle caches are forgotten, or, with `park`, kept in files; None for never.
        park: keep idle caches in the user's cache folder instead.
        exit_after_s: with socket activation: end when nothing has been loaded for so long; None for never.
        grace_s: on SIGTERM, running requests may take so long to end.
        low_priority: run workers in a low scheduling class while they have background work only.
        sandbox: see `protocol.Load`.
        verify: compare bundles with their hashes when they are loaded.
        log: `text` or `json`; `log_prompts` also what people write and get.
    """

    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    device: str | None = None
    objective: str | None = None
    preload: bool = True
    folders: tuple[Path, ...] = ()
    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    key_file: Path | None = None
    origins: tuple[str, ...] = ()
    memory_bytes: int | None = None
    kv_bytes: int = 2**30
    max_sequences: int = 16
    queue: int = 64
    max_tokens: int = 4096
    body_bytes: int = 16 * 2**20
    prefill_chunk: int = 512
    preempt_ms: float = 100.0
    threads: int = 0
    device_timeout_s: float = 60.0
    step_timeout_s: float = 60.0
    declared_watts: Mapping[str, float] = field(default_factory=dict)
    power: PowerPolicy = "auto"
    max_watts: float | None = None
    joules_per_hour: float | None = None
    dwell_s: float = 30.0
    keep_alive_s: float = 300.0
    drop_after_s: float | None = 60.0
    park: bool = False
    exit_after_s: float | None = None
    grace_s: float = 30.0
    low_priority: bool = True
    sandbox: bool = True
    verify: bool = True
    log: Literal["text", "json"] = "text"
    log_prompts: bool = False


PREFIX = "EDGERT_SERVE_"
COMMAND_LINE = "command line"  # where bundles come from that are given as arguments
WINDOWS_PORT = 11535  # where there are no Unix sockets to talk to; Ollama's is 11434

_DEVICE = values.text(r"[^\s\x00]{1,256}", "a device configuration such as CPU@f32")
_OBJECTIVE = values.choice("tokens_per_joule", "latency", "throughput")
RULES: dict[str, Rule] = {
    "device": values.optional(_DEVICE),
    "objective": values.optional(_OBJECTIVE),
    "preload": values.switch(),
    "folders": values.several(values.path(), os.pathsep),
    "socket": values.optional(values.path()),
    "host": values.text(r"[A-Za-z0-9.:_-]{1,253}", "a host name or an address"),
    "port": values.optional(values.whole(0, 65535)),
    "key_file": values.optional(values.path()),
    "origins": values.several(
        values.text(r"https?://[A-Za-z0-9.\[\]:_-]+", "an origin such as http://localhost:5173"), ","
    ),
    "memory_bytes": values.optional(values.size(64 * 2**20, of_memory=True)),
    "kv_bytes": values.size(2**20),
    "max_sequences": values.whole(1, 256),
    "queue": values.whole(0, 100_000),
    "max_tokens": values.whole(1, 2**20),
    # A worker's line holds at most 64 MiB, and JSON's escapes may make three bytes of one.
    "body_bytes": values.size(1024, 20 * 2**20),
    "prefill_chunk": values.whole(1, 65536),
    "preempt_ms": values.span(1, 60_000, per_second=1000),
    "threads": values.whole(0, 1024),
    "device_timeout_s": values.span(0.1, 86400),
    "step_timeout_s": values.span(0.1, 86400),
    "declared_watts": values.watts(),
    "power": values.choice("auto", "saver", "balanced", "performance"),
    "max_watts": values.optional(values.number(0, unit="watts")),
    "joules_per_hour": values.optional(values.number(0, unit="joules")),
    "dwell_s": values.span(0, 86400),
    "keep_alive_s": values.span(0, 10**9, forever=True),
    "drop_after_s": values.optional(values.span(0, 10**9)),
    "park": values.switch(),
    "exit_after_s": values.optional(values.span(1, 10**9)),
    "grace_s": values.span(0, 3600),
    "low_priority": values.switch(),
    "sandbox": values.switch(),
    "verify": values.switch(),
    "log": values.choice("text", "json"),
    "log_prompts": values.switch(),
}
MODEL_RULES: dict[str, Rule] = {
    "path": values.path(),
    "device": _DEVICE,
    "objective": _OBJECTIVE,
    "plan": values.path(),
    "preload": values.switch(),
    "pin": values.switch(),
    "keep_alive_s": values.span(0, 10**9, forever=True),
}
Origins = Mapping[str, str]


def flag(name: str) -> str:
    """A setting's flag on the command line, which leaves its unit out."""
    short = next((name.removesuffix(unit) for unit in ("_bytes", "_ms", "_s") if name.endswith(unit)), name)
    return f"--{short.replace('_', '-')}"


def default_file(environ: Mapping[str, str]) -> Path:
    """Where the settings are read from if nobody says; it need not be there."""
    return config_folder(environ) / "serve.toml"


def default_socket(environ: Mapping[str, str]) -> Path | None:
    """The user's Unix socket, in a folder that the system removes with the session where there is one."""
    if sys.platform == "win32":
        return None
    runtime = environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "edgert" / "edgert.sock" if runtime else cache_folder() / "run" / "edgert.sock"


def read(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> tuple[Settings, Origins]:
    """The settings, and where each comes from: a flag, a variable, the file's path, or `default`.

    Precedence: flags, environment, file, defaults. Models are added up by name; of those with the same name the first
    in that order counts.

    Args:
        flags: by setting, only those given; `models` is a list of `PATH` or `NAME=PATH`.
        environ: `EDGERT_SERVE_…`, and where the user's folders are. `EDGERT_SERVE_MODELS` as the flag, separated like
            `PATH`; `EDGERT_SERVE_CONFIG` names the file.
        file: must be there if it is given; None for `default_file`.

    Raises:
        UsageError: a value is none that the setting takes, or a name is unknown; the message says where.
    """
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    models: dict[str, ModelSettings] = {}
    named = environ.get(PREFIX + "CONFIG")
    file = file or (Path(named).expanduser().absolute() if named else None)
    table = _from_file(file or default_file(environ), needed=file is not None)
    where = str((file or default_file(environ)).absolute())
    _add_tables(models, origins, table.pop("models", {}), where)
    _known(table, where, RULES)
    _add(given, origins, table, dict.fromkeys(table, where), Path(where).parent)

    variables = {name.removeprefix(PREFIX).lower(): text for name, text in environ.items() if name.startswith(PREFIX)}
    variables.pop("config", None)
    listed = variables.pop("models", "")
    _known(variables, "environment", RULES, shown=lambda name: PREFIX + name.upper())
    _add_paths(models, origins, [part for part in listed.split(os.pathsep) if part], PREFIX + "MODELS")
    _add(given, origins, variables, {name: PREFIX + name.upper() for name in variables}, Path.cwd())

    flags = dict(flags)
    _add_paths(models, origins, flags.pop("models", ()), COMMAND_LINE)
    _add(given, origins, flags, {name: flag(name) for name in flags}, Path.cwd())

    if "socket" not in given:
        given["socket"] = default_socket(environ)
    if "port" not in given and sys.platform == "win32":
        given["port"] = WINDOWS_PORT
    if given.get("preload", True):
        for name, model in models.items():
            if origins[f"models.{name}"] == COMMAND_LINE:
                models[name] = replace(model, preload=True)
    settings = Settings(models=models, **given)
    _check(settings, origins)
    return settings, {**{f.name: "default" for f in fields(Settings) if f.name != "models"}, **origins}


def to_toml(settings: Settings, origins: Origins) -> str:
    """The settings as a file that `read` takes, with a comment on each line that says where its value comes from."""
    lines = [
        (f"{name} = {rule.show(getattr(settings, name))}", origins.get(name, "default")) for name, rule in RULES.items()
    ]
    width = min(48, max(len(line) for line, _ in lines))
    text = [f"{line:<{width}}  # {_comment(where)}" for line, where in lines]
    for name, model in settings.models.items():
        text += ["", f"[models.{values.quoted(name)}]  # {_comment(origins.get(f'models.{name}', 'default'))}"]
        found = {key: getattr(model, key) for key in MODEL_RULES}
        text += [f"{key} = {MODEL_RULES[key].show(value)}" for key, value in found.items() if value is not None]
    return "\n".join(text) + "\n"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _comment(where: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in where)


def _from_file(file: Path, *, needed: bool) -> dict[str, Any]:
    import tomllib

    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError as error:
        if needed:
            raise UsageError(f"settings {file}: no such file") from error
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"settings {file}: {error}") from error


def _known(table: Collection[str], where: str, rules: Collection[str], shown: Any = str) -> None:
    for name in table:
        if name not in rules:
            from difflib import get_close_matches

            near = get_close_matches(name, [*rules, "models"], 1, 0.4)
            hint = f"; did you mean {shown(near[0])}?" if near else ""
            raise UsageError(f"{where}: {shown(name)} is no setting{hint}")


def _add(
    given: dict[str, Any], origins: dict[str, str], table: Mapping[str, Any], where: Mapping[str, str], folder: Path
) -> None:
    for name, value in table.items():
        given[name] = _value(RULES[name], value, name, where[name], folder)
        origins[name] = where[name]


def _value(rule: Rule, value: Any, name: str, where: str, folder: Path) -> Any:
    try:
        return rule.read(value, folder)
    except (ValueError, KeyError, RuntimeError, OverflowError) as error:  # RuntimeError: no home folder for `~`
        raise UsageError(f"{where}: {name} is {str(value)[:100]!r}, expected {rule.expects}") from error


def _add_tables(models: dict[str, ModelSettings], origins: dict[str, str], tables: Any, where: str) -> None:
    """`[models.NAME]` of a file."""
    if not isinstance(tables, Mapping):
        raise UsageError(f"{where}: models is {str(tables)[:100]!r}, expected tables [models.NAME]")
    for name, table in tables.items():
        here = f"{where}: [models.{name}]"
        if not isinstance(table, Mapping) or "path" not in table:
            raise UsageError(f"{here}: path is missing")
        _known(table, here, MODEL_RULES)
        read = {key: _value(MODEL_RULES[key], value, key, here, Path(where).parent) for key, value in table.items()}
        ways = [key for key in ("device", "objective", "plan") if key in read]
        if len(ways) > 1:
            raise UsageError(f"{here}: {' and '.join(ways)} are given, expected one of them at most")
        models[_name(name, here)] = ModelSettings(name=name, **read)
        origins[f"models.{name}"] = where


def _add_paths(models: dict[str, ModelSettings], origins: dict[str, str], texts: Sequence[str], where: str) -> None:
    """`PATH` or `NAME=PATH`; a table's other entries stay where the bundle is the same."""
    for text in texts:
        name, separator, rest = text.partition("=")
        if not separator or "/" in name or "\\" in name:
            name, rest = "", text
        path: Path = _value(MODEL_RULES["path"], rest, "bundle", where, Path.cwd())
        if not path.is_dir():
            raise UsageError(f"{where}: bundle {path}: no such folder{_nearest(path)}")
        name = _name(name or path.name.removesuffix(".edge"), f"{where}: bundle {path}")
        if origins.get(f"models.{name}") == where:
            raise UsageError(f"{where}: two bundles are called {name!r}; choose names with NAME=PATH")
        known = models.get(name)
        if known is None or known.path.resolve() != path.resolve():
            models[name] = ModelSettings(path, name)
        origins[f"models.{name}"] = where


def _nearest(path: Path) -> str:
    """A hint at a bundle in the same folder whose name is much alike."""
    from difflib import get_close_matches

    try:
        there = [each.name for each in path.parent.iterdir() if each.name.endswith(".edge")]
    except OSError:
        return ""
    wanted = path.name if path.name.endswith(".edge") else path.name + ".edge"
    near = get_close_matches(wanted, there, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _name(name: str, where: str) -> str:
    if not values.MODEL_NAME.fullmatch(name):
        raise UsageError(
            f"{where}: a model's name is {name[:150]!r}, expected up to 128 letters, digits and . _ : + -, the first a "
            "letter or digit"
        )
    return name


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    """What no setting can say alone."""
    if not is_loopback(settings.host) and settings.port is not None and settings.key_file is None:
        raise UsageError(
            f"{origins.get('host')}: host is {settings.host!r}, which others can reach; that needs key_file, a file "
            "with the key that clients must send"
        )
    if settings.device is not None and settings.objective is not None:
        raise UsageError(
            f"{origins['objective']}: objective is {settings.objective!r}, but device is {settings.device!r} "
            f"({origins['device']}); expected one of them at most"
        )
    if settings.socket is None and settings.port is None:
        raise UsageError(f"{origins.get('socket')}: socket is none and there is no port: nowhere to listen")
    if settings.socket is not None and len(os.fsencode(settings.socket)) > 107:
        raise UsageError(
            f"{origins.get('socket', 'default')}: socket {settings.socket} has {len(os.fsencode(settings.socket))} "
            "bytes, at most 107 allowed (unix(7))"
        )
