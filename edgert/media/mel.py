"""Log-mel spectra, each as the feature extractor of its family in transformers computes it.

`whisper`: WhisperFeatureExtractor (Whisper, Qwen2-Audio, Voxtral). Windows centred on their frame, a Hann window,
    power, Slaney's mel scale; the decimal logarithm, at most 8 below the loudest, (x + 4) / 4.
`phi4`: Phi4MultimodalFeatureExtractor. Windows from the first sample on, pre-emphasis in each, a symmetric Hamming
    window, samples as 16-bit integers, power, Kaldi's mel scale with triangles in mels; the natural logarithm, floored.
`gemma4`: Gemma4AudioFeatureExtractor. Half a window of silence first, pre-emphasis as HTK does it, a Hann window,
    magnitude, HTK's mel scale; the natural logarithm of it plus a floor.

Computed in f64, so that it agrees with them within the rounding of those that use f32.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgert.media.spec import AudioSpec

BLOCK = 2**20  # values of windows at a time

Array = NDArray[np.float64]


def frames(samples: int, spec: AudioSpec) -> int:
    """How many frames of the spectrum are of the sound, as the family counts them."""
    if spec.kind == "whisper":
        return -(-samples // spec.hop)
    if spec.kind == "phi4":
        return max(0, (samples - spec.window) // spec.hop + 1)
    return max(0, (samples + spec.window // 2 - spec.window - 1) // spec.hop + 1)


def features(samples: NDArray[np.float32], spec: AudioSpec, length: int) -> NDArray[np.float32]:
    """The log-mel spectrum.

    Args:
        samples: [n], mono at the spec's rate.
        length: frames of the result: what is behind the sound is silence for `whisper`, zero for the others.

    Returns:
        [mels, length].
    """
    if spec.kind == "whisper":
        return _whisper(samples, spec, length)
    result = np.zeros((spec.mels, length), np.float32)
    log = _phi4(samples, spec) if spec.kind == "phi4" else _gemma4(samples, spec)
    result[:, : len(log)] = log.T
    return result


def _whisper(samples: NDArray[np.float32], spec: AudioSpec, length: int) -> NDArray[np.float32]:
    silence = np.pad(samples, (0, length * spec.hop - len(samples)))
    centred = np.pad(silence, spec.n_fft // 2, mode="reflect")
    energy = _spectrum(centred, length, spec.n_fft, spec, _hann(spec.n_fft), power=2)
    log = np.log10(np.maximum(energy, spec.floor))
    scaled: Array = (np.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    return scaled.astype(np.float32).T


def _phi4(samples: NDArray[np.float32], spec: AudioSpec) -> Array:
    count = frames(len(samples), spec)
    energy = _spectrum(samples, count, spec.window, spec, np.hamming(spec.window), power=2, scale=32_768.0)
    return np.log(np.maximum(energy, spec.floor))


def _gemma4(samples: NDArray[np.float32], spec: AudioSpec) -> Array:
    count = frames(len(samples), spec)
    late = np.pad(samples, (spec.window // 2, 0))
    log = np.log(_spectrum(late, count, spec.window, spec, _hann(spec.window), power=1) + spec.floor)
    if spec.band_mean:
        log = log - np.array(spec.band_mean)
    if spec.band_std:
        log = log / np.array(spec.band_std)
    return log


def _spectrum(
    samples: NDArray[np.float32], count: int, width: int, spec: AudioSpec, window: Array, power: int, scale: float = 1.0
) -> Array:
    """Energy of each band, [count, mels], of the windows that begin at every hop.

    Args:
        width: samples of a window.
        power: of the magnitude that the bands add up.
        scale: what samples are multiplied with.
    """
    windows = np.lib.stride_tricks.sliding_window_view(samples, width)[:: spec.hop]
    bands = _bands(spec)
    result = np.empty((count, spec.mels))
    step = max(1, BLOCK // spec.n_fft)
    for start in range(0, count, step):
        block = windows[start : min(count, start + step)].astype(np.float64)
        emphasized = _emphasize(block, spec) * scale
        magnitude = np.abs(np.fft.rfft(emphasized * window, spec.n_fft))
        result[start : start + len(block)] = magnitude**power @ bands
    return result


def _emphasize(block: Array, spec: AudioSpec) -> Array:
    """Each sample less a part of the one before it in its window; the first has itself for that."""
    if not spec.preemphasis:
        return block
    before = np.roll(block, 1, axis=1)
    before[:, 0] = block[:, 0]
    return block - spec.preemphasis * before


def _hann(width: int) -> Array:
    """The periodic one: its next value would be the first again."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)


@lru_cache(maxsize=8)
def _bands(spec: AudioSpec) -> Array:
    """Triangular filters, [n_fft / 2 + 1, mels], after `mel_filter_bank` of transformers (from torchaudio, librosa)."""
    to_mels, to_hertz = (_slaney, _from_slaney) if spec.kind == "whisper" else (_htk, _from_htk)
    ends = to_mels(np.array([spec.min_frequency, spec.max_frequency]))
    corners = np.linspace(ends[0], ends[1], spec.mels + 2)
    bins = np.linspace(0.0, spec.sampling_rate // 2, spec.n_fft // 2 + 1)
    if spec.kind == "phi4":
        bins = to_mels(bins)
    else:
        corners = to_hertz(corners)
    widths = np.diff(corners)
    distance = corners[None, :] - bins[:, None]
    filters: Array = np.maximum(0.0, np.minimum(-distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]))
    if spec.kind == "whisper":  # Slaney's: each of the same area
        filters = filters * (2.0 / (corners[2:] - corners[:-2]))
    return filters


def _htk(hertz: Array) -> Array:
    """HTK's mel scale; Kaldi's is the same times a constant close to 1, which cancels."""
    return 2595.0 * np.log10(1.0 + hertz / 700.0)


def _from_htk(mels: Array) -> Array:
    return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)


def _slaney(hertz: Array) -> Array:
    """Slaney's mel scale (Auditory Toolbox, 1998): linear up to 1,000 Hz, which is 15, logarithmic above."""
    return np.where(hertz < 1000.0, hertz * 3 / 200, 15.0 + np.log(np.maximum(hertz, 1.0) / 1000.0) * 27 / np.log(6.4))


def _from_slaney(mels: Array) -> Array:
    return np.where(mels < 15.0, mels * 200 / 3, 1000.0 * np.exp((mels - 15.0) * np.log(6.4) / 27))
