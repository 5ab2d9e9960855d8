"""`edgert run --image --audio`: what reaches the model, and one line where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_media

from edgert.cli import main
from edgert.cli import run as verb
from edgert.results import Piece


class Listener:
    """A model that says nothing and notes what it was told."""

    def __init__(self) -> None:
        self.plan = SimpleNamespace(warnings=[])
        self.heard: list[list[dict[str, Any]]] = []

    def stream_chat(self, messages: list[dict[str, Any]], **_: Any) -> Iterator[Piece]:
        self.heard.append([dict(message) for message in messages])
        return iter(())


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    model = Listener()
    monkeypatch.setattr(verb, "load", lambda *_, **__: model)
    return model


MEDIA = [
    {"type": "image", "image": "a.png"},
    {"type": "image", "image": "b.png"},
    {"type": "audio", "audio": "c.wav"},
]
OPTIONS = ["--image", "a.png", "--audio", "c.wav", "--image", "b.png"]


def test_files_come_before_the_prompt(listener: Listener) -> None:
    assert main(["run", "x.edge", *OPTIONS, "--system", "Be brief.", "What is this?"]) == 0
    said = [{"role": "system", "content": "Be brief."}]
    said.append({"role": "user", "content": [*MEDIA, {"type": "text", "text": "What is this?"}]})
    assert listener.heard == [said]


def test_files_are_of_the_first_message(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["What is this?", "And that?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["run", "x.edge", *OPTIONS]) == 0
    assert [message["content"] for message in listener.heard[-1]] == [
        [*MEDIA, {"type": "text", "text": "What is this?"}],
        "",
        "And that?",
    ]


def test_without_files_content_stays_text(listener: Listener) -> None:
    assert main(["run", "x.edge", "--chat", "Good evening"]) == 0
    assert listener.heard == [[{"role": "user", "content": "Good evening"}]]


@pytest.mark.parametrize("option", ["--image", "--audio"])
def test_a_model_that_takes_none(option: str, demo_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(demo_path), option, "a.png", "What is this?"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("edgert: error: ")
    assert "takes no" in err
    assert err.count("\n") == 1


def test_what_a_bundle_takes_is_shown(demo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_media.make(demo_path, tmp_path / "media.edge"))
    assert main(["inspect", path]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "4 tokens a picture" in shown
    assert "at most 10 tokens" in shown
    assert main(["plan", path, "--place", "vision=NPU,*=CPU@f32"]) == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "vision" in line and "tower" in line]
    assert "NPU@f16" in row
    assert main(["plan", path, "--place", "vision=CPU"]) == 2
    assert "no rule says where prefill runs; *=CPU would" in capsys.readouterr().err
