"""The blocks of LTX-2's transformer out of its `config.json`: two streams, of video and of sound, through every layer.

Which products there are follows `LTX2VideoTransformer3DModel` of diffusers 0.39
(https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/transformer_ltx2.py), and so do
the defaults: diffusers writes every field, so they matter to files made by hand only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgert.architecture.config import MAX_LAYERS, MAX_WIDTH
from edgert.architecture.parts import Matrix, Part
from edgert.errors import UsageError
from edgert.graph import BlockKind

CLASS = "LTX2VideoTransformer3DModel"
_FREQUENCIES = 256  # of the embedding of a time step (diffusers' TimestepEmbedding)
_WIDENING = 4  # of an FFN
_SIZES = {
    "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "attention_head_dim": 128,
    "cross_attention_dim": 4096, "audio_in_channels": 128, "audio_out_channels": 128, "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048, "num_layers": 48, "caption_channels": 3840,
}  # fmt: skip
_FLAGS = {
    "gated_attn": False, "cross_attn_mod": False, "audio_gated_attn": False, "audio_cross_attn_mod": False,
    "use_prompt_embeddings": True, "attention_bias": True, "attention_out_bias": True, "norm_elementwise_affine": False,
    "ff_bias": True, "audio_ff_bias": True, "use_prompt_adaln_single": True,
}  # fmt: skip


@dataclass(frozen=True)
class _Stream:
    """One of the two streams."""

    width: int
    heads: int
    dim: int
    channels: tuple[int, int]  # in and out
    text: int
    gated: bool
    modulated: bool
    ff_bias: bool


class _Reader:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def size(self, name: str) -> int:
        value = self._config.get(name, _SIZES[name])
        most = MAX_LAYERS if name == "num_layers" else MAX_WIDTH
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UsageError(f"model configuration: {name} is {str(value)[:40]}, expected 1 to {most}")
        return value

    def flag(self, name: str) -> bool:
        value = self._config.get(name, _FLAGS[name])
        if not isinstance(value, bool):
            raise UsageError(f"model configuration: {name} is {str(value)[:40]!r}, expected true or false")
        return value

    def stream(self, prefix: str) -> _Stream:
        heads, dim = self.size(f"{prefix}num_attention_heads"), self.size(f"{prefix}attention_head_dim")
        return _Stream(
            heads * dim,
            heads,
            dim,
            (self.size(f"{prefix}in_channels"), self.size(f"{prefix}out_channels")),
            self.size(f"{prefix}cross_attention_dim"),
            self.flag(f"{prefix}gated_attn"),
            self.flag(f"{prefix}cross_attn_mod"),
            self.flag(f"{prefix}ff_bias"),
        )


def parts(config: Mapping[str, Any]) -> tuple[list[Part], int]:
    """The blocks of an LTX-2 transformer: what comes before its layers, each layer, and what comes after.

    Returns:
        the blocks and the width of the video's stream. A block's operations are those of all its products, of either
        stream and of the text: for a token of each.

    Raises:
        UsageError: a field is of another type or beyond its limit.
    """
    reader = _Reader(config)
    video, sound = reader.stream(""), reader.stream("audio_")
    modulated = video.modulated or sound.modulated
    affine = reader.flag("norm_elementwise_affine")
    before, after = Part(BlockKind.EMBED, []), Part(BlockKind.HEAD, [])
    for stream in (video, sound):
        _linear(before, stream.width, stream.channels[0])
        if reader.flag("use_prompt_embeddings"):
            _linear(before, stream.width, reader.size("caption_channels"))
            _linear(before, stream.width, stream.width)
        # What the time step says to the layers' norms, to the attention between the streams, to its gate, to the text.
        prompt = [2] if modulated and reader.flag("use_prompt_adaln_single") else []
        for rows in (9 if stream.modulated else 6, 4, 1, *prompt):
            _linear(before, stream.width, _FREQUENCIES)
            _linear(before, stream.width, stream.width)
            _linear(before, rows * stream.width, stream.width)
        # NNCF leaves the last product that it meets at INT8, which is the video's.
        _linear(after, stream.channels[1], stream.width, last=stream is video)
        _table(after, 2, stream.width)
    layer = [_layer(reader, video, sound, modulated=modulated, affine=affine) for _ in range(reader.size("num_layers"))]
    return [before, *layer, after], video.width


def _layer(reader: _Reader, video: _Stream, sound: _Stream, *, modulated: bool, affine: bool) -> Part:
    part = Part(BlockKind.BLOCK, [])
    bias, out_bias = reader.flag("attention_bias"), reader.flag("attention_out_bias")
    for stream, other in ((video, sound), (sound, video)):
        between = (sound.heads, sound.dim)  # of the attention between the streams, either way
        own = (stream.heads, stream.dim)
        for keys, (heads, dim) in ((stream.width, own), (stream.text, own), (other.width, between)):
            inner = heads * dim
            for rows, columns, biased in (
                (inner, stream.width, bias),
                (inner, keys, bias),
                (inner, keys, bias),
                (stream.width, inner, out_bias),
            ):
                _linear(part, rows, columns, bias=biased)
            if stream.gated:
                _linear(part, heads, stream.width)
            part.vectors += 2 * inner  # norms of queries and keys
            part.score_flops += 4 * inner
        _linear(part, _WIDENING * stream.width, stream.width, bias=stream.ff_bias)
        _linear(part, stream.width, _WIDENING * stream.width, bias=stream.ff_bias)
        part.vectors += 4 * stream.width * affine
        for rows in (9 if stream.modulated else 6, 4, *([2] if modulated else [])):
            _table(part, rows, stream.width)
        part.vectors += stream.width  # the gate of the attention between the streams
    return part


def _linear(part: Part, rows: int, columns: int, *, bias: bool = True, last: bool = False) -> None:
    part.matrices.append(Matrix(rows, columns, role="head" if last else "linear"))
    part.vectors += rows * bias


def _table(part: Part, rows: int, columns: int) -> None:
    """Shifts and scales of a norm, which are added and never multiplied: f16 whatever the precision."""
    part.matrices.append(Matrix(rows, columns, role="shift"))
