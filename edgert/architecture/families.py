"""What each family has that Llama has not: a line of `FAMILIES` each. `edgert.architecture.layers` says what it means.

From the configuration and model classes of Hugging Face transformers 5.5
(https://github.com/huggingface/transformers/tree/main/src/transformers/models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """How a family's layers differ from Llama's.

    Attributes:
        norms: norms of the stream in each half of a layer.
        norm_bias: its norms have biases.
        qk_norm: queries and keys are scaled with a weight for each channel of a `head`, or of `all` heads.
        bias: which products have biases: none, those of queries, keys and values, or all.
        attention_bias: default of the field of that name, where that is what tells.
        output_bias: with `attention_bias`, the product after the attention has one too.
        gated: its FFN has a gate.
        parallel: attention and FFN are beside each other and read the same stream; `shared_norm` where one norm serves
            both.
        latent: keys and values come from a narrow latent (MLA).
        query_gate: its queries bring a gate of the attention's output along.
        sinks: each head has a sink.
        gated_norm: its Mamba has a norm before the product that leads back.
        both: attention and Mamba beside each other in every layer.
        tied: default of `tie_word_embeddings`.
        every: one layer in so many attends to all tokens, the last of each group; the others are of the kind named.
        encoder: hidden states and no logits; keeps nothing.
        corrected: its router adds a number an expert that is no parameter.
        router_bias: its router has biases.
        expert_bias: its experts have biases.
        shared_gate: how much of the shared expert is used is computed too.
        experts_gated: its experts have a gate.
        defaults: of fields that configurations leave out, as transformers' classes have them.
        names: fields under which it has what others call otherwise.
    """

    norms: int = 1
    norm_bias: bool = False
    qk_norm: Literal["", "head", "all"] = ""
    bias: Literal["", "qkv", "all"] = ""
    attention_bias: bool = False
    output_bias: bool = True
    gated: bool = True
    parallel: bool = False
    shared_norm: bool = False
    latent: bool = False
    query_gate: bool = False
    sinks: bool = False
    gated_norm: bool = True
    both: bool = False
    tied: bool = False
    every: tuple[int, str] | None = None
    encoder: bool = False
    corrected: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    experts_gated: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


LLAMA = Family()
_QWEN3 = Family(qk_norm="head")
_HYBRID_QWEN = Family(qk_norm="head", query_gate=True, shared_gate=True, every=(4, "linear_attention"))
_DEEPSEEK = Family(latent=True, corrected=True)
_GPT = Family(norm_bias=True, bias="all", gated=False)
_BERT = Family(norm_bias=True, bias="all", gated=False, encoder=True)
_ERNIE = {
    "first_k_dense_replace": "moe_layer_start_index",
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_k",
    "n_shared_experts": "moe_num_shared_experts",
}

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "llama4_text": Family(every=(4, "chunked_attention")),
    "mistral": LLAMA,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "mistral4": Family(latent=True),
    "mixtral": LLAMA,
    "qwen2": Family(bias="qkv"),
    "qwen2_5_vl_text": Family(bias="qkv"),
    "qwen2_vl_text": Family(bias="qkv"),
    "qwen2_moe": Family(bias="qkv", shared_gate=True),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "qwen3_5_text": _HYBRID_QWEN,
    "qwen3_5_moe_text": _HYBRID_QWEN,
    "qwen3_next": _HYBRID_QWEN,
    "phi3": LLAMA,
    "phimoe": Family(norm_bias=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=2, tied=True, every=(2, "sliding_attention")),
    "gemma3_text": Family(
        norms=2, qk_norm="head", tied=True, every=(6, "sliding_attention"),
        defaults={
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
            "max_position_embeddings": 131_072, "sliding_window": 4096,
        },
    ),
    "gemma4_text": Family(norms=2, qk_norm="head", tied=True, every=(6, "sliding_attention")),
    "deepseek_v2": Family(latent=True),
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "gpt_oss": Family(
        attention_bias=True, sinks=True, router_bias=True, expert_bias=True, every=(2, "sliding_attention"),
    ),
    "nemotron_h": Family(gated=False, experts_gated=False, corrected=True),
    "granite": LLAMA,
    "granitemoe": LLAMA,
    "granitemoehybrid": Family(
        every=(1, "mamba"), defaults={"num_local_experts": 8, "mamba_n_groups": 1, "mamba_d_head": "auto"},
    ),
    "lfm2": Family(qk_norm="head", tied=True, every=(1, "conv")),
    "lfm2_moe": Family(
        qk_norm="head", tied=True, corrected=True, every=(1, "conv"),
        names={"first_k_dense_replace": "num_dense_layers"},
    ),
    "smollm3": Family(tied=True),
    "gpt2": replace(_GPT, tied=True),
    "gpt_neox": replace(_GPT, parallel=True),
    "starcoder2": replace(_GPT, tied=True),
    "cohere2": Family(parallel=True, shared_norm=True, tied=True, every=(4, "sliding_attention")),
    "olmo2": Family(qk_norm="all"),
    "olmo3": Family(qk_norm="all", every=(4, "sliding_attention")),
    "olmoe": Family(qk_norm="all"),
    "glm4": Family(norms=2, attention_bias=True, output_bias=False),
    "glm4_moe": Family(attention_bias=True, output_bias=False, corrected=True),
    "exaone4": Family(qk_norm="head", every=(4, "sliding_attention")),
    "minimax_m2": Family(qk_norm="all", corrected=True),
    "falcon_h1": Family(both=True, gated_norm=False),
    "bamba": Family(every=(1, "mamba")),
    "ernie4_5": Family(tied=True),
    "ernie4_5_moe": Family(tied=True, router_bias=True, names=_ERNIE),
    "hunyuan_v1_dense": _QWEN3,
    "seed_oss": Family(attention_bias=True, output_bias=False),
    "arcee": Family(gated=False),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "modernbert": Family(encoder=True, every=(3, "sliding_attention")),
}  # fmt: skip
