"""`edgert eval`: what it prints, the gate, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgert import subjects
from edgert.bundle import Bundle
from edgert.cli import main
from edgert.evaluation import Logits, Scorer
from edgert.placement import HOST, Plan
from edgert.scorers import bundle_scorer

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "examples" / "models" / "bookworm"
SHORT = ("--tokens", "150", "--window", "64")


class Result:
    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> None:
        self.code = main([str(argument) for argument in arguments])
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """The prose in two files of a folder."""
    folder = tmp_path / "texts"
    folder.mkdir()
    paragraphs = (ROOT / "tests" / "data" / "prose.txt").read_text("utf-8").split("\n\n")
    half = len(paragraphs) // 2
    for name, part in (("one", paragraphs[:half]), ("two", paragraphs[half:])):
        (folder / f"{name}.txt").write_text("\n\n".join(part), "utf-8")
    return folder


@pytest.fixture
def blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan but the exact one computes logits that are a little off."""

    class Blurred(Scorer):
        def __init__(self, real: Scorer) -> None:
            self.real, self.name, self.vocab_size, self.context = real, real.name, real.vocab_size, real.context

        def logits(self, tokens: Sequence[int]) -> Logits:
            found = self.real.logits(tokens)
            return found + np.random.default_rng(0).normal(0, 0.3, found.shape).astype(np.float32)

    def load(bundle: Bundle, plan: Plan) -> Scorer:
        real = bundle_scorer(bundle, plan)
        return real if plan.configs == (HOST,) else Blurred(real)

    monkeypatch.setattr(subjects, "bundle_scorer", load)


def test_without_a_reference(capsys: pytest.CaptureFixture[str], demo_path: Path, text: Path) -> None:
    done = Result(capsys, "eval", demo_path, "--text", text / "one.txt", *SHORT)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "demo.edge on CPU@f32+dq"
    assert lines[-1].startswith(
        "126 tokens (435 bytes) of one.txt in 3 windows of up to 64 tokens, stride 32; text sha256 "
    )
    assert "perplexity" in done.out
    assert "bits per byte" in done.out
    assert "increase" not in done.out


def test_the_gate_lets_a_placement_pass(capsys: pytest.CaptureFixture[str], demo_path: Path, text: Path) -> None:
    done = Result(capsys, "eval", demo_path, "--text", text, "--gate", *SHORT)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == "demo.edge on CPU@f32+dq, against demo.edge on CPU@f32"
    for figure in ("increase", "±", "KL divergence", "top-1 agreement", "greedy divergence", "of 2 files in"):
        assert figure in done.out


@pytest.mark.usefixtures("blurred")
def test_the_gate_refuses_what_drifts(capsys: pytest.CaptureFixture[str], demo_path: Path, text: Path) -> None:
    done = Result(capsys, "eval", demo_path, "--text", text, "--gate", "--json", "--place", "*=CPU@f32+static", *SHORT)
    assert done.code == 3
    name = "demo.edge on CPU@f32, CPU@f32+static"
    found = json.loads(done.out)  # what was measured is told all the same
    assert found["model"] == name
    assert found["kl"] > 0.005
    assert found["divergence"]["minimum"] < 64
    warning, error = done.err.splitlines()
    assert warning.startswith("edgert: warning: block 0 (embed) runs on CPU@f32")
    assert error.startswith(f"edgert: error: {name} drifts from demo.edge on CPU@f32: ")
    assert error.endswith("allowed")
    lenient = ("--max-increase", "50%", "--max-kl", "0.1")
    assert Result(capsys, "eval", demo_path, "--text", text, "--gate", *lenient, *SHORT).code == 0


@pytest.mark.usefixtures("blurred")
def test_limits_against_another_model(capsys: pytest.CaptureFixture[str], demo_path: Path, text: Path) -> None:
    command = ("eval", demo_path, "--text", text, "--reference", DEMO_MODEL, *SHORT)
    done = Result(capsys, *command, "--max-kl", "0.001")
    assert done.code == 3
    assert "demo.edge on CPU@f32+dq drifts from bookworm in transformers: KL divergence 0.0" in done.err
    assert "at most 0.00100 nats a token allowed" in done.err
    assert Result(capsys, *command, "--max-increase", "0.5", "--max-kl", "0.1").code == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-increase", "1%"], "--max-increase and --max-kl are limits on what is lost: they need --reference or"),
        (["--text", "nothing.txt"], "text nothing.txt: no such file or folder"),
        (["--tokens", "0"], "the limit is 0 tokens, expected at least 1"),
        (["--window", "5000"], "window is 5000 tokens, the context holds 1024"),
        (["--stride", "0"], "stride is 0, expected 1 to 1023"),
        (["--device", "CPU@f33"], "device CPU@f33 is not available here"),
        (["--reference", "nothing"], "model nothing: no such folder"),
    ],
)
def test_what_cannot_be(
    capsys: pytest.CaptureFixture[str], demo_path: Path, text: Path, more: list[str], message: str
) -> None:
    done = Result(capsys, "eval", demo_path, "--text", text, *more)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"edgert: error: {message}")
    assert done.err.count("\n") == 1


def test_the_gate_is_for_bundles(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    done = Result(capsys, "eval", DEMO_MODEL, "--text", text, "--gate")
    assert done.code == 2
    assert "--gate: " in done.err
    assert "is no bundle" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "--reference", "x"], "not allowed with argument --gate"),
        (["--gate", "--max-increase=-1%"], "'-1' is no number from 0"),
        (["--gate", "--max-increase", "much"], "invalid share value: 'much'"),
        (["--gate", "--max-kl", "nan"], "'nan' is no number from 0"),
        ([], "the following arguments are required: --text"),
    ],
)
def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "demo.edge", *(["--text", "x"] if arguments else []), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
