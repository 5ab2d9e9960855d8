"""Bundles of every format behind the same API."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from worker_client import Inside, load_of

import edgert
from edgert.errors import ContextOverflowError, EmptyPromptError, PlanError, UsageError
from edgert.service.protocol import Cancel, Embed, Ready, Vectors


@pytest.fixture(scope="module")
def onnx_model(decoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> edgert.Model:
    out = tmp_path_factory.mktemp("onnx") / "tiny.edge"
    edgert.compile(decoder_folder, out, weights="fp16", format="onnx")
    return edgert.load(out)


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> edgert.Model:
    out = tmp_path_factory.mktemp("encoder") / "tiny.edge"
    edgert.compile(encoder_folder, out, weights="fp16")
    return edgert.load(out, device="CPU@f32")


def test_an_onnx_bundle_says_what_its_source_says(onnx_model: edgert.Model, decoder_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(decoder_folder, dtype=torch.float32).eval()
    tokens = onnx_model.tokenizer.encode("A bundle holds a model, and a model holds its weights.")
    with torch.no_grad():
        expected = source(torch.tensor([tokens])).logits[0].numpy()
    assert str(onnx_model.plan.placements[0].config) == "ORT@CPU"
    assert np.abs(onnx_model.score(tokens) - expected).max() <= 5e-3 * np.abs(expected).max()  # weights in f16


def test_an_onnx_bundle_has_the_same_session(onnx_model: edgert.Model) -> None:
    first = onnx_model.generate("The quick brown", max_tokens=8)
    again = onnx_model.generate("The quick brown", max_tokens=8)
    assert len(first.tokens) == 8 or first.finish_reason == "stop"
    assert again.tokens == first.tokens
    assert again.timings.reused_tokens == again.timings.prompt_tokens - 1
    assert first.timings.provenance == "measured"


def test_an_onnx_bundle_runs_only_whole_and_on_onnxruntime(onnx_model: edgert.Model) -> None:
    with pytest.raises(PlanError, match="ORT"):
        edgert.load(onnx_model.bundle.path, device="CPU")
    with pytest.raises(UsageError, match="no blocks"):
        edgert.load(onnx_model.bundle.path, place="ffn=ORT")


def test_embeddings_are_the_sources(encoder: edgert.Model, encoder_folder: Path) -> None:
    from transformers import AutoModel

    source = AutoModel.from_pretrained(encoder_folder, dtype=torch.float32).eval()
    texts = ["The quick brown fox", "a model"]
    found = encoder.embed(texts)
    assert encoder.facts.pooling in {"mean", "cls"}
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = source(torch.tensor([encoder.tokenizer.encode(text)])).last_hidden_state[0].numpy()
        expected = states[0] if encoder.facts.pooling == "cls" else states.mean(axis=0)
        assert np.abs(vector - expected / np.linalg.norm(expected)).max() < 5e-3
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_an_encoder_cut_into_blocks_embeds_the_same(encoder: edgert.Model) -> None:
    cut = edgert.load(encoder.bundle.path, place="attention=CPU@f32,ffn=SIM@f32")
    assert len(cut.plan.placements) > 2
    np.testing.assert_allclose(cut.embed(["a model"]), encoder.embed(["a model"]), atol=1e-5)


def test_what_an_encoder_refuses(encoder: edgert.Model) -> None:
    with pytest.raises(UsageError, match="expected 'decoder'"):
        encoder.generate("x")
    with pytest.raises(UsageError, match="sequence of strings"):
        encoder.embed("one string")
    with pytest.raises(EmptyPromptError):
        encoder.embed(["fine", ""])
    with pytest.raises(ContextOverflowError):
        encoder.embed(["model " * 5000])


@pytest.mark.parametrize("stage", ["load", "export", "write"])
def test_ctrl_c_leaves_nothing(decoder_folder: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(name: str) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edgert.compile(decoder_folder, tmp_path / "out.edge", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_says_something_else_when_cut_stays_whole(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgert.converters.quality.CUT_LIMIT", -1.0)
    bundle = edgert.compile(decoder_folder, tmp_path / "out.edge", weights="fp16")
    assert bundle.graph is not None
    assert len(bundle.graph.blocks) == 1
    assert "cut at every boundary: relative error" in str(bundle.graph.reason)
    assert edgert.load(bundle.path).generate("A bundle", max_tokens=2).tokens


def test_a_worker_embeds_the_same(encoder: edgert.Model) -> None:
    worker = Inside(load_of(encoder.bundle.path, device="CPU@f32"))
    ready = worker.wait_for(Ready)
    assert (ready.task, ready.context_length) == ("encoder", encoder.facts.context_length)
    texts = ["The quick brown fox", "a model"]
    worker.send(Embed(1, texts))
    worker.send(Embed(2, texts[:1]))
    worker.send(Embed(3, ["fine", ""]))
    worker.send(Embed(4, ["model " * 5000]))
    worker.send(Cancel(5))
    short, long = (worker.wait_for(Vectors) for _ in range(2))
    assert (short.id, long.id) == (2, 1)  # a text each in turn
    np.testing.assert_allclose(long.vectors, encoder.embed(texts), atol=1e-6)
    assert short.vectors == long.vectors[:1]
    assert long.prompt_tokens == sum(len(encoder.tokenizer.encode(text)) for text in texts)
    number = worker.start("x")
    worker.finish(number)
    while len(worker.refused) < 3:
        worker.read()
    kinds = {id: refused.kind for id, refused in worker.refused.items()}
    assert kinds == {3: "EmptyPromptError", 4: "ContextOverflowError", number: "UsageError"}
    assert worker.end() == 0


def test_a_worker_runs_an_onnx_bundle(onnx_model: edgert.Model) -> None:
    worker = Inside(load_of(onnx_model.bundle.path))
    assert worker.wait_for(Ready).plans[0].units == ["ORT"]
    prompts = ["The quick brown", "A bundle holds"]
    ids = [worker.start(prompt, sampling={"max_tokens": 6}) for prompt in prompts]
    assert worker.finish(*ids) == [onnx_model.generate(prompt, max_tokens=6).text for prompt in prompts]
    assert worker.end() == 0
