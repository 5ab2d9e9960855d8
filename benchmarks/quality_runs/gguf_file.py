"""A trained model as a GGUF file, and what is in such a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, LlamaFileType, get_tensor_name_map
from quality_runs.weights import Weights, counted


def write(source: Path, target: Path) -> None:
    """Write a Llama or Qwen3 of transformers in f32: what llama.cpp quantizes is then what was trained.

    Tokens are passed by number, so there is no tokenizer in the file.

    Args:
        source: a folder with config.json and model.safetensors.

    Raises:
        ValueError: GGUF has no name for one of the tensors.
    """
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text("utf-8"))
    kind, layers, dim = config["model_type"], config["num_hidden_layers"], config["head_dim"]
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], layers)
    writer = GGUFWriter(target, kind)
    writer.add_name(source.name)
    writer.add_file_type(LlamaFileType.ALL_F32)
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
    for name, tensor in load_file(source / "model.safetensors").items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise ValueError(f"{source}: GGUF has no tensor {name} in {kind}")
        array = tensor.float().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns neighbouring pairs, transformers halves of a head.
            halves = array.reshape(array.shape[0] // dim, 2, dim // 2, -1)
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(new, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights(path: Path) -> Weights:
    """What the matrices of a GGUF file take, scales included."""
    matrices = (tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
    return counted((tensor.tensor_type.name, int(tensor.n_elements), int(tensor.n_bytes)) for tensor in matrices)
