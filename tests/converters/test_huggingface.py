"""Every family takes the general route, computes what transformers computes, and is fused on the CPU."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from edgert.converters import quality
from edgert.converters.canonical import DECODER_INPUTS
from edgert.converters.huggingface import export_decoder
from tiny_models import DECODERS, SLIDING_WINDOW, VOCAB_SIZE, exported

from edgert.errors import ConversionError


def kind(node: ov.Node) -> str:
    return str(node.get_rt_info()["layerType"].astype(str))


@pytest.mark.parametrize("family", DECODERS)
def test_decoder(family: str) -> None:
    source, model = exported(family)
    assert {port.any_name for port in model.inputs} == set(DECODER_INPUTS)
    layers = source.config.num_hidden_layers
    assert len(model.get_sinks()) == 2 * layers
    compiled = ov.Core().compile_model(model, "CPU", quality.EXACT)
    attentions = [n for n in compiled.get_runtime_model().get_ops() if kind(n) == "ScaledDotProductAttention"]
    assert len(attentions) == layers
    for node in attentions:  # the cache is read by the operation itself: the fused kernel
        assert [kind(port.get_source_output().get_node()) for port in node.inputs()].count("MemoryInput") == 2
    row = quality.check_decoder(
        quality.openvino_decoder(model),
        quality.torch_decoder(source),
        vocab_size=VOCAB_SIZE,
        window=SLIDING_WINDOW,
        against=quality.transformers_name(),
    )
    assert row["relative_error"] < 1e-4


def test_encoder() -> None:
    source, model = exported("bert")
    assert {port.any_name for port in model.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    both = quality.openvino_encoder(model), quality.torch_encoder(source)
    row = quality.check_encoder(*both, vocab_size=VOCAB_SIZE, against="transformers")
    assert row["relative_error"] < 1e-4


def test_batch_and_beams() -> None:
    """Two sequences at once, which change places between two steps."""
    source, model = exported("llama")
    request = ov.Core().compile_model(model, "CPU", quality.EXACT).create_infer_request()
    ids = torch.randint(3, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(0))
    first = quality.decoder_inputs(ids[:, :5].numpy(), 0)
    batch = {
        "attention_mask": first["attention_mask"].repeat(2, 0),
        "position_ids": first["position_ids"].repeat(2, 0),
    }
    request.infer({**first, **batch, "beam_idx": np.array([0, 1], np.int32)})
    last = quality.decoder_inputs(ids[[1, 0], 5:].numpy(), 5)
    batch = {"attention_mask": last["attention_mask"].repeat(2, 0), "position_ids": last["position_ids"].repeat(2, 0)}
    found = request.infer({**last, **batch, "beam_idx": np.array([1, 0], np.int32)})["logits"]
    with torch.no_grad():
        expected = source(ids[[1, 0]]).logits[:, -1:].numpy()
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()


def test_untraceable_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = exported("llama")
    real = type(source).forward

    def odd(self: object, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_exporting():
            raise ValueError("odd model")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(source), "forward", odd)
    with pytest.raises(ConversionError, match=r"llama: torch.export failed: ValueError: odd model"):
        export_decoder(source)
