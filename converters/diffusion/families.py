"""What each kind of diffusion transformer takes and gives: one entry a class of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from edgert.converters.general.adaptation import replaced

Tensors = dict[str, torch.Tensor]
Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Sizes:
    """How large an example is: of latents, after patches were made, and of the text."""

    batch: int
    frames: int
    height: int
    width: int
    sound: int
    text: int

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Family:
    """A class of diffusion transformers.

    Attributes:
        outputs: names of what it gives, in order.
        inputs: for a model, the dimensions of each input: numbers, and names of those that change (`batch`, `video`…).
        example: values for all inputs of one size, as a pipeline would give them but for random latents and text.
        options: what else the pipeline passes.
        adapted: what is replaced while the model is traced.
    """

    outputs: tuple[str, ...]
    inputs: Callable[[Any], Mapping[str, Dims]]
    example: Callable[[Any, Sizes], Tensors]
    options: Callable[[Any], dict[str, Any]] = lambda model: {}
    adapted: Callable[[], AbstractContextManager[None]] = nullcontext


def _ltx2_inputs(model: Any) -> dict[str, Dims]:
    config = model.config
    # Without a projection of its own (LTX-2.3) the text comes as wide as each stream attends to it.
    projected = config.use_prompt_embeddings
    text = config.caption_channels if projected else config.cross_attention_dim
    audio_text = config.caption_channels if projected else config.audio_cross_attention_dim
    inputs: dict[str, Dims] = {
        "hidden_states": ("batch", "video", config.in_channels),
        "audio_hidden_states": ("batch", "sound", config.audio_in_channels),
        "encoder_hidden_states": ("batch", "text", text),
        "audio_encoder_hidden_states": ("batch", "text", audio_text),
        "timestep": ("batch", "video"),
        "audio_timestep": ("batch",),
        "encoder_attention_mask": ("batch", "text"),
        "audio_encoder_attention_mask": ("batch", "text"),
        "video_coords": ("batch", 3, "video", 2),
        "audio_coords": ("batch", 1, "sound", 2),
    }
    return inputs | ({"sigma": ("batch",)} if model.prompt_modulation else {})


def _ltx2_example(model: Any, sizes: Sizes) -> Tensors:
    values = _noise(_ltx2_inputs(model), sizes)
    return values | {
        "video_coords": model.rope.prepare_video_coords(sizes.batch, sizes.frames, sizes.height, sizes.width, "cpu"),
        "audio_coords": model.audio_rope.prepare_audio_coords(sizes.batch, sizes.sound, "cpu").contiguous(),
    }


def _ltx2_options(model: Any) -> dict[str, Any]:
    return {"use_cross_timestep": model.prompt_modulation}  # LTX-2.3 takes the other stream's noise, LTX-2 its own


def _ltx_inputs(model: Any) -> dict[str, Dims]:
    return {
        "hidden_states": ("batch", "video", model.config.in_channels),
        "encoder_hidden_states": ("batch", "text", model.config.caption_channels),
        "timestep": ("batch", "video"),
        "encoder_attention_mask": ("batch", "text"),
        "video_coords": ("batch", 3, "video"),
    }


def _ltx_example(model: Any, sizes: Sizes) -> Tensors:
    values = _noise(_ltx_inputs(model), sizes)
    axes = [torch.arange(size, dtype=torch.float32) for size in (sizes.frames, sizes.height, sizes.width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    return values | {"video_coords": grid.expand(sizes.batch, -1, -1).contiguous()}


def _noise(inputs: Mapping[str, Dims], sizes: Sizes) -> Tensors:
    """Normal numbers, steps of 0 to 1000, and masks that hide the last word of the text."""
    values = {}
    for name, dims in inputs.items():
        shape = [dim if isinstance(dim, int) else getattr(sizes, dim) for dim in dims]
        if name.endswith("mask"):
            values[name] = torch.ones(shape, dtype=torch.int64)
            values[name][:, -1] = 0
        elif name.endswith("timestep") or name == "sigma":
            values[name] = torch.rand(shape) * 1000
        else:
            values[name] = torch.randn(shape)
    return values


def _out_of_place_rope() -> AbstractContextManager[None]:
    """Split RoPE without writing into views.

    diffusers adds to halves of a tensor in place (`addcmul_`), and a trace loses what is written into a view: the
    export then computes something else (relative error 0.16 on a tiny model). Needed until `apply_split_rotary_emb`
    of diffusers writes into nothing; it does in 0.42.
    """
    from diffusers.models.transformers import transformer_ltx2

    return replaced((transformer_ltx2, "apply_split_rotary_emb", _split_rope))


def _split_rope(x: torch.Tensor, freqs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the first half of each head's channels with the second: x [batch, tokens, width], tables [batch, heads,
    tokens, head_dim / 2]."""
    cos, sin = freqs
    heads = x.unflatten(2, (cos.shape[1], -1)).transpose(1, 2)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.transpose(1, 2).flatten(2).to(x.dtype)


FAMILIES: dict[str, Family] = {
    "LTX2VideoTransformer3DModel": Family(
        ("sample", "audio_sample"), _ltx2_inputs, _ltx2_example, _ltx2_options, _out_of_place_rope
    ),
    "LTXVideoTransformer3DModel": Family(("sample",), _ltx_inputs, _ltx_example),
}
