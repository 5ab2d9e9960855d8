"""The benchmark of quality: its texts, what it counts as weights, what it remembers, and what it makes of figures."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgert.converters import gguf_source, pretrained, quality
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from edgert.evaluation import Scorer
from edgert.likelihood import documents

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "examples" / "models" / "bookworm"
sys.path.insert(0, str(ROOT / "benchmarks"))  # no package: its modules find each other beside the one that runs
bench, charts, gguf_writer = (import_module(name) for name in ("quality", "charts", "runtimes.gguf_writer"))
entries, gguf_file, judge, llama, report, texts, weights = (
    import_module(f"quality_runs.{name}")
    for name in ("entries", "gguf_file", "judge", "llama", "report", "texts", "weights")
)
STORY = "Once there was a lighthouse, and nobody knew who lit it.\n"


@given(st.lists(st.text("ab \n", min_size=1), min_size=2, max_size=8), st.integers(1, 200))
def test_halves_share_no_document(parts: list[str], limit: int) -> None:
    kept = [part.strip() for part in parts if part.strip()]
    if len(kept) < 2:
        return
    first, second = texts.halves("<|endoftext|>".join(kept), limit)
    found = documents(first) + documents(second)
    assert documents(first)
    assert documents(second)
    assert found == kept[: len(found)]
    assert sum(map(len, found[:-1])) <= limit or len(found) == 2


def test_halves_are_about_as_long() -> None:
    many = "<|endoftext|>".join(f"{number} {STORY}" for number in range(100))
    first, second = texts.halves(many, 1 << 20)
    assert len(first) == pytest.approx(len(second), rel=0.05)


def test_a_single_document_is_cut_at_a_line() -> None:
    first, second = texts.halves(STORY * 100, 40 * len(STORY))
    assert documents(first) == documents(second) == [(STORY * 20).strip()]
    with pytest.raises(ValueError, match="1 characters"):
        texts.halves("a", 10)


def test_a_model_needs_a_text(tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    (tmp_path / "models" / "stories-3m").mkdir(parents=True)
    with pytest.raises(ValueError, match="no text"):
        bench.chosen([], None, None)
    with pytest.raises(ValueError, match=r"books-heldout\.txt is no file"):
        bench.chosen([], None, tmp_path)
    for name in ("books-heldout.txt", "tinystories-400.txt"):
        (tmp_path / "corpora" / name).touch()
    found = bench.chosen([], None, tmp_path)
    assert [model.name for model, _ in found] == ["bookworm", "stories-3m"]
    assert [text.name for _, text in found] == ["books-heldout.txt", "tinystories-400.txt"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_gguf_file_holds_the_same_model(family: str, tmp_path: Path) -> None:
    source = tiny(family)
    source.save_pretrained(tmp_path / "source")
    gguf_writer.write(tmp_path / "source", tmp_path / "model.gguf")
    model, _ = gguf_source.convert(gguf_source.read_metadata(tmp_path / "model.gguf"), lambda stage: None)
    pair = quality.openvino_decoder(model), quality.torch_decoder(source)
    quality.check_decoder(*pair, vocab_size=256, window=None, against="transformers")  # or it raises
    matrices = {p.data_ptr(): p.numel() for p in source.parameters() if p.ndim > 1}
    found = gguf_file.weights(tmp_path / "model.gguf")
    assert found.count == sum(matrices.values())  # a tied table once
    assert found.bits == 32


def test_a_matrix_without_a_name_in_gguf_is_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.gate_up.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="gate_up"):
        gguf_writer.write(tmp_path, tmp_path / "model.gguf")


@pytest.fixture
def judged(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes judges of the repository's own model on a text of a few tokens, with its fp16 bundle as the reference."""

    def exact(model: Path, folder: Path) -> None:
        for suffix in (".xml", ".bin"):
            shutil.copyfile(demo_path / f"model{suffix}", folder / f"openvino_model{suffix}")

    monkeypatch.setattr(entries, "exact", exact)
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(STORY * (3 + number) for number in range(4)), "utf-8")
    settings = judge.Settings(0.01, 0, 1 << 20, 64, tmp_path / "build")
    return lambda **changed: judge.Judge(DEMO_MODEL, text, replace(settings, **changed), Console(quiet=True))


def made(key: str, make: Callable[..., str], **changed: Any) -> Any:
    return replace(entries.Entry(key, key, key, "ir", make, "baseline"), **changed)


