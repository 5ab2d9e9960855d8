"""Packed weights on disk: `kernels.bin`, which is memory-mapped and used in place, and its index `kernels.json`.

`docs/bundle.md` describes the format. What the index says is checked before a byte of the weights is touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BundleError
from edgert.fields import build
from edgert.packing import PackedShape

INDEX, DATA = "kernels.json", "kernels.bin"
VERSION = 1  # of the layout, and of the rules by which matrices are joined: one more, and the weights are packed anew
ALIGNMENT = 64  # of a matrix in the file: a line of the CPU's caches
MAX_INDEX_BYTES = 16 * 1024 * 1024

Array = NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """One matrix in the file, or several that are packed as one.

    Attributes:
        offset, bytes: where it lies in `kernels.bin`.
        shape: what it is.
    """

    offset: int
    bytes: int
    shape: PackedShape


class PackedWeights:
    """The packed weights of a bundle, mapped into memory.

    Attributes:
        path: the bundle.
        entries: by key: the names of the constants whose codes they are, see `edgert.kernel_lowering.weights`.
        refused: constants that the kernels cannot hold, by name, and why.
        unusable: why the model must not run on the kernels at all; None where it may.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        refused: Mapping[str, str],
        unusable: str | None,
        data: Array,
    ) -> None:
        self.path = path
        self.entries = entries
        self.refused = refused
        self.unusable = unusable
        self._data = data

    @classmethod
    def open(cls, path: Path) -> PackedWeights | None:
        """Map the packed weights of a bundle; None where it has none, or of another version.

        Raises:
            BundleError: index or weights are damaged.
        """
        index = path / INDEX
        if not index.is_file():
            return None
        size = index.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise BundleError(f"bundle {path}: {INDEX} has {size} bytes, at most {MAX_INDEX_BYTES} allowed")
        try:
            content = json.loads(index.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"bundle {path}: {INDEX} is no JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("matrices"), dict):
            raise BundleError(f"bundle {path}: {INDEX} has no object 'matrices'")
        if content.get("version") != VERSION:
            return None
        refused, unusable = content.get("refused"), content.get("unusable")
        if not isinstance(refused, dict) or not all(isinstance(reason, str) for reason in refused.values()):
            raise BundleError(f"bundle {path}: {INDEX} has no object 'refused' of texts")
        if unusable is not None and not isinstance(unusable, str):
            raise BundleError(f"bundle {path}: {INDEX}: unusable is {unusable!r}, expected a text or null")
        entries: dict[str, Entry] = {}
        if not content["matrices"]:
            return cls(path, entries, refused, unusable, np.empty(0, np.uint8))
        try:
            # Nobody writes into it. OpenVINO makes no constant of memory that says it is read-only.
            data = np.memmap(path / DATA, np.uint8, "c")
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise BundleError(f"bundle {path}: {DATA} cannot be mapped: {error}") from error
        for key, row in content["matrices"].items():
            try:
                entries[key] = _checked(build(Entry, row, "entry"), data.size)
            except ValueError as error:
                raise BundleError(f"bundle {path}: {INDEX}: {key!r}: {error}") from error
        return cls(path, entries, refused, unusable, data)

    def get(self, key: str, shape: PackedShape) -> Array | None:
        """A matrix as u8 `[bytes]`, a view of the file; None where it was not packed.

        Raises:
            BundleError: it is of another shape, so the file belongs to another model.
        """
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.shape != shape:
            raise BundleError(f"bundle {self.path}: {INDEX}: {key!r} is {entry.shape}, the model has {shape}")
        # A plain array: every slice of a memmap would drag the class along.
        return np.asarray(self._data[entry.offset : entry.offset + entry.bytes])


def _checked(entry: Entry, size: int) -> Entry:
    if entry.offset < 0 or entry.offset % ALIGNMENT:
        raise ValueError(f"offset is {entry.offset}, expected a multiple of {ALIGNMENT} from 0")
    if entry.bytes != entry.shape.bytes:
        raise ValueError(f"bytes is {entry.bytes}, expected {entry.shape.bytes} for {entry.shape}")
    if entry.offset + entry.bytes > size:
        raise ValueError(f"it ends at byte {entry.offset + entry.bytes}, {DATA} has {size}")
    return entry


class PackedWriter:
    """Writes packed weights matrix by matrix, and the index when the block ends without an error.

    Args:
        path: the bundle.
        refused: constants that the kernels cannot hold, by name, and why.
    """

    def __init__(self, path: Path, refused: Mapping[str, str]) -> None:
        self._path = path
        self._refused = dict(refused)
        self._matrices: dict[str, dict[str, Any]] = {}
        self._places: dict[Hashable, int] = {}
        self._stream: BinaryIO | None = None

    def __enter__(self) -> PackedWriter:
        self._stream = (self._path / DATA).open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._stream is not None
        self._stream.close()
        if error is not None or not self._matrices:
            (self._path / DATA).unlink()
        if error is None:
            _write_index(self._path, self._matrices, self._refused, None)

    def add(self, key: str, shape: PackedShape, content: Hashable, packed: Callable[[], Array]) -> None:
        """Write a matrix.

        Args:
            content: equal for matrices that hold the same, which are written once.
            packed: gives the bytes, if they are needed.
        """
        assert self._stream is not None
        if content not in self._places:
            self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
            self._places[content] = self._stream.tell()
            self._stream.write(packed().data)
        self._matrices[key] = {"offset": self._places[content], "bytes": shape.bytes, "shape": asdict(shape)}


def make_unusable(path: Path, reason: str) -> None:
    """Take the packed weights out of a bundle in the making; the index says that the kernels must not run it."""
    (path / DATA).unlink()
    _write_index(path, {}, {}, reason)


def _write_index(path: Path, matrices: Mapping[str, Any], refused: Mapping[str, str], unusable: str | None) -> None:
    index = {"version": VERSION, "unusable": unusable, "refused": refused, "matrices": matrices}
    (path / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
