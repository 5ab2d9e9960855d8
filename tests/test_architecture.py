"""Shapes of models from their config.json: against compiled models, transformers' own classes and published sizes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch
import transformers
from conftest import DEMO_MODEL
from edgert.converters.compress import compress, to_fp16
from tiny_models import DECODERS, SLIDING_WINDOW, exported
from transformers import PreTrainedModel

from edgert import catalogue
from edgert.architecture import ModelShape, from_config, read
from edgert.bundle import Bundle
from edgert.catalogue import CatalogueModel
from edgert.device import DeviceConfig
from edgert.errors import PlanError, UsageError
from edgert.graph import Block, BlockGraph, BlockKind
from edgert.partition import annotate
from edgert.placement import Plan

ENTRIES = {entry.name: entry for entry in catalogue.models()}
# Configuration classes of transformers by model_type, and one entry of the catalogue for each.
CLASSES = {
    "qwen3": ("Qwen3", "Qwen3 0.6B"),
    "qwen3_moe": ("Qwen3Moe", "Qwen3 30B-A3B"),
    "qwen3_5_text": ("Qwen3_5Text", "Qwen3.5 0.8B"),
    "ministral3": ("Ministral3", "Ministral 3 3B"),
    "mistral": ("Mistral", "Mistral Nemo 12B"),
    "mistral4": ("Mistral4", "Mistral Small 4 119B-A6.5B"),
    "phi3": ("Phi3", "Phi-4-mini"),
    "gemma3_text": ("Gemma3Text", "Gemma 3 1B"),
    "gemma4_text": ("Gemma4Text", "Gemma 4 26B-A4B"),
    "gemma4_text, per-layer embeddings": ("Gemma4Text", "Gemma 4 E2B"),
    "llama": ("Llama", "Llama 3.2 1B"),
    "llama4_text": ("Llama4Text", "Llama 4 Scout 109B-A17B"),
    "qwen2": ("Qwen2", "DeepSeek-R1-Distill-Qwen 1.5B"),
    "nemotron_h": ("NemotronH", "Nemotron 3 Nano 30B-A3B"),
    "gpt_oss": ("GptOss", "gpt-oss 20B"),
}
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128,
}  # fmt: skip


def sizes(block: Block) -> tuple[Any, ...]:
    return block.kind, block.name, block.kv_bytes_per_token, block.recurrent_bytes


@pytest.mark.parametrize(
    ("family", "weights"),
    [(family, "int4") for family in DECODERS]
    + [(family, weights) for family in ("gpt2", "gpt_oss", "qwen3_moe") for weights in ("int8", "fp16")],
)
def test_shapes_are_those_of_compiled_models(family: str, weights: Any, tmp_path: Path) -> None:
    source, model = exported(family)
    to_fp16(model)
    if weights != "fp16":
        model = compress(model, weights)
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    compiled = annotate(ov.Core().read_model(tmp_path / "model.xml"))
    shape = from_config(source.config.to_dict(), weights=weights)
    assert shape.parameters == source.num_parameters()
    assert (shape.vocab_size, shape.hidden_size) == (256, 64)
    assert [sizes(b) for b in shape.graph.blocks] == [sizes(b) for b in compiled.blocks]
    for found, expected in zip(shape.graph.blocks, compiled.blocks, strict=True):
        # What is not there: numbers of a norm's formula, a few bytes each.
        assert 0 <= expected.total_weight_bytes - found.total_weight_bytes <= 80
        assert {k: v for k, v in found.weight_bytes.items() if k in {"u4", "u8", "f16"}} == {
            k: v for k, v in expected.weight_bytes.items() if k in {"u4", "u8", "f16"}
        }
        assert found.flops_per_token == expected.flops_per_token
        assert found.score_flops == expected.score_flops
    assert [e.bytes_per_token for e in shape.graph.edges] == [e.bytes_per_token for e in compiled.edges]


def test_the_demo_model(demo_path: Path) -> None:
    bundle = Bundle.open(demo_path)
    assert bundle.graph is not None
    shape = read(DEMO_MODEL, weights="fp16")
    assert shape == read(DEMO_MODEL / "config.json", weights="fp16")
    assert shape.name == "bookworm"
    assert shape.context_length == bundle.facts.context_length
    assert shape.parameters == shape.active_parameters == pytest.approx(bundle.facts.parameters, rel=1e-4)
    for found, expected in zip(shape.graph.blocks, bundle.graph.blocks, strict=True):
        assert sizes(found) == sizes(expected)
        assert found.flops_per_token == expected.flops_per_token
        assert found.score_flops == expected.score_flops
        assert found.total_weight_bytes == pytest.approx(expected.total_weight_bytes, rel=0.01)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_catalogue_has_published_sizes(entry: CatalogueModel) -> None:
    shape = entry.shape()
    if entry.parameters is not None:
        assert shape.parameters == pytest.approx(entry.parameters, rel=0.03)
    if entry.active_parameters is not None:
        # Some publish them with the table of embeddings, some without.
        table = shape.vocab_size * shape.hidden_size
        assert any(
            active == pytest.approx(entry.active_parameters, rel=0.03)
            for active in (shape.active_parameters, shape.active_parameters - table)
        )
    assert (entry.active_parameters is None) == (shape.active_parameters == shape.parameters)
    graph = shape.graph
    assert BlockGraph.from_json(json.loads(json.dumps(graph.to_json()))) == graph
    Plan.single(graph, DeviceConfig.parse("CPU@f32+dq")).check(graph)
    recurrent = any(block.recurrent_bytes for block in graph.blocks)
    Plan.single(graph, DeviceConfig.parse("GPU@f16+static")).check(graph)
    with pytest.raises(PlanError, match="recurrent state") if recurrent else nullcontext():
        Plan.single(graph, DeviceConfig.parse("NPU@f16")).check(graph)
    assert "https://" in entry.source
    assert entry.published


def test_sizes_that_were_published_are_rarely_missing() -> None:
    assert [e.name for e in ENTRIES.values() if e.parameters is None] == ["Qwen3.5 0.8B", "Qwen3.5 2B", "Qwen3.5 4B"]


def in_transformers(kind: str, config: dict[str, Any]) -> PreTrainedModel:
    """The text model of transformers with this configuration, without memory for its weights."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    if kind == "Gemma4Text":
        every = fields.pop("sliding_window_pattern")
        kinds = ["sliding_attention"] * (every - 1) + ["full_attention"]
        fields["layer_types"] = [kinds[i % every] for i in range(fields["num_hidden_layers"])]
        fields.setdefault("hidden_size_per_layer_input", 0)
    settings = getattr(transformers, f"{kind}Config")(**fields)
    name = "Mistral4ForCausalLM" if kind == "Mistral4" else None
    with torch.device("meta"):
        if name is None:
            return transformers.AutoModelForCausalLM.from_config(settings)
        from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

        return Mistral4ForCausalLM(settings)


