"""What becomes of a picture: from a folder's preprocessor and tokenizer files to `ImageSpec`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgert.converters.media.families import Vision
from edgert.converters.media.folders import Names, understood
from transformers import PretrainedConfig

from edgert.errors import ConversionError, UsageError
from edgert.media.spec import MAX_PIXELS, MAX_SIDE, ImageSpec

TOWER = "vision"
DEFAULT_TOKENS = 256  # of a picture whose size is free: 16 x 16
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


def image_size(
    folder: Path, config: PretrainedConfig, vision: Vision, settings: dict[str, Any], wanted: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width of the pictures that the tower is made for; see `edgert.converters.compile`.

    Raises:
        UsageError: `wanted` is a size that the model does not take.
        ConversionError: the files give none, or one beyond what a bundle may have.
    """
    with understood(folder):
        height, width = _size(config, vision, settings, wanted)
    if min(height, width) < 1 or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ConversionError(
            f"{folder}: pictures of {height} x {width} pixels, expected sides of 1 to {MAX_SIDE}, {MAX_PIXELS} in all"
        )
    return height, width


def _size(
    config: PretrainedConfig, vision: Vision, settings: dict[str, Any], wanted: tuple[int, int] | None
) -> tuple[int, int]:
    if vision.unit is None:
        side = config.vision_config.image_size
        fixed = (side, side) if isinstance(side, int) else tuple(side)
        if wanted not in (None, fixed):
            raise UsageError(f"image_size is {wanted}, but {config.model_type} takes {fixed} only")
        return int(fixed[0]), int(fixed[1])
    unit, most = vision.unit(config), _most_tokens(vision.unit(config), settings)
    if wanted is None:
        side = max(1, math.isqrt(min(most, DEFAULT_TOKENS))) * unit
        return side, side
    if any(side < unit or side % unit for side in wanted):
        raise UsageError(f"image_size is {wanted}, expected multiples of {unit} for {config.model_type}")
    if (count := wanted[0] // unit * (wanted[1] // unit)) > most:
        raise UsageError(f"image_size {wanted} is {count} tokens, {config.model_type} takes {most} at most")
    return wanted


def _most_tokens(unit: int, settings: dict[str, Any]) -> int:
    """As the processors of Gemma 4, LFM2-VL, Qwen-VL (an area) and Pixtral (a side) limit it."""
    given = settings.get("size")
    size: dict[str, Any] = given if isinstance(given, dict) else {}
    longest = size.get("longest_edge")
    if "max_pixels" in settings or "shortest_edge" in size:
        longest = settings.get("max_pixels") or longest
        return int(longest) // unit**2 if longest else 1024
    if longest:
        return (int(longest) // unit) ** 2
    return int(settings.get("max_soft_tokens") or settings.get("max_image_tokens") or 1024)


def image_spec(
    folder: Path,
    config: PretrainedConfig,
    vision: Vision,
    settings: dict[str, Any],
    names: Names,
    size: tuple[int, int],
    tokens: int,
) -> ImageSpec:
    """How a picture of any size gets into the tower, and its `tokens` rows into a prompt.

    Raises:
        ConversionError: a number is missing that cannot be guessed, or is none that is supported.
    """
    resample = settings.get("resample", 3)
    if resample not in _FILTERS:
        raise ConversionError(f"{folder}: resample is {resample!r}, expected one of {_FILTERS}")
    normalize = settings.get("do_normalize", True)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if normalize and not (_three(mean) and _three(std)):
        raise ConversionError(f"{folder}: its preprocessor says no image_mean and image_std: {mean!r}, {std!r}")
    cropped = bool(settings.get("crop_size")) and settings.get("do_center_crop", True)
    token = names.number("image_token")
    rows, columns = 1, tokens
    if vision.unit is not None:
        unit = vision.unit(config)
        rows, columns = size[0] // unit, size[1] // unit
        if rows * columns != tokens:
            raise ConversionError(f"{folder}: the tower gives {tokens} rows, expected {rows} x {columns}")
    between: list[int] = []
    for row in range(rows if vision.row else 1):
        between += [token] * (columns if vision.row else tokens)
        if vision.row:
            between += names.sequence(vision.last if row == rows - 1 else vision.row, [])
    longest = settings.get("size", {}).get("longest_edge", 0) if settings.get("max_image_size") else 0
    spec = ImageSpec(
        tower=TOWER,
        placeholder=names.sequence(vision.placeholder, [])[0],
        expansion=tuple(names.sequence(vision.text, between)),
        token=token,
        height=size[0],
        width=size[1],
        fit="crop" if cropped else vision.fit,
        resample=_FILTERS[resample],  # type: ignore[arg-type]
        scale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
        mean=tuple(map(float, mean)) if normalize else (0.0, 0.0, 0.0),  # type: ignore[arg-type]
        std=tuple(map(float, std)) if normalize else (1.0, 1.0, 1.0),  # type: ignore[arg-type]
        longest_edge=int(longest),
        grid=(rows, columns) if vision.mrope else None,
        bidirectional=vision.bidirectional(config),
    )
    try:
        spec.check()
    except ValueError as error:
        raise ConversionError(f"{folder}: {error}") from error
    return spec


def _three(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == 3
