"""Compiled NPU submodels and what they were made of: the folder `npu` of a bundle, or of a device's own cache.

What a blob was made of and with is its identity. At build time one of the same identity is not made again; on a device
one of another form, OpenVINO release or platform is stale, which is the same as none (`edgert.npu.library`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.bundle import sha256
from edgert.errors import BundleError
from edgert.fields import build
from edgert.npu.compiler import PLATFORMS, Compiled
from edgert.shapes import MAX_BUCKET, MAX_CHUNK, StaticShape

if TYPE_CHECKING:
    import openvino as ov

FOLDER = "npu"
INDEX = "index.json"
INDEX_VERSION = 1
MAX_INDEX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Identity:
    """What a blob was made of.

    Attributes:
        ir_sha256: of the static submodel; see `hash_ir`.
        form: `edgert.shapes.FORM` of the edgert that made the submodel.
        openvino: release that the blob is for.
        compiler: `Compiler.version`.
        platform: one of `compiler.PLATFORMS`.
        properties: compile properties beside the platform.
    """

    ir_sha256: str
    form: int
    openvino: str
    compiler: str
    platform: str
    properties: dict[str, str]

    def key(self) -> str:
        """A short hash of all of it: the blob's file name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Blob:
    """One row of the index: a submodel at one shape, and its blob.

    Attributes:
        identity: what it was made of. Rows of one identity share a file: submodels that are the same but for their
            names.
        file: name in the folder.
        first, last: the blocks of the submodel.
        shape: rows of new tokens and slots for past ones.
        bytes, sha256: of the file.
        compile_s: what the compiler took for it.
        estimated_us: one inference as the compiler estimates it; never a measurement.
    """

    identity: Identity
    file: str
    first: int
    last: int
    shape: StaticShape
    bytes: int
    sha256: str
    compile_s: float
    estimated_us: float | None


@dataclass(frozen=True)
class _Index:
    version: int
    blobs: tuple[Blob, ...] = field(default_factory=tuple)


class BlobStore:
    """The blobs under `root`, a bundle or a cache folder. One process writes, any number read."""

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER

    def blobs(self) -> tuple[Blob, ...]:
        """All rows; none where there is no index.

        Raises:
            BundleError: the index is not what `add` writes.
        """
        path = self.folder / INDEX
        if path.is_symlink():
            raise BundleError(f"{path}: is a symbolic link, which bundles may not hold")
        if not path.exists():
            return ()
        try:
            if path.stat().st_size > MAX_INDEX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, at most {MAX_INDEX_BYTES} allowed")
            data = json.loads(path.read_text("utf-8"))
            if isinstance(data, Mapping) and data.get("version") != INDEX_VERSION:
                raise ValueError(f"version {data.get('version')!r}, this edgert reads {INDEX_VERSION}")
            index = build(_Index, data, "index")
            for blob in index.blobs:
                _check(blob)
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path}: {error}") from error
        return index.blobs

    def find(self, identity: Identity) -> Path | None:
        """The blob of this identity, its hash compared; None where there is none.

        Raises:
            BundleError: the index is damaged, or the file is not the one it lists.
        """
        row = next((b for b in self.blobs() if b.identity == identity), None)
        if row is None:
            return None
        path = self.folder / row.file
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path}: is missing or no plain file")
        if path.stat().st_size != row.bytes or sha256(path) != row.sha256:
            raise BundleError(f"{path}: has not the content that {INDEX} lists")
        return path

    def add(self, identity: Identity, blocks: tuple[int, int], shape: StaticShape, compiled: Compiled) -> Blob:
        """Take a compiled blob in; its file is moved. Rows of the same blocks, shape and platform give way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = _file(identity)
        digest, size = sha256(compiled.blob), compiled.blob_bytes
        shutil.move(compiled.blob, self.folder / name)
        blob = Blob(
            identity, name, *blocks, shape, size, digest, round(compiled.compile_s, 3), compiled.estimated_us
        )  # fmt: skip
        return self._write(blob)

    def share(self, identity: Identity, blocks: tuple[int, int], shape: StaticShape) -> Blob | None:
        """Let another submodel use the blob of this identity; None where there is none."""
        row = next((b for b in self.blobs() if b.identity == identity), None)
        if row is None:
            return None
        blob = Blob(
            identity, row.file, *blocks, shape, row.bytes, row.sha256, row.compile_s, row.estimated_us
        )  # fmt: skip
        return self._write(blob)

    def _write(self, blob: Blob) -> Blob:
        def place(b: Blob) -> tuple[object, ...]:
            return b.first, b.last, b.shape.query, b.shape.past, b.identity.platform

        before = self.blobs()
        rows = sorted([b for b in before if place(b) != place(blob)] + [blob], key=lambda b: tuple(map(str, place(b))))
        index = {"version": INDEX_VERSION, "blobs": [asdict(b) for b in rows]}
        draft = self.folder / f".{INDEX}"
        draft.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        os.replace(draft, self.folder / INDEX)
        for name in {b.file for b in before} - {b.file for b in rows}:
            (self.folder / name).unlink(missing_ok=True)
        return blob


def rename(model: ov.Model) -> None:
    """Name operations by their place alone, in place; names of inputs and outputs stay.

    OpenVINO numbers nameless operations as they come in a process, and the compiler writes names into blobs: without
    this, the same submodel made a second time gives another blob.
    """
    model.set_friendly_name("submodel")
    for number, op in enumerate(model.get_ordered_ops()):
        op.set_friendly_name(f"{op.get_type_name()}.{number}")


def hash_ir(xml: Path) -> str:
    """A hash of what a saved model computes: its structure and weights, and the names of its inputs and outputs.

    Names inside are left out: layers that differ in nothing else are the same.
    """
    root = ElementTree.parse(xml).getroot()
    for layer in root.iter("layer"):
        layer.attrib.pop("name", None)
        if layer.get("type") != "Parameter":
            for port in layer.iter("port"):
                port.attrib.pop("names", None)
    root.attrib.pop("name", None)
    for info in root.findall("rt_info"):
        root.remove(info)
    total = hashlib.sha256(ElementTree.canonicalize(ElementTree.tostring(root), strip_text=True).encode())
    with xml.with_suffix(".bin").open("rb") as stream:
        total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _check(blob: Blob) -> None:
    """Raise `ValueError` for a row that `add` cannot have written."""
    if blob.file != _file(blob.identity):
        raise ValueError(f"file name {blob.file!r} is not that of its identity, {_file(blob.identity)}")
    if blob.identity.platform not in PLATFORMS:
        raise ValueError(f"platform {blob.identity.platform!r}, expected one of {', '.join(PLATFORMS)}")
    numbers = (blob.first, blob.last - blob.first, blob.shape.query - 1, blob.shape.past, blob.bytes - 1)
    times = (blob.compile_s, blob.estimated_us or 0.0)
    large = blob.shape.query > MAX_CHUNK or blob.shape.past > MAX_BUCKET
    if min(numbers) < 0 or large or not all(0 <= t < float("inf") for t in times):
        raise ValueError(f"blob {blob.file}: blocks, shape, bytes or compile_s out of range")


def _file(identity: Identity) -> str:
    return f"{identity.key()}.blob"
