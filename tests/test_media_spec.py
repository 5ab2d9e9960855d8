"""media.json is what somebody else wrote: each field within its limits, or a message that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import BundleError, BundleVersionError
from edgert.media import AudioSpec, ImageSpec, MediaSpec, read

IMAGE = ImageSpec("vision", 7, (1, 7, 7, 7, 7, 2), 7, 448, 448, grid=(2, 2), bidirectional=True)
AUDIO = AudioSpec("audio", 8, 8, 3000, "whisper", prefix=(3,), suffix=(4,), subsampling=((3, 2, 1), (2, 2, 0)))
SPEC = MediaSpec(image=IMAGE, audio=AUDIO)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def written(content: Any) -> Path:
        path = tmp_path / "media.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def test_what_is_written_is_read_back(write: Callable[[Any], Path]) -> None:
    for spec in (SPEC, replace(SPEC, image=None), replace(SPEC, audio=None)):
        assert read(write(spec.to_json())) == spec


def test_tokens() -> None:
    assert IMAGE.tokens == 4
    assert [AUDIO.tokens(n) for n in (3000, 5, 4, 3, 1, 0)] == [750, 1, 1, 1, 0, 0]
    assert AUDIO.seconds == 30.0


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("image", "tower", "../../etc", "image: tower is '../../etc', expected up to 64 letters"),
        ("image", "tower", "", "image: tower is ''"),
        ("image", "height", 0, "image: height is 0, expected 1 to 4096"),
        ("image", "width", 10**9, "image: width is 1000000000, expected 1 to 4096"),
        ("image", "placeholder", -1, "image: placeholder is -1, expected 0 to"),
        ("image", "expansion", [1, 2], "image: expansion does not hold token 7"),
        ("image", "expansion", [7] * 65_537, "image: expansion has 65537 tokens, expected up to 65536"),
        ("image", "expansion", [7, 2**40], "image: expansion is 1099511627776, expected 0 to 2147483647"),
        ("image", "fit", "squeeze", "image: fit is 'squeeze'"),
        ("image", "resample", "hamming", "image: resample is 'hamming'"),
        ("image", "scale", 0.0, "image: scale is 0.0, expected 1e-06 to 1.0"),
        ("image", "scale", float("nan"), "image: scale is nan"),
        ("image", "mean", [0.5, 0.5], "image: mean has 2 values, expected 3"),
        ("image", "std", [1.0, 0.0, 1.0], "image: std is 0.0, expected 0.0001 to"),
        ("image", "pad_color", [0, 256, 0], "image: pad_color is 256, expected 0 to 255"),
        ("image", "grid", [3, 2], "image: grid is (3, 2), expected rows × columns of 4 tokens"),
        ("image", "grid", [4], "image: grid is (4,)"),
        ("image", "longest_edge", 5000, "image: longest_edge is 5000, expected 0 to 4096"),
        ("image", "colour", 1, "unknown field 'colour'"),
        ("audio", "kind", "mp3", "audio: kind is 'mp3'"),
        ("audio", "sampling_rate", 10, "audio: sampling_rate is 10, expected 1000 to 96000"),
        ("audio", "mels", 10**6, "audio: mels is 1000000, expected 1 to 512"),
        ("audio", "n_fft", 2**20, "audio: n_fft is 1048576, expected 16 to 16384"),
        ("audio", "window", 500, "audio: window is 500, expected 1 to 400"),
        ("audio", "window", 320, "audio: window is 320, expected n_fft, 400, for whisper"),
        ("audio", "hop", 0, "audio: hop is 0, expected 1 to 400"),
        ("audio", "max_frequency", 9000.0, "audio: max_frequency is 9000.0, expected 1.0 to 8000.0"),
        ("audio", "min_frequency", 8000.0, "audio: min_frequency is 8000.0"),
        ("audio", "frames", 10**7, "audio: frames is 10000000, expected 1 to 60000"),
        ("audio", "max_pieces", 2, "audio: max_pieces is 2, expected 1 where not the whole counts"),
        ("audio", "max_pieces", 65, "audio: max_pieces is 65, expected 1 to 64"),
        ("audio", "subsampling", [[3, 0, 1]], "audio: subsampling has (3, 0, 1), expected kernel and stride 1 to 64"),
        ("audio", "subsampling", [[3, 2]], "audio: subsampling has (3, 2)"),
        ("audio", "subsampling", [[64, 64, 0]] * 3, "audio: tokens of all frames is 0, expected 1 to"),
        ("audio", "floor", 0.0, "audio: floor is 0.0"),
        ("audio", "preemphasis", 2.0, "audio: preemphasis is 2.0, expected 0.0 to 1.0"),
        ("audio", "band_mean", [1.0], "audio: band_mean has 1 values, expected 80"),
        ("audio", "band_std", [0.0] * 80, "audio: band_std is 0.0"),
        ("audio", "placeholder", 7, "token 7 is the placeholder of images and of sound"),
    ],
)
def test_limits(part: str, field: str, value: Any, message: str, write: Callable[[Any], Path]) -> None:
    data = SPEC.to_json()
    data[part][field] = value
    with pytest.raises(BundleError) as caught:
        read(write(data))
    assert message in str(caught.value)
    assert "media.json" in str(caught.value)


def test_sound_beyond_ten_minutes(write: Callable[[Any], Path]) -> None:
    data = SPEC.to_json()
    data["audio"] |= {"frames": 60_000, "hop": 400, "subsampling": []}
    with pytest.raises(BundleError, match=r"hop / sampling_rate is 1500\.0, expected 0\.0 to 600"):
        read(write(data))


NO_SPECS = ["", "[]", "null", "{", "[" * 100_000, '{"version": "1"}', '{"version": 0.5}', " " * 5_000_000]


@pytest.mark.parametrize("text", NO_SPECS, ids=range(len(NO_SPECS)))
def test_files_that_are_none(text: str, write: Callable[[Any], Path]) -> None:
    with pytest.raises(BundleError, match=r"media\.json: [^\n]+\Z"):
        read(write(text))


def test_versions_and_missing_files(write: Callable[[Any], Path], tmp_path: Path) -> None:
    with pytest.raises(BundleVersionError, match="version 2 is newer than 1"):
        read(write({"version": 2, "video": {}}))
    with pytest.raises(BundleError, match=r"media\.json: media: version is 0, expected 1 to 1"):
        read(write({"version": 0}))
    with pytest.raises(BundleError, match="No such file"):
        read(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["image", "audio"]), st.data())
def test_hostile_fields(part: str, data: st.DataObject) -> None:
    """Whatever a field is: a message, or a spec that passes its own check."""
    content = SPEC.to_json()
    content[part][data.draw(st.sampled_from(sorted(content[part])))] = data.draw(JSON)
    try:
        spec = MediaSpec.from_json(content)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
        assert MediaSpec.from_json(spec.to_json()) == spec
    assert "\n" not in said
