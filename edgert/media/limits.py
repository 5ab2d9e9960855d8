"""How much one picture or one sound may be; what is beyond is refused before it is decoded."""

from __future__ import annotations

from pathlib import Path

from edgert.errors import UsageError

MAX_IMAGE_BYTES = 32 * 1024 * 1024
MAX_IMAGE_PIXELS = 50_000_000
MAX_AUDIO_BYTES = 64 * 1024 * 1024
MAX_AUDIO_SECONDS = 600.0
MAX_AUDIO_CHANNELS = 8
MIN_AUDIO_RATE, MAX_AUDIO_RATE = 1_000, 384_000


def read_bytes(source: str | Path | bytes, what: str, limit: int) -> tuple[bytes, str]:
    """The bytes of a file, or those given, and how messages call them.

    Raises:
        UsageError: the file cannot be read, or there are more bytes than the limit.
    """
    if isinstance(source, bytes):
        raw, name = source, what
    else:
        name = f"{what} {source}"
        if isinstance(source, str) and "://" in source[:16]:
            raise UsageError(f"{name}: nothing is fetched from a URL; expected a file")
        try:
            with Path(source).open("rb") as stream:
                raw = stream.read(limit + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > limit:
        raise UsageError(f"{name}: more than {limit} bytes, the limit")
    return raw, name
