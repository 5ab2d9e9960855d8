"""From a loaded model that sees or hears to its towers, its decoder, `MediaSpec` and the rows of the report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from edgert.converters.huggingface import export_decoder
from edgert.converters.media.check import Arrays, check_prompt, check_tower, gradient, noise
from edgert.converters.media.families import HEARING, Call, Hearing, Vision, vision_of
from edgert.converters.media.folders import Names, preprocessor, understood
from edgert.converters.media.inputs import MoreInputs
from edgert.converters.media.pictures import image_size, image_spec
from edgert.converters.media.sounds import audio_spec
from edgert.converters.media.towers import export_tower
from edgert.converters.quality import Floats, Row
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel

from edgert.errors import ConversionError, UsageError
from edgert.features import Kind, Medium
from edgert.media.spec import AudioSpec, ImageSpec, MediaSpec

log = logging.getLogger("edgert")


@dataclass(frozen=True)
class Media:
    """What a bundle has for images and sound.

    Attributes:
        spec: how they get to the towers and into the prompt.
        towers: by the folder's name; f32.
        samples: an input of each tower to judge its compression by.
    """

    spec: MediaSpec
    towers: dict[str, ov.Model]
    samples: dict[str, Arrays]


@dataclass(frozen=True)
class _Case:
    """A picture or a sound in a prompt: what it is, what stands for it, and what transformers' model takes for it."""

    what: str
    medium: Medium
    call: Call


@dataclass(frozen=True)
class _Part:
    """A tower, how things get there, the row of its check, and cases for that of the whole model."""

    tower: ov.Model
    spec: ImageSpec | AudioSpec
    row: Row
    sample: Arrays
    width: int
    cases: list[_Case]


