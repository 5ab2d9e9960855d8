"""`objective=` loads the best plan by this machine's own profile, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import edgert
from edgert.cli import main
from edgert.errors import DeviceError, PlanError, UsageError


def test_the_best_plan_depends_on_the_objective(demo_path: Path, known: Callable[..., None]) -> None:
    known()
    fast = edgert.load(demo_path, objective="latency")
    frugal = edgert.load(demo_path, objective="tokens_per_joule")
    assert [str(config) for config in fast.plan.configs] == ["CPU@f32+dq"]
    assert [str(config) for config in frugal.plan.configs] == ["CPU@f32"]
    assert "was not measured on CPU@f32+dq" in fast.plan.warnings[-1]
    assert fast.generate("Once", max_tokens=4).timings.new_tokens == 4


def test_the_command_line_takes_an_objective(
    demo_path: Path, known: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    known()
    assert main(["run", str(demo_path), "Once", "--max-tokens", "3", "--objective", "latency", "--json"]) == 0
    assert '"new_tokens": 3' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(demo_path), "Once", "--objective", "latency", "--device", "CPU"])


def test_what_is_missing_is_said(demo_path: Path, known: Callable[..., None], fake_bundle: Callable[..., Path]) -> None:
    with pytest.raises(DeviceError, match="has no profile yet: run `edgert profile BUNDLE`"):
        edgert.load(demo_path, objective="latency")
    known(watts=False)
    with pytest.raises(PlanError, match="active_w"):
        edgert.load(demo_path, objective="tokens_per_joule")
    with pytest.raises(UsageError, match="plan, device, place and objective exclude each other"):
        edgert.load(demo_path, objective="latency", device="CPU")
    with pytest.raises(UsageError, match="objective is 'speed'"):
        edgert.load(demo_path, objective="speed")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="runs whole: it has no blocks to place"):
        edgert.load(fake_bundle(), objective="latency")