@pytest.mark.parametrize("family", CLASSES)
def test_parameters_are_those_of_transformers(family: str) -> None:
    kind, name = CLASSES[family]
    entry = ENTRIES[name]
    assert entry.shape().parameters == sum(p.numel() for p in in_transformers(kind, entry.config).parameters())


def test_every_family_of_the_catalogue_is_tested_so() -> None:
    assert {entry.config["model_type"] for entry in ENTRIES.values()} <= set(CLASSES)


def blocks(name: str, kind: BlockKind) -> list[Block]:
    return [block for block in ENTRIES[name].shape().graph.blocks if block.kind is kind]


def test_windows() -> None:
    windows = [block.window for block in blocks("Gemma 3 4B", BlockKind.ATTENTION)]
    assert windows[:6] == [1024] * 5 + [None]
    assert windows.count(None) == 5
    assert [b.window for b in blocks("gpt-oss 20B", BlockKind.ATTENTION)] == [128, None] * 12
    assert [b.window for b in blocks("Llama 4 Scout 109B-A17B", BlockKind.ATTENTION)[:4]] == [8192] * 3 + [None]
    assert {b.window for b in blocks("Qwen3 8B", BlockKind.ATTENTION)} == {None}
    mistral = from_config({**LLAMA, "model_type": "mistral", "sliding_window": SLIDING_WINDOW})
    assert mistral.graph.blocks[1].window == SLIDING_WINDOW
    unused = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1, "use_sliding_window": False}
    assert [b.window for b in from_config(unused).graph.blocks[1::2]] == [None, None, None]
    used = from_config({**unused, "use_sliding_window": True})
    assert [used.graph.blocks[i].window for i in (1, 3)] == [None, 8]


def test_layers_that_share_keys_and_values() -> None:
    attentions = blocks("Gemma 4 E2B", BlockKind.ATTENTION)
    assert [bool(b.states) for b in attentions] == [True] * 15 + [False] * 20
    assert [b.kv_bytes_per_token for b in attentions] == ([2 * 256 * 4] * 4 + [2 * 512 * 4]) * 3 + [0] * 20
    assert all(b.score_flops == 4 * 8 * (256 if b.window else 512) for b in attentions)


def test_recurrent_layers() -> None:
    delta = blocks("Qwen3.5 9B", BlockKind.SSM)
    assert len(delta) == 24
    assert {b.recurrent_bytes for b in delta} == {4 * (32 * 128 * 128 + (2 * 16 + 32) * 128 * 4)}
    assert {b.kv_bytes_per_token for b in delta} == {0}
    assert len(blocks("Qwen3.5 9B", BlockKind.ATTENTION)) == 8
    names = [str(b.kind) for b in ENTRIES["Nemotron 3 Nano 30B-A3B"].shape().graph.blocks]
    assert names[:7] == ["embed", "ssm", "moe", "ssm", "moe", "ssm", "attention"]
    assert len(names) == 54
    assert {b.recurrent_bytes for b in blocks("Nemotron 3 Nano 30B-A3B", BlockKind.SSM)} == {
        4 * (64 * 64 * 128 + (64 * 64 + 2 * 8 * 128) * 4)
    }


