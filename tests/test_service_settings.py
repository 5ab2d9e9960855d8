"""Settings of the service: one precedence, values that are refused by name, and a file that can be read back."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from edgert.cli import main
from edgert.cli.serve import GROUPS
from edgert.errors import UsageError
from edgert.service.settings import (
    RULES,
    ModelSettings,
    Settings,
    default_socket,
    flag,
    is_loopback,
    read,
    to_toml,
)

DOCS = Path(__file__).parents[1] / "docs" / "service.md"
SOME = Settings(
    models={"a.b": ModelSettings(Path("/m/a.edge"), "a.b", device="CPU@f32", keep_alive_s=-1.0)},
    preload=False, folders=(Path("/m/x y"),), socket=Path("/run/e.sock"), port=0, key_file=Path('/k"ey'),
    origins=("http://localhost:5173",), memory_bytes=3 * 2**30 + 1, kv_bytes=2**28, preempt_ms=12.5,
    declared_watts={"CPU": 15.0, "base": 4.5}, power="saver", max_watts=8.25, joules_per_hour=1e6 / 3,
    keep_alive_s=-1.0, drop_after_s=None, park=True, exit_after_s=1234567.8, log="json",
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with folders of its own."""
    return {"XDG_CONFIG_HOME": str(tmp_path), "APPDATA": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}


def write(home: Mapping[str, str], text: str) -> Path:
    path = Path(home["XDG_CONFIG_HOME"]) / "edgert" / "serve.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_each_setting_has_a_rule_and_its_default_obeys_it() -> None:
    assert [f.name for f in fields(Settings) if f.name != "models"] == list(RULES)
    for name, rule in RULES.items():
        value = getattr(Settings(), name)
        shown = rule.show(value)
        assert rule.read("none" if value is None else value, Path("/")) == value, name
        assert shown, name


numbers = st.none() | st.integers(0, 100_000)


@given(flag=numbers, variable=numbers, entry=numbers)
@examples(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_flags_then_environment_then_file_then_default(
    home: dict[str, str], flag: int | None, variable: int | None, entry: int | None
) -> None:
    file = write(home, "" if entry is None else f"queue = {entry}")
    environ = home if variable is None else {**home, "EDGERT_SERVE_QUEUE": str(variable)}
    settings, origins = read({} if flag is None else {"queue": str(flag)}, environ)
    expected = [
        (value, where)
        for value, where in (
            (flag, "--queue"), (variable, "EDGERT_SERVE_QUEUE"), (entry, str(file)), (Settings().queue, "default")
        )
        if value is not None
    ]  # fmt: skip
    assert (settings.queue, origins["queue"]) == expected[0]


@pytest.mark.skipif(sys.platform == "win32", reason="the paths above are POSIX paths")
def test_what_is_printed_can_be_read_back(home: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "printed.toml"
    file.write_text(to_toml(SOME, {}), "utf-8")
    assert read({}, home, file)[0] == SOME
    assert read({}, {**home, "EDGERT_SERVE_CONFIG": str(file)})[0] == SOME


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("memory_bytes", "4 GiB", 4 * 2**30),
        ("memory_bytes", "1.5GB", 1_500_000_000),
        ("memory_bytes", "none", None),
        ("keep_alive_s", "5m", 300.0),
        ("keep_alive_s", "forever", -1.0),
        ("keep_alive_s", "-1", -1.0),
        ("keep_alive_s", "90", 90.0),
        ("drop_after_s", "never", None),
        ("preempt_ms", "0.25s", 250.0),
        ("preempt_ms", "50", 50.0),
        ("sandbox", "no", False),
        ("origins", "http://a:1,https://b", ("http://a:1", "https://b")),
        ("declared_watts", "CPU=15, base=4", {"CPU": 15.0, "base": 4.0}),
    ],
)
def test_how_values_are_written(home: dict[str, str], name: str, text: str, value: object) -> None:
    assert getattr(read({}, {**home, f"EDGERT_SERVE_{name.upper()}": text})[0], name) == value


def test_a_share_of_the_memory(home: dict[str, str]) -> None:
    half, whole = (read({"memory_bytes": text}, home)[0].memory_bytes for text in ("50 %", "100%"))
    assert half is not None
    assert whole is not None
    assert abs(2 * half - whole) <= 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "65536"), ("port", "-1"), ("port", "1.5"), ("port", "x"), ("queue", "1" * 40), ("host", "a b"),
        ("memory_bytes", "4 parsecs"), ("memory_bytes", "5m"), ("memory_bytes", "0"), ("memory_bytes", "101 %"),
        ("kv_bytes", "50 %"), ("kv_bytes", "nan"), ("keep_alive_s", "5 GiB"), ("keep_alive_s", "inf"),
        ("max_watts", "0"), ("max_watts", "nan"), ("sandbox", "maybe"), ("power", "turbo"), ("log", "TEXT"),
        ("declared_watts", "CPU"), ("declared_watts", "CPU=-1"), ("origins", "*"), ("socket", ""), ("key_file", "a\0b"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_where_it_came_from(home: dict[str, str], name: str, text: str) -> None:
    variable = f"EDGERT_SERVE_{name.upper()}"
    with pytest.raises(UsageError) as error:
        read({}, {**home, variable: text})
    told = str(error.value)
    assert told.startswith(f"{variable}: {name} is ")
    assert RULES[name].expects in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keepalive = 3", "keepalive is no setting; did you mean keep_alive_s?"),
        ("sandbox = 1", "sandbox is '1', expected true or false"),
        ("queue = true", "queue is 'True', expected a whole number from 0 to 100000"),
        ("models = 3", "expected tables [models.NAME]"),
        ("[models.a]\ndevice = 'CPU'", "[models.a]: path is missing"),
        ("[models.a]\npath = 'a'\npine = true", "[models.a]: pine is no setting; did you mean pin?"),
        ("[models.a]\npath = 'a'\ndevice = 'CPU'\nobjective = 'latency'", "device and objective are given"),
        ("[models.'../a']\npath = 'a'", "a model's name is '../a'"),
        ("queue = ", "serve.toml: "),
    ],
)
def test_a_bad_file_is_named(home: dict[str, str], text: str, told: str) -> None:
    file = write(home, text)
    with pytest.raises(UsageError, match=re.escape(told)) as error:
        read({}, home)
    assert str(file) in str(error.value)