def perceives(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration takes pictures or sound."""
    return any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config"))


def warn_of_adapters(folder: Path) -> None:
    """Say that adapters which lie beside the weights, as Phi-4-multimodal's do (format of PEFT), are not applied."""
    if found := sorted(file.parent.name for file in folder.glob("*/adapter_config.json")):
        log.warning("%s: %s are adapters, which are not applied: the model answers without them", folder, found)


def convert_media(
    source: PreTrainedModel,
    folder: Path,
    tokenizer: Tokenizer,
    size: tuple[int, int] | None,
    progress: Callable[[str], None],
    check_text: Callable[[ov.Model], list[Row]],
    check: bool = True,
) -> tuple[ov.Model, list[Row], Media]:
    """Export such a model: the decoder, canonical but for the inputs of `MoreInputs`, and the towers.

    Args:
        size: of pictures; see `edgert.converters.compile`.
        check_text: the gate for what the decoder does with text.
        check: whether the decoder is compared. Towers always are.

    Raises:
        ConversionError: a part cannot be exported, or the folder does not say how pictures or sound are prepared.
        ParityError: the export computes something else.
        UsageError: `size` is none that the model takes.
    """
    config = source.config
    warn_of_adapters(folder)
    names = Names(folder, config, tokenizer)
    vision = vision_of(config) if getattr(config, "vision_config", None) is not None else None
    hearing = HEARING.get(config.model_type) if getattr(config, "audio_config", None) is not None else None
    parts: list[_Part] = []
    if vision is not None:
        progress("export the vision tower")
        parts.append(_vision_part(source, folder, vision, names, size))
    elif size is not None:
        raise UsageError(f"image_size is {size}, but {folder} is a model without a vision tower")
    if hearing is not None:
        progress("export the audio tower")
        parts.append(_audio_part(source, folder, hearing, names))
    elif getattr(config, "audio_config", None) is not None:
        problem = f"{config.model_type}: how its audio tower is called is not known (converters/media/families.py)"
        if not parts:
            raise ConversionError(f"{problem}; text_only compiles the language model alone")
        log.warning("%s: the bundle takes pictures, but no sound", problem)

    progress("export")
    more = _more_inputs(source, vision, parts)
    decoder = export_decoder(source, more)
    rows = [part.row for part in parts]
    specs = [part.spec for part in parts]
    image = next((spec for spec in specs if isinstance(spec, ImageSpec)), None)
    audio = next((spec for spec in specs if isinstance(spec, AudioSpec)), None)
    media = Media(
        MediaSpec(image=image, audio=audio),
        {part.spec.tower: part.tower for part in parts},
        {part.spec.tower: part.sample for part in parts},
    )
    if check:
        progress("check")
        rows = [*check_text(decoder), *rows]
        for part in parts:
            argument = vision.ids if vision is not None and part.spec is image else None
            for case in part.cases:
                rows.append(
                    check_prompt(
                        case.what, decoder, source, case.medium, case.call,
                        ids_argument=argument, grid=image.grid if image is not None else None,
                        vocab_size=config.get_text_config().vocab_size,
                    )
                )  # fmt: skip
    return decoder, rows, media


def _vision_part(
    source: PreTrainedModel, folder: Path, vision: Vision, names: Names, size: tuple[int, int] | None
) -> _Part:
    config = source.config
    settings = preprocessor(folder, "image_processor")
    height, width = image_size(folder, config, vision, settings, size)
    pictures = [draw((1, 3, height, width)) for draw in (noise, gradient)]

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return vision.features(source, vision.call(config, pixels))

    inputs: list[Arrays] = [{"pixel_values": picture} for picture in pictures]
    tower = export_tower(source, run, _tensors(inputs[0]))
    row, found = check_tower("vision", tower, lambda values: _run(run, values), inputs)
    with understood(folder):
        spec = image_spec(folder, config, vision, settings, names, (height, width), len(found[0]))
    cases = [
        _Case(what, _medium("image", rows, spec.expansion, spec.token), vision.call(config, torch.from_numpy(picture)))
        for what, picture, rows in zip(("a picture of noise", "a picture of a gradient"), pictures, found, strict=True)
    ]
    return _Part(tower, spec, row, inputs[1], found[0].shape[1], cases)


def _audio_part(source: PreTrainedModel, folder: Path, hearing: Hearing, names: Names) -> _Part:
    """The check hears a sound that fills the tower, and where the tower can tell, one of about half that length."""
    config = source.config
    with understood(folder):
        spec = audio_spec(folder, config, hearing, preprocessor(folder, "feature_extractor", "audio_processor"), names)
    used = ("input_features", "feature_mask")[: 1 + hearing.masked]

    def run(features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        known = torch.ones(1, spec.frames) if mask is None else mask
        return hearing.features(source, hearing.call(config, features, known))

    inputs, lengths = [], [spec.frames, spec.frames // 2 + 1 if hearing.masked else spec.frames]
    for seed, length in enumerate(lengths):
        features = np.random.default_rng(seed).normal(size=(1, spec.mels, spec.frames)).astype(np.float32)
        mask = (np.arange(spec.frames) < length).astype(np.float32)[None]
        inputs.append({name: {"input_features": features * mask, "feature_mask": mask}[name] for name in used})
    tower = export_tower(source, run, _tensors(inputs[0]))
    counts = [spec.tokens(length) for length in lengths]
    row, found = check_tower("audio", tower, lambda values: _run(run, values), inputs, counts)
    if len(found[0]) < spec.tokens(spec.frames):
        raise ConversionError(
            f"{folder}: the audio tower gives {len(found[0])} rows, expected {spec.tokens(spec.frames)}"
        )
    cases = []
    for which, values, rows, length in zip(("a sound", "another sound"), inputs, found, lengths, strict=True):
        ids = (*spec.prefix, *[spec.token] * spec.tokens(length), *spec.suffix)
        tensors = _tensors(values)
        call = hearing.call(config, tensors["input_features"], tensors.get("feature_mask", torch.ones(1, spec.frames)))
        cases.append(_Case(f"{which} of {length} frames", _medium("audio", rows, ids, spec.token), call))
    return _Part(tower, spec, row, inputs[1], found[0].shape[1], cases)


def _run(run: Callable[..., torch.Tensor], values: Arrays) -> Floats:
    with torch.no_grad():
        return np.asarray(run(*_tensors(values).values()).float().numpy())


def _tensors(values: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _medium(kind: Kind, rows: Floats, ids: tuple[int, ...], token: int) -> Medium:
    return Medium(kind, hashlib.sha256(rows.tobytes()).digest(), ids, token, lambda: (rows, ()))


def _more_inputs(source: PreTrainedModel, vision: Vision | None, parts: list[_Part]) -> MoreInputs:
    family, hidden = source.config.model_type, int(source.get_input_embeddings().weight.shape[1])
    widths = {part.width for part in parts}
    if len(widths) != 1 or min(widths) % hidden:
        raise ConversionError(f"{family}: rows of its towers have {sorted(widths)} numbers, embeddings {hidden}")
    levels = min(widths) // hidden - 1
    if vision is None:
        return MoreInputs(hidden, levels)
    return MoreInputs(hidden, levels, vision.bidirectional(source.config), 3 if vision.mrope else 0)
