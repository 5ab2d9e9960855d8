"""Sound: from a WAV file or an array to samples, and to what an audio tower takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.media import mel, wav
from edgert.media.limits import MAX_AUDIO_BYTES, MAX_AUDIO_CHANNELS, MAX_AUDIO_SECONDS, read_bytes
from edgert.media.resampling import resample
from edgert.media.spec import AudioSpec

FULL_SCALE = 32_768.0  # what samples may be at most; they should be within 1, and integers taken for floats are not


def read_audio(
    source: str | Path | bytes | tuple[NDArray[Any], int], rate: int, *, seconds: float = MAX_AUDIO_SECONDS
) -> NDArray[np.float32]:
    """Samples of a sound at a rate, all channels mixed into one.

    Args:
        source: a WAV file or its bytes (PCM of 8, 16, 24 or 32 bits, float of 32 or 64), or an array [samples] or
            [samples, channels] with its rate in Hz; f32 and f64 within −1 to 1, int16 at full scale.
        rate: in Hz, what the tower takes.
        seconds: at most; longer sound is refused before it is resampled.

    Returns:
        f32 [samples].

    Raises:
        UsageError: it is none of these, damaged, empty, not finite, or more than 64 MiB, 600 seconds, 8 channels, or
            not of 1,000 to 384,000 samples a second.
    """
    if isinstance(source, tuple):
        samples, given, name = *_array(source), "audio"
    elif isinstance(source, (str, Path, bytes, bytearray)):
        raw, name = read_bytes(bytes(source) if isinstance(source, bytearray) else source, "audio", MAX_AUDIO_BYTES)
        samples, given = wav.decode(raw, name)
    else:
        raise UsageError(f"audio: {type(source).__name__}, expected a path, bytes or (samples, rate)")
    if not len(samples):
        raise UsageError(f"{name}: no samples")
    if len(samples) > (limit := min(seconds, MAX_AUDIO_SECONDS)) * given:
        raise UsageError(f"{name}: {len(samples) / given:.1f} s, the limit is {limit:g} s")
    mono = samples.mean(axis=1, dtype=np.float32)
    peak = float(np.abs(mono).max())
    if not peak <= FULL_SCALE:  # NaN is not
        raise UsageError(f"{name}: a sample is {peak:g}, expected −1 to 1 and at most {FULL_SCALE:g}")
    return resample(mono, given, rate)


def prepare_audio(samples: NDArray[np.float32], spec: AudioSpec) -> tuple[dict[str, NDArray[Any]], int]:
    """What an audio tower takes for a sound, and how many tokens stand for it.

    Args:
        samples: [n] at `spec.sampling_rate`, as of `read_audio`.

    Returns:
        `input_features`, f32 [pieces, mels, frames], and `feature_mask`, f32 [pieces, frames], 1 for frames of the
        sound and 0 for what fills up; one piece but for families that cut (`spec.max_pieces`). The tower takes a piece
        at a time. Of its rows, one after another, the first so many as there are tokens count.

    Raises:
        UsageError: the sound is too long for the tower, or too short for one token.
    """
    frames = mel.frames(len(samples), spec)
    pieces = max(1, -(-frames // spec.frames))
    if pieces > spec.max_pieces:
        seconds = len(samples) / spec.sampling_rate
        raise UsageError(f"audio: {seconds:.2f} s, this model takes up to {spec.seconds:.2f} s")
    tokens = spec.tokens(spec.frames) * pieces if spec.whole else spec.tokens(frames)
    if frames < 1 or tokens < 1:
        raise UsageError(f"audio: {len(samples)} samples at {spec.sampling_rate} Hz are too short for one token")
    features = mel.features(samples, spec, pieces * spec.frames)
    mask = (np.arange(pieces * spec.frames) < frames).astype(np.float32)
    inputs = {
        "input_features": features.reshape(spec.mels, pieces, spec.frames).transpose(1, 0, 2),
        "feature_mask": mask.reshape(pieces, spec.frames),
    }
    return {name: np.ascontiguousarray(value) for name, value in inputs.items()}, tokens


def _array(source: tuple[NDArray[Any], int]) -> tuple[NDArray[np.float32], int]:
    """[samples, channels] and rate of what was given."""
    if len(source) != 2 or not isinstance(source[0], np.ndarray):
        raise UsageError("audio: a tuple that is not (array, rate)")
    samples, rate = source
    if not isinstance(rate, (int, np.integer)) or isinstance(rate, bool):
        raise UsageError(f"audio: the rate is {rate!r}, expected samples a second, an integer")
    wav.check_rate(int(rate), "audio")
    if samples.ndim not in (1, 2) or samples.dtype not in (np.float32, np.float64, np.int16):
        kind = f"{samples.dtype} {list(samples.shape)}"
        raise UsageError(f"audio: an array of {kind}, expected f32, f64 or int16 [samples] or [samples, channels]")
    samples = samples[:, None] if samples.ndim == 1 else samples
    if not 1 <= samples.shape[1] <= MAX_AUDIO_CHANNELS:
        raise UsageError(f"audio: {samples.shape[1]} channels, expected 1 to {MAX_AUDIO_CHANNELS}")
    scale = 32_768.0 if samples.dtype == np.int16 else 1.0
    with np.errstate(over="ignore"):  # an infinity is refused like the others
        return samples.astype(np.float32) / np.float32(scale), int(rate)
