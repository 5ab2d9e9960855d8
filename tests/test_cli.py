"""The command line: each verb, one-line errors, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgert.cli import VERBS, main
from edgert.placement import Plan


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert "CPU@f32" in run(capsys, "devices")[1]
    listed = json.loads(run(capsys, "devices", "--json")[1])
    assert "CPU@f32" in next(d for d in listed if d["name"] == "CPU")["configs"]
    assert next(d for d in listed if d["name"] == "SIM")["emulated"]


def test_inspect(capsys: pytest.CaptureFixture[str], demo_path: Path) -> None:
    code, out, _ = run(capsys, "inspect", str(demo_path), "--verify")
    assert code == 0
    assert "hashes verified" in out
    facts = json.loads(run(capsys, "inspect", str(demo_path), "--json")[1])
    assert facts["model"]["architecture"] == "qwen3"
    assert len(facts["graph"]["blocks"]) == 10
    assert facts["report"]["checks"]


def test_plan_files(capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path) -> None:
    svg, page, saved = tmp_path / "p.svg", tmp_path / "p.html", tmp_path / "p.json"
    code, out, _ = run(
        capsys, "plan", str(demo_path), "--place", "attention=CPU@f32,ffn=SIM@f32",
        "--svg", str(svg), "--html", str(page), "--save", str(saved),
    )  # fmt: skip
    assert code == 0
    assert "ffn.3" in out
    names = {e.text for e in ElementTree.fromstring(svg.read_text("utf-8")).iter() if e.tag.endswith("text")}
    assert {"attention.0", "head", "SIM@f32", "CPU@f32"} <= names
    assert "ffn.3" in page.read_text("utf-8")
    plan = Plan.read(saved)
    assert json.loads(run(capsys, "plan", str(demo_path), "--plan", str(saved), "--json")[1]) == plan.to_json()


def test_run(capsys: pytest.CaptureFixture[str], demo_path: Path) -> None:
    code, out, err = run(capsys, "run", str(demo_path), "It was", "--max-tokens", "8", "--device", "CPU@f32")
    assert code == 0
    assert out.strip()
    assert "8 new" in err
    data = json.loads(
        run(capsys, "run", str(demo_path), "It was", "--max-tokens", "8", "--device", "CPU@f32", "--json")[1]
    )
    assert data["text"].strip() == out.strip()
    assert data["timings"]["new_tokens"] == 8


def test_the_prompt_may_follow_options(capsys: pytest.CaptureFixture[str], demo_path: Path) -> None:
    code, out, _ = run(capsys, "run", str(demo_path), "--json", "--max-tokens", "2", "--chat", "Good evening")
    assert code == 0
    assert json.loads(out)["timings"]["prompt_tokens"] > 4
    for stray in (["--nonsense"], ["a", "b"]):
        with pytest.raises(SystemExit) as stop:
            main(["run", str(demo_path), "--json", *stray])
        assert stop.value.code == 2


def test_run_reads_standard_input(
    capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("It was\n"))
    code, out, _ = run(capsys, "run", str(demo_path), "--max-tokens", "4", "--json")
    assert code == 0
    assert json.loads(out)["timings"]["new_tokens"] == 4
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(capsys, "run", str(demo_path))[0] == 2


def test_conversation(capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter(["Good evening, sir.", "And then?", ""])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, _, err = run(capsys, "run", str(demo_path), "--max-tokens", "8")
    assert code == 0
    assert err.count("new") == 2
    assert "(0 from cache)" in err.splitlines()[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "none.edge", "x"],
        ["inspect", "none.edge"],
        ["plan", "none.edge"],
        ["run", "DEMO", "x", "--device", "TPU"],
        ["run", "DEMO", "x", "--device", "CPU@f8"],
        ["run", "DEMO", "x", "--place", "moe=CPU"],
        ["run", "DEMO", "x", "--plan", "none.json"],
        ["run", "DEMO", ""],
        ["run", "DEMO", "x", "--top-p", "7"],
        ["run", "DEMO", "x", "--max-tokens", "-3"],
        ["run", "DEMO", "x", "--max-tokens", "5000"],
        ["plan", "DEMO", "--svg", "no/such/folder/p.svg"],
        ["compile", "no-such-model-here", "-o", "OUT"],
    ],
    ids=lambda a: " ".join(a),
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path, arguments: list[str]
) -> None:
    places = {"DEMO": str(demo_path), "OUT": str(tmp_path / "out.edge")}
    code, _, err = run(capsys, *(places.get(a, a) for a in arguments))
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("edgert: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out.edge").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from edgert.errors import BundleError

    with pytest.raises(BundleError):
        main(["inspect", "none.edge", "--debug"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgert.cli.devices.devices", interrupt)
    code, _, err = run(capsys, "devices")
    assert code == 130
    assert err == "edgert: interrupted\n"


def test_as_a_program(demo_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgert", "run", str(demo_path), "It was", "--max-tokens", "3"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
