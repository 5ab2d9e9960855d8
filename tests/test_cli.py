"""The command line: each verb, one-line errors, exit codes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgert.bundle import Bundle
from edgert.cli import VERBS, main
from edgert.placement import Plan


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert "CPU@f32" in run(capsys, "devices")[1]
    listed = json.loads(run(capsys, "devices", "--json")[1])
    present = {device["name"]: device for device in listed["devices"]}
    assert "CPU@f32" in present["CPU"]["configs"]
    assert present["SIM"]["emulated"]
    kinds = {name.partition(".")[0] for name in present} | {absence["kind"] for absence in listed["absent"]}
    assert kinds == {"CPU", "GPU", "NPU", "ORT", "SIM"}


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
    for stdin, message in ((None, "closed"), (io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"), "not utf-8 text")):
        monkeypatch.setattr("sys.stdin", stdin)
        code, _, err = run(capsys, "run", str(demo_path))
        assert code == 2
        assert message in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_conversation(capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Good evening, sir.", "And then?", ""])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, _, err = run(capsys, "run", str(demo_path), "--max-tokens", "8")
    assert code == 0
    assert err.count("new") == 2
    assert "(0 from cache)" in err.splitlines()[0]
    code, _, err = run(capsys, "run", str(demo_path), "--json")
    assert code == 2
    assert "--json" in err


@pytest.mark.parametrize("config", ["GPU.99@f16", "CPU@nonsense"])
def test_plan_warns_of_a_device_that_is_not_here(
    capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path, config: str
) -> None:
    saved = str(tmp_path / "p.json")
    code, out, _ = run(capsys, "plan", str(demo_path), "--device", config, "--save", saved)
    assert code == 0
    assert f"warning: when this plan was made: device {config} is not available" in " ".join(out.split())
    for _ in range(2):  # once each, however often the plan is read and saved
        code, out, _ = run(capsys, "plan", str(demo_path), "--plan", saved, "--save", saved, "--json")
        assert code == 0
        assert len(json.loads(out)["warnings"]) == 1
    assert run(capsys, "plan", str(demo_path), "--device", "CPU@f32", "--json")[1].count('"warnings": []') == 1


def test_run_shows_the_warnings_of_a_plan(capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path) -> None:
    plan = {
        "placements": [{"first": 0, "last": 9, "config": "CPU@f32"}],
        "rationale": "test",
        "warnings": ["[/b] careful"],
    }
    (tmp_path / "p.json").write_text(json.dumps(plan))
    code, _, err = run(capsys, "run", str(demo_path), "It", "--max-tokens", "1", "--plan", str(tmp_path / "p.json"))
    assert code == 0
    assert "edgert: warning: [/b] careful\n" in err


def test_no_graph_to_plan(capsys: pytest.CaptureFixture[str], fake_bundle: Callable[..., Path]) -> None:
    path = fake_bundle()
    code, _, err = run(capsys, "plan", str(path))
    assert code == 2
    assert "has no block graph" in err
    (path / "model.xml").rename(path / "model.onnx")
    manifest = path / "manifest.json"
    text = manifest.read_text("utf-8").replace("model.xml", "model.onnx")
    manifest.write_text(text.replace('"format": "openvino"', '"format": "onnx"'), "utf-8")
    code, _, err = run(capsys, "plan", str(path))
    assert code == 2
    assert "runs whole on onnxruntime" in err


def rename(bundle: Path, name: str) -> None:
    """Give a bundle's model another name; the manifest itself has no hash."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["model"]["name"] = name
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_names_and_paths_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # nothing is wrapped
    path = tmp_path / "a[" / "b] [bold]m[v2].edge"  # holds the markup `[/b]`, where the separator is a slash
    shutil.copytree(demo_path, path)
    rename(path, "[red]m[/b] :cat:")
    code, out, _ = run(capsys, "inspect", str(path))
    assert code == 0
    assert str(path) in out.replace("\n", "")  # a title is as wide as its table
    assert "[red]m[/b] :cat:" in out
    plan = {"placements": [{"first": 0, "last": 9, "config": "CPU@f32"}], "rationale": "[/i]r", "warnings": ["[/b]w"]}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    code, out, _ = run(capsys, "plan", str(path), "--plan", str(tmp_path / "p.json"))
    assert code == 0
    assert "[red]m[/b] :cat:" in out
    assert "[/i]r: 1 submodel" in out
    assert "warning: [/b]w" in out

    def compile(*_: object, progress: Callable[[str], None], **__: object) -> Bundle:
        progress("reading [/b]")
        return Bundle.open(path)

    monkeypatch.setattr("edgert.converters.compile", compile)
    code, out, _ = run(capsys, "compile", "src", "-o", "out")
    assert code == 0
    assert "reading [/b]" in out
    assert f"wrote {path}\n" in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_in_an_encoding_that_lacks_characters(fake_bundle: Callable[..., Path], encoding: str) -> None:
    name = "Müller → 模型 😀"
    path = fake_bundle("é模.edge")
    rename(path, name)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "500"}
    outputs = []
    for more in ([], ["--json"], ["--place", "*=模"]):
        verb = "plan" if "--place" in more else "inspect"
        done = subprocess.run(
            [sys.executable, "-m", "edgert", verb, str(path), *more], capture_output=True, check=False, env=environment
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == (2 if verb == "plan" else 0)
        outputs.append((done.stdout + done.stderr).decode(encoding))
    assert name.encode(encoding, "backslashreplace").decode(encoding) in outputs[0]
    assert json.loads(outputs[1])["model"]["name"] == name
    assert "\\u6a21.edge" in outputs[2]


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
        ["run", "DEMO", "x", "--place", "0-99999999999=CPU"],
        ["run", "DEMO", "x", "--place", "²=CPU"],
        ["run", "DEMO", "x", "--system", "Be brief."],
        ["plan", "DEMO", "--svg", "no/such/folder/p.svg"],
        ["plan", "DEMO", "--save", "/"],
        ["plan", "DEMO", "--save", ""],
        ["plan", "DEMO", "--svg", ""],
        ["plan", "DEMO", "--html", ""],
        ["plan", "DEMO", "--save", "x" * 250],
        ["plan", "DEMO", "--plan", ""],
        ["compile", "no-such-model-here", "-o", "OUT"],
    ],
    ids=lambda a: " ".join(a)[:60],
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

    monkeypatch.setattr("edgert.cli.devices.survey", interrupt)
    code, _, err = run(capsys, "devices")
    assert code == 130
    assert err == "edgert: interrupted\n"


def test_interrupt_while_the_verb_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgert.cli.import_module", interrupt)
    assert run(capsys, "devices") == (130, "", "edgert: interrupted\n")


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert set(VERBS) <= {line[0] for line in lines if len(line) == 2}


def test_a_verb_imports_only_its_own_module() -> None:
    code = (
        "import sys; from edgert.cli import main; main(['devices', '--json']); print('edgert.session' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_as_a_program(demo_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgert", "run", str(demo_path), "It was", "--max-tokens", "3"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
