"""What Intel's NPU compiler makes of the blocks of well-known models: the tables of docs/npu.md.

    .venv/bin/python benchmarks/npu.py                  all; writes the tables into docs/npu.md
    .venv/bin/python benchmarks/npu.py Qwen3-0.6B       only some

Needs no NPU, but the compiler (`edgert doctor --setup npu-compiler`), and for the largest vocabulary 12 GB of memory.
The demo model is compiled as it is. The others have the shapes of the models they are named after, random weights and
a single layer, as the layers of a model differ in their weights only; the vocabulary has its full size.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import openvino as ov
import torch
import transformers
from edgert.converters.compress import compress, to_fp16
from edgert.converters.huggingface import export_decoder
from edgert.converters.npu import NpuOptions, add_blobs
from edgert.converters.pretrained import load, quiet

from edgert.bundle import Bundle, ModelFacts, Report
from edgert.graph import BlockGraph
from edgert.irgraph import make_names_unique
from edgert.npu.blobs import Blob, BlobStore
from edgert.npu.compiler import PLATFORMS
from edgert.npu.recipe import check
from edgert.partition import annotate
from edgert.shapes import StaticShapes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "npu.md"
DEMO = "bookworm"
SHAPES = StaticShapes(chunks=(256,), buckets=(1024,))
Weights = Literal["int4", "fp16"]
# Sizes as in the models' own config.json on https://huggingface.co.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": ("Qwen3Config", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    }),
    "Llama-3.2-1B": ("LlamaConfig", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }),
    # Its own RoPE, longrope, chooses between two tables by the length of the text, which torch.export cannot follow.
    # Which table it is does not matter here: tables are inputs of the blocks on an NPU.
    "Phi-4-mini": ("Phi3Config", {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": 200064, "max_position_embeddings": 4096, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    }),
}  # fmt: skip


def source(name: str) -> transformers.PreTrainedModel:
    """The demo model, or a model of one layer with random weights."""
    if name == DEMO:
        return load(ROOT / "examples" / "models" / DEMO, "decoder")
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def blobs(name: str, model: ov.Model, weights: Weights, platforms: Sequence[str]) -> tuple[BlockGraph, list[Blob]]:
    """Compile every block of a model, each by itself, by the way that `edgert compile --npu-split` takes."""
    if weights == "int4":
        model = compress(model, "int4", sym=True, group_size=-1)
    else:
        to_fp16(model)
    make_names_unique(model)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder)
        ov.save_model(model, path / "model.xml", compress_to_fp16=False)
        del model
        gc.collect()
        saved = ov.Core().read_model(path / "model.xml")
        graph = annotate(saved)
        assert check(saved, graph) == []
        vocab_size = saved.outputs[0].get_partial_shape()[-1].get_length()
        width, context = graph.edges[0].bytes_per_token // 4, SHAPES.buckets[-1]
        facts = ModelFacts(
            name, "decoder", "openvino", name, vocab_size, width, context, 1, (), None, weights, 1
        )  # fmt: skip
        bundle = Bundle(path, facts, Report(name, {}), graph, {})
        add_blobs(
            bundle, NpuOptions(tuple(platforms), SHAPES, split=True), lambda stage: print(f"  {stage}", flush=True)
        )
        return graph, list(BlobStore(path).blobs())


def table(rows: dict[Weights, tuple[BlockGraph, list[Blob]]], platforms: Sequence[str]) -> str:
    """Markdown: a row for each kind of block, weights and shape; of several blocks of a kind the largest figures."""
    lines = [
        "| block | weights | shape | " + " | ".join(f"{p}: compile, blob, *estimated* call" for p in platforms) + " |",
        "|---" * (3 + len(platforms)) + "|",
    ]
    for graph, found in rows.values():
        groups: dict[tuple[str, str, str], dict[str, list[Blob]]] = {}
        for blob in sorted(found, key=lambda b: (b.first, b.shape)):
            block = graph.blocks[blob.first]
            largest = max(block.weight_bytes, key=lambda kind: block.weight_bytes[kind])
            shape = str(blob.shape) if blob.shape.past else f"{blob.shape.query} row{'s' * (blob.shape.query > 1)}"
            groups.setdefault((block.kind, largest, shape), {}).setdefault(blob.identity.platform, []).append(blob)
        for (kind, type_, shape), of in groups.items():
            count = len(next(iter(of.values())))
            name = kind if count == 1 else f"{kind} ({count})"
            lines.append(f"| {name} | {type_} | {shape} | " + " | ".join(cell(of[p]) for p in platforms) + " |")
    return "\n".join(lines)


def cell(found: list[Blob]) -> str:
    mark = "†" if any("NPU_TILES" in b.identity.properties for b in found) else ""
    estimate = max(b.estimated_us or 0 for b in found)
    us = f"*{estimate:.0f} µs*" if estimate else "*none*"
    return f"{max(b.compile_s for b in found):.1f} s, {max(b.bytes for b in found) / 1e6:.1f} MB, {us}{mark}"


def write(name: str, text: str) -> None:
    """Replace a model's table in the page."""
    page = PAGE.read_text("utf-8")
    pattern = rf"(<!-- benchmarks/npu\.py {re.escape(name)} -->\n).*?(<!-- end -->)"
    changed, count = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} has no place for the table of {name}")
    PAGE.write_text(changed, "utf-8")


def main() -> int:
    names = [DEMO, *CONFIGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="only print what this one gives")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"unknown model {unknown[0]!r}: expected one of {', '.join(names)}")
    platforms = options.platform or PLATFORMS
    kinds: tuple[Weights, ...] = ("int4", "fp16")
    for name in options.names or names:
        rows = {}
        for weights in kinds:
            print(f"{name}, {weights}", flush=True)
            with quiet():
                torch_model = source(name)
                model = export_decoder(torch_model)
            rows[weights] = blobs(name, model, weights, platforms)
            del model, torch_model
            gc.collect()
        text = table(rows, platforms)
        print(text, flush=True)
        if options.platform is None:
            write(name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
