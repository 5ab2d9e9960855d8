"""Pictures: from a file, bytes or an array to pixels, and to what a vision tower takes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, MissingDependencyError, UsageError
from edgert.media.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, read_bytes
from edgert.media.spec import ImageSpec

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
ELONGATION = 8  # `crop` resizes no more of a long picture than this many times what it keeps


def read_image(source: str | Path | bytes | NDArray[Any] | Image) -> NDArray[np.uint8]:
    """The pixels of a picture, [height, width, 3], upright as its EXIF orientation says, over white where transparent.

    Args:
        source: a file or its bytes (PNG, JPEG, WebP, BMP, the first frame of a GIF), a Pillow image, or a uint8 array
            [height, width] (grey), [height, width, 3] (RGB) or [height, width, 4] (RGBA).

    Raises:
        UsageError: it is none of these, damaged, or more than 32 MiB or 50 million pixels; nothing is decoded of one
            that says it has more.
        MissingDependencyError: Pillow is not installed, and it takes more than an RGB array.
    """
    if isinstance(source, np.ndarray):
        if source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3:
            _check_size("image", source.shape[1], source.shape[0])
            return np.ascontiguousarray(source)
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 4)):
            kind = f"{source.dtype} {list(source.shape)}"
            raise UsageError(f"image: an array of {kind}, expected uint8 [height, width], [… , 3] or [… , 4]")
        _check_size("image", source.shape[1], source.shape[0])
        return _pixels(_pillow().fromarray(source))
    pillow = _pillow()
    if isinstance(source, pillow.Image):
        _check_size("image", *source.size)
        with _decoding("image"):
            return _pixels(source)
    if not isinstance(source, (str, Path, bytes, bytearray)):
        raise UsageError(f"image: {type(source).__name__}, expected a path, bytes, a Pillow image or an array")
    data, name = read_bytes(bytes(source) if isinstance(source, bytearray) else source, "image", MAX_IMAGE_BYTES)
    with _decoding(name):
        try:
            image = pillow.open(io.BytesIO(data), formats=FORMATS)
        except pillow.DecompressionBombError:
            raise UsageError(f"{name}: more than {MAX_IMAGE_PIXELS} pixels, the limit") from None
        except pillow.UnidentifiedImageError:
            raise UsageError(f"{name}: not a picture in one of {', '.join(FORMATS)}") from None
        with image:
            _check_size(name, *image.size)
            return _pixels(image)


def prepare_image(pixels: NDArray[np.uint8], spec: ImageSpec) -> dict[str, NDArray[Any]]:
    """What a vision tower takes for a picture.

    The same operations in the same order and precision as the image processors of transformers that use Pillow, so
    that equal sizes give equal numbers; `docs/media.md` has the comparison.

    Args:
        pixels: [height, width, 3], as of `read_image`.

    Returns:
        `pixel_values`, f32 [1, 3, spec.height, spec.width].

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    image = _pillow().fromarray(pixels)
    if spec.longest_edge:
        image = _resize(image, _longest_edge(image.width, image.height, spec.longest_edge), spec)
    fitted = np.asarray({"stretch": _stretch, "pad": _pad, "crop": _crop}[spec.fit](image, spec))
    # One value for each of the 256 of a pixel. The precisions are those of transformers: the product in f64, the rest
    # in f32.
    scaled = (np.arange(256, dtype=np.float64) * spec.scale).astype(np.float32)
    values = np.empty((1, 3, spec.height, spec.width), np.float32)
    for channel in range(3):
        table = (scaled - np.float32(spec.mean[channel])) / np.float32(spec.std[channel])
        values[0, channel] = table[fitted[..., channel]]
    return {"pixel_values": values}


def _stretch(image: Image, spec: ImageSpec) -> Image:
    return _resize(image, (spec.width, spec.height), spec)


def _pad(image: Image, spec: ImageSpec) -> Image:
    """As large as fits, with the colour around it, or right of it and below."""
    width, height = image.size
    if spec.width * height <= spec.height * width:
        size = (spec.width, max(1, height * spec.width // width))
    else:
        size = (max(1, width * spec.height // height), spec.height)
    canvas: Image = _pillow().new("RGB", (spec.width, spec.height), spec.pad_color)
    left, top = ((spec.width - size[0]) // 2, (spec.height - size[1]) // 2) if spec.pad_at == "center" else (0, 0)
    canvas.paste(_resize(image, size, spec), (left, top))
    return canvas


def _crop(image: Image, spec: ImageSpec) -> Image:
    """The shorter side as long as it must be, and the middle of that: how CLIP's processors do it."""
    width, height = image.size
    if width * spec.height > ELONGATION * height * spec.width:
        kept = max(1, ELONGATION * height * spec.width // spec.height)
        image = image.crop(((width - kept) // 2, 0, (width - kept) // 2 + kept, height))
    elif height * spec.width > ELONGATION * width * spec.height:
        kept = max(1, ELONGATION * width * spec.height // spec.width)
        image = image.crop((0, (height - kept) // 2, width, (height - kept) // 2 + kept))
    width, height = image.size
    if height * spec.width >= width * spec.height:
        size = (spec.width, max(spec.height, int(spec.width * height / width)))
    else:
        size = (max(spec.width, int(spec.height * width / height)), spec.height)
    left, top = (size[0] - spec.width) // 2, (size[1] - spec.height) // 2
    return _resize(image, size, spec).crop((left, top, left + spec.width, top + spec.height))


def _longest_edge(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height with the longer side so long and the shorter one even, as Idefics 3 rounds them."""
    if width >= height:
        short = int(longest / (width / height))
        return longest, max(1, short + short % 2)
    short = int(longest * (width / height))
    return max(1, short + short % 2), longest


def _resize(image: Image, size: tuple[int, int], spec: ImageSpec) -> Image:
    resized: Image = image.resize(size, _pillow().Resampling[spec.resample.upper()])
    return resized


def _pixels(image: Image) -> NDArray[np.uint8]:
    """RGB of a Pillow image: upright, and over white where it is transparent."""
    from PIL import Image as pillow
    from PIL import ImageOps

    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UsageError(f"{name}: {width} × {height} pixels, expected at least 1 × 1")
    if width * height > MAX_IMAGE_PIXELS:
        raise UsageError(f"{name}: {width} × {height} pixels are more than {MAX_IMAGE_PIXELS}, the limit")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever a decoder raises on a damaged file (half of Python's tree), in one line."""
    try:
        yield
    except EdgertError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise UsageError(f"{name}: damaged: {first or type(error).__name__}") from error


def _pillow() -> Any:
    """Pillow's module `Image`: an optional dependency, imported when the first picture comes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(f"images need Pillow: pip install edgert[media] ({error})") from error
    return Image
