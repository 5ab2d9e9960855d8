"""The blobs that a bundle's submodels need on an NPU: found in the bundle or in the device's own cache, or made."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import openvino as ov

from edgert.bundle import Bundle
from edgert.errors import BundleError, DeviceFailedError, MissingBlobError, cause
from edgert.folders import cache_folder
from edgert.npu.blobs import Blob, BlobStore, Identity, hash_ir, rename
from edgert.npu.compiler import Compiler, Failed, Limits, find, openvino_version
from edgert.shapes import FORM, StaticShape, StaticShapes

T = TypeVar("T")
log = logging.getLogger("edgert")
# Compile properties, tried in this order. The compiler (2026.4.1) rejects some prefill attention with few key heads for
# a 3720, and takes it when it uses one of its two tiles (docs/npu.md).
ATTEMPTS: tuple[Mapping[str, str], ...] = ({}, {"NPU_TILES": "1"})


def make(
    store: BlobStore,
    model: ov.Model,
    blocks: tuple[int, int],
    shape: StaticShape,
    platform: str,
    compiler: Compiler,
    limits: Limits,
) -> Blob:
    """Compile a static submodel into a store; one that is the same as another but for its blocks shares its blob.

    Args:
        blocks: first and last block.

    Raises:
        DeviceFailedError: the compiler gave no blob; the message has its own words.
    """
    with _temporary(store.folder.parent) as folder:
        store.folder.mkdir(exist_ok=True)
        xml = Path(folder) / "model.xml"
        rename(model)
        ov.save_model(model, xml, compress_to_fp16=False)
        digest = hash_ir(xml)
        failures: list[Failed] = []
        for properties in ATTEMPTS:
            identity = Identity(digest, FORM, openvino_version(), compiler.version, platform, dict(properties))
            if (shared := store.share(identity, blocks, shape)) is not None:
                return shared
            result = compiler.compile(xml, Path(folder) / "out.blob", platform, properties, limits)
            if not isinstance(result, Failed):
                return store.add(identity, blocks, shape, result)
            failures.append(result)
            if result.kind not in {"rejected", "aborted"}:
                break
    raise DeviceFailedError(
        f"NPU compiler {compiler.version}: blocks {blocks[0]}-{blocks[1]} at {shape} for {platform}: "
        f"{failures[0].kind}: {failures[0].reason}"
    )


@contextmanager
def _temporary(parent: Path) -> Iterator[str]:
    """A folder in `parent` that is gone afterwards; a disk that takes nothing is a `DeviceFailedError`."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npu-", dir=parent, ignore_cleanup_errors=True) as folder:
            yield folder
    except (OSError, RuntimeError) as error:  # OpenVINO raises the latter when it cannot write a model
        raise DeviceFailedError(f"NPU blobs: {parent} cannot be written: {cause(error)}") from error


class Library:
    """The blobs of one bundle for the NPU of this machine.

    Args:
        bundle: whose blobs; what is made here goes to the user's cache, as a bundle is not written to.
        platform: of the NPU, e.g. `4000`.
        complete: whether to compile what is missing, in a process of its own; otherwise that is an error.
    """

    def __init__(
        self,
        bundle: Bundle,
        platform: str,
        *,
        complete: bool = False,
        find_compiler: Callable[[], Compiler | None] = find,
    ) -> None:
        self.platform = platform
        self.complete = complete
        self._own = BlobStore(cache_folder() / "npu" / bundle.fingerprint)
        self._stores = (BlobStore(bundle.path), self._own)
        self._find_compiler = find_compiler
        self._shipped = [blob for blob in BlobStore(bundle.path).blobs() if blob.identity.platform == platform]

    @property
    def starts(self) -> set[int]:
        """Blocks at which the bundle's submodels for this platform begin, and the one behind the last."""
        return {edge for blob in self._shipped for edge in (blob.first, blob.last + 1)}

    @property
    def shapes(self) -> StaticShapes | None:
        """The shapes that the bundle's blobs were made for; None where it has none for this platform."""
        found = {blob.shape for blob in self._shipped}
        chunks = sorted({s.query for s in found if s.query > 1})
        buckets = sorted({s.past for s in found if s.past})
        return StaticShapes(tuple(chunks), tuple(buckets)) if chunks and buckets else None

    def get(
        self,
        blocks: tuple[int, int],
        shape: StaticShape,
        load: Callable[[Path], T],
        lowered: Callable[[], ov.Model],
    ) -> T:
        """A blob, loaded.

        Args:
            load: loads a blob; raises `DeviceFailedError` where the driver does not take it.
            lowered: makes the static submodel, for the compiler.

        Raises:
            MissingBlobError: there is none that loads, and it is not to be compiled now.
            DeviceFailedError: it cannot be compiled.
        """
        why = ["there is none"]
        for store in self._stores:
            path = self._find(store, blocks, shape, why)
            if path is not None:
                try:
                    return load(path)
                except DeviceFailedError as error:
                    why.append(str(error))
        return load(self._make(blocks, shape, lowered, why[-1]))

    def require(self, blocks: tuple[int, int], shape: StaticShape, lowered: Callable[[], ov.Model]) -> None:
        """See that there is a blob, without loading it; raises as `get`."""
        why = ["there is none"]
        if not any(self._find(store, blocks, shape, why) for store in self._stores):
            self._make(blocks, shape, lowered, why[-1])

    def _make(self, blocks: tuple[int, int], shape: StaticShape, lowered: Callable[[], ov.Model], reason: str) -> Path:
        if not self.complete:
            raise MissingBlobError(f"NPU blob of blocks {blocks[0]}-{blocks[1]} at {shape}: {reason}")
        compiler = self._find_compiler()
        if compiler is None:
            raise DeviceFailedError("NPU compiler: none is here; see edgert doctor")
        return self._own.folder / make(self._own, lowered(), blocks, shape, self.platform, compiler, Limits()).file

    def _find(self, store: BlobStore, blocks: tuple[int, int], shape: StaticShape, why: list[str]) -> Path | None:
        """A blob that fits this OpenVINO; `why` is told why one that is there does not serve."""
        try:
            for row in store.blobs():
                if (row.first, row.last, row.shape, row.identity.platform) != (*blocks, shape, self.platform):
                    continue
                if row.identity.form != FORM:
                    why.append("it is of another edgert")
                elif row.identity.openvino == openvino_version():
                    return store.find(row.identity)
                else:
                    why.append(f"it is of OpenVINO {row.identity.openvino}, installed is {openvino_version()}")
        except BundleError as error:
            if store is not self._own:
                raise
            log.warning("a damaged cache of NPU blobs is emptied: %s", error)
            shutil.rmtree(store.folder, ignore_errors=True)
            why.append(str(error))
        return None