def test_unknown_variables_and_missing_files(home: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EDGERT_SERVE_PORTS is no setting; did you mean EDGERT_SERVE_PORT"):
        read({}, {**home, "EDGERT_SERVE_PORTS": "1"})
    with pytest.raises(UsageError, match="no such file"):
        read({}, home, tmp_path / "none.toml")
    with pytest.raises(UsageError, match="no such file"):
        read({}, {**home, "EDGERT_SERVE_CONFIG": str(tmp_path / "none.toml")})


def test_models_come_from_everywhere_by_name(home: dict[str, str], tmp_path: Path) -> None:
    for name in ("one.edge", "two.edge", "three.edge"):
        (tmp_path / name).mkdir()
    write(home, "[models.one]\npath = '../one.edge'\npin = true\n[models.old]\npath = '../two.edge'")
    environ = {**home, "EDGERT_SERVE_MODELS": str(tmp_path / "two.edge")}
    flags = {"models": [str(tmp_path / "one.edge"), f"mine={tmp_path / 'three.edge'}"]}
    settings, origins = read(flags, environ)
    assert list(settings.models) == ["one", "old", "two", "mine"]
    one = settings.models["one"]
    assert one.path.resolve() == tmp_path / "one.edge"  # beside the file, not the current folder
    assert one.pin  # the same bundle keeps what the file says of it
    assert [name for name, model in settings.models.items() if model.preload] == ["one", "mine"]
    assert origins["models.mine"] == "command line"
    assert not any(model.preload for model in read({**flags, "preload": False}, environ)[0].models.values())


@pytest.mark.parametrize("given", [["a/x.edge", "b/x.edge"], ["absent.edge"], ["..=a/x.edge"], ["-=a/x.edge"]])
def test_bundles_that_cannot_be_served(
    home: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    for name in ("a/x.edge", "b/x.edge"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"command line: .*(two bundles|no such folder|name is)"):
        read({"models": given}, home)


def test_what_no_setting_can_say_alone(home: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--host: host is '0.0.0.0'.*key_file"):
        read({"host": "0.0.0.0", "port": "1"}, home)
    assert read({"host": "0.0.0.0", "port": "1", "key_file": str(tmp_path / "key")}, home)[0].host == "0.0.0.0"
    with pytest.raises(UsageError, match=r"--objective: objective is 'latency', but device is 'CPU' \(--device\)"):
        read({"device": "CPU", "objective": "latency"}, home)
    with pytest.raises(UsageError, match="nowhere to listen"):
        read({"socket": "none", "port": "none"}, home)
    with pytest.raises(UsageError, match="at most 107 allowed"):
        read({"socket": "/" + "x" * 107}, home)


def test_only_addresses_of_this_machine_are_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "LocalHost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "127.0.0.1.evil.net", "10.0.0.1", ""))


@pytest.mark.skipif(sys.platform == "win32", reason="there it is None")
def test_the_default_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/edgert/edgert.sock")
    monkeypatch.setenv("EDGERT_CACHE", "/cache")
    assert default_socket({}) == Path("/cache/run/edgert.sock")


def test_print_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGERT_SERVE_QUEUE", "3")
    config = tmp_path / "some.toml"
    config.write_text("max_tokens = 7\n", "utf-8")
    assert main(["serve", "--config", str(config), "--keep-alive", "5m", "--no-sandbox", "--print-config"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "queue = 3 # EDGERT_SERVE_QUEUE", f"max_tokens = 7 # {config}", "keep_alive_s = 300 # --keep-alive",
        "sandbox = false # --sandbox", "log = \"text\" # default",
    ):  # fmt: skip
        assert line in re.sub(" +", " ", printed)
    assert main(["serve", "--port", "x"]) == 2
    assert capsys.readouterr().err.startswith("edgert: error: --port: port is 'x', expected a whole number")


def test_help_has_a_line_for_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(RULES)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {flag(name)}\b", printed, re.MULTILINE) for name in RULES)
    assert "--keep-alive TIME" in printed
    assert "--keep-alive-s" not in printed


def test_nothing_to_serve_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["serve"]) == 2
    assert "nothing to serve" in capsys.readouterr().err


def test_a_wrong_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "small.edge").mkdir()
    with pytest.raises(UsageError, match=r"no such folder; did you mean small\.edge\?"):
        read({"models": [str(tmp_path / "small")]}, {"XDG_CONFIG_HOME": str(tmp_path)})


def test_the_table_in_the_documentation_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", DOCS.read_text("utf-8"), re.MULTILINE)
    found: dict[str, Any] = {name: (default, meaning) for name, default, meaning in rows}
    assert list(found) == list(RULES)
    for name, rule in RULES.items():
        assert found[name][0].strip("`") == rule.show(getattr(Settings(), name)).strip('"'), name
