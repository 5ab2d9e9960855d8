"""Shapes by the configuration alone, for every family: against transformers' classes and what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import tiny_multimodal
import torch
import transformers
from edgert.converters.compress import compress, to_fp16
from tiny_models import TABLE, exported, tiny, tiny_config

from edgert.architecture import from_config
from edgert.architecture.families import FAMILIES
from edgert.errors import UsageError
from edgert.graph import BlockGraph, BlockKind
from edgert.partition import annotate

# Those whose layers are made of other parts, for which no shape is reckoned.
NOT_RECKONED = {"mamba2", "falcon_mamba", "jamba", "zamba2", "olmo_hybrid"}
KNOWN = [family for family in TABLE if family not in NOT_RECKONED]
TOWERS_APPROXIMATE = {"gemma4", "phi4_multimodal"}  # audio encoders of their own
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14, "image_size": 896,
}  # fmt: skip
# name -> (parameters, where that is published, config.json). Written down from memory of these pages, not copied.
PUBLISHED: dict[str, tuple[float, str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (30.5e9, "https://huggingface.co/Qwen/Qwen3-30B-A3B", {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936, "tie_word_embeddings": False,
    }),
    "Gemma 3 4B, with its tower": (4.3e9, "https://huggingface.co/google/gemma-3-4b-it", {
        "model_type": "gemma3", "vision_config": SIGLIP_SO400M,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    }),
    "Mistral Small 3.1 24B, with its tower": (24.0e9, "https://mistral.ai/news/mistral-small-3-1", {
        "model_type": "mistral3", "spatial_merge_size": 2,
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "head_dim": 64, "patch_size": 14, "image_size": 1540,
        },
    }),
    "Qwen3-VL-8B, with its tower": (8.77e9, "https://huggingface.co/Qwen/Qwen3-VL-8B-Instruct", {
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 4096,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24], "in_channels": 3,
        },
    }),
    "Llama 4 Scout": (109e9, "https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E-Instruct", {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "num_hidden_layers": 48,
            "intermediate_size_mlp": 16384, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "vocab_size": 202048,
            "attention_chunk_size": 8192,
        },
        "vision_config": {
            "model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632,
            "num_hidden_layers": 34, "num_attention_heads": 16, "patch_size": 14, "image_size": 336,
            "projector_input_dim": 4096, "projector_output_dim": 4096, "vision_output_dim": 4096,
        },
    }),
    "DeepSeek-V3": (671e9, "https://arxiv.org/abs/2412.19437", {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 129280,
    }),
    "gpt-oss-20b": (20.9e9, "https://arxiv.org/abs/2508.10925", {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
    }),
    "LFM2-1.2B": (1.17e9, "https://huggingface.co/LiquidAI/LFM2-1.2B", {
        "model_type": "lfm2", "hidden_size": 2048, "intermediate_size": 12288, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 65536, "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    }),
    "LFM2-8B-A1B": (8.3e9, "https://huggingface.co/LiquidAI/LFM2-8B-A1B", {
        "model_type": "lfm2_moe", "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792,
        "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 65536,
        "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "conv_L_cache": 3,
        "layer_types": ["full_attention" if i in {2, 6, 10, 14, 18, 21} else "conv" for i in range(24)],
    }),
    "Qwen3-Next-80B-A3B": (80e9, "https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct", {
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    }),
    "ModernBERT-base": (149e6, "https://arxiv.org/abs/2412.13663", {
        "model_type": "modernbert", "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
        "num_attention_heads": 12, "vocab_size": 50368, "global_attn_every_n_layers": 3, "local_attention": 128,
    }),
    "BGE-M3": (568e6, "https://huggingface.co/BAAI/bge-m3", {
        "model_type": "xlm-roberta", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 250002, "max_position_embeddings": 8194, "type_vocab_size": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", KNOWN)
def test_parameters(family: str) -> None:
    with torch.device("meta"):
        source = tiny(family)
    shape = from_config(tiny_config(family).to_dict(), weights="fp16")
    unused = sum(p.numel() for name, p in source.named_parameters() if name.startswith("pooler"))
    assert shape.parameters == source.num_parameters() - unused
    assert not any("not known" in note for note in shape.notes)


@pytest.mark.parametrize("family", sorted(NOT_RECKONED & set(TABLE)))
def test_families_that_are_not_reckoned_say_so(family: str) -> None:
    assert any("taken for one like Llama" in note for note in from_config(tiny_config(family).to_dict()).notes)


@pytest.mark.parametrize("family", tiny_multimodal.TABLE)
def test_towers(family: str) -> None:
    whole = tiny_multimodal.build(family)
    shape = from_config(whole.config.to_dict(), weights="int4")
    if family in TOWERS_APPROXIMATE:
        assert any("audio tower" in note for note in shape.notes)
        return
    assert shape.parameters + shape.tower_parameters == whole.num_parameters()
    assert [block.kind for block in shape.graph.towers] == [BlockKind.TOWER] * len(shape.graph.towers) != []
    elements = sum(block.weight_bytes["u8"] for block in shape.graph.towers)  # with a zero point for each row
    assert shape.tower_parameters * 0.8 < elements < shape.tower_parameters * 1.1
    assert BlockGraph.from_json(shape.graph.to_json()) == shape.graph


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": 3}, "vision_config is '3', expected an object"),
        ({"vision_config": {"hidden_size": -4}}, "hidden_size is -4"),
        ({"vision_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers is 1000000"),
        ({"audio_config": {"encoder_layers": 0}}, "encoder_layers is 0"),
        ({"model_type": "lfm2", "block_ffn_dim_multiplier": -1.0}, "expected a number above 0"),
        ({"model_type": "exaone4", "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ],
)
def test_hostile_fields(config: dict[str, Any], message: str) -> None:
    text = {**tiny_config("llama").to_dict(), **config}
    with pytest.raises(UsageError, match=message):
        from_config(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    parameters, source, config = PUBLISHED[name]
    shape = from_config(config)
    assert shape.parameters + shape.tower_parameters == pytest.approx(parameters, rel=0.01), source
    assert shape.graph.blocks[0].kind is BlockKind.EMBED


@pytest.mark.parametrize("family", ["bert", "lfm2", "gemma4_e2b"])
def test_shapes_are_those_of_compiled_models(family: str, tmp_path: Path) -> None:
    """`make models` compares all families so, at three precisions."""
    source, model = exported(family)
    to_fp16(model)
    ov.save_model(compress(model, "int4"), tmp_path / "model.xml", compress_to_fp16=False)
    compiled = annotate(ov.Core().read_model(tmp_path / "model.xml"))
    shape = from_config(source.config.to_dict())
    names = ("kind", "name", "kv_bytes_per_token", "recurrent_bytes", "flops_per_token", "score_flops")
    for found, expected in zip(shape.graph.blocks, compiled.blocks, strict=True):
        assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
        packed = [{k: v for k, v in b.weight_bytes.items() if k != "f32"} for b in (found, expected)]
        assert packed[0] == packed[1]
        assert 0 <= expected.weight_bytes.get("f32", 0) - found.weight_bytes.get("f32", 0) <= 80  # a norm's formula


def test_every_line_is_a_family_of_transformers() -> None:
    assert set(FAMILIES) <= set(transformers.CONFIG_MAPPING)
