"""What a search has measured so far, on disk: one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert.errors import UsageError

_KEY, _ROWS = "key.json", "rows.jsonl"


class Journal:
    """A folder with measurements of one search.

    Args:
        folder: made where it is missing. What another search left there (another model, text, seed or version, by
            `key`) is removed.
        key: all that the measurements depend on.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(key, sort_keys=True)
        own = hashlib.sha256(text.encode()).hexdigest()
        try:
            if folder.is_dir() and any(folder.iterdir()):
                if not (folder / _KEY).is_file():
                    raise UsageError(f"{folder}: exists and is no search of edgert's; it will not be replaced")
                if (folder / _KEY).read_text("utf-8") != own:
                    shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _KEY).write_text(own, "utf-8")
            self._rows = self._read()
            self._stream = (folder / _ROWS).open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{folder}: cannot be written: {error}") from error

    @property
    def rows(self) -> int:
        """How many measurements there are."""
        return len(self._rows)

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is known by that name; measured and written down where nothing is. It must be something JSON has."""
        if name not in self._rows:
            self._rows[name] = measure()
            self._stream.write(json.dumps([name, self._rows[name]]) + "\n")
            self._stream.flush()
        return self._rows[name]

    def remove(self) -> None:
        """The search is over."""
        self._stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        self._stream.close()

    def _read(self) -> dict[str, Any]:
        path, found = self.folder / _ROWS, {}
        if path.is_file():
            text = path.read_text("utf-8")
            for line in text.splitlines():
                try:
                    name, value = json.loads(line)
                except ValueError:  # cut off as it was written
                    continue
                found[name] = value
            if text and not text.endswith("\n"):
                path.write_text("".join(json.dumps([n, v]) + "\n" for n, v in found.items()), "utf-8")
        return found
