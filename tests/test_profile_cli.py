"""`edgert profile`: what it keeps, what it does not measure again, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgert.cli import main
from edgert.conditions import conditions, path_of
from edgert.profile import Profile

SMALL = ["--quick", "--device", "CPU@f32", "--contexts", "8", "--chunks", "4,8"]


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_path: Path) -> Callable[..., int]:
    """Runs the verb on the demo bundle, with a cache of its own."""
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path / "cache"))
    return lambda *options: main(["profile", str(demo_path), *options])


def test_a_profile_is_kept_and_used(
    profile: Callable[..., int], demo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(*SMALL, "--output", str(tmp_path / "copy.json")) == 0
    path = path_of(conditions())
    found = Profile.read(path)
    assert found == Profile.read(tmp_path / "copy.json")
    assert [str(config) for config in found.configs] == ["CPU@f32"]
    assert {(m.tokens, m.provenance) for m in found.measurements} == {(n, "measured") for n in (1, 4, 8)}
    assert list(path.parent.iterdir()) == [path]  # nothing half-written is left
    shown = capsys.readouterr()
    assert "whole model" in shown.out
    assert str(path.name) in shown.out.replace("\n", "")

    # Again: nothing is measured, but what it draws is taken up.
    assert profile(*SMALL, "--watts", "CPU=15", "--watts", "base=4", "--json") == 0
    shown = capsys.readouterr()
    assert "nothing to measure" in shown.err
    said = json.loads(shown.out)
    assert said["base_w"] == 4
    assert said["devices"][0]["active_w"] == 15
    assert said["devices"][0]["provenances"]["active_w"] == "estimated"
    assert Profile.read(path).measurements == found.measurements
    assert main(["plan", str(demo_path), "--profile", "measured", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["prediction"]["energy_provenance"] == "estimated"
    assert {entry["provenance"] for entry in planned["prediction"]["entries"]} <= {"measured", "estimated"}

    # Sizes that were not measured, and a file that is none, are measured.
    assert profile(*SMALL[:-1], "4,16") == 0
    assert {m.tokens for m in Profile.read(path).measurements} == {1, 4, 16}
    path.write_text("{}")
    assert profile(*SMALL) == 0
    assert "measured anew: profile" in capsys.readouterr().err
    assert Profile.read(path).covers((), Profile.read(path).configs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--watts", "GPU=3"], "--watts GPU: neither base nor a device that is measured"),
        (["--watts", "CPU=-3"], "--watts CPU=-3: expected NAME=WATTS with watts above 0"),
        (["--contexts", "8,99999"], "--contexts goes to 99999, the model's context holds 1024"),
        (["--chunks", "8,8"], "chunks are [8, 8], expected ascending numbers from 2"),
        (["--budget", "0"], "--budget is 0, expected seconds above 0"),
        (["--device", "CPU@f64"], "device CPU@f64 is not available here"),
        (["--device", "sim:lunarlake-npu"], "SIM@lunarlake-npu is emulated"),
    ],
)
def test_what_cannot_be_measured(
    profile: Callable[..., int], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert profile(*options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_cache_that_cannot_be_written_is_noticed_first(
    profile: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert profile(*SMALL) == 2
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())
