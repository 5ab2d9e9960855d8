"""What a family's configuration does not tell: how its towers want pictures and sound, and what stands for them.

A family of models that see, if it is not in the table, is taken for a plain one: `get_image_features(pixel_values)`,
its image token repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from edgert.media.spec import MAX_FRAMES, MAX_PIECES

Fit = Literal["stretch", "pad", "crop"]
Call = dict[str, Any]
"""What transformers' model takes for a picture beside tokens."""


@dataclass(frozen=True)
class Vision:
    """A vision tower and its projector.

    Attributes:
        call: what the model takes for `pixels` f32 [1, 3, height, width]; shapes only may depend on them, besides.
        features: rows f32 [tokens, width] for a call.
        text: what replaces the placeholder: `{names}` of tokens, `*` for the picture's own, other text as it is.
        placeholder: the token that the chat template writes for a picture.
        row: token at the end of each row but the last, whose own is `last`.
        unit: pixels of a token's side where the picture may have any size; None where the tower has one size.
        fit: how another aspect ratio gets there.
        ids: the picture's tokens as `mm_token_type_ids` or `token_type_ids` of the model, where it needs them.
        mrope: positions have three axes.
        bidirectional: the tokens of a picture see each other both ways.
    """

    call: Callable[[PretrainedConfig, torch.Tensor], Call]
    features: Callable[[PreTrainedModel, Call], torch.Tensor]
    text: str = "*"
    placeholder: str = "{image_token}"
    row: str = ""
    last: str = ""
    unit: Callable[[PretrainedConfig], int] | None = None
    fit: Fit = "stretch"
    ids: str | None = None
    mrope: bool = False
    bidirectional: Callable[[PretrainedConfig], bool] = lambda config: False


def vision_of(config: PretrainedConfig) -> Vision:
    """The line of the table for a model, or the plain one."""
    return VISION.get(config.model_type, PLAIN)


def _rows(model: PreTrainedModel, call: Call) -> torch.Tensor:
    """What `get_image_features` gives, parts for later layers (DeepStack) beside each row."""
    output = model.get_image_features(**call, return_dict=True)
    found = output.pooler_output
    features = torch.cat(list(found)) if isinstance(found, list | tuple) else found
    features = features.reshape(-1, features.shape[-1])
    deeper = getattr(output, "deepstack_features", None) or []
    return torch.cat([features, *deeper], -1)


def _plain(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    return {"pixel_values": pixels}


def _sized(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[pixels.shape[2], pixels.shape[3]]])}


