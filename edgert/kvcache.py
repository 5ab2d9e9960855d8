"""Where keys and values live, and how they change hands.

Whatever a device does with its cache, it can be read as rows `[batch, heads, tokens, head_dim]` by state id, and such
rows can be written into the cache of another device, of any precision. Phase split, failover, parking and the reuse of
prefixes are all that one ability.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgert.backends.base import Array
from edgert.errors import BundleError, UsageError, cause

TOKEN_AXIS = 2  # of [batch, heads, tokens, head_dim]
Precision = Literal["f16", "f32"]
_TYPES: dict[Precision, np.dtype[np.floating]] = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
_VERSION = 1
_INDEX = "index.json"


def trim(states: Mapping[str, Array], length: int) -> dict[str, Array] | None:
    """The caches as they were after the first `length` tokens.

    Args:
        states: caches `[batch, heads, tokens, head_dim]` by variable id.

    Returns:
        Views `[batch, heads, length, head_dim]`; None where a state is no cache of that many tokens (recurrent states,
        windows), so that going back needs a new prefill.
    """
    if any(a.ndim != 4 or a.shape[TOKEN_AXIS] < length for a in states.values()):
        return None
    return {name: a[:, :, :length] for name, a in states.items()}


@dataclass(frozen=True, eq=False)
class KvCache:
    """The keys and values of a sequence, apart from any device.

    Attributes:
        model: fingerprint of the model they belong to (`Bundle.fingerprint`); they mean nothing to another.
        tokens: the sequence.
        states: rows `[1, heads, tokens, head_dim]` by state id, f16 or f32.
    """

    model: str
    tokens: tuple[int, ...]
    states: dict[str, Array]

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for a in self.states.values())

    def to(self, precision: Precision) -> KvCache:
        """A copy in another precision; f16 halves it.

        Raises:
            UsageError: no such precision.
        """
        if precision not in _TYPES:
            raise UsageError(f"KV cache: precision {precision!r}, expected one of {', '.join(_TYPES)}")
        return KvCache(self.model, self.tokens, {n: a.astype(_TYPES[precision]) for n, a in self.states.items()})

    def save(self, path: Path | str) -> None:
        """Write it to a file (a zip archive of NumPy arrays), under a temporary name first.

        Raises:
            UsageError: the file cannot be written.
        """
        path = Path(path)
        index = {"version": _VERSION, "model": self.model, "tokens": list(self.tokens), "states": list(self.states)}
        partial = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
                partial = Path(file.name)
                with zipfile.ZipFile(file, "w") as archive:
                    archive.writestr(_INDEX, json.dumps(index))
                    for number, rows in enumerate(self.states.values()):
                        with archive.open(f"{number}.npy", "w", force_zip64=True) as entry:
                            np.lib.format.write_array(entry, np.ascontiguousarray(rows), allow_pickle=False)
            partial.replace(path)
        except OSError as error:
            raise UsageError(f"KV cache {path}: cannot be written: {error}") from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> KvCache:
        """Read what `save` wrote; whether it fits a model is checked when it is given to one.

        Raises:
            BundleError: the file is missing, damaged, or of another format.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")  # `save` does not, and a small file could become a large one
                index = json.loads(archive.read(_INDEX))
                if not isinstance(index, dict) or index.get("version") != _VERSION:
                    raise ValueError(f"not of version {_VERSION}")
                tokens = tuple(int(token) for token in index["tokens"])
                states = {}
                for number, name in enumerate(index["states"]):
                    with archive.open(f"{number}.npy") as entry:
                        rows = np.lib.format.read_array(entry, allow_pickle=False)
                    if rows.dtype not in _TYPES.values() or rows.ndim != 4 or rows.shape[TOKEN_AXIS] != len(tokens):
                        raise ValueError(f"state {name!r} is {rows.dtype}{list(rows.shape)} for {len(tokens)} tokens")
                    states[str(name)] = rows
                return cls(str(index["model"]), tokens, states)
        except Exception as error:  # zipfile and NumPy raise a dozen kinds, SyntaxError and RuntimeError among them
            raise BundleError(f"KV cache {path}: cannot be read: {cause(error)}") from error
