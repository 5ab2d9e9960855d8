"""What the search for mixed precision works on, of tiny models: blocks, matrices, and a source to compile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import torch
import transformers
from edgert.converters.compress import to_fp16
from edgert.converters.huggingface import export_decoder
from edgert.converters.mixed.chain import Array, Chain
from edgert.converters.mixed.matrices import Matrix, find_matrices
from edgert.converters.mixed.variants import Variants
from edgert.converters.quality import EXACT, decoder_inputs
from tiny_models import VOCAB_SIZE, exported

from edgert.cutting import cut
from edgert.graph import BlockGraph
from edgert.irgraph import make_names_unique
from edgert.likelihood import Window
from edgert.partition import annotate
from edgert.precision.formats import named

F16 = named("f16")
WINDOWS = (Window(tuple(range(3, 20)), 1), Window((40, 7, 99, 41, 200), 2))
"""Of different lengths."""


@cache
def _small() -> ov.Model:
    settings = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings)
    return export_decoder(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def model_of(family: str) -> ov.Model:
    """An f16 decoder of a family of `tiny_models`, or `small`: one layer with a tied table, four blocks."""
    model = _small().clone() if family == "small" else exported(family)[1]
    to_fp16(model)
    make_names_unique(model)
    return model


def write_source(folder: Path, like: Path, model: ov.Model) -> Path:
    """An IR folder to compile, with the tokenizer and configuration of another folder."""
    folder.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / file, folder / file)
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    return folder


@dataclass(frozen=True)
class Parts:
    """A model, and what the search takes it apart into.

    Attributes:
        path: its IR.
    """

    path: Path
    graph: BlockGraph
    submodels: tuple[ov.Model, ...]
    matrices: tuple[Matrix, ...]

    def model(self) -> ov.Model:
        return ov.Core().read_model(self.path)

    def chain(self) -> Chain:
        return Chain(self.submodels, self.matrices)

    def variants(self, folder: Path, kept_bytes: int = 2**30) -> Variants:
        return Variants(folder, self.submodels, self.matrices, kept_bytes=kept_bytes)

    def named(self, name: str) -> Matrix:
        return next(matrix for matrix in self.matrices if matrix.name == name)


def parts_of(model: ov.Model, folder: Path) -> Parts:
    """Write a model into a folder and take it apart."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    model = ov.Core().read_model(path)
    graph = annotate(model)
    submodels = cut(model, graph, [(block.index, block.index) for block in graph.blocks])
    return Parts(path, graph, tuple(submodels), tuple(find_matrices(graph, submodels)))


def logits_of(model: ov.Model, windows: Sequence[Window] = WINDOWS) -> list[Array]:
    """What the whole model says, each window from an empty cache, `[tokens, vocabulary]`."""
    request = ov.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    found = []
    for window in windows:
        request.reset_state()
        inputs = decoder_inputs(np.array([window.tokens], np.int64), 0)
        found.append(np.array(request.infer({**inputs, "beam_idx": np.zeros(1, np.int32)})["logits"][0]))
    return found
