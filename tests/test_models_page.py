"""docs/models.md is what its JSON says, and has a row for every family."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES, TABLE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from models_runs.page import page  # noqa: E402 - benchmarks are no package

MEASURED = json.loads((ROOT / "docs" / "models_measured.json").read_text("utf-8"))
EXPORT = {"blocks": {"embed": 1, "moe": 2}, "reason": None}
GATE = "cut at every boundary"


def row(steps: dict[str, object]) -> str:
    """The row of llama, whose steps had these outcomes, and what stands below the table."""
    checked = {"checked": "2026-01-02", "transformers": "5", "openvino": "6", "steps": steps}
    text = page({"families": {"llama": checked, "gone": checked}}, TABLE)
    assert "1 families, checked 2026-01-02 with transformers 5 and openvino 6" in text
    assert "gone" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| llama |")]
    return line.partition(TABLE["llama"].models)[2] + "\n" + text.partition("## Out of reach")[2]


def test_page_is_that_of_the_measurements() -> None:
    assert (ROOT / "docs" / "models.md").read_text("utf-8") == page(MEASURED, TABLE), "make models ARGS='--steps page'"


def test_every_family_has_a_row() -> None:
    assert list(MEASURED["families"]) == list(TABLE), "make models ARGS=FAMILY"
    for name in FAMILIES:
        failed = {step for step, outcome in MEASURED["families"][name]["steps"].items() if "error" in outcome}
        assert not failed & {"export", "parity", "fp16", "int8", "int4"}, name


def test_what_passed_and_what_did_not() -> None:
    steps: dict[str, object] = {
        "export": EXPORT, "parity": {"relative_error": 1e-6, "in_pieces": 3e-6}, "fp16": {"checks": {GATE: 0.0}},
        "int8": {"checks": {GATE: 2e-7}, "correlation": 0.99961}, "int4": {"error": "ParityError: `x` | y"},
        "placements": {"plans": {"a": 1e-7, "b": "refused: no", "c": 0.0}}, "fit": {}, "npu_recipe": {},
        "npu_compile": {"error": "no compiler"}, "optimum": {"error": "not for it"},
    }  # fmt: skip
    cells, _, below = row(steps).partition("\n")
    wanted = "general | embed, 2 moe | 3e-06 | 1.000, no | 2e-07 | 2 of 3 | exact | recipe | int4, npu compile |"
    assert wanted in cells
    assert "* **llama**, int4: `ParityError: 'x' | y`" in below
    assert "* **llama**, npu compile: `no compiler`" in below
    assert "optimum" not in below


def test_what_was_not_tried_and_what_cannot_be_exported() -> None:
    assert "| – | – | – | –, – | – | – | – | – | export |" in row({"export": {"error": "no"}})
    assert "optimum" in row({"export": EXPORT, "optimum": {"relative_error": 1e-6}}).partition("|")[2]
    assert "| whole |" in row({"export": {"blocks": {"block": 1}, "reason": "tangled"}})
    assert "Nothing of what was tried." in row({"export": EXPORT})


def test_names_of_families_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import models

    monkeypatch.setattr(sys, "argv", ["models.py", "llama", "lama"])
    with pytest.raises(SystemExit):
        models.main()
    assert "lama: expected some of llama, llama3" in capsys.readouterr().err
