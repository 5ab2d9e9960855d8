"""Real models by the ruler: the demo model as a bundle on several plans, as an IR folder, and in torch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert import converters, subjects
from edgert.bundle import Bundle
from edgert.choice import choose_plan
from edgert.errors import BundleError, ConversionError, MissingDependencyError, UsageError
from edgert.executor import SequenceRun
from edgert.placement import HOST, Plan
from edgert.scorers import bundle_scorer, exact_plan, folder_scorer
from edgert.session import Model

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "examples" / "models" / "bookworm"
PROSE = ROOT / "tests" / "data" / "prose.txt"


@pytest.fixture(scope="module")
def ir_folder(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as optimum-intel lays out its folders."""
    folder = tmp_path_factory.mktemp("ir") / "demo-ir"
    shutil.copytree(demo_path / "tokenizer", folder)
    shutil.copy(DEMO_MODEL / "config.json", folder)
    for ending in ("xml", "bin"):
        shutil.copy(demo_path / f"model.{ending}", folder / f"openvino_model.{ending}")
    return folder


def test_the_source_in_torch_and_the_bundle_and_its_ir_are_the_same_model(demo_path: Path, ir_folder: Path) -> None:
    found = edgert.evaluate(demo_path, PROSE, reference=DEMO_MODEL, device="CPU@f32", window=128)
    assert found.model == "demo.edge on CPU@f32"
    assert found.reference == "bookworm in transformers"
    assert found.protocol.bos is None
    assert found.protocol.windows > 5
    assert found.increase == pytest.approx(0, abs=1e-5)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement is not None
    assert found.agreement > 0.995
    assert found.divergence is not None
    assert found.divergence.minimum == 64
    back = edgert.evaluate(DEMO_MODEL, PROSE, reference=ir_folder, window=128)
    assert (back.model, back.reference) == ("bookworm in transformers", "demo-ir on CPU@f32")
    assert back.perplexity == found.reference_perplexity
    assert back.reference_perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert back.divergence == found.divergence


@pytest.mark.parametrize("device", ["CPU@f32+static", "CPU@f32+dq"])
def test_a_placement_against_exact_arithmetic(demo_path: Path, device: str) -> None:
    found = edgert.evaluate(demo_path, PROSE, reference=demo_path, device=device, window=300, stride=200)
    limit = 1e-6 if device == "CPU@f32+static" else 1e-2
    assert found.increase == pytest.approx(0, abs=limit)
    assert found.kl is not None
    assert -1e-7 < found.kl < limit  # a divergence is exact to that
    found.check(max_increase=0.005, max_kl=0.005)


