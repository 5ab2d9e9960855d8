"""Pictures: what is taken, what is refused, and the same numbers as the processors of transformers."""

from __future__ import annotations

import base64
import io
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import media_processors
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgert.errors import MissingDependencyError, UsageError
from edgert.media import ImageSpec, decode_data_url, prepare_image, read_image
from edgert.media.images import FORMATS
from edgert.media.limits import MAX_IMAGE_BYTES

DOCS = Path(__file__).parents[1] / "docs" / "media.md"
SIZES = ((480, 640), (333, 217), (37, 52), (900, 1300))


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Large spots and fine noise: filters differ on both."""
    random = np.random.default_rng(seed)
    spots = random.integers(0, 226, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC))
    return smooth // 2 + random.integers(0, 128, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def spec(height: int = 8, width: int = 8, **changes: Any) -> ImageSpec:
    return ImageSpec(tower="vision", placeholder=1, expansion=(2,), token=2, height=height, width=width, **changes)


def promised() -> dict[str, float]:
    """The largest difference from each processor, as docs/media.md says."""
    rows = re.findall(r"^\| `(\w+)` \| `\w+ImageProcessorPil` \|.*\| (\S+) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    return {name: float(value) for name, value in rows}


def test_the_documentation_names_every_processor() -> None:
    assert list(promised()) == list(media_processors.PICTURES)


@pytest.mark.parametrize("name", media_processors.PICTURES)
def test_pixels_are_those_of_transformers(name: str) -> None:
    largest = 0.0
    for seed, (height, width) in enumerate(SIZES):
        pixels = picture(height, width, seed)
        expected, described = media_processors.PICTURES[name].both(pixels)
        got = prepare_image(pixels, described)["pixel_values"]
        assert got.dtype == np.float32
        largest = max(largest, float(np.abs(got[0] - expected).max()))
    assert largest <= promised()[name]


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, tmp_path: Path) -> None:
    image = Image.fromarray(picture(40, 60))
    raw = encoded(image, form)
    got = read_image(raw)
    assert got.shape == (40, 60, 3)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
    if form in ("PNG", "BMP"):
        np.testing.assert_array_equal(got, np.asarray(image))
    path = tmp_path / "picture"
    path.write_bytes(raw)
    for source in (path, str(path), bytearray(raw), Image.open(path)):
        np.testing.assert_array_equal(read_image(source), got)


def test_arrays() -> None:
    pixels = picture(5, 7)
    np.testing.assert_array_equal(read_image(pixels), pixels)
    np.testing.assert_array_equal(read_image(pixels[..., 0])[..., 2], pixels[..., 0])
    opaque = np.dstack([pixels, np.full((5, 7), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(opaque), pixels)


def test_orientation_of_exif() -> None:
    image = Image.fromarray(picture(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    raw = encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(raw), np.rot90(np.asarray(image), -1))


def test_transparency_lies_over_white() -> None:
    image = Image.fromarray(np.zeros((2, 2, 4), np.uint8))
    image.putpixel((0, 0), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 51))
    got = read_image(encoded(image, "PNG"))
    assert got.tolist() == [[[10, 20, 30], [204, 204, 204]], [[255] * 3, [255] * 3]]
    palette = encoded(image.convert("P"), "PNG", transparency=0)
    assert (read_image(palette)[1] == 255).all()


def test_sixteen_bits_keep_their_scale() -> None:
    image = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert read_image(encoded(image, "PNG"))[0, :, 0].tolist() == [0, 0x12, 0xFF]


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    for form in ("GIF", "WEBP"):
        raw = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        assert (read_image(raw) == (255, 0, 0)).all(), form


def bomb() -> bytes:
    """A PNG of few bytes that says it has 30,000 × 30,000 pixels."""
    raw = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    raw[16:24] = (30_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "image: not a picture in one of PNG, JPEG, WEBP, BMP, GIF"),
        (b"<svg/>", "image: not a picture"),
        (encoded(Image.new("RGB", (2, 2)), "TIFF"), "image: not a picture"),
        (encoded(Image.new("RGB", (2, 2)), "PPM"), "image: not a picture"),
        (b"\0" * (MAX_IMAGE_BYTES + 1), f"image: more than {MAX_IMAGE_BYTES} bytes, the limit"),
        (bomb(), "more than 50000000"),
        (np.zeros((2, 2, 3), np.float32), "image: an array of float32 [2, 2, 3], expected uint8"),
        (np.zeros((2, 2, 2), np.uint8), "image: an array of uint8 [2, 2, 2], expected uint8"),
        (np.zeros((0, 2, 3), np.uint8), "image: 2 × 0 pixels, expected at least 1 × 1"),
        (np.broadcast_to(np.uint8(0), (10_000, 5_001, 3)), "image: 5001 × 10000 pixels are more than 50000000"),
        (Path("no-such-picture"), "image no-such-picture: No such file"),
        (
            "https://example.com/a.png",
            "image https://example.com/a.png: nothing is fetched from a URL; expected a file",
        ),
        ("nul\0byte", "image nul\0byte: "),
        (7, "image: int, expected a path, bytes, a Pillow image or an array"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refusals(source: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_image(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files_are_refused_in_one_line(form: str) -> None:
    raw = encoded(Image.fromarray(picture(64, 64)), form)
    with pytest.raises(UsageError, match=r"\Aimage: [^\n]*\Z"):
        read_image(raw[: len(raw) // 2])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture with some bytes changed, cut off, or put in."""
    form = draw(st.sampled_from(FORMATS))
    exif = {"exif": b"Exif\0\0MM\0*" + b"\0" * 8} if form in ("PNG", "JPEG", "WEBP") else {}
    raw = bytearray(encoded(Image.fromarray(picture(16, 16)), form, **exif))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=8)):
        raw[at % len(raw)] = value
    inserted = draw(st.binary(max_size=16))
    place = draw(st.integers(0, len(raw)))
    return bytes(raw[:place]) + inserted + bytes(raw[place : draw(st.integers(place, len(raw)))])


