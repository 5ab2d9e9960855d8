"""Sound: what is taken, what is refused, resampling, and the same numbers as the extractors of transformers."""

from __future__ import annotations

import io
import math
import re
import struct
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import media_processors
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.media import AudioSpec, prepare_audio, read_audio
from edgert.media.limits import MAX_AUDIO_BYTES
from edgert.media.resampling import resample

DOCS = Path(__file__).parents[1] / "docs" / "media.md"
FLOAT, PCM, EXTENSIBLE = 3, 1, 0xFFFE


def chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def wav(
    content: bytes, code: int = PCM, bits: int = 16, channels: int = 1, rate: int = 16_000, more: bytes = b""
) -> bytes:
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate, rate * block, block, bits) + more
    body = b"WAVE" + chunk(b"fmt ", form) + chunk(b"LIST", b"odd") + chunk(b"data", content)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def sound(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Tones that come and go over noise, at 16 kHz."""
    random = np.random.default_rng(seed)
    at = np.arange(int(seconds * 16_000)) / 16_000
    tones = sum(np.sin(2 * np.pi * f * at) * np.sin(np.pi * at * (i + 1)) ** 2 for i, f in enumerate((220, 740, 3100)))
    return (0.2 * tones + 0.01 * random.standard_normal(len(at))).astype(np.float32)


def promised() -> dict[str, float]:
    """The largest difference from each extractor, as docs/media.md says."""
    rows = re.findall(r"^\| `([^`]+)` \| `\w+FeatureExtractor`.*\| (\S+) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    return {name: float(value) for name, value in rows}


def test_the_documentation_names_every_extractor() -> None:
    assert list(promised()) == list(media_processors.SOUNDS)


@pytest.mark.parametrize("name", media_processors.SOUNDS)
def test_spectra_are_those_of_transformers(name: str) -> None:
    case = media_processors.SOUNDS[name]
    largest = 0.0
    for seed, seconds in enumerate((0.1, 1.0, 2.71)):
        samples = sound(seconds, seed)
        expected, frames = case.process(samples)
        inputs, tokens = prepare_audio(samples, case.spec)
        got, mask = inputs["input_features"], inputs["feature_mask"]
        assert got.shape == (1, case.spec.mels, case.spec.frames)
        assert got.dtype == mask.dtype == np.float32
        assert mask.tolist() == [[1.0] * frames + [0.0] * (case.spec.frames - frames)]
        assert tokens == case.spec.tokens(frames)
        if case.spec.kind == "whisper":
            largest = max(largest, float(np.abs(got[0] - expected).max()))
        else:
            largest = max(largest, float(np.abs(got[0, :, :frames] - expected[:, :frames]).max()))
            assert not got[0, :, frames:].any()
    assert largest <= promised()[name]


def test_tokens_are_counted_as_by_transformers() -> None:
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.models.phi4_multimodal.feature_extraction_phi4_multimodal import Phi4MultimodalFeatureExtractor

    gemma, phi = media_processors.SOUNDS["gemma4"].spec, media_processors.SOUNDS["phi4_multimodal"].spec
    counter = object.__new__(Gemma4Processor)
    counter.audio_seq_length = 750
    extractor = Phi4MultimodalFeatureExtractor()
    for samples in (800, 3_999, 4_000, 16_161, 47_313):
        silence = np.zeros(samples, np.float32)
        assert prepare_audio(silence, gemma)[1] == counter._compute_audio_num_tokens(silence, 16_000)
        assert [prepare_audio(silence, phi)[1]] == extractor(silence, sampling_rate=16_000)[
            "audio_embed_sizes"
        ].tolist()


def test_long_sound_in_pieces() -> None:
    plain = media_processors.SOUNDS["whisper"].spec
    cut = replace(plain, frames=100, max_pieces=3, whole=True)
    samples = sound(1.5)
    inputs, tokens = prepare_audio(samples, cut)
    together, _ = prepare_audio(samples, replace(plain, frames=200))
    assert inputs["input_features"].shape == (2, 80, 100)
    np.testing.assert_array_equal(np.concatenate(list(inputs["input_features"]), 1), together["input_features"][0])
    assert inputs["feature_mask"].sum(axis=1).tolist() == [100, 50]
    assert tokens == 2 * 50
    with pytest.raises(UsageError, match=r"audio: 3\.01 s, this model takes up to 3\.00 s"):
        prepare_audio(np.zeros(48_160, np.float32), cut)


@pytest.mark.parametrize("name", ["phi4_multimodal", "gemma4"])
def test_too_short_and_too_long(name: str) -> None:
    spec = media_processors.SOUNDS[name].spec
    with pytest.raises(UsageError, match="audio: 100 samples at 16000 Hz are too short for one token"):
        prepare_audio(np.zeros(100, np.float32), spec)
    with pytest.raises(UsageError, match=r"audio: 4\.50 s, this model takes up to 4\.00 s"):
        prepare_audio(np.zeros(72_000, np.float32), spec)


@pytest.mark.parametrize(
    ("code", "bits", "raw", "expected"),
    [
        (PCM, 8, bytes([0, 128, 192]), [-1.0, 0.0, 0.5]),
        (PCM, 16, struct.pack("<3h", -32768, 0, 16384), [-1.0, 0.0, 0.5]),
        (PCM, 24, b"\x00\x00\x80" + b"\0\0\0" + b"\x00\x00\x40", [-1.0, 0.0, 0.5]),
        (PCM, 32, struct.pack("<3i", -(2**31), 0, 2**30), [-1.0, 0.0, 0.5]),
        (FLOAT, 32, struct.pack("<3f", -1, 0, 1.5), [-1.0, 0.0, 1.5]),
        (FLOAT, 64, struct.pack("<3d", -1, 0, 1.5), [-1.0, 0.0, 1.5]),
    ],
)
def test_encodings(code: int, bits: int, raw: bytes, expected: list[float], tmp_path: Path) -> None:
    data = wav(raw, code, bits)
    path = tmp_path / "sound.wav"
    path.write_bytes(data)
    guid = struct.pack("<HHIH", 22, bits, 0, code) + bytes.fromhex("000000001000800000aa00389b71")
    for source in (data, bytearray(data), path, str(path), wav(raw, EXTENSIBLE, bits, more=guid)):
        samples = read_audio(source, 16_000)
        assert samples.dtype == np.float32
        assert samples.tolist() == expected


def test_what_the_standard_library_writes() -> None:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(struct.pack("<4h", 1000, 3000, -4, 0))
    assert (read_audio(stream.getvalue(), 16_000) * 32768).tolist() == [2000, -2]


def test_length_that_a_pipe_leaves_open() -> None:
    data = wav(struct.pack("<2h", 16384, -16384))
    assert read_audio(data[:-8] + b"\xff\xff\xff\xff" + data[-4:], 16_000).tolist() == [0.5, -0.5]


def test_arrays() -> None:
    for array in (np.array([0.5, -0.5]), np.array([0.5, -0.5], np.float32), np.array([16384, -16384], np.int16)):
        assert read_audio((array, 16_000), 16_000).tolist() == [0.5, -0.5]
    assert read_audio((np.array([[0.5, 0.0], [1.0, 0.5]]), 16_000), 16_000).tolist() == [0.25, 0.75]
    assert len(read_audio((np.zeros(4410), 44_100), 16_000)) == 1600


FINE = struct.pack("<2h", 0, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "audio: not a WAV file"),
        (b"OggS" + b"\0" * 40, "audio: not a WAV file"),
        (wav(FINE)[:-1], "audio: truncated: 3 of 4 bytes of samples"),
        (wav(FINE)[:30], "audio: damaged"),
        (wav(b""), "audio: no samples"),
        (wav(FINE, code=85), "audio: encoding 85 of 16 bits"),
        (wav(FINE, bits=12), "audio: encoding 1 of 12 bits"),
        (wav(FINE, channels=9), "audio: 9 channels, expected 1 to 8"),
        (wav(FINE, channels=0), "audio: 0 channels, expected 1 to 8"),
        (wav(FINE, rate=999), "audio: 999 samples a second, expected 1000 to 384000"),
        (wav(FINE, rate=384_001), "audio: 384001 samples a second"),
        (wav(b"\0" * 1_300_000, rate=1_000), "audio: 650.0 s, the limit is 600 s"),
        (wav(struct.pack("<f", math.nan), FLOAT, 32), "audio: a sample is nan"),
        (wav(struct.pack("<d", 1e300), FLOAT, 64), "audio: a sample is inf"),
        (b"\0" * (MAX_AUDIO_BYTES + 1), f"audio: more than {MAX_AUDIO_BYTES} bytes, the limit"),
        (Path("no-such-sound"), "audio no-such-sound: No such file"),
        ((np.zeros(3, np.int64), 16_000), "audio: an array of int64 [3]"),
        ((np.zeros((2, 2, 2)), 16_000), "audio: an array of float64 [2, 2, 2]"),
        ((np.zeros((4, 9)), 16_000), "audio: 9 channels"),
        ((np.zeros(3), 16_000.0), "audio: the rate is 16000.0, expected samples a second, an integer"),
        ((np.zeros(3), 10), "audio: 10 samples a second"),
        ((np.zeros(0), 16_000), "audio: no samples"),
        ((np.zeros((0, 0)), 16_000), "audio: 0 channels"),
        ((np.full(3, 1e5), 16_000), "audio: a sample is 100000"),
        (([0.0], 16_000), "audio: a tuple that is not (array, rate)"),
        (7, "audio: int, expected a path, bytes or (samples, rate)"),
    ],
    ids=lambda value: value[7:40] if isinstance(value, str) else "",
)
def test_refusals(source: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_audio(source, 16_000)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(PCM, 8), (PCM, 16), (PCM, 24), (FLOAT, 32), (EXTENSIBLE, 16)]),
    st.binary(max_size=64),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6),
    st.integers(0, 140),
)
def test_damaged_sound(form: tuple[int, int], content: bytes, changes: list[tuple[int, int]], end: int) -> None:
    raw = bytearray(wav(content, *form))
    for at, value in changes:
        raw[at % len(raw)] = value
    try:
        samples = read_audio(bytes(raw[:end]), 8_000)
    except UsageError as error:
        said = str(error)
    else:
        said = ""
        assert np.isfinite(samples).all()
    assert "\n" not in said


RATES = ((44_100, 16_000), (48_000, 16_000), (22_050, 16_000), (8_000, 16_000), (11_025, 16_000), (16_000, 24_000))


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampling(source: int, target: int) -> None:
    """Against the exact periodic resampling of a band-limited second; SciPy's polyphase filter errs more."""
    random = np.random.default_rng(source)
    spectrum = np.fft.rfft(random.standard_normal(source))
    spectrum[int(0.8 * min(source, target) / 2) :] = 0
    signal = np.fft.irfft(spectrum, source)
    signal /= np.abs(signal).max()
    got = resample(signal.astype(np.float32), source, target)
    exact = scipy.signal.resample(signal, target)
    inner = slice(400, -400)  # the second is not periodic for the filter

    def decibels(error: NDArray[np.float64]) -> float:
        return 10 * math.log10((error[inner] ** 2).mean() / (exact[inner] ** 2).mean())

    common = math.gcd(source, target)
    polyphase = scipy.signal.resample_poly(signal, target // common, source // common)
    assert len(got) == len(polyphase) == target
    assert decibels(got - exact) < -105
    assert -65 < decibels(polyphase - exact) < -55


@pytest.mark.parametrize("frequency", [8_000, 8_300, 12_000, 20_000])
def test_what_the_lower_rate_cannot_carry_is_gone(frequency: int) -> None:
    tone = np.sin(2 * np.pi * frequency * np.arange(48_000) / 48_000 + 0.3).astype(np.float32)
    assert np.abs(resample(tone, 48_000, 16_000)[400:-400]).max() < 1.7e-5  # 95 dB


def test_rates_without_a_common_divisor() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(9_973) / 9_973).astype(np.float32)
    got = resample(tone, 9_973, 16_001)
    assert len(got) == 16_001
    np.testing.assert_allclose(got[400:-400], np.sin(2 * np.pi * 440 * np.arange(16_001) / 16_001)[400:-400], atol=1e-4)


def test_the_longest_sound_of_a_spec() -> None:
    assert AudioSpec("a", 1, 2, 3000, "whisper", max_pieces=2, whole=True).seconds == 60.0
