"""What becomes of sound: from a folder's feature extractor to `AudioSpec`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgert.converters.media.families import Hearing
from edgert.converters.media.folders import Names
from transformers import PretrainedConfig

from edgert.errors import ConversionError
from edgert.media.spec import AudioSpec

TOWER = "audio"
_GEMMA4_TOKENS = 750  # audio_seq_length of Gemma4Processor: 30 s


def audio_spec(
    folder: Path, config: PretrainedConfig, hearing: Hearing, settings: dict[str, Any], names: Names
) -> AudioSpec:
    """How sound gets into the tower, and its rows into a prompt.

    Args:
        settings: of the feature extractor; what it leaves out has the default of its class in transformers.

    Raises:
        ConversionError: a number is none that is supported.
    """
    token = names.number("audio_token")
    around = names.sequence(hearing.text, [-1])
    middle = around.index(-1)
    try:
        fields = _whisper(settings) if hearing.kind == "whisper" else _gemma4(settings)
        spec = AudioSpec(
            tower=TOWER,
            placeholder=token,
            token=token,
            prefix=tuple(around[:middle]),
            suffix=tuple(around[middle + 1 :]),
            kind=hearing.kind,
            **{**fields, **hearing.settings(config)},
        )
        spec.check()
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{folder}: {error}") from error
    return spec


def _whisper(settings: dict[str, Any]) -> dict[str, Any]:
    """As WhisperFeatureExtractor."""
    n_fft = int(settings.get("n_fft", 400))
    return {
        "sampling_rate": int(settings.get("sampling_rate", 16_000)),
        "mels": int(settings.get("feature_size", 80)),
        "n_fft": n_fft,
        "window": n_fft,
        "hop": int(settings.get("hop_length", 160)),
    }


def _gemma4(settings: dict[str, Any]) -> dict[str, Any]:
    """As Gemma4AudioFeatureExtractor."""
    rate = int(settings.get("sampling_rate", 16_000))
    window = round(rate * float(settings.get("frame_length_ms", 20.0)) / 1000)
    for name, only in (("min_frequency", 0.0), ("dither", 0.0), ("input_scale_factor", 1.0)):
        if float(settings.get(name, only)) != only:
            raise ValueError(f"{name} is {settings[name]}, expected {only}")
    return {
        "sampling_rate": rate,
        "mels": int(settings.get("feature_size", 128)),
        "n_fft": 2 ** math.ceil(math.log2(window)) * (2 if settings.get("fft_overdrive") else 1),
        "window": window,
        "hop": round(rate * float(settings.get("hop_length_ms", 10.0)) / 1000),
        "max_frequency": float(settings.get("max_frequency", 8000.0)),
        "frames": 4 * int(settings.get("audio_seq_length", _GEMMA4_TOKENS)),
        "floor": float(settings.get("mel_floor", 1e-3)),
        "preemphasis": float(settings.get("preemphasis", 0.0)),
        "band_mean": tuple(map(float, settings.get("per_bin_mean") or ())),
        "band_std": tuple(map(float, settings.get("per_bin_stddev") or ())),
    }
