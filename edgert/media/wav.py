"""WAV files, with the standard library: PCM of 8 to 32 bits and floating point."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.media.limits import MAX_AUDIO_CHANNELS, MAX_AUDIO_RATE, MIN_AUDIO_RATE

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
# The rest of a sub-format's GUID, after the two bytes of its code (Microsoft, "Multiple channel audio data and WAVE
# files").
GUID = bytes.fromhex("000000001000800000aa00389b71")
UNKNOWN_SIZE = 0xFFFFFFFF  # what is written to a pipe, where nobody can go back to fill it in


def decode(data: bytes, name: str) -> tuple[NDArray[np.float32], int]:
    """Samples and rate of a WAV file.

    Args:
        name: what messages call it.

    Returns:
        f32 [samples, channels], full scale −1 to 1, and the sampling rate in Hz.

    Raises:
        UsageError: no WAV file, another encoding, a rate or a number of channels out of their limits, or truncated.
    """
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UsageError(f"{name}: not a WAV file")
    form: tuple[int, int, int, int] | None = None
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if kind == b"fmt ":
            form = _format(data[at : at + min(size, 40)], name)
        elif kind == b"data":
            if form is None:
                raise UsageError(f"{name}: damaged: samples before their format")
            if size == UNKNOWN_SIZE:
                size = len(data) - at
            elif size > len(data) - at:
                raise UsageError(f"{name}: truncated: {len(data) - at} of {size} bytes of samples")
            code, channels, rate, bits = form
            width = channels * bits // 8
            samples = _samples(data[at : at + size // width * width], code, bits)
            return samples.reshape(-1, channels), rate
        at += size + size % 2
    raise UsageError(f"{name}: damaged: no samples")


def _format(chunk: bytes, name: str) -> tuple[int, int, int, int]:
    """Code of the encoding, channels, rate and bits a sample."""
    if len(chunk) < 16:
        raise UsageError(f"{name}: damaged: its format has {len(chunk)} bytes, expected 16")
    code, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", chunk)
    if code == EXTENSIBLE and len(chunk) >= 40 and chunk[26:40] == GUID:
        code = int.from_bytes(chunk[24:26], "little")
    if (code, bits) not in {(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)}:
        raise UsageError(f"{name}: encoding {code} of {bits} bits, expected PCM of 8, 16, 24, 32 or float of 32, 64")
    check_rate(rate, name)
    if not 1 <= channels <= MAX_AUDIO_CHANNELS:
        raise UsageError(f"{name}: {channels} channels, expected 1 to {MAX_AUDIO_CHANNELS}")
    if block != channels * bits // 8:
        raise UsageError(f"{name}: damaged: {block} bytes a frame, expected {channels * bits // 8}")
    return code, channels, rate, bits


def check_rate(rate: int, name: str) -> None:
    """Raise `UsageError` for a sampling rate that no sound has."""
    if not MIN_AUDIO_RATE <= rate <= MAX_AUDIO_RATE:
        raise UsageError(f"{name}: {rate} samples a second, expected {MIN_AUDIO_RATE} to {MAX_AUDIO_RATE}")


def _samples(raw: bytes, code: int, bits: int) -> NDArray[np.float32]:
    if code == FLOAT:
        with np.errstate(over="ignore"):  # an infinity is refused like the others
            return np.frombuffer(raw, f"<f{bits // 8}").astype(np.float32)
    if bits == 8:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
    if bits == 24:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2.0**31)
    return np.frombuffer(raw, f"<i{bits // 8}").astype(np.float32) / np.float32(2.0 ** (bits - 1))
