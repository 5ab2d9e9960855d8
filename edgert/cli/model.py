"""Models as far as a plan needs them: their blocks, out of a bundle or of a `config.json` without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from edgert import architecture, catalogue
from edgert.architecture import PIPELINE, ModelShape, Weights
from edgert.bundle import MANIFEST, Bundle
from edgert.errors import BundleError, MissingDependencyError, UsageError, cause
from edgert.graph import BlockGraph

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PlannedModel:
    """A model as far as a plan needs it.

    Attributes:
        name: for people.
        graph: its blocks.
        context_length: tokens; None where nobody says.
        bundle: that it is in; None where only its shape is known.
        notes: what was assumed of the shape.
    """

    name: str
    graph: BlockGraph
    context_length: int | None
    bundle: Bundle | None = None
    notes: tuple[str, ...] = ()


def find_model(source: str, weights: Weights | None = None) -> PlannedModel:
    """The model that `source` names: a bundle, a config.json or the folder with one, a name of the catalogue, a hub id.

    Args:
        weights: precision of a model without weights; None is `int4`. A bundle has its own.

    Raises:
        UsageError: it is none of them; or `weights` is given for a bundle. The hub is not asked for what looks like a
            local file: a name that ends in `.edge` or `.json`, or begins with a folder that is there.
        BundleError: the bundle is damaged or has no blocks.
    """
    path = Path(source)
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UsageError(f"model {source}: {error.strerror}") from error
    if folder and ((path / MANIFEST).exists() or not any((path / name).exists() for name in ("config.json", PIPELINE))):
        return _from_bundle(path, weights)
    precision: Weights = weights or "int4"
    if folder or file:
        return _from_shape(architecture.read(path, weights=precision))
    known = {_plain(entry.name): entry for entry in catalogue.models()}
    if entry := known.get(_plain(source)):
        return _from_shape(entry.shape(precision))
    tried = "no bundle or config.json is there, and the catalogue does not have it"
    if not _HUB_ID.fullmatch(source):
        raise UsageError(f"model {source!r}: {tried}; a hub id would be ORGANISATION/NAME")
    if source.endswith((".edge", ".json")) or Path(source.partition("/")[0]).is_dir():
        raise UsageError(f"model {source!r}: {tried}; it looks like a file of this machine, so the hub is not asked")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingDependencyError(f"model {source!r}: {tried}; to ask the hub, install huggingface_hub") from error
    try:
        config = hf_hub_download(source, "config.json")
    except Exception as error:  # network, access, validation: as many classes as causes
        message = f"the hub did not give its config.json: {type(error).__name__}: {cause(error)}"
        raise UsageError(f"model {source!r}: {tried}; {message}") from error
    shape = architecture.read(Path(config), weights=precision)
    return _from_shape(replace(shape, name=source.rpartition("/")[2]))


def _plain(name: str) -> str:
    """A model's name without what people write in different ways."""
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _from_bundle(path: Path, weights: str | None) -> PlannedModel:
    bundle = Bundle.open(path)
    if weights is not None:
        raise UsageError(f"--weights is {weights}: bundle {path} has its weights, at {bundle.facts.weights}")
    if bundle.graph is None and bundle.facts.format == "onnx":
        raise UsageError(f"bundle {path} runs whole on onnxruntime; it has no blocks to show")
    if bundle.graph is None:
        raise BundleError(f"bundle {path}: it has no block graph")
    return PlannedModel(bundle.facts.name, bundle.graph, bundle.facts.context_length, bundle)


def _from_shape(shape: ModelShape) -> PlannedModel:
    name = f"{shape.name}, {shape.weights}"
    return PlannedModel(name, shape.graph, shape.context_length, notes=shape.notes)
