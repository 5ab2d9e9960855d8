"""The shape of a model out of its `config.json`, without weights: the blocks, bytes and operations that it would have
as a bundle.

Which products a layer has, and how wide they are, follows the model classes of Hugging Face transformers 5.5
(https://github.com/huggingface/transformers/tree/main/src/transformers/models); the bytes follow what NNCF makes of
them in `edgert.converters.compress`. Only the text model counts: towers for images and sound are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.architecture.config import MAX_CONTEXT, MAX_WIDTH, Fields
from edgert.architecture.layers import layers
from edgert.architecture.parts import PRECISIONS, Matrix, Part, Weights
from edgert.errors import UsageError
from edgert.graph import Block, BlockGraph, BlockKind, Edge

__all__ = ["PRECISIONS", "ModelShape", "Weights", "from_config", "read"]

MAX_PARAMETERS = 10**14


@dataclass(frozen=True)
class ModelShape:
    """What a `config.json` says of a model.

    Attributes:
        name: for people.
        family: `model_type` of the text model, e.g. `qwen3`.
        weights: the precision that the graph's bytes are for.
        graph: its blocks, as `edgert.partition.annotate` makes them of the compiled model. Names of tensors and states
            are made up. Operations of a recurrence (not its projections) are not counted.
        context_length: tokens, at least 1; None where the configuration does not say.
        vocab_size, hidden_size: at least 1.
        parameters: a tied embedding once.
        active_parameters: those that one token uses: of a mixture's experts the chosen ones and the shared ones.
        notes: what was assumed or left out, a sentence each.
    """

    name: str
    family: str
    weights: Weights
    graph: BlockGraph
    context_length: int | None
    vocab_size: int
    hidden_size: int
    parameters: int
    active_parameters: int
    notes: tuple[str, ...]


def read(path: Path, *, weights: Weights = "int4", group_size: int = 128) -> ModelShape:
    """The shape of the model that a `config.json`, or the folder with one, describes; raises `UsageError`."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"model configuration {file}: {error}") from error
    return from_config(config, name=file.resolve().parent.name, weights=weights, group_size=group_size)


def from_config(
    config: Mapping[str, Any], *, name: str | None = None, weights: Weights = "int4", group_size: int = 128
) -> ModelShape:
    """The shape of the model that a Hugging Face configuration describes.

    A family that is not known is taken for one like Llama, and `notes` says so.

    Args:
        config: the object in a `config.json`; of one with a `text_config` only that counts.
        name: for people; `_name_or_path` or the family where None.
        weights: `int4` is asymmetric, with embedding, head and experts at INT8; `int8` has a scale a row.
        group_size: INT4 weights along the input dimension that share a scale; -1 is the whole dimension.

    Raises:
        UsageError: a field is missing, of another type or beyond its limit.
    """
    if weights not in PRECISIONS:
        raise UsageError(f"weights is {str(weights)[:20]!r}, expected one of {', '.join(PRECISIONS)}")
    if group_size != -1 and not 1 <= group_size <= MAX_WIDTH:
        raise UsageError(f"group_size is {group_size}, expected -1 or 1 to {MAX_WIDTH}")
    if not isinstance(config, Mapping):
        raise UsageError(f"model configuration: expected an object, got {type(config).__name__}")
    fields = Fields(config)
    between = list(layers(fields))
    hidden, vocab = fields.hidden, fields.size("vocab_size", most=MAX_WIDTH)
    tied = fields.flag("tie_word_embeddings", default=fields.family.startswith(("gpt2", "gemma", "cohere", "smollm3")))

    embed = Part(BlockKind.EMBED, [Matrix(vocab, hidden, role="table")])
    head = Part(BlockKind.HEAD, [Matrix(vocab, hidden, role="head")], vectors=hidden * fields.norm_width)
    outside = 0  # parameters that are in no block
    if fields.family == "gpt2":
        outside = hidden * fields.size("n_positions", "max_position_embeddings", most=MAX_CONTEXT)
    if side := fields.size("hidden_size_per_layer_input", default=0, least=0):
        width = side * fields.layers
        table = fields.size("vocab_size_per_layer_input", default=vocab)
        embed.matrices += [Matrix(table, width, role="table"), Matrix(width, hidden)]
        embed.vectors += side

    parts = [embed, *between, head]
    held = sum(part.parameters for part in parts) + outside - (vocab * hidden if tied else 0)
    if held > MAX_PARAMETERS:
        raise UsageError(f"model configuration: it describes {held:.1e} parameters, the most is {MAX_PARAMETERS:.0e}")
    if weights == "int4" and any(m.role == "expert" for part in between for m in part.matrices):
        fields.notes.append("experts stay at INT8, as edgert compile leaves them")
    if any(part.window for part in between):
        fields.notes.append("keys outside a window take memory but no time; a compiled model may read and hide them")
    if any(part.score_flops and not part.kv for part in between):
        fields.notes.append("reading keys and values that layers share is reckoned once, not for each of them")
    return ModelShape(
        name=name or str(config.get("_name_or_path") or fields.family)[:100],
        family=fields.family,
        weights=weights,
        graph=_graph(parts, hidden, weights, group_size),
        context_length=fields.size("max_position_embeddings", "n_positions", default=0, least=0, most=MAX_CONTEXT)
        or None,
        vocab_size=vocab,
        hidden_size=hidden,
        parameters=held,
        active_parameters=held - sum(m.elements - m.used_elements for part in parts for m in part.matrices),
        notes=tuple(fields.notes),
    )


def _graph(parts: list[Part], hidden: int, weights: Weights, group_size: int) -> BlockGraph:
    blocks: list[Block] = []
    numbers: dict[BlockKind, int] = {}
    for index, part in enumerate(parts):
        number = numbers[part.kind] = numbers.get(part.kind, -1) + 1
        name = str(part.kind) if part.kind in {BlockKind.EMBED, BlockKind.HEAD} else f"{part.kind}.{number}"
        held: dict[str, int] = {}
        for matrix in part.matrices:
            for kind, size in matrix.bytes(weights, group_size).items():
                held[kind] = held.get(kind, 0) + size
        if part.vectors:
            held["f32"] = 4 * part.vectors
        kept = ("key", "value") if part.kv else ("conv", "recurrent") if part.recurrent else ()
        blocks.append(
            Block(
                index=index,
                kind=part.kind,
                name=name,
                input=blocks[-1].output if blocks else None,
                output=f"{name}:0",
                states=tuple(f"{name}.{state}" for state in kept),
                weight_bytes=held,
                flops_per_token=2 * sum(m.used_elements for m in part.matrices if m.role != "table"),
                kv_bytes_per_token=4 * part.kv,
                recurrent_bytes=4 * part.recurrent,
                score_flops=part.score_flops,
                window=part.window,
            )
        )
    return BlockGraph(tuple(blocks), tuple(Edge(b.index, b.index + 1, b.output, 4 * hidden) for b in blocks[:-1]))
