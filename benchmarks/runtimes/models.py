"""The same weights in the format of each runtime. Run by `peers.py` in the runtimes' own environment.

    python models.py SOURCE BUNDLE FOLDER

SOURCE is a folder in transformers' form, BUNDLE what edgert compiled of it. Into FOLDER go `genai/` (OpenVINO, the
bundle's own model), `model.gguf`, `ort/` and `bf16/`; what is there and not older than its source is left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

GROUP = 128  # weights with one scale, as in the bundle


def genai(source: Path, bundle: Path, target: Path) -> None:
    """The bundle's model under the names that OpenVINO GenAI looks for."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    target.mkdir()
    for suffix in (".xml", ".bin"):
        try:
            os.link(bundle / f"model{suffix}", target / f"openvino_model{suffix}")
        except OSError:  # another file system, or one without links
            shutil.copyfile(bundle / f"model{suffix}", target / f"openvino_model{suffix}")
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    # Only token ids are passed, but the pipeline wants a tokenizer.
    for name, model in zip(
        ("tokenizer", "detokenizer"),
        convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True),
        strict=True,
    ):
        ov.save_model(model, target / f"openvino_{name}.xml")


def gguf(source: Path, bundle: Path, target: Path) -> None:
    """Q4_0, groups of 32; embedding and head, which are one tensor, Q8_0; norms f32."""
    import numpy as np
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
    from gguf.quants import quantize
    from safetensors import safe_open

    config = json.loads((source / "config.json").read_text("utf-8"))
    kind, layers, heads = config["model_type"], config["num_hidden_layers"], config["num_attention_heads"]
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], layers)
    writer = GGUFWriter(target, kind)
    writer.add_name(source.name)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(2)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    with safe_open(source / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
            if name == "lm_head.weight":  # the embedding again
                continue
            new = names.get_name(name, try_suffixes=(".weight",))
            if new is None:
                raise ValueError(f"{name}: GGUF has no such tensor in {kind}")
            array = tensors.get_tensor(name).astype(np.float32)
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp turns neighbouring pairs, transformers halves of a head.
                count = array.shape[0] // config["head_dim"]
                halves = array.reshape(count, 2, config["head_dim"] // 2, -1)
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
            if array.ndim == 1:
                writer.add_tensor(new, array)
                continue
            form = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_0
            writer.add_tensor(new, quantize(array, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ort(source: Path, bundle: Path, target: Path) -> None:
    """INT4 asymmetric; embedding and head, which are one tensor, INT8 in groups too; by onnxruntime-genai's builder."""
    options = {
        "block_size": GROUP, "is_symmetric": "false", "algo_config": "rtn",
        "matmul_mixed_precision": "last_matmul:int8", "accuracy_level": 4, "prune_lm_head": "true", "hf_token": "false",
    }  # fmt: skip
    log = target.parent / "ort.log"  # it says a line a tensor
    with tempfile.TemporaryDirectory(dir=target.parent) as cache, log.open("w") as lines:
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target), "-p",
            "int4", "-e", "cpu", "-c", cache, "--extra_options", *(f"{k}={v}" for k, v in options.items()),
        ]  # fmt: skip
        if subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT).returncode:
            raise RuntimeError(f"onnxruntime-genai's builder failed; see {log}")


def bf16(source: Path, bundle: Path, target: Path) -> None:
    """As transformers maps it into memory: without a conversion at load."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)


FORMS: dict[str, Callable[[Path, Path, Path], None]] = {
    "genai": genai, "model.gguf": gguf, "ort": ort, "bf16": bf16,
}  # fmt: skip


def make(source: Path, bundle: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, form in FORMS.items():
        target, partial = folder / name, folder / f"partial-{name}"
        origin = bundle / "manifest.json" if form is genai else source / "config.json"
        if target.exists() and target.stat().st_mtime >= origin.stat().st_mtime:
            continue
        for path in (target, partial):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        print(f"{folder.name}: {name}", file=sys.stderr)
        form(source, bundle, partial)
        partial.rename(target)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
