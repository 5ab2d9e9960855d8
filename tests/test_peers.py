"""The benchmark against other runtimes: its processes, and what it makes of their figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no package: its modules find each other beside the one that runs
catalogue, install, measure, report = (
    import_module(f"runtimes.{name}") for name in ("catalogue", "install", "measure", "report")
)


@pytest.fixture
def process(demo_path: Path, tmp_path: Path) -> Iterator[Any]:
    runtime = catalogue.Runtime("edgert", "edgert", Path(sys.executable), demo_path, {}, {"device": "CPU@f32"})
    with (tmp_path / "log").open("wb") as log:
        process = measure.Process(runtime, 1, 4096, log)
        yield process
        process.end()


def test_a_process_stamps_each_token_and_keeps_what_it_holds(process: Any) -> None:
    stamps = process.ask(120, do="run", prompt=40, seed=1, new=5)["stamps_s"]
    assert len(stamps) == 5
    assert stamps == sorted(stamps)
    assert 0 < stamps[0] < process.age_ms / 1000
    assert len(process.ask(120, do="hold", prompt=64, seed=2, new=2)["stamps_s"]) == 2
    assert len(process.ask(120, do="run", prompt=40, seed=3, new=2)["stamps_s"]) == 2  # another one in between
    assert len(process.ask(120, do="resume", prompt=64, new=3)["stamps_s"]) == 3
    memory = process.ask(120, do="memory")
    assert memory["peak"] is None or memory["peak"] >= memory["resident"] > 1 << 20
    assert process.ask(120, do="versions")["edgert"]


def test_a_failure_is_told_and_ends_nothing(process: Any) -> None:
    with pytest.raises(measure.RuntimeFailedError, match="ContextOverflowError"):
        process.ask(120, do="run", prompt=1 << 20, seed=1, new=1)
    assert process.ask(120, do="run", prompt=8, seed=1, new=1)["stamps_s"]


def test_who_is_over_the_limit_is_ended(process: Any) -> None:
    with pytest.raises(measure.OverLimitError):
        process.ask(0, do="run", prompt=8, seed=1, new=1)
    with pytest.raises(measure.RuntimeFailedError, match="process ended"):
        process.ask(120, do="run", prompt=8, seed=1, new=1)


def test_steps_are_counted_from_the_second_on() -> None:
    assert measure.steps_ms([0.5, 1.5, 1.51, 1.53, 1.56]) == pytest.approx(20)


def cell(*values: float, over_s: float | None = None, error: str | None = None) -> dict[str, Any]:
    found = measure.Cell(list(values), over_s, error)
    return {"values": found.values, "over_s": over_s, "error": error, "median": found.median}


def result(isa: str = "all", **cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of runtimes by name, with their cells."""
    precision = dict.fromkeys(("body", "head", "activations", "cache"), "some")
    return {
        "model": "Qwen3-0.6B's shape, random weights", "isa": isa, "date": "2026-01-01", "provenance": "measured",
        "machine": {"cpu": "A CPU", "cores": 2, "isa": ["avx2"], "memory_bytes": 2**34, "system": "Linux"},
        "threads": 2, "rounds": 3, "bandwidth_gbps": [20.0, 10.0, 30.0], "weight_bytes_a_token": 300e6,
        "notes": ["A note."],
        "runtimes": [
            {"name": name, "precision": precision, "versions": {"p": "1"}, "cells": own} for name, own in cells.items()
        ],
    }  # fmt: skip


def test_ratios_are_of_medians_against_the_best_that_finished() -> None:
    found = result(**{
        "edgert CPU@kernels": {
            "decode 512": cell(18, 20, 90), "decode 8192": cell(30), "resident memory": cell(5e8), "load": cell(1e3),
        },
        "OpenVINO f32": {"decode 512": cell(30), "decode 8192": cell(66)},
        "OpenVINO bf16": {"decode 512": cell(31), "decode 8192": cell(over_s=90)},
        "OpenVINO GenAI": {"decode 512": cell(50), "resident memory": cell(1e9), "load": cell(error="no")},
        "llama.cpp": {"decode 512": cell(5, over_s=90), "decode 8192": cell(65)},
    })  # fmt: skip
    targets = {(t.cell, t.against): t for t in report.targets(found)}
    assert targets["decode 512", "OpenVINO GenAI"].value == pytest.approx(2.5)
    assert targets["decode 512", "OpenVINO GenAI"].met
    assert targets["decode 512", "best bare OpenVINO: OpenVINO f32"].value == pytest.approx(1.5)
    assert not targets["decode 512", "best bare OpenVINO: OpenVINO f32"].met
    assert targets["decode 512", "llama.cpp"].value is None  # over its limit, so its figures do not count
    assert targets["decode 8192", "best of all: llama.cpp"].value == pytest.approx(65 / 30)
    limit = targets["decode 512", "reading the weights at the measured bandwidth"]
    assert limit.value == pytest.approx(15 / 20)
    assert targets["resident memory", "OpenVINO GenAI"].met
    assert not targets["load", "OpenVINO GenAI"].met  # nothing to compare with
    assert all(target.cell != "prefill 512" for target in targets.values())  # not part of this run


def test_held_runs_have_targets_of_their_own() -> None:
    found = result("avx2-vnni", edgert={"decode 512": cell(10)}, other={"decode 512": cell(14)})
    assert [(t.cell, t.value, t.limit) for t in report.targets(found)] == [("decode 512", 1.4, 1.4)]


def test_the_page_has_every_figure_and_every_failure() -> None:
    text, svg = report.page([
        result(edgert={"decode 32": cell(10.04, 11), "load": cell(1500)}),
        result("avx2", other={"decode 32": cell(over_s=90), "load": cell(error="no <such> thing")}),
    ])  # fmt: skip
    assert "| edgert | 10.5 (10.0–11.0) | 1.50 (1.50–1.50) |" in text
    assert "| other | over 90 s | failed |" in text
    assert "other, load: no <such> thing" in text
    assert "held to AVX2" in text
    assert "A CPU" in text
    assert "measured" in text
    assert "2026-01-01" in text
    assert svg.startswith("<svg")


def test_the_page_is_what_the_runs_say() -> None:
    if not report.DOCUMENT.exists():
        pytest.skip("no run was kept")
    text, svg = report.page(json.loads(report.DOCUMENT.read_text("utf-8")))
    assert report.DOCUMENT.with_suffix(".md").read_text("utf-8") == text
    assert report.DOCUMENT.with_suffix(".svg").read_text("utf-8") == svg


def test_llama_cpp_is_built_for_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds: list[str] = []

    def pip(*arguments: str, **environment: str) -> None:
        builds.append(environment["CMAKE_ARGS"])
        Path(arguments[arguments.index("--target") + 1]).mkdir()

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "cpu_flags", lambda: {"avx2", "avx512f", "avx512_vnni"})
    install.llama(tmp_path)
    assert len(builds) == 2  # without AVX-VNNI the build for it is that for AVX2
    assert ["GGML_AVX512=ON" in build for build in builds] == [True, False]
    assert not any("AVX_VNNI" in build or "BF16" in build for build in builds)
    folders = json.loads((tmp_path / "llama.json").read_text("utf-8"))
    assert folders["avx2-vnni"] == folders["avx2"] != folders["all"]
    install.llama(tmp_path)
    assert len(builds) == 2
