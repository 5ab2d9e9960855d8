"""Bundles with the shapes of well-known models and random weights, for what depends on sizes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgert
from edgert import native

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench"
CONTEXT = 16384  # the longest that a benchmark decodes at is 8192; the models themselves go further


def qwen3_bundle() -> Path:
    """Qwen3-0.6B's shape (https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _bundle(
        "qwen3-0.6b-16k", Qwen3Config, Qwen3ForCausalLM,
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rope_theta=1e6,
    )  # fmt: skip


def llama_bundle() -> Path:
    """Llama-3.2-1B's shape (https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json), without its scaling
    of RoPE."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _bundle(
        "llama-3.2-1b-16k", LlamaConfig, LlamaForCausalLM,
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rope_theta=5e5,
    )  # fmt: skip


def _bundle(name: str, config_class: Any, model_class: Any, **shape: Any) -> Path:
    """At INT4 (asymmetric, group 128; embedding and head INT8), with weights for the kernels; made once."""
    bundle, source = BUILD / f"{name}.edge", BUILD / name
    if not (source / "generation_config.json").exists():
        import torch
        from transformers import AutoTokenizer

        torch.manual_seed(0)
        config = config_class(**shape, eos_token_id=None, bos_token_id=None)
        AutoTokenizer.from_pretrained(ROOT / "examples" / "models" / "bookworm").save_pretrained(source)
        model_class(config).to(torch.float16).save_pretrained(source)
    if not bundle.exists() or (native.status().loads and not (bundle / "kernels.json").exists()):
        edgert.compile(source, bundle, weights="int4", force=True, progress=print)
    return bundle
