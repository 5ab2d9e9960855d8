"""Where edgert keeps what it can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`EDGERT_CACHE`, or a folder of edgert's own in the user's cache folder; it may not be there yet."""
    if given := os.environ.get("EDGERT_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgert"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgert"
