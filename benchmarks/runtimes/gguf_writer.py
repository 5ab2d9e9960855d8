"""A model of transformers as a GGUF file, for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import quantize
from safetensors import safe_open


def write(source: Path, target: Path, *, int4: bool = False) -> None:
    """Write a Llama or Qwen3 in f32: what llama.cpp quantizes is then what was trained.

    Tokens are passed by number, so there is no tokenizer in the file.

    Args:
        source: a folder with config.json and model.safetensors.
        int4: matrices in Q4_0, groups of 32, but embedding and head in Q8_0.

    Raises:
        ValueError: GGUF has no name for one of the tensors.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    kind, layers, dim = config["model_type"], config["num_hidden_layers"], config["head_dim"]
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], layers)
    writer = GGUFWriter(target, kind)
    writer.add_name(source.name)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0 if int4 else LlamaFileType.ALL_F32)
    if int4:
        writer.add_quantization_version(2)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    with safe_open(source / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            new = names.get_name(name, try_suffixes=(".weight",))
            if new is None:
                raise ValueError(f"{source}: GGUF has no tensor {name} in {kind}")
            array = tensors.get_tensor(name).float().numpy()
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp turns neighbouring pairs, transformers halves of a head.
                halves = array.reshape(array.shape[0] // dim, 2, dim // 2, -1)
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
            if not int4 or array.ndim == 1:
                writer.add_tensor(new, array)
                continue
            form = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_0
            writer.add_tensor(new, quantize(array, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
