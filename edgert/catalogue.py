"""Well-known models by their shapes: what a machine can be judged by before it is bought."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgert.architecture import ModelShape, Weights, from_config, read_config
from edgert.errors import UsageError
from edgert.fields import build


@dataclass(frozen=True)
class CatalogueModel:
    """A model of the catalogue.

    Attributes:
        name: unique, e.g. `Qwen3 0.6B`.
        parameters: of the text model as they were published; None where that is not known. The tests compare them with
            what the configuration gives.
        active_parameters: those that one token uses, as published; None for models without experts.
        published: where these two stand; they were read there or where others quote it.
        source: what the configuration rests on: an address, and what is there if it is no copy of `config.json`.
        verified: whether the source was looked at and is a copy or a framework's own account of that model; False where
            only others quote it, or a library's defaults were taken for it.
        config: the fields of its `config.json` that its shape needs.
    """

    name: str
    parameters: int | None
    active_parameters: int | None
    published: str
    source: str
    verified: bool
    config: dict[str, Any]

    def shape(self, weights: Weights = "int4", group_size: int = 128) -> ModelShape:
        """Its blocks at a precision; see `from_config`."""
        return from_config(self.config, name=self.name, weights=weights, group_size=group_size)


@dataclass(frozen=True)
class _File:
    models: tuple[CatalogueModel, ...]


@cache
def models() -> tuple[CatalogueModel, ...]:
    """All models of the catalogue."""
    return build(_File, json.loads((files("edgert") / "catalogue.json").read_text("utf-8")), "catalogue").models


def from_file(path: Path) -> CatalogueModel:
    """The model that a `config.json`, or the folder with one, describes; raises `UsageError`."""
    config = read_config(path)
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    return CatalogueModel(name, None, None, "", str(path), True, config)


def find(names: Sequence[str]) -> tuple[CatalogueModel, ...]:
    """The models whose names contain one of these texts, in any case; all for none. Raises `UsageError`."""
    known = models()
    for name in names:
        if not any(name.lower() in model.name.lower() for model in known):
            raise UsageError(f"model {name!r} is not in the catalogue; it has {', '.join(m.name for m in known)}")
    return tuple(m for m in known if not names or any(name.lower() in m.name.lower() for name in names))
