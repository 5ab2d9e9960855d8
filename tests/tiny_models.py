"""Tiny models with random weights, one a family: what the general route, the partition and the executor are tested on.

Sizes are the smallest that still have every part of the family: grouped queries, sliding windows, experts, latent
attention, recurrences, each kind of layer. `initializer_range` is five times the usual one, so that logits differ
clearly from token to token. A new family is a line of `TABLE`; `make models` (benchmarks/models.py) runs all of them,
tests those of `FAMILIES`.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import openvino as ov
import torch
import transformers
from edgert.converters.huggingface import export_decoder, export_encoder
from filelock import FileLock
from transformers import PreTrainedConfig, PreTrainedModel

SHARED = "EDGERT_TEST_EXPORTS"  # names the folder in which the processes of a test run share what they exported
SLIDING_WINDOW = 8
VOCAB_SIZE = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE_HEADS = {"head_dim": 32}
_MULTI_HEAD = {"num_key_value_heads": 4}
_SLIDING = {"sliding_window": SLIDING_WINDOW}
_HALF_SLIDING = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_MULTI_HEAD, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip
_DELTA = {
    **_WIDE_HEADS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 8}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Short factors up to 16 tokens, long ones beyond; two thirds of the heads' width turn.
_LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_GEMMA4 = {**_WIDE_HEADS, **_SLIDING, "global_head_dim": 64, "hidden_size_per_layer_input": 0}


class Family(NamedTuple):
    """A line of the table.

    Attributes:
        kind: the configuration class in transformers, without `Config`.
        models: whose it is, for people.
        settings: what differs from `_COMMON`.
    """

    kind: str
    models: str
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed


TABLE: dict[str, Family] = {
    "llama": Family("Llama", "Llama 2, TinyLlama, DeepSeek-R1-Distill-Llama (with Llama 3's RoPE)"),
    "llama3": Family("Llama", "Llama 3.1, 3.2", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama4": Family(
        "Llama4Text",
        "Llama 4 Scout, Maverick",
        {
            **_WIDE_HEADS,
            **_LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "attention_chunk_size": SLIDING_WINDOW,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "floor_scale": 16,
        },
    ),
    "mistral": Family("Mistral", "Mistral 7B, Nemo, Small 3", _SLIDING),
    "ministral": Family("Ministral", "Ministral 8B", {**_WIDE_HEADS, **_HALF_SLIDING}),
    "ministral3": Family("Ministral3", "Ministral 3, Mistral Small 3.x", _WIDE_HEADS),
    "mistral4": Family(
        "Mistral4",
        "Mistral Small 4",
        {
            **_LATENT,
            "n_shared_experts": 1,
            "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen2": Family("Qwen2", "Qwen 2.5, DeepSeek-R1-Distill-Qwen"),
    "qwen3": Family("Qwen3", "Qwen3 0.6B to 32B", _WIDE_HEADS),
    "qwen3_moe": Family("Qwen3Moe", "Qwen3 30B-A3B", {**_WIDE_HEADS, **_EXPERTS}),
    "qwen3_5": Family("Qwen3_5Text", "Qwen 3.5 0.8B to 9B", _DELTA),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeText", "Qwen 3.5 35B-A3B", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 64}
    ),
    "qwen3_next": Family(
        "Qwen3Next", "Qwen3-Next 80B-A3B", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 64}
    ),
    "phi3": Family("Phi3", "Phi-3, Phi-4"),
    "phi4_mini": Family(
        "Phi3",
        "Phi-4-mini, Phi-3.5-mini",
        {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
    ),
    "phimoe": Family("Phimoe", "Phi-3.5-MoE, Phi-mini-MoE", {**_LOCAL_EXPERTS, "lm_head_bias": True}),
    "gemma2": Family("Gemma2", "Gemma 2", {**_WIDE_HEADS, "query_pre_attn_scalar": 32, **_HALF_SLIDING}),
    "gemma3": Family("Gemma3Text", "Gemma 3", {**_WIDE_HEADS, "query_pre_attn_scalar": 32, **_HALF_SLIDING}),
    "gemma4_e2b": Family(
        "Gemma4Text",
        "Gemma 4 E2B, E4B",
        {
            **_GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "num_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4_moe": Family(
        "Gemma4Text",
        "Gemma 4 26B-A4B",
        {
            **_GEMMA4,
            **_HALF_SLIDING,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4_dense": Family(
        "Gemma4Text",
        "Gemma 4 31B",
        {**_GEMMA4, **_HALF_SLIDING, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "deepseek_v3": Family(
        "DeepseekV3",
        "DeepSeek V3, R1",
        {**_LATENT, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "gpt_oss": Family("GptOss", "gpt-oss 20B, 120B", {**_WIDE_HEADS, **_LOCAL_EXPERTS, **_HALF_SLIDING}),
    "nemotron_h": Family(
        "NemotronH",
        "Nemotron 3 Nano, Nemotron-H",
        {
            "layers_block_type": ["mamba", "moe", "attention", "mamba"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        "Granite 4",
        {
            **_LOCAL_EXPERTS,
            **_MAMBA,
            "mamba_n_groups": 1,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
            "intermediate_size": 64,
            "position_embedding_type": "nope",
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "lfm2": Family("Lfm2", "LFM2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    "lfm2_moe": Family(
        "Lfm2Moe",
        "LFM2 8B-A1B",
        {**_EXPERTS, "num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "smollm3": Family("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt2": Family("GPT2", "GPT-2"),
    "gpt_neox": Family("GPTNeoX", "Pythia", _MULTI_HEAD),
    "cohere2": Family("Cohere2", "Command R7B", {"logit_scale": 1.0, **_HALF_SLIDING}),
    "olmo2": Family("Olmo2", "OLMo 2"),
    "mixtral": Family("Mixtral", "Mixtral", _LOCAL_EXPERTS),
    "glm4": Family("Glm4", "GLM-4", {"head_dim": 16}),
    "bert": Family("Bert", "BERT, BGE", {"type_vocab_size": 2}),
    "xlm_roberta": Family("XLMRoberta", "XLM-RoBERTa, multilingual E5, BGE-M3", {"type_vocab_size": 1}),
    "modernbert": Family(
        "ModernBert",
        "ModernBERT",
        {"local_attention": SLIDING_WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    # Beyond those that edgert is made for: what a family costs that is no more than a line here.
    "falcon_h1": Family("FalconH1", "Falcon-H1", {**_MAMBA, "mamba_d_ssm": 128, "mamba_n_groups": 2, "head_dim": 16}),
    "bamba": Family(
        "Bamba", "Bamba", {**_MAMBA, "mamba_n_groups": 2, "num_hidden_layers": 2, "attn_layer_indices": [1]}
    ),
    "mamba2": Family(
        "Mamba2",
        "Mamba 2, Codestral Mamba",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    ),
    "falcon_mamba": Family("FalconMamba", "Falcon Mamba"),
    "jamba": Family(
        "Jamba",
        "Jamba",
        {
            **_LOCAL_EXPERTS,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": Family(
        "Zamba2",
        "Zamba 2",
        {
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 8,
        },
    ),
    "olmo3": Family("Olmo3", "OLMo 3", _HALF_SLIDING),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe",
        "ERNIE 4.5 21B-A3B",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "granitemoe": Family(
        "GraniteMoe",
        "Granite 3.1 3B-A800M",
        {**_LOCAL_EXPERTS, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    ),
    "arcee": Family("Arcee", "AFM 4.5B"),
    "exaone4": Family("Exaone4", "EXAONE 4", _HALF_SLIDING),
    "minimax_m2": Family(
        "MiniMaxM2", "MiniMax M2", {**_WIDE_HEADS, **_LOCAL_EXPERTS, "intermediate_size": 64, "rotary_dim": 16}
    ),
}

ENCODERS: tuple[str, ...] = ("bert", "xlm_roberta", "modernbert")
# Those that tests go through, one of each kind; an export takes seconds.
FAMILIES: tuple[str, ...] = (
    "llama", "qwen3", "mistral", "ministral3", "gemma3", "phi3", "gpt2", "gpt_neox", "cohere2", "gpt_oss", "qwen3_moe",
    "deepseek_v3", "olmo2", "bert",
)  # fmt: skip
DECODERS: tuple[str, ...] = tuple(family for family in FAMILIES if family not in ENCODERS)


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of `tiny(family)`."""
    kind, _, special = TABLE[family]
    settings = {**_COMMON, **special}
    if family == "gpt2":  # the one family whose configuration has its own names
        settings |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            del settings[name]
        del settings["intermediate_size"], settings["max_position_embeddings"]
    if family == "nemotron_h":  # its number of layers is the length of their list
        del settings["num_hidden_layers"]
    config: PreTrainedConfig = getattr(transformers, f"{kind}Config")(**settings)
    return config


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `family` in f32 and eval mode: a causal language model, or the bare encoder."""
    config = tiny_config(family)
    torch.manual_seed(seed)
    model = _auto(family, config).eval()
    with torch.no_grad():  # biases begin at 0 and norms at 1, where a wrong export of them would not show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():  # what corrects the choice of experts
            if name.endswith("bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def _auto(family: str, config: PreTrainedConfig) -> PreTrainedModel:
    if family in ENCODERS:
        return transformers.AutoModel.from_config(config, dtype=torch.float32)
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module = type(config).__module__.replace("configuration", "modeling")  # the class is there, without an entry
    name = type(config).__name__.replace("Config", "ForCausalLM")
    model: PreTrainedModel = getattr(import_module(module), name)(config).float()
    return model


@cache
def _exported(family: str) -> tuple[PreTrainedModel, ov.Model]:
    model = tiny(family)
    convert = export_encoder if family in ENCODERS else export_decoder
    folder = os.environ.get(SHARED)
    if folder is None:
        return model, convert(model)
    path = Path(folder) / f"{family}.xml"
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return model, ov.Core().read_model(path)
        converted = convert(model)
        ov.save_model(converted, path, compress_to_fp16=False)
    return model, converted


def exported(family: str) -> tuple[PreTrainedModel, ov.Model]:
    """`tiny(family)` and a copy of its export, which is made once a run: do not change the first of the two."""
    model, converted = _exported(family)
    return model, converted.clone()
