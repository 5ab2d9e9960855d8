"""The gate lets right models pass and stops wrong ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import psutil
import pytest
from edgert.converters import compile as compile_model
from edgert.converters import pretrained, quality
from tiny_models import VOCAB_SIZE, exported, tiny

from edgert.errors import ParityError


def check(model: ov.Model, source: object) -> quality.Row:
    return quality.check_decoder(
        quality.openvino_decoder(model),
        quality.torch_decoder(source),
        vocab_size=VOCAB_SIZE,
        window=None,
        against="source",
    )


def test_one_wrong_weight_is_refused() -> None:
    source, model = exported("qwen3")
    weight = next(n for n in model.get_ops() if n.get_type_name() == "MatMul").input_value(1).get_node()
    values = np.array(weight.data)
    values[0] *= 2
    for consumer in weight.output(0).get_target_inputs():
        consumer.replace_source_output(ov.opset13.constant(values).output(0))
    with pytest.raises(ParityError, match="relative error") as caught:
        check(model, source)
    assert caught.value.relative_error > caught.value.limit == quality.LIMIT


def test_a_forgotten_cache_is_refused() -> None:
    source, model = exported("qwen3")
    forgetful = quality.openvino_decoder(model)

    def without_past(ids: quality.Tokens) -> quality.Floats:
        return quality.openvino_decoder(model)(ids) if ids.shape[1] == 1 else forgetful(ids)

    with pytest.raises(ParityError):
        quality.check_decoder(
            without_past, quality.torch_decoder(source), vocab_size=VOCAB_SIZE, window=None, against="source"
        )


def test_step_by_step_notices_wrong_positions() -> None:
    _, model = exported("qwen3")
    right = quality.openvino_decoder(model)
    quality.check_states(lambda: quality.openvino_decoder(model), vocab_size=VOCAB_SIZE)

    def swapped(ids: quality.Tokens) -> quality.Floats:
        return right(ids)[:, ::-1] if ids.shape[1] > 1 else right(ids)

    with pytest.raises(ParityError):
        quality.check_states(lambda: swapped, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_number_is_refused(value: float) -> None:
    source, _ = exported("qwen3")
    broken = quality.torch_decoder(source)
    with pytest.raises(ParityError), np.errstate(invalid="ignore"):
        quality.check_decoder(
            lambda ids: broken(ids) + np.float32(value), quality.torch_decoder(source),
            vocab_size=VOCAB_SIZE, window=None, against="source",
        )  # fmt: skip


def test_other_shape_is_refused() -> None:
    source, _ = exported("qwen3")
    other = quality.torch_decoder(source)
    with pytest.raises(ParityError, match="shape"):
        quality.check_decoder(
            lambda ids: other(ids)[..., 1:], quality.torch_decoder(source),
            vocab_size=VOCAB_SIZE, window=None, against="source",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 512, "max_position_embeddings": 4096}, 512),
        ({"sliding_window": 4096, "max_position_embeddings": 4096}, None),  # never reached
        ({"sliding_window": 512, "layer_types": ["full_attention"]}, None),
        ({"text_config": {"sliding_window": 512, "layer_types": ["sliding_attention"]}}, 512),
        ({"llm_config": {"sliding_window": 512}}, 512),
        ({"attention_chunk_size": 8192, "layer_types": ["chunked_attention", "full_attention"]}, 8192),
        ({"attention_chunk_size": 8192, "layer_types": ["full_attention"]}, None),
    ],
)
def test_attention_window(config: dict[str, object], window: int | None) -> None:
    assert quality.attention_window(config) == window


def test_tokens_of_a_text() -> None:
    """They are repeated as often as needed, and the report says what was compared."""
    seen: list[int] = []

    def decoder(ids: quality.Tokens) -> quality.Floats:
        seen.extend(ids[0].tolist())
        return np.ones((1, ids.shape[1], 4), np.float32)

    row = quality.check_decoder(decoder, decoder, vocab_size=4, window=None, against="itself", text=[3, 1, 2])
    assert row["check"].startswith("logits of tokens of a text: a prefill of 16, 8 decode steps, then 7 + 1 + 5 tokens")
    assert seen[:7] == [3, 1, 2, 3, 1, 2, 3]


def test_long_prompt_goes_in_chunks() -> None:
    sizes: list[int] = []

    def decoder(ids: quality.Tokens) -> quality.Floats:
        sizes.append(ids.shape[1])
        return np.ones((1, ids.shape[1], 4), np.float32)

    quality.check_decoder(decoder, decoder, vocab_size=4, window=600, against="itself")
    assert sizes[: len(sizes) // 2] == [256, 256, 96, *[1] * quality.STEPS, *quality.MORE]


def test_wrong_export_leaves_no_bundle(decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, other = exported("qwen3")
    weight = next(n for n in other.get_ops() if n.get_type_name() == "MatMul").input_value(1).get_node()
    for consumer in weight.output(0).get_target_inputs():
        consumer.replace_source_output(ov.opset13.constant(np.array(weight.data) * 2).output(0))
    monkeypatch.setattr(pretrained, "export_decoder", lambda model: other)
    with pytest.raises(ParityError):
        compile_model(decoder_folder, tmp_path / "out.edge")
    assert list(tmp_path.iterdir()) == []


def test_large_model_is_checked_on_its_first_layers(decoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    monkeypatch.setattr(pretrained, "_few_layers", lambda config: 1)
    exports: list[int] = []

    def export(model: object) -> ov.Model:
        exports.append(model.config.num_hidden_layers)  # type: ignore[attr-defined]
        return pretrained_export(model) if len(exports) == 1 else exported("qwen3")[1]

    pretrained_export = pretrained.export_decoder
    monkeypatch.setattr(pretrained, "export_decoder", export)
    with pretrained.quiet():
        _, _, rows = pretrained.convert(decoder_folder, "general", lambda stage: None)
    assert exports == [1, 2]
    assert [row["check"].endswith("on a copy cut to its first 1 layers") for row in rows] == [True]


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("gemma3", 2), ("deepseek_v3", 2)])
def test_cut_copy_has_every_kind_of_layer(family: str, layers: int) -> None:
    assert pretrained._few_layers(tiny(family).config) == layers