@settings(max_examples=150, deadline=None)
@given(st.one_of(damaged(), st.binary(max_size=200)))
def test_damaged_pictures(raw: bytes) -> None:
    try:
        pixels = read_image(raw)
    except UsageError as error:
        said = str(error)
    else:
        said = ""
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
    assert "\n" not in said


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(2, 2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    np.testing.assert_array_equal(read_image(pixels), pixels)
    with pytest.raises(MissingDependencyError, match=r"pip install edgert\[media\]"):
        read_image(b"x")
    with pytest.raises(MissingDependencyError, match="Pillow"):
        prepare_image(pixels, spec())


def test_what_pads() -> None:
    plain = {"scale": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "pad_color": (1, 2, 3)}
    pixels = np.full((4, 8, 3), 9, np.uint8)
    middle = prepare_image(pixels, spec(fit="pad", **plain))["pixel_values"][0]
    assert middle.shape == (3, 8, 8)
    assert middle[:, 1].tolist() == [[1] * 8, [2] * 8, [3] * 8]
    assert (middle[:, 2:6] == 9).all()
    assert (middle[1, 6:] == 2).all()
    corner = prepare_image(pixels, spec(fit="pad", pad_at="corner", **plain))["pixel_values"][0]
    assert (corner[:, :4] == 9).all()
    assert (corner[2, 4:] == 3).all()


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (50_000, 3)])
def test_odd_shapes_cost_no_more(fit: Any, size: tuple[int, int]) -> None:
    values = prepare_image(np.full((*size, 3), 255, np.uint8), spec(32, 48, fit=fit, longest_edge=100))["pixel_values"]
    assert values.shape == (1, 3, 32, 48)
    assert values.max() == 1.0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/cat.png", "'https' is refused: only data: URLs"),
        ("file:///etc/passwd", "'file' is refused"),
        ("cat.png", "'cat.png' is refused"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png," + "A" * 9, "is not in base64"),
        ("data:image/png;base64,@@@@", "url: no base64"),
        ("data:;base64,QUJ", "url: no base64"),
        ("data:" + ";" * 300 + ",", "no comma within 256"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        decode_data_url(url)


def test_data_urls() -> None:
    raw = encoded(Image.new("RGB", (2, 3), "red"), "PNG")
    for head in ("data:image/png;base64,", "DATA:;base64,", "data:image/png;charset=x;BASE64,"):
        assert decode_data_url(head + base64.b64encode(raw).decode()) == raw


def test_data_urls_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgert.media import dataurl

    monkeypatch.setattr(dataurl, "MAX_BYTES", 30)
    with pytest.raises(UsageError, match="the limit is 30 bytes"):
        decode_data_url("data:;base64," + "A" * 48)
