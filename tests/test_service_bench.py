"""The benchmarks of the service, short: a whole service under load, under faults and under attack."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("the benchmarks need Unix sockets and signals", allow_module_level=True)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no package: its modules find each other beside the one that runs
service, fuzz = import_module("service"), import_module("fuzz")
cost, faults, host, load = (import_module(f"service_runs.{name}") for name in ("cost", "faults", "host", "load"))


def test_every_client_gets_what_it_would_get_alone(demo_path: Path) -> None:
    with host.Host(demo_path, "--queue", "8") as served:
        found = asyncio.run(load.run(served, clients=8, seconds=4, seed=0))
    assert not found.faults
    assert found.counts["wrong text"] == found.counts["failed"] == 0
    assert found.counts["whole"] > 0
    assert found.to_json()["queue_ms"]["worst"] > 0


def test_a_wrong_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(*_: Any) -> tuple[str, bool]:
        asked.append(1)
        return "something else", len(asked) > 1

    asked: list[int] = []
    found = load.Load(1.0, 1)
    monkeypatch.setattr(load, "_ask", ask)
    asyncio.run(load._client(None, random.Random(0), load.time.monotonic() + 0.01, [("a", {})], ["text"], found))
    assert found.counts["wrong text"] == len(asked) > 0


def test_streams_outlive_faults(demo_path: Path) -> None:
    with host.Host(demo_path, *faults.FLAGS, faulty=True) as served:
        found = asyncio.run(faults.run(served, count=3, seed=0))
    assert not found.wrong
    told = found.to_json()
    assert told["faults"] == 3
    assert {kind: times["count"] for kind, times in told["recovery_s"].items()} == {
        "kill": 1,
        "hang": 1,
        "nan": 1,
        "all": 3,
    }


def test_nothing_breaks_under_attack(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "WARM_S", 0.1)
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "mutants").mkdir()
    with host.Host(demo_path, "--folders", str(tmp_path / "mutants")) as served:
        attack = fuzz.Attack(served, tmp_path / "mutants", demo_path, random.Random(0))
        asyncio.run(attack.run(3, lambda share: None))
    assert not attack.broken
    assert attack.counts["400"] > 0
    assert sum(count for name, count in attack.counts.items() if name.startswith("bundle")) > 0


def test_the_report_is_made_of_what_was_measured() -> None:
    document = ROOT / "docs" / "service_measured.json"
    assert service.report(json.loads(document.read_text("utf-8"))) == document.with_suffix(".md").read_text("utf-8")
