"""The key that clients over TCP must send: the user's token file, or a file that the settings name."""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edgert.errors import ServiceError
from edgert.folders import config_folder

_KEY = re.compile(r"[\x21-\x7e]{16,512}")


def token_file(environ: Mapping[str, str]) -> Path:
    """Where the user's token is; any program that runs as this user may read it."""
    return config_folder(environ) / "token"


def read_key(path: Path) -> str:
    """The key in a file.

    Raises:
        ServiceError: the file is missing or empty, holds something else, or everybody may read it.
    """
    try:
        if sys.platform != "win32" and path.stat().st_mode & 0o007:
            raise ServiceError(
                f"key {path}: everybody may read it (mode {path.stat().st_mode & 0o777:o}); chmod 600 it"
            )
        text = path.read_text("utf-8", errors="replace").strip()
    except OSError as error:
        raise ServiceError(f"key {path}: {error.strerror}") from error
    if not _KEY.fullmatch(text):
        raise ServiceError(f"key {path}: {len(text)} characters, expected 16 to 512 of ASCII without spaces")
    return text


def ensure_token(path: Path) -> str:
    """The user's token; one is made, mode 0600, if there is none.

    Raises:
        ServiceError: as `read_key`, or it cannot be written.
    """
    if not path.exists():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".token.", dir=path.parent)  # 0600
            try:
                with os.fdopen(handle, "w") as stream:
                    stream.write(secrets.token_urlsafe(32) + "\n")
                # A link, unlike a rename, does not replace what another service has written in between.
                with suppress(FileExistsError):
                    os.link(name, path)
            finally:
                Path(name).unlink()
        except OSError as error:
            raise ServiceError(f"key {path}: cannot be written: {error.strerror}") from error
    return read_key(path)