def _merged_patches(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    """Patches as Qwen2VLImageProcessor orders them: those that are merged lie side by side, a still picture twice."""
    vision = config.vision_config
    size, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
    still = pixels.reshape(1, 3, rows // merge, merge, size, columns // merge, merge, size)
    patches = still.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return {
        "pixel_values": patches.reshape(rows * columns, 3 * frames * size * size),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def _patches(pixels: torch.Tensor, size: int) -> tuple[torch.Tensor, int, int]:
    """Patches [1, patches, size * size * 3] row by row, colours last; how many rows and columns."""
    rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
    cut = pixels.reshape(1, 3, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(1, rows * columns, size * size * 3), rows, columns


def _naflex(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    """As Lfm2VlImageProcessor."""
    patches, rows, columns = _patches(pixels, config.vision_config.patch_size)
    mask = torch.ones(1, rows * columns, dtype=torch.int64)
    return {"pixel_values": patches, "spatial_shapes": torch.tensor([[rows, columns]]), "pixel_attention_mask": mask}


def _positioned(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    """As Gemma4ImageProcessor, without the padding to the most patches that a picture may have."""
    patches, rows, columns = _patches(pixels, config.vision_config.patch_size)
    places = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), -1)
    return {"pixel_values": patches, "image_position_ids": places.reshape(1, -1, 2)}


def _one_tile(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    return {"pixel_values": pixels[None]}


def _llama4_rows(model: PreTrainedModel, call: Call) -> torch.Tensor:
    strategy = model.config.vision_config.vision_feature_select_strategy
    hidden = model.get_image_features(**call, vision_feature_select_strategy=strategy).last_hidden_state
    return model.multi_modal_projector(hidden.reshape(-1, hidden.shape[-1]))


def _idefics_rows(model: PreTrainedModel, call: Call) -> torch.Tensor:
    """`get_image_features` without the search for tiles that are empty, whose result has no fixed shape."""
    pixels, size = call["pixel_values"][0], model.config.vision_config.patch_size
    whole = torch.ones(1, pixels.shape[2] // size, pixels.shape[3] // size, dtype=torch.bool)
    hidden = model.model.vision_model(pixel_values=pixels, patch_attention_mask=whole).last_hidden_state
    features = model.model.connector(hidden)
    return features.reshape(-1, features.shape[-1])


def _phi4_crops(config: PretrainedConfig, pixels: torch.Tensor) -> Call:
    """As Phi4MultimodalImageProcessor for a picture of one crop: the picture as a whole, and as its only crop."""
    side = pixels.shape[2] // config.vision_config.patch_size
    return {
        "image_pixel_values": torch.stack([pixels, pixels], 1),
        "image_sizes": torch.tensor([[pixels.shape[2], pixels.shape[3]]]),
        "image_attention_mask": torch.ones(1, 2, side, side),
    }


def _phi4_rows(model: PreTrainedModel, call: Call) -> torch.Tensor:
    """What the model puts in the place of tokens.

    Where no patch is padding, transformers 5.5 has no mask, and then its `is_causal` makes each patch blind to later
    ones (SDPA only; with eager attention or with padding it does not). The tower was trained to see all.
    """
    embed = model.model.embed_tokens_extend.image_embed
    for layer in embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False
    ids = torch.full((1, 1), model.config.vision_config.image_token_id)
    return embed(ids, _Put(), **call)


class _Put:
    """Stands for embeddings in which rows are put, and gives these rows (`aten::index_put` is not translated)."""

    dtype, device = torch.float32, torch.device("cpu")

    def index_put(self, indices: Any, values: torch.Tensor, accumulate: bool) -> torch.Tensor:
        return values


def _merged(config: PretrainedConfig) -> int:
    return int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)


PLAIN = Vision(_plain, _rows)
_QWEN = Vision(_merged_patches, _rows, unit=_merged, fit="pad", ids="mm_token_type_ids", mrope=True)
_IDEFICS = Vision(
    _one_tile, _idefics_rows, text="<fake_token_around_image><global-img>*<fake_token_around_image>"
)  # fmt: skip

VISION: dict[str, Vision] = {
    "gemma3": Vision(
        _plain, _rows, text="\n\n{boi_token}*{eoi_token}\n\n", placeholder="{boi_token}", ids="token_type_ids",
        bidirectional=lambda config: True,
    ),
    "gemma4": Vision(
        _positioned, _rows, text="{boi_token}*{eoi_token}", ids="mm_token_type_ids", fit="pad",
        unit=lambda config: config.vision_config.patch_size * config.vision_config.pooling_kernel_size,
        bidirectional=lambda config: config.get_text_config().use_bidirectional_attention == "vision",
    ),
    "mistral3": Vision(
        _sized, _rows, row="{image_break_token}", last="{image_end_token}", fit="pad",
        unit=lambda config: config.vision_config.patch_size * config.spatial_merge_size,
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "llama4": Vision(
        _plain, _llama4_rows, text="<|image_start|><|image|>*<|image_end|>", placeholder="<|image|>", fit="pad",
    ),
    "lfm2_vl": Vision(
        _naflex, _rows, text="<|image_start|>*<|image_end|>", fit="pad",
        unit=lambda config: config.vision_config.patch_size * config.downsample_factor,
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "phi4_multimodal": Vision(_phi4_crops, _phi4_rows, fit="pad"),
}  # fmt: skip


@dataclass(frozen=True)
class Hearing:
    """An audio tower and its projector.

    Attributes:
        call: what the model takes for `features` f32 [1, mels, frames] and `mask` f32 [1, frames], 1 for sound.
        features: rows f32 [tokens, width] for a call; those behind the sound's own do not count.
        settings: fields of `AudioSpec` that the configuration says, and `subsampling`.
        kind: whose log-mel spectrum it is.
        text: what replaces the placeholder, as `Vision.text`.
        masked: the tower looks at `mask`.
    """

    call: Callable[[PretrainedConfig, torch.Tensor, torch.Tensor], Call]
    features: Callable[[PreTrainedModel, Call], torch.Tensor]
    settings: Callable[[PretrainedConfig], dict[str, Any]]
    kind: Literal["whisper", "gemma4"]
    text: str = "*"
    masked: bool = True


def _whisper_frames(config: PretrainedConfig) -> int:
    return 2 * int(config.audio_config.max_source_positions)  # the second convolution has stride 2


def _heard(model: PreTrainedModel, call: Call) -> torch.Tensor:
    owner = model if hasattr(model, "get_audio_features") else model.model
    features = owner.get_audio_features(**call, return_dict=True).pooler_output
    return features.reshape(-1, features.shape[-1])


def _qwen2_audio_rows(model: PreTrainedModel, call: Call) -> torch.Tensor:
    """As the model's `forward`, which has no function of its own for it."""
    known = (call["feature_attention_mask"].sum(-1) - 1) // 2 + 1
    seen = torch.arange(model.config.audio_config.max_source_positions)[None] < known[:, None]
    least = torch.finfo(call["input_features"].dtype).min
    bias = torch.where(seen, 0.0, least)[:, None, None, :].expand(-1, 1, seen.shape[1], -1)
    hidden = model.audio_tower(call["input_features"], attention_mask=bias).last_hidden_state
    return model.multi_modal_projector(hidden)[0]


HEARING: dict[str, Hearing] = {
    "voxtral": Hearing(
        lambda config, features, mask: {"input_features": features},
        _heard,
        lambda config: {
            "frames": _whisper_frames(config),
            "subsampling": ((3, 2, 1), *_joined(config.audio_config)),
            "whole": True,
            "max_pieces": max(1, min(MAX_PIECES, MAX_FRAMES // _whisper_frames(config))),
        },
        "whisper",
        text="[BEGIN_AUDIO]*",
        masked=False,
    ),
    "qwen2_audio": Hearing(
        lambda config, features, mask: {"input_features": features, "feature_attention_mask": mask.long()},
        _qwen2_audio_rows,
        lambda config: {"frames": _whisper_frames(config), "subsampling": ((3, 2, 1), (2, 2, 0))},
        "whisper",
    ),
    "gemma4": Hearing(
        lambda config, features, mask: {"input_features": features.transpose(1, 2), "input_features_mask": mask.bool()},
        _heard,
        lambda config: {"subsampling": ((3, 2, 1), (3, 2, 1))},
        "gemma4",
        text="{boa_token}*{eoa_token}",
    ),
}


def _joined(audio: PretrainedConfig) -> tuple[tuple[int, int, int], ...]:
    """How many frames Voxtral joins to a row for its projector, as a step of `AudioSpec.subsampling`."""
    frames = audio.intermediate_size // audio.hidden_size
    return ((frames, frames, 0),)
