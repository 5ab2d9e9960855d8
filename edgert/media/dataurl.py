"""`data:` URLs, the only ones that edgert takes: whatever else a URL names is never fetched."""

from __future__ import annotations

import base64
import binascii

from edgert.errors import UsageError
from edgert.media.limits import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES

MAX_BYTES = max(MAX_AUDIO_BYTES, MAX_IMAGE_BYTES)
MAX_HEADER = 256


def decode_data_url(url: str) -> bytes:
    """The content of a `data:` URL in base64 (RFC 2397); its media type is not believed, the content tells.

    Raises:
        UsageError: another scheme, no base64, or more than `MAX_BYTES`.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.lower() != "data":
        shown = scheme[:20] if colon else url[:20]
        raise UsageError(f"url: {shown!r} is refused: only data: URLs are taken, and nothing is fetched")
    header, comma, content = rest.partition(",")
    if not comma or len(header) > MAX_HEADER:
        raise UsageError(f"url: no comma within {MAX_HEADER} characters, expected data:TYPE;base64,CONTENT")
    if header.rsplit(";", 1)[-1].strip().lower() != "base64":
        raise UsageError(f"url: data:{header[:60]} is not in base64, expected data:TYPE;base64,CONTENT")
    return decode_base64(content, "url")


def decode_base64(content: str, what: str) -> bytes:
    """The bytes of text in base64.

    Args:
        what: what the text is, for the message.

    Raises:
        UsageError: it is no base64, or more than `MAX_BYTES`.
    """
    if len(content) > MAX_BYTES // 3 * 4 + 4:
        raise UsageError(f"{what}: {len(content)} characters of base64, the limit is {MAX_BYTES} bytes of content")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{what}: no base64: {error}") from error
