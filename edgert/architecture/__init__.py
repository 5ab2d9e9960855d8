"""The shape of a model out of its `config.json`, without weights: the blocks, bytes and operations that it would have
as a bundle.

Which products a layer has, and how wide they are, follows the model classes of Hugging Face transformers 5.5
(https://github.com/huggingface/transformers/tree/main/src/transformers/models); the bytes follow what NNCF makes of
them in `edgert.converters.compress`. Towers for images and sound are blocks beside the text model's chain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgert.architecture import diffusion
from edgert.architecture.config import MAX_CONTEXT, MAX_WIDTH, Fields
from edgert.architecture.layers import layers
from edgert.architecture.parts import PRECISIONS, Matrix, Part, Weights
from edgert.architecture.towers import towers
from edgert.errors import UsageError
from edgert.graph import Block, BlockGraph, BlockKind, Edge

__all__ = ["PIPELINE", "PRECISIONS", "ModelShape", "Weights", "from_config", "read", "read_config"]

MAX_PARAMETERS = 10**14
PIPELINE = "model_index.json"  # of a folder that diffusers wrote


@dataclass(frozen=True)
class ModelShape:
    """What a `config.json` says of a model.

    Attributes:
        name: for people.
        family: `model_type` of the text model, e.g. `qwen3`.
        weights: the precision that the graph's bytes are for.
        graph: its blocks, as `edgert.partition.annotate` makes them of the compiled model. Names of tensors and states
            are made up. Operations of a recurrence or a short convolution (not its projections) are not counted.
        context_length: tokens, at least 1; None where the configuration does not say.
        vocab_size, hidden_size: at least 1, but a diffusion transformer has no vocabulary: 0.
        parameters: of the text model; a tied embedding once.
        tower_parameters: of what reads images and sound.
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
    tower_parameters: int
    active_parameters: int
    notes: tuple[str, ...]


def read(path: Path, *, weights: Weights = "int4", group_size: int = 128) -> ModelShape:
    """The shape of the model that a `config.json`, or the folder with one, describes; raises `UsageError`."""
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    return from_config(read_config(path), name=name, weights=weights, group_size=group_size)


def read_config(path: Path) -> dict[str, Any]:
    """The object in a `config.json`, or in that of a folder or of its pipeline's transformer; raises `UsageError`."""
    if (path / PIPELINE).is_file():
        path = path / "transformer"
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"model configuration {file}: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"model configuration {file}: expected an object, got {type(config).__name__}")
    return config


