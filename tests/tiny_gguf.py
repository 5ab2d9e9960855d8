"""Write a tiny transformers model as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(
    model: PreTrainedModel,
    path: Path,
    tokenizer_folder: Path,
    *,
    template: str | None = None,
    architecture: str | None = None,
    pre: str = "qwen2",
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    """Write a Qwen3 or Llama, norms in f32, with the tokenizer and chat template as metadata.

    `architecture` and `pre` replace what the file says of the model and of the pre-tokenizer.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), architecture or config.model_type)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text("utf-8"))
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    padded = [tokens.get(i, f"[unused{i}]") for i in range(config.vocab_size)]
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL if i in tokens else gguf.TokenType.UNUSED
        for i in range(config.vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(padded)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)

    for name, tensor in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        if stem in _TOP:
            target = _TOP[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{_LAYER[part]}"
        values = tensor.numpy()
        if config.model_type == "llama" and target.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if target.endswith("q") else config.num_key_value_heads
            # llama.cpp rotates neighbouring pairs where transformers rotates halves.
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        values = np.ascontiguousarray(values)
        if values.ndim == 2 and matrices != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{target}.{ending}", gguf.quantize(values, matrices), raw_dtype=matrices)
        else:
            writer.add_tensor(f"{target}.{ending}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
