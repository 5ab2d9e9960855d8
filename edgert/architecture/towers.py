"""Towers of a multimodal model, by its configuration: what reads images or sound, and leads into the text model.

Widths follow the classes of Hugging Face transformers 5.5, as those of text models do. A kind that is not known is
taken for a vision transformer like SigLIP's with one product behind it, or for Whisper's encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgert.architecture.config import MAX_CONTEXT, MAX_LAYERS, Numbers
from edgert.architecture.parts import Matrix, Part
from edgert.errors import UsageError
from edgert.graph import BlockKind


@dataclass(frozen=True)
class _Kind:
    """How a vision transformer differs from SigLIP's.

    Attributes:
        biased: products and norms have biases.
        patch_bias: the product of patches has one.
        gated: the FFN has a gate.
        norms: of a layer; outer: of the whole tower.
        head_norms: queries and keys are scaled by channel.
        class_token: a vector before the patches.
    """

    biased: bool = True
    patch_bias: bool = True
    gated: bool = False
    norms: int = 2
    outer: int = 1
    head_norms: bool = False
    class_token: bool = False


_SIGLIP = _Kind()
_QWEN = _Kind(outer=0)
# By the model_type of the vision_config, or that of the whole model where it has none of its own.
_KINDS = {
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": _SIGLIP,
    "idefics3_vision": _SIGLIP,
    "smolvlm_vision": _SIGLIP,
    "clip_vision_model": _Kind(patch_bias=False, outer=2, class_token=True),
    "llama4_vision_model": _Kind(patch_bias=False, outer=2, class_token=True),
    "pixtral": _Kind(biased=False, patch_bias=False, gated=True),
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "gemma4_vision": _Kind(biased=False, patch_bias=False, gated=True, norms=4, outer=0, head_norms=True),
}
_UNKNOWN_SIZE = 384  # pixels of a square image, where a configuration says nothing


def towers(config: Mapping[str, Any], hidden: int, notes: list[str]) -> list[tuple[str, Part, int]]:
    """Name, content and parameters of each tower; empty for a text model.

    Args:
        config: the whole `config.json`.
        hidden: width of the text model.
        notes: gets what was assumed.

    Raises:
        UsageError: a field is missing, of another type or beyond its limit.
    """
    found = []
    for name, key, make in (("vision", "vision_config", _vision), ("audio", "audio_config", _audio)):
        given = config.get(key)
        if given is None or given == {}:
            continue
        if not isinstance(given, Mapping):
            raise UsageError(f"model configuration: {key} is {str(given)[:40]!r}, expected an object")
        part = make(Numbers(config, str(config.get("model_type"))[:60]), given, hidden, notes)
        found.append((name, part, part.parameters))
    return found


def _vision(whole: Numbers, given: Mapping[str, Any], hidden: int, notes: list[str]) -> Part:
    v = Numbers(given, str(given.get("model_type") or whole.family)[:60])
    kind = _KINDS.get(v.family, _SIGLIP)
    if v.family not in _KINDS:
        notes.append(f"vision tower {v.family!r} is not known: taken for one like SigLIP's")
    width, layers = (
        v.size("hidden_size", default=768),
        v.size("num_hidden_layers", "depth", default=12, most=MAX_LAYERS),
    )
    inner = v.size("intermediate_size", default=4 * width)
    heads = v.size("num_attention_heads", "num_heads", default=12)
    dim = v.size("head_dim", default=max(1, width // heads))
    patch = v.size("patch_size", default=16)
    colours = v.size("num_channels", "in_channels", default=3) * v.size("temporal_patch_size", default=1)
    part = Part(BlockKind.TOWER, [Matrix(width, colours * patch * patch)])
    layer = [Matrix(heads * dim, width)] * 3 + [Matrix(width, heads * dim)]
    layer += [Matrix(inner, width)] * (2 if kind.gated else 1) + [Matrix(width, inner)]
    vectors = width * kind.norms
    if kind.biased:
        vectors += width * kind.norms + sum(m.rows for m in layer)
    vectors += 2 * dim if kind.head_norms else 0
    part.matrices += layer * layers
    part.vectors = layers * vectors + width * kind.outer * (2 if kind.biased else 1) + width * kind.patch_bias
    if positions := _positions(v, kind, patch):
        part.matrices.append(Matrix(positions, width, role="table"))
    part.vectors += width * kind.class_token
    _project(part, whole, v, hidden, width, notes)
    return part


def _positions(v: Numbers, kind: _Kind, patch: int) -> int:
    """Rows of the table of positions; 0 where positions turn, as text's do."""
    if v.family == "pixtral":
        return 0
    if v.family == "gemma4_vision":  # rows and columns have tables of their own
        return 2 * v.size("position_embedding_size", default=10_240)
    size = v.size("image_size", default=_UNKNOWN_SIZE)
    count = v.size("num_position_embeddings", "num_patches", default=(size // patch) ** 2, most=MAX_CONTEXT)
    return count + int(kind.class_token)


def _project(part: Part, whole: Numbers, v: Numbers, hidden: int, width: int, notes: list[str]) -> None:
    """What leads from the tower's width to the text model's."""
    family = whole.family
    if family == "gemma3":
        part.matrices.append(Matrix(hidden, width))
        part.vectors += width
    elif family == "mistral3":
        merged = whole.size("spatial_merge_size", default=2) ** 2
        part.matrices += [Matrix(width, merged * width), Matrix(hidden, width), Matrix(hidden, hidden)]
        part.vectors += width
        if whole.flag("multimodal_projector_bias", default=False):
            part.vectors += 2 * hidden
    elif v.family in _KINDS and _KINDS[v.family] is _QWEN:
        merged = width * v.size("spatial_merge_size", default=2) ** 2
        out = v.size("out_hidden_size", default=hidden)
        deep = len(v.items("deepstack_visual_indexes"))
        part.matrices += [Matrix(merged, merged), Matrix(out, merged)] * (1 + deep)
        part.vectors += (merged + out) * (1 + deep) + 2 * width + 2 * merged * deep
    elif family == "llama4":
        narrow, out = v.size("projector_input_dim", default=4096), v.size("projector_output_dim", default=4096)
        first = v.size("intermediate_size", default=5632)  # pixels are shuffled to that width
        part.matrices += [
            Matrix(narrow, first), Matrix(out, narrow), Matrix(hidden, v.size("vision_output_dim", default=out)),
        ]  # fmt: skip
    elif family == "lfm2_vl":
        merged = width * whole.size("downsample_factor", default=2) ** 2
        narrow = whole.size("projector_hidden_size", default=2560)
        part.matrices += [Matrix(narrow, merged), Matrix(hidden, narrow)]
        part.vectors += narrow + hidden
        if whole.flag("projector_use_layernorm", default=True):
            part.vectors += 2 * merged
    elif family in {"idefics3", "smolvlm"}:
        part.matrices.append(Matrix(hidden, width * whole.size("scale_factor", default=2) ** 2))
    elif family == "llava":
        part.matrices += [Matrix(hidden, width), Matrix(hidden, hidden)]
        part.vectors += 2 * hidden
    else:
        part.matrices.append(Matrix(hidden, width))
        if family not in {"gemma4", "gemma3n"}:
            notes.append(f"what leads from images to the text of {family!r} is not known: taken for one product")


def _audio(whole: Numbers, given: Mapping[str, Any], hidden: int, notes: list[str]) -> Part:
    """Whisper's encoder (https://arxiv.org/abs/2212.04356), which Voxtral and Qwen2-Audio have, or one taken for it."""
    a = Numbers(given, str(given.get("model_type") or whole.family)[:60])
    if whole.family not in {"voxtral", "qwen2_audio"}:
        notes.append(f"audio tower {a.family!r} is reckoned like Whisper's encoder of its width and depth")
    width = a.size("d_model", "hidden_size", default=1280)
    layers = a.size("encoder_layers", "num_hidden_layers", "num_blocks", default=32, most=MAX_LAYERS)
    inner = a.size("encoder_ffn_dim", "intermediate_size", default=4 * width)
    mels = a.size("num_mel_bins", "input_feat_size", "input_size", default=128)
    positions = a.size("max_source_positions", default=1500, most=MAX_CONTEXT)
    part = Part(BlockKind.TOWER, [Matrix(width, 3 * mels), Matrix(width, 3 * width)])  # two convolutions over time
    part.matrices += ([Matrix(width, width)] * 4 + [Matrix(inner, width), Matrix(width, inner)]) * layers
    part.matrices.append(Matrix(positions, width, role="table"))
    # Biases of queries, values and what leads out, of the FFN; two norms; keys have none.
    part.vectors = layers * (3 * width + inner + width + 4 * width) + 2 * width + 2 * width
    if whole.family == "voxtral":  # four frames make a row
        part.matrices += [Matrix(hidden, inner), Matrix(hidden, hidden)]
    else:
        part.matrices.append(Matrix(hidden, width))
        part.vectors += hidden
    return part
