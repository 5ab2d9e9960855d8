"""Tiny models with random weights, one a family: what the general route, the partition and the executor are tested on.

Sizes are the smallest that still have every part of the family: grouped queries, sliding windows, experts, latent
attention. `initializer_range` is five times the usual one, so that logits differ clearly from token to token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import openvino as ov
import torch
import transformers
from edgert.converters.huggingface import export_decoder, export_encoder
from transformers import PreTrainedModel

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
_MULTI_HEAD = {"num_key_value_heads": 4}
_HALF_SLIDING = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

# family -> (configuration class, what differs from _COMMON)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": SLIDING_WINDOW}),
    "ministral3": ("Ministral3Config", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, **_HALF_SLIDING}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", _MULTI_HEAD),
    "cohere2": ("Cohere2Config", {"logit_scale": 1.0, **_HALF_SLIDING}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, **_HALF_SLIDING}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "bert": ("BertConfig", {"type_vocab_size": 2}),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
DECODERS: tuple[str, ...] = tuple(family for family in FAMILIES if family != "bert")


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `family` in f32 and eval mode: a causal language model, or for `bert` the bare encoder."""
    kind, special = _CONFIGS[family]
    settings = {**_COMMON, **special}
    if family == "gpt2":  # the one family whose configuration has its own names
        settings |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            del settings[name]
        del settings["intermediate_size"], settings["max_position_embeddings"]
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(seed)
    auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases begin at 0 and norms at 1, where a wrong export of them would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def _exported(family: str) -> tuple[PreTrainedModel, ov.Model]:
    model = tiny(family)
    return model, (export_encoder if family == "bert" else export_decoder)(model)


def exported(family: str) -> tuple[PreTrainedModel, ov.Model]:
    """`tiny(family)` and a copy of its export, which is made once a session: do not change the first of the two."""
    model, converted = _exported(family)
    return model, converted.clone()