def test_latent_attention() -> None:
    """The cache holds keys and values in full; scores have two widths."""
    (block, *_) = blocks("Mistral Small 4 119B-A6.5B", BlockKind.ATTENTION)
    assert block.kv_bytes_per_token == 4 * 32 * (128 + 128)
    assert block.score_flops == 2 * 32 * (128 + 128)


def test_experts_of_one_token() -> None:
    (block, *_) = blocks("Qwen3 30B-A3B", BlockKind.MOE)
    assert block.flops_per_token == 2 * (128 * 2048 + 8 * 3 * 768 * 2048)
    elements = 128 * 3 * 768 * 2048  # and one group in 128 has a zero point of 4 bits
    assert block.weight_bytes["u4"] == (elements + elements // 128) // 2
    assert block.weight_bytes["f16"] == 2 * (elements // 128 + 128 * 2048)  # scales, and the router


def test_groups_that_do_not_divide() -> None:
    """As NNCF: the largest power of two that does, or INT8."""

    def kinds(width: int, group_size: int = 128) -> set[str]:
        shape = from_config({**LLAMA, "intermediate_size": width}, group_size=group_size)
        return set(shape.graph.blocks[2].weight_bytes)

    assert kinds(512) == {"u4", "f16", "f32"}
    assert kinds(500) == {"u4", "u8", "f16", "f32"}  # the product that leads back is 500 wide
    assert kinds(500, -1) == {"u4", "f16", "f32"}
    bytes_of = [
        from_config({**LLAMA, "intermediate_size": 96}, group_size=group).graph.blocks[2].weight_bytes["f16"]
        for group in (128, -1)
    ]
    assert bytes_of == [2 * (2 * 96 * 2 + 256 * 3), 2 * (2 * 96 + 256)]


def test_multimodal_configurations_and_defaults() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    whole = {"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}}
    shape = from_config(whole)
    assert shape.parameters == ENTRIES["Gemma 3 4B"].shape().parameters
    assert shape.family == "gemma3_text"
    assert not shape.tower_parameters
    tied = from_config({"tie_word_embeddings": True, "text_config": LLAMA})
    assert tied.parameters == from_config(LLAMA).parameters - 1000 * 256
    assert from_config({**LLAMA, "model_type": "smollm3"}).parameters == tied.parameters  # its class's default


def test_a_family_that_is_not_known() -> None:
    shape = from_config({**LLAMA, "model_type": "newcomer"})
    assert shape.graph == from_config(LLAMA).graph
    assert any("'newcomer' is not known" in note for note in shape.notes)
    assert not from_config(LLAMA).notes


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_fields_that_must_be_there(field: str) -> None:
    with pytest.raises(UsageError, match=f"no field '{field}'"):
        from_config({key: value for key, value in LLAMA.items() if key != field})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -1}, "hidden_size is -1, expected 1 to"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 256.0}, "hidden_size is '256.0', expected an integer"),
        ({"hidden_size": True}, "expected an integer"),
        ({"hidden_size": "256"}, "expected an integer"),
        ({"vocab_size": 10**5000}, "more than 10\\^18"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected 1 to 2048"),
        ({"num_attention_heads": 5}, "no multiple of 2 key heads"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 items for 2 layers"),
        ({"layer_types": 3}, "layer_types is '3', expected a list"),
        ({"tie_word_embeddings": "yes"}, "expected true or false"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected 1 to 8"),
        ({"num_experts": 10**6}, "num_experts is 1000000, expected 0 to 4096"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"num_hidden_layers": 2048, "hidden_size": 2**20, "intermediate_size": 2**20}, "parameters, the most is"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX", "num_hidden_layers": 2}, "no field 'mamba"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "X"}, "layer 0 is 'X', expected M"),
        ({"model_type": "nemotron_h", "layers_block_type": [["M"]]}, "layer 0 is"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M" * 3000}, "number of layers is 3000"),
        ({"model_type": "nemotron_h"}, "no field 'hybrid_override_pattern'"),
    ],
)
def test_hostile_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_config({**LLAMA, **changes})


@pytest.mark.parametrize("text", ["[]", "{", "null", '"llama"', "[" * 100_000])
def test_files_that_are_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="model configuration"):
        read(tmp_path)


def test_arguments() -> None:
    with pytest.raises(UsageError, match="weights is 'int2'"):
        from_config(LLAMA, weights="int2")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group_size is 0"):
        from_config(LLAMA, group_size=0)
    with pytest.raises(UsageError, match="'none such' is not in the catalogue"):
        catalogue.find(["none such"])
    assert [m.name for m in catalogue.find(["QWEN3 0", "gpt-oss"])] == ["Qwen3 0.6B", "gpt-oss 20B"]
    assert len({m.name for m in catalogue.models()}) == len(catalogue.find([])) == len(ENTRIES)


def test_less_precise_is_smaller() -> None:
    def total(shape: ModelShape) -> int:
        return sum(block.total_weight_bytes for block in shape.graph.blocks)

    for entry in ENTRIES.values():
        int4, int8, fp16 = (total(entry.shape(weights)) for weights in ("int4", "int8", "fp16"))
        assert int4 < int8 < fp16