def from_config(
    config: Mapping[str, Any], *, name: str | None = None, weights: Weights = "int4", group_size: int = 128
) -> ModelShape:
    """The shape of the model that a Hugging Face configuration describes.

    A family that is not known is taken for one like Llama, and `notes` says so.

    Args:
        config: the object in a `config.json`; its `text_config`, where it has one, is the text model.
        name: for people; `_name_or_path` or the family where None.
        weights: `int4` is asymmetric, with embedding and head at INT8; `int8` has a scale a row.
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
    if config.get("_class_name") == diffusion.CLASS:
        return _denoiser(config, name, weights, group_size)
    fields = Fields(config)
    between = list(layers(fields))
    hidden, vocab = fields.hidden, fields.size("vocab_size", most=MAX_WIDTH)
    encoder = fields.traits.encoder
    tied = not encoder and fields.tied

    embed = Part(BlockKind.EMBED, [Matrix(vocab, hidden, role="table")])
    head = Part(BlockKind.HEAD, [Matrix(vocab, hidden, role="head")], vectors=hidden * fields.norm_width)
    if fields.flag("lm_head_bias", default=False):
        head.vectors += vocab
    outside = 0  # parameters that are in no block
    if fields.family == "gpt2" or (encoder and fields.traits.norm_bias):
        outside = hidden * fields.size("n_positions", "max_position_embeddings", most=MAX_CONTEXT)
    if encoder:
        embed.vectors = hidden * fields.norm_width
        outside += hidden * fields.size("type_vocab_size", default=0, least=0)
        last = between[-1].matrices
        last[-1] = replace(last[-1], role="head")  # NNCF leaves a model's last product at INT8
        if not fields.traits.norm_bias:
            between[-1].vectors += hidden  # the last norm
    if side := fields.size("hidden_size_per_layer_input", default=0, least=0):
        width = side * fields.layers
        table = fields.size("vocab_size_per_layer_input", default=vocab)
        embed.matrices += [Matrix(table, width, role="table"), Matrix(width, hidden)]
        embed.vectors += side

    parts = [embed, *between] if encoder else [embed, *between, head]
    held = sum(part.parameters for part in parts) + outside - (vocab * hidden if tied else 0)
    if held > MAX_PARAMETERS:
        raise UsageError(f"model configuration: it describes {held:.1e} parameters, the most is {MAX_PARAMETERS:.0e}")
    beside = towers(config, hidden, fields.notes)
    if any(part.window for part in between):
        fields.notes.append("keys outside a window take memory but no time; a compiled model may read and hide them")
    if any(part.score_flops and not part.kv for part in between):
        fields.notes.append("reading keys and values that layers share is reckoned once, not for each of them")
    return ModelShape(
        name=name or str(config.get("_name_or_path") or fields.family)[:100],
        family=fields.family,
        weights=weights,
        graph=replace(_graph(parts, hidden, weights, group_size), towers=_towers(beside, weights)),
        context_length=fields.size("max_position_embeddings", "n_positions", default=0, least=0, most=MAX_CONTEXT)
        or None,
        vocab_size=vocab,
        hidden_size=hidden,
        parameters=held,
        tower_parameters=sum(count for _, _, count in beside),
        active_parameters=held - sum(m.elements - m.used_elements for part in parts for m in part.matrices),
        notes=tuple(fields.notes),
    )


def _denoiser(config: Mapping[str, Any], name: str | None, weights: Weights, group_size: int) -> ModelShape:
    parts, hidden = diffusion.parts(config)
    held = sum(part.parameters for part in parts)
    if held > MAX_PARAMETERS:
        raise UsageError(f"model configuration: it describes {held:.1e} parameters, the most is {MAX_PARAMETERS:.0e}")
    return ModelShape(
        name=name or diffusion.CLASS,
        family=diffusion.CLASS,
        weights=weights,
        graph=_graph(parts, hidden, weights, group_size),
        context_length=None,
        vocab_size=0,
        hidden_size=hidden,
        parameters=held,
        tower_parameters=0,
        active_parameters=held,
        notes=("a diffusion transformer: operations are for a token of video, of sound and of text each",),
    )


def _towers(beside: Sequence[tuple[str, Part, int]], weights: Weights) -> tuple[Block, ...]:
    """Their weights are INT8 where the text model's are compressed; one picture or piece of sound is many tokens."""
    return tuple(
        Block(
            index=index,
            kind=BlockKind.TOWER,
            name=name,
            input=None,
            output="features",
            states=(),
            weight_bytes=_weight_bytes(part, "fp16" if weights == "fp16" else "int8", -1),
            flops_per_token=_flops(part),
            kv_bytes_per_token=0,
            recurrent_bytes=0,
        )
        for index, (name, part, _) in enumerate(beside)
    )


def _weight_bytes(part: Part, weights: Weights, group_size: int) -> dict[str, int]:
    held: dict[str, int] = {}
    for matrix in part.matrices:
        for kind, size in matrix.bytes(weights, group_size).items():
            held[kind] = held.get(kind, 0) + size
    if rest := part.vectors + part.constants:
        held["f32"] = held.get("f32", 0) + 4 * rest
    return held


def _flops(part: Part) -> int:
    return 2 * sum(m.used_elements for m in part.matrices if m.role not in {"table", "shift", "conv"})


def _graph(parts: list[Part], hidden: int, weights: Weights, group_size: int) -> BlockGraph:
    blocks: list[Block] = []
    numbers: dict[BlockKind, int] = {}
    for index, part in enumerate(parts):
        number = numbers[part.kind] = numbers.get(part.kind, -1) + 1
        name = str(part.kind) if part.kind in {BlockKind.EMBED, BlockKind.HEAD} else f"{part.kind}.{number}"
        kept = ("key", "value") * bool(part.kv) + part.fixed_states
        blocks.append(
            Block(
                index=index,
                kind=part.kind,
                name=name,
                input=blocks[-1].output if blocks else None,
                output=f"{name}:0",
                states=tuple(f"{name}.{state}" for state in kept),
                weight_bytes=_weight_bytes(part, weights, group_size),
                flops_per_token=_flops(part),
                kv_bytes_per_token=4 * part.kv,
                recurrent_bytes=4 * part.recurrent,
                score_flops=part.score_flops,
                window=part.window,
            )
        )
    return BlockGraph(tuple(blocks), tuple(Edge(b.index, b.index + 1, b.output, 4 * hidden) for b in blocks[:-1]))