def test_figures_stay_while_nothing_changes(judged: Callable[..., Any], tmp_path: Path) -> None:
    makings: list[str] = []

    def same(source: Any, folder: Path, log: Path) -> str:
        makings.append(source.model.name)
        shutil.copytree(source.exact, folder, dirs_exist_ok=True)
        return "as the reference"

    def broken(source: Any, folder: Path, log: Path) -> str:
        makings.append("broken")
        raise RuntimeError("no such tool")

    pair = [made("same", same), made("broken", broken)]
    first = judged().result(pair)
    row, failed = first["rows"]
    assert (row["increase"], row["kl"], row["agreement"], row["error"]) == (0, 0, 1, None)
    assert row["bits"] == 16
    assert row["bytes"] == 2 * first["weights"] == 2 * sum(row["formats"].values())
    assert failed["error"] == "RuntimeError: no such tool"
    assert judged().result(pair) == first
    assert makings == ["bookworm", "broken", "broken"]  # what failed is tried again
    judged(window=32).result(pair[:1])
    judged(window=32, anew=frozenset({"same"})).result(pair[:1])
    judged(window=32, budget=0.02).result(pair[:1])
    assert makings[3:] == ["bookworm", "bookworm"]  # the budget is nothing to this entry
    for budget in (0.01, 0.02):
        judged(window=32, budget=budget).result([made("fitted", same, budgeted=True)])
    assert makings[5:] == ["bookworm", "bookworm"]
    with pytest.raises(RuntimeError, match="no such tool"):
        judged().result(pair[1:])
    assert not list((tmp_path / "build").rglob("broken"))


def test_a_reference_is_read_once_as_far_as_there_is_room() -> None:
    class Counting(Scorer):
        name, vocab_size = "counting", 2

        def __init__(self) -> None:
            self.calls = 0

        def logits(self, tokens: Sequence[int]) -> Any:
            self.calls += 1
            return np.full((len(tokens), 2), self.calls, np.float32)

    counting = Counting()
    memory = judge.Remembering(counting, room=8)
    memory.logits([1])[:] = 7  # the caller's own
    assert memory.logits([1]).tolist() == [[1, 1]]
    for _ in range(2):
        memory.logits([1, 2])
    assert counting.calls == 3
    assert memory.greedy([1], 3) == memory.greedy([1], 3)
    assert counting.calls == 6


@pytest.mark.skipif(not (llama.PEERS / "llama.json").exists(), reason="llama.cpp is not set up")
def test_llama_cpp_computes_what_was_trained(tmp_path: Path) -> None:
    gguf_writer.write(DEMO_MODEL, tmp_path / "model.gguf")
    tokens = list(range(100, 140))
    source = pretrained.load(DEMO_MODEL, "decoder")
    with torch.no_grad():
        expected = source(torch.tensor([tokens])).logits[0].numpy()
    with (tmp_path / "log").open("wb") as log, llama.Llama(log) as process:
        process.load(tmp_path / "model.gguf", 64, 1)
        for _ in range(2):  # the second one finds no cache of the first
            np.testing.assert_allclose(process.logits(tokens), expected, atol=0.05)
        with pytest.raises(llama.LlamaFailedError, match="65 tokens, the context has 64"):
            process.logits(range(65))
        process.quantize(tmp_path / "model.gguf", tmp_path / "small.gguf")
        process.load(tmp_path / "small.gguf", 64, 1)
        assert np.abs(process.logits(tokens) - expected).mean() < 1
    assert gguf_file.weights(tmp_path / "small.gguf").bits < 6
    with pytest.raises(llama.LlamaFailedError, match="process ended"):
        process.logits(tokens)


def row(key: str, increase: float, size: int, role: str = "baseline", **changed: Any) -> dict[str, Any]:
    return {
        "key": key, "mark": key[:4], "name": f"the {key}", "role": role, "error": None, "remark": "", "seconds": 1.0,
        "weights": 8000, "bytes": size, "bits": size / 1000, "formats": {"u4": 6000, "u8": 2000}, "perplexity": 3.0,
        "increase": increase, "standard_error": 0.0005, "kl": 0.01, "agreement": 0.9,
        "divergence": {"median": 4.5, "minimum": 1, "tokens": 64, "points": [1, 8], "prompt": 32}, **changed,
    }  # fmt: skip


