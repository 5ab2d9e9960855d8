"""Where edgert keeps what it can make again, and where it looks for what people have set."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def cache_folder() -> Path:
    """`EDGERT_CACHE`, or a folder of edgert's own in the user's cache folder; it may not be there yet."""
    if given := os.environ.get("EDGERT_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgert"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgert"


def config_folder(environ: Mapping[str, str]) -> Path:
    """A folder of edgert's own in the user's folder of settings; it may not be there yet."""
    if sys.platform == "win32":
        return Path(environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "edgert"
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgert"
