"""The names of models: what a request may say, and the bundle that it means. A name never becomes part of a path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgert.errors import UnknownModelError
from edgert.service.settings import ModelSettings, Settings
from edgert.service.values import MODEL_NAME

_ENDING = ".edge"


class Names:
    """The models of the settings, and those that lie in the settings' folders, as these are now."""

    def __init__(self, settings: Settings) -> None:
        self._models = settings.models
        self._folders = settings.folders

    def all(self) -> dict[str, ModelSettings]:
        """Every model by its name; what the settings name goes before what is found, and an earlier folder first."""
        found = dict(self._models)
        for path in self._bundles():
            name = path.name.removesuffix(_ENDING)
            if MODEL_NAME.fullmatch(name):
                found.setdefault(name, ModelSettings(path, name))
        return found

    def find(self, name: str) -> ModelSettings:
        """What a name means. Raises `UnknownModelError`."""
        if name in self._models:
            return self._models[name]
        models = self.all()
        if name not in models:
            from difflib import get_close_matches

            known, near = ", ".join(sorted(models)[:10]) or "none", get_close_matches(name[:128], models, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UnknownModelError(f"model {name[:128]!r} is not known; {hint}known are: {known}")
        return models[name]

    def _bundles(self) -> Iterator[Path]:
        for folder in self._folders:
            try:
                entries = sorted(folder.iterdir())
                home = folder.resolve()
            except OSError:  # it may be on a disk that is not there now
                continue
            # A link that leads elsewhere would make a folder of models a door to everything.
            yield from (e for e in entries if e.name.endswith(_ENDING) and e.is_dir() and e.resolve().parent == home)