def test_a_plan_that_decodes_elsewhere_is_judged_there_too(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    forward = SequenceRun.forward

    def watched(self: SequenceRun, tokens: Sequence[int], *, keep: int = 1) -> np.ndarray:
        chunks.append(len(tokens))
        return forward(self, tokens, keep=keep)

    monkeypatch.setattr(SequenceRun, "forward", watched)
    bundle = Bundle.open(demo_path)
    whole = bundle_scorer(bundle, exact_plan(bundle)).logits(range(5, 105))
    assert chunks == [100]
    chunks.clear()
    both = bundle_scorer(bundle, choose_plan(bundle, place="prefill:*=CPU@f32,decode:*=CPU@f32+static"))
    assert np.abs(both.logits(range(5, 105)) - whole).max() < 1e-3
    assert chunks == [75, *[1] * 25]
    assert np.abs(both.logits(range(5, 105)) - whole).max() < 1e-3  # from an empty cache again
    assert both.greedy([5, 6, 7], 4) == bundle_scorer(bundle, exact_plan(bundle)).greedy([5, 6, 7], 4)


def test_long_windows_go_in_chunks(demo: Model, demo_path: Path) -> None:
    bundle = Bundle.open(demo_path)
    tokens = np.random.default_rng(0).integers(0, bundle.facts.vocab_size, 300).tolist()
    found = bundle_scorer(bundle, exact_plan(bundle)).logits(tokens)
    assert np.abs(found - demo.score(tokens)).max() < 1e-3


def test_windows_are_as_long_as_both_contexts_allow(demo_path: Path, ir_folder: Path, tmp_path: Path) -> None:
    shorter = shutil.copytree(ir_folder, tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text("utf-8"))
    (shorter / "config.json").write_text(
        json.dumps({"text_config": {**config, "max_position_embeddings": 96}}), "utf-8"
    )
    found = edgert.evaluate(ir_folder, PROSE, tokens=120, reference=shorter)
    assert (found.protocol.window, found.protocol.stride) == (96, 48)
    with pytest.raises(UsageError, match="window is 97 tokens, the context holds 96"):
        edgert.evaluate(ir_folder, PROSE, reference=shorter, window=97)
    (shorter / "config.json").write_text("[]", "utf-8")
    with pytest.raises(BundleError, match="is no configuration"):
        folder_scorer(shorter)
    (shorter / "config.json").unlink()
    assert folder_scorer(shorter).context is None


def test_other_tokens_have_no_divergence(demo_path: Path, ir_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(ir_folder, tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text("utf-8"))
    data["model"]["merges"] = data["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(UsageError, match=r"other: its tokenizer makes other tokens of prose\.txt.*bits per byte"):
        edgert.evaluate(demo_path, PROSE, reference=other)
    assert edgert.evaluate(other, PROSE, tokens=200).bits_per_byte > 1.5


def test_what_is_no_model(tmp_path: Path, ir_folder: Path, fake_bundle: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="nothing: no such folder; expected a bundle, an OpenVINO IR or a"):
        edgert.evaluate(tmp_path / "nothing", PROSE)
    with pytest.raises(ConversionError, match=r"found no \*\.safetensors"):
        edgert.evaluate(tmp_path, PROSE)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds ONNX; `edgert compile` makes a bundle"):
        edgert.evaluate(tmp_path, PROSE)
    with pytest.raises(UsageError, match=r"demo-ir: only a bundle is placed on devices"):
        edgert.evaluate(ir_folder, PROSE, device="CPU@f32")
    bare = shutil.copytree(ir_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ConversionError, match="has no tokenizer"):
        edgert.evaluate(bare, PROSE)
    with pytest.raises(UsageError, match=r"has no openvino_model\.xml or model\.xml"):
        folder_scorer(tmp_path)
    encoder = Bundle.open(fake_bundle(task="encoder", pooling="mean"))
    with pytest.raises(UsageError, match="is an encoder, which predicts no tokens"):
        bundle_scorer(encoder, Plan((), "none"))
    with pytest.raises(UsageError, match=f"there is no {HOST} to compare with"):
        exact_plan(encoder)


def test_an_ir_with_explicit_caches_is_refused(ir_folder: Path, tmp_path: Path) -> None:
    import openvino as ov

    folder = tmp_path / "explicit"
    folder.mkdir()
    inputs = [ov.opset13.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "past_key_values.0.key")]
    for node in inputs:
        node.output(0).get_tensor().set_names({node.get_friendly_name()})
    ov.save_model(ov.Model([ov.opset13.add(*inputs)], inputs, "explicit"), folder / "openvino_model.xml")
    with pytest.raises(UsageError, match=r"inputs are input_ids, past_key_values\.0\.key, expected some of .*states"):
        folder_scorer(folder)


def test_a_hugging_face_folder_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("pretrained", "torch_scorer"):
        monkeypatch.delitem(sys.modules, f"edgert.converters.{name}", raising=False)
        monkeypatch.delattr(converters, name, raising=False)
    with pytest.raises(MissingDependencyError, match=r"needs torch: pip install edgert\[compile\]"):
        subjects.Subject.open(DEMO_MODEL).load(None)


def test_ends_of_tokens_and_what_comes_before_a_text(demo: Model) -> None:
    text = "Nine cafés, naïve."
    ids, ends = demo.tokenizer.encode_with_ends(text)
    assert ids == demo.tokenizer.encode(text, special=False)
    assert [demo.tokenizer.decode(ids[: i + 1]) for i in range(2)] == [text[:end] for end in ends[:2]]
    assert (ends[-1], sorted(ends)) == (len(text), ends)
    with pytest.raises(UsageError, match="text is a int"):
        demo.tokenizer.encode_with_ends(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="surrogate"):
        demo.tokenizer.encode_with_ends("\ud800")
    assert demo.tokenizer.prefix() is None
