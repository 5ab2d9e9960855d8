"""Tiny vision-language and audio models with random weights, as folders: what `compile` is tested on end to end.

Two layers of 64 everywhere, pictures of 32 to 64 pixels, a handful of tokens for each. Sizes are the smallest that
still have every part of the family: merged patches, pooled rows, DeepStack, sliding windows, states.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

VOCABULARY = 256
TEXT = "What is in this picture, and what do you hear? A fox, a dog, three brown birds and the sea. " * 40
# The first tokens of every tokenizer here: their numbers are fixed, so that configurations can name them.
SPECIAL = (
    "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<image>", "<boi>", "<eoi>", "<break>", "<end>", "<video>",
    "<audio>", "<boa>", "<eoa>", "<fake_token_around_image>", "<global-img>", "<|image|>", "<|image_start|>",
    "<|image_end|>", "[BEGIN_AUDIO]",
)  # fmt: skip
IMAGE, BOI, EOI, VIDEO, AUDIO, BOA, EOA = (
    SPECIAL.index(f"<{name}>") for name in ("image", "boi", "eoi", "video", "audio", "boa", "eoa")
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}PLACEHOLDER_{{ part.type }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HALF_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "initializer_range": 0.1,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BOI,
    "vision_end_token_id": EOI,
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 2}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
    "resample": 3,
}
_IDEFICS3: dict[str, Any] = {
    "text_config": {**_TEXT, "model_type": "llama"},
    "vision_config": {**_TOWER, "image_size": 32, "patch_size": 8},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}
_ONE_TILE: dict[str, Any] = {
    "size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False, **_HALF,
}  # fmt: skip


class Family(NamedTuple):
    """A line of the table.

    Attributes:
        kind: the configuration class in transformers, without `Config`.
        placeholders: what its chat template writes for an image and for a sound.
        settings: of the configuration.
        image, audio: of its preprocessor.
    """

    kind: str
    placeholders: tuple[str, str]
    settings: dict[str, Any]
    image: dict[str, Any] = {}  # noqa: RUF012 - never changed
    audio: dict[str, Any] = {}  # noqa: RUF012


TABLE: dict[str, Family] = {
    "gemma3": Family(
        "Gemma3",
        ("<boi>", ""),
        {
            "text_config": {**_TEXT, "query_pre_attn_scalar": 16, **_HALF_SLIDING},
            "vision_config": {**_TOWER, "image_size": 32, "patch_size": 8, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "boi_token_index": BOI,
            "eoi_token_index": EOI,
            "image_token_index": IMAGE,
        },
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}, **_HALF},
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        ("<boi><image><eoi>", ""),
        {
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_TOWER, "deepstack_visual_indexes": [0, 1]},
            **_QWEN_TOKENS,
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 8,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 256, "longest_edge": 4096},
            **_HALF,
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5",
        ("<boi><image><eoi>", ""),
        {
            "text_config": {
                **_TEXT,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "head_dim": 32,
                "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5},
            },
            "vision_config": _QWEN_TOWER,
            **_QWEN_TOKENS,
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 8,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 256, "longest_edge": 4096},
            **_HALF,
        },
    ),
    "mistral3": Family(
        "Mistral3",
        ("<image>", ""),
        {
            "text_config": {**_TEXT, "model_type": "mistral"},
            "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 16},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
        },
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 8, "size": {"longest_edge": 64}, **_CLIP},
    ),
    "llama4": Family(
        "Llama4",
        ("<|image|>", ""),
        {
            "text_config": {
                **_TEXT,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 4,
                "attention_chunk_size": 8,
                "intermediate_size": 64,
                "intermediate_size_mlp": 128,
                "interleave_moe_layer_step": 2,
                "floor_scale": 16,
            },
            "vision_config": {
                **_TOWER,
                "intermediate_size": 128,
                "image_size": 32,
                "patch_size": 8,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            "boi_token_index": BOI,
            "eoi_token_index": EOI,
            "image_token_index": IMAGE,
        },
        {"image_processor_type": "Llama4ImageProcessor", "size": {"height": 32, "width": 32}, **_HALF},
    ),
    "lfm2_vl": Family(
        "Lfm2Vl",
        ("<image>", ""),
        {
            "text_config": {
                **_TEXT,
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"],
                "block_dim": 64,
                "block_ff_dim": 128,
                "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {
                **_TOWER,
                "model_type": "siglip2_vision_model",
                "patch_size": 8,
                "num_patches": 64,
                "vision_use_head": False,
            },
            "image_token_id": IMAGE,
            "projector_hidden_size": 64,
            "downsample_factor": 2,
        },
        {
            "image_processor_type": "Lfm2VlImageProcessor",
            "encoder_patch_size": 8,
            "downsample_factor": 2,
            "max_image_tokens": 16,
            "tile_size": 64,
            **_HALF,
        },
    ),
    "smolvlm": Family(
        "SmolVLM", ("<image>", ""), _IDEFICS3, {"image_processor_type": "SmolVLMImageProcessor", **_ONE_TILE}
    ),
    "idefics3": Family(
        "Idefics3", ("<image>", ""), _IDEFICS3, {"image_processor_type": "Idefics3ImageProcessor", **_ONE_TILE}
    ),
    "llava": Family(
        "Llava",
        ("<image>", ""),
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            **_CLIP,
        },
    ),
    "gemma4": Family(
        "Gemma4",
        ("<image>", "<audio>"),
        {
            "text_config": {
                **_TEXT,
                **_HALF_SLIDING,
                "global_head_dim": 32,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": VOCABULARY,
            },
            "vision_config": {
                **_TOWER,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
                "initializer_range": 0.1,
            },
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "conv_kernel_size": 3,
                "subsampling_conv_channels": [128, 4],
                "attention_chunk_size": 4,
                "attention_context_left": 5,
                "output_proj_dims": 48,
                "initializer_range": 0.1,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
            "boi_token_id": BOI,
            "eoi_token_id": EOI,
            "boa_token_id": BOA,
            "eoa_token_index": EOA,
        },
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "max_soft_tokens": 70,
            "do_normalize": False,
            "rescale_factor": 1 / 255,
            "resample": 3,
        },
        {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 128, "audio_seq_length": 10},
    ),
    "phi4_multimodal": Family(
        "Phi4Multimodal",
        ("<image>", "<audio>"),
        {
            **{name: value for name, value in _TEXT.items() if name != "head_dim"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
            "vision_config": {**_TOWER, "image_size": 32, "crop_size": 32, "patch_size": 8, "image_token_id": IMAGE},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
                "input_size": 80,
                "audio_token_id": AUDIO,
            },
        },
        {
            "image_processor_type": "Phi4MultimodalImageProcessor",
            "size": {"height": 32, "width": 32},
            "patch_size": 8,
            **_HALF,
        },
    ),
    "voxtral": Family(
        "Voxtral",
        ("", "<audio>"),
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "audio_config": {**_TOWER, "intermediate_size": 128, "num_mel_bins": 80, "max_source_positions": 40},
            "audio_token_id": AUDIO,
        },
        {},
        {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80},
    ),
    "qwen2_audio": Family(
        "Qwen2Audio",
        ("", "<boa><audio><eoa>"),
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "num_mel_bins": 80,
                "max_source_positions": 40,
            },
            "audio_token_index": AUDIO,
        },
        {},
        {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80},
    ),
}


def build(family: str, layers: int | None = None) -> PreTrainedModel:
    """The model, with random weights; parameters that transformers begins with zeros are random, too.

    Args:
        layers: of its language model, where these are not those of the table.
    """
    line = TABLE[family]
    config = getattr(transformers, f"{line.kind}Config")(**line.settings)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
    kind = transformers.AutoModelForImageTextToText
    if type(config) not in kind._model_mapping:
        kind = transformers.AutoModelForMultimodalLM
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0, 0.05)
    return model


def write_tokenizer(folder: Path, placeholders: tuple[str, str]) -> None:
    """A tokenizer whose first tokens are `SPECIAL`, with a chat template that takes parts of messages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=[*SPECIAL], show_progress=False)
    tokenizer.train_from_iterator([TEXT, "\n\n"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace("PLACEHOLDER_{{ part.type }}", _either(*placeholders))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "chat_template": template,
        "model_max_length": 1024,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _either(image: str, audio: str) -> str:
    return "{% if part.type == 'audio' %}" + audio + "{% else %}" + image + "{% endif %}"


def write_vl_folder(folder: Path, family: str, layers: int | None = None) -> Path:
    """A tiny model of `family` as a Hugging Face folder: weights, tokenizer with chat template, preprocessor."""
    folder.mkdir(parents=True)
    line = TABLE[family]
    build(family, layers).save_pretrained(folder)
    write_tokenizer(folder, line.placeholders)
    processor: dict[str, Any] = {"image_break_token": "<break>", "image_end_token": "<end>"}
    processor |= {"image_processor": line.image} if line.image else {}
    processor |= {"feature_extractor": line.audio} if line.audio else {}
    (folder / "processor_config.json").write_text(json.dumps(processor), "utf-8")
    return folder


def check(family: str, folder: Path) -> list[dict[str, Any]]:
    """Compile a tiny model of `family` in `folder`; the rows of its report.

    Raises:
        EdgertError: it does not compile, or computes something else.
    """
    import edgert.converters

    source = write_vl_folder(folder / family, family)
    bundle = edgert.converters.compile(source, folder / f"{family}.edge", weights="fp16", kernels=False)
    return bundle.report.checks