def result(*rows: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "weights": 8000, "date": "2026-01-01", "provenance": "measured", "budget": 0.01,
        "text": "a text, the second part", "tokens": 1234, "bytes": 4321, "perplexity": 3.0, "bits_per_byte": 0.45,
        "protocol": {
            "text": "judged.txt", "sha256": "ab" * 32, "documents": 2, "windows": 5, "window": 64, "stride": 32,
            "bos": 1, "limit": None,
        },
        "versions": {"nncf": "1"}, "machine": {"cpu": "A CPU"}, "rows": list(rows), **changed,
    }  # fmt: skip


OURS, MISSED = ("edgert", 0.009, 5000, "ours"), [row("nncf-int4", 0.05, 4200), row("optimum-int4", 0.04, 4200)]


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([row(*OURS), *MISSED, row("nncf-int8", 0.001, 8100)], [True, True, True, True]),
        ([row(*OURS), *MISSED, row("llama-q4-k-m", 0.004, 4900)], [True, True, False, True]),
        ([row(*OURS), row("nncf-int4", 0.01, 5100)], [True, False, True, True]),
        ([row(*OURS), row("nncf-int4", 0.01, 5000)], [True, False, False, False]),
        ([row("edgert", 0.011, 3000, "ours"), *MISSED], [False, True, True, False]),
        ([row(*OURS, error="no"), *MISSED], [False, True, None, False]),
        ([row(*OURS)], [True, None, None, None]),
        (MISSED, [None, True, None, None]),
        ([row(*OURS), row("nncf-int8", 0.001, 8100)], [True, None, True, True]),
        ([row(*OURS), row("nncf-int4", 0.0, 1, error="no")], [True, None, None, None]),
        ([row(*OURS), row("nncf-int8", 0.0, 4000), row("llama-q4-k-m", 0, 1, error="no")], [True, None, False, None]),
    ],
)
def test_verdicts(rows: list[dict[str, Any]], met: list[bool | None]) -> None:
    assert [verdict.met for verdict in report.verdicts(result(*rows))] == met


def test_another_model_in_the_gguf_file_is_told() -> None:
    for value, met in ((0.0005, True), (-0.002, False)):
        assert report.verdicts(result(row("llama-f32", value, 32000, "other")))[-1].met is met


def test_the_page_has_every_figure_and_every_failure() -> None:
    text, svg = report.page([
        result(row(*OURS), row("nncf-int8", -0.0002, 8100), row("f16", 0, 16000, "other")),
        result(*MISSED, row("nncf-int8", 0, 1, error="ValueError: no <such> thing"), model="other"),
    ])  # fmt: skip
    assert (
        "| edge | **the edgert** | +0.90 ± 0.05 | 0.01000 | 90.0% | 4.5 of 64 | 5.00 | 5 kB | u4 75%, u8 25% | yes |"
        in text
    )
    assert "| the nncf-int8 | failed | – |" in text
    assert "the nncf-int8: ValueError: no <such> thing" in text
    assert "| edgert within 1% | met | +0.90% ± 0.05 |" in text
    assert "the nncf-int8: 0.617 of its 8 kB" in text
    for part in ("A CPU", "measured", "2026-01-01", "nncf 1", "bos 1", "abababab"):
        assert part in text
    assert svg.startswith("<svg")
    assert svg.count("<circle") == 4  # f16 is no compression, and what failed has no place
    assert "the f16" not in svg


def test_dots_at_the_same_place_have_marks_beside_each_other() -> None:
    dots = [charts.Dot(5.0, 0.02, f"m{number}", "t", False) for number in range(3)] + [
        charts.Dot(8.0, -0.001, "low", "t", True)
    ]
    svg = charts.panels("title", {"one": dots}, 0.01, "bits", ["a <line>"])
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="[\d.]+"[^>]*>m\d', svg)]
    assert all(b - a >= 14 for a, b in itertools.pairwise(places))  # two characters of 12 pixels' height
    assert svg.count('fill="#fff" stroke="#0072B2"') == 1  # below what the axis shows: hollow
    assert "a &lt;line&gt;" in svg


def test_the_page_is_what_the_runs_say() -> None:
    if not report.DOCUMENT.exists():
        pytest.skip("no run was kept")
    text, svg = report.page(json.loads(report.DOCUMENT.read_text("utf-8")))
    assert report.DOCUMENT.with_suffix(".md").read_text("utf-8") == text
    assert report.DOCUMENT.with_suffix(".svg").read_text("utf-8") == svg
