"""One native operation at a time: on any instruction set, with any number of threads, with or without the CPU plugin.

Also packed weights, written from the description of the layout alone: `edgert.packing` is held to this.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from edgert import native

Array = np.ndarray[Any, np.dtype[Any]]

LANES = 16  # rows of a block of packed weights
COLUMNS = 32  # that columns are padded to a multiple of
# Ascending; the last runs on every processor, with its tiles in software.
INSTRUCTION_SETS = ("scalar", "avx2", "avx2-vnni", "avx512-vnni", "amx-int8", "amx-int8-emulated")


@functools.cache
def controls(path: Path | None = None) -> ctypes.CDLL:
    """What the library (by default the installed one) exports beside its operations: `kernels/src/dispatch.hpp`."""
    library = ctypes.CDLL(str(path or native.library()))
    library.edgert_kernels_isa.restype = ctypes.c_char_p
    library.edgert_kernels_limit_isa.restype = ctypes.c_char_p
    library.edgert_kernels_limit_isa.argtypes = [ctypes.c_char_p]
    library.edgert_kernels_with_threads.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.edgert_kernels_with_threads.restype = None
    return library


@contextmanager
def instruction_set(name: str, path: Path | None = None) -> Iterator[str]:
    """Held to at most `name`; gives what is used instead of it where the processor lacks it."""
    library = controls(path)
    before = library.edgert_kernels_isa()
    found = library.edgert_kernels_limit_isa(name.encode())
    assert found is not None, name
    try:
        yield found.decode()
    finally:
        library.edgert_kernels_limit_isa(before)


@functools.cache
def instruction_sets(path: Path | None = None) -> tuple[str, ...]:
    """Those that this processor has."""
    found = []
    for name in INSTRUCTION_SETS:
        with instruction_set(name, path) as used:
            found.append(used)
    return tuple(dict.fromkeys(found))


def with_threads(threads: int, call: Callable[[], Array], path: Path | None = None) -> Array:
    """What `call` returns where the kernels divide their work among `threads`, however many cores there are."""
    results: list[Array] = []
    errors: list[Exception] = []

    def task() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    controls(path).edgert_kernels_with_threads(threads, ctypes.cast(ctypes.CFUNCTYPE(None)(task), ctypes.c_void_p))
    if errors:
        raise errors[0]
    return results[0]


@functools.cache
def factory(path: Path | None = None) -> NodeFactory:
    nodes = NodeFactory()
    nodes.add_extension(str(path or native.library()))
    return nodes


@functools.cache
def core(path: Path | None = None) -> ov.Core:
    made = ov.Core()
    if path is None:
        assert native.load(made).loads
    else:
        made.add_extension(str(path))
    return made


class Operation:
    """One operation and its parameters.

    Args:
        name: of the operation.
        inputs: partial shape and element type of each.
        attributes: of the operation.
        path: the library; by default the installed one.

    Raises:
        RuntimeError: the operation takes no such inputs or attributes.
    """

    def __init__(
        self, name: str, inputs: Sequence[tuple[Any, Any]], attributes: dict[str, Any], path: Path | None = None
    ) -> None:
        self.path = path
        self.parameters = [ops.parameter(ov.PartialShape(shape), ov.Type(kind)) for shape, kind in inputs]
        self.node = factory(path).create(name, self.parameters, attributes)

    def __call__(self, *inputs: Array) -> Array:
        """Evaluated in place: no plugin looks at shapes, copies tensors or makes them larger than they are.

        Raises:
            RuntimeError: the operation refuses the tensors.
        """
        out = ov.Tensor(ov.Type.f32, ov.Shape([0]))
        arrays = [np.asarray(each, order="C") for each in inputs]  # a tensor does not keep what it shares
        assert self.node.evaluate([out], [ov.Tensor(each, shared_memory=True) for each in arrays])
        return np.array(out.data)

    def on_all(self, *inputs: Array) -> Iterator[tuple[str, Array]]:
        """The result of every instruction set of this processor."""
        for name in instruction_sets(self.path):
            with instruction_set(name, self.path):
                yield name, self(*inputs)

    def model(self) -> ov.Model:
        return ov.Model([self.node], self.parameters)

    def compiled(self, threads: int = 0, **properties: Any) -> ov.CompiledModel:
        """In OpenVINO's CPU plugin; `threads` 0 leaves their number to it."""
        properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, **properties}
        return core(self.path).compile_model(self.model(), "CPU", properties)


@dataclass(frozen=True)
class Matrix:
    """Compressed weights `(codes - zero points) * scales`.

    Attributes:
        codes: u8 `[rows, columns]`.
        scales: f16 `[rows, groups]`.
        zero_points: u8 `[rows, groups]`; None means 8 or 128.
        bits: of a code, 4 or 8.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: int

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        return int(self.codes.shape[1])

    @property
    def group(self) -> int:
        return self.columns // int(self.scales.shape[1])

    @property
    def zeros(self) -> Array:
        """u8 `[rows, groups]`: what means zero."""
        return (
            np.full(self.scales.shape, 1 << (self.bits - 1), np.uint8) if self.zero_points is None else self.zero_points
        )

    def weights(self, kind: Any = np.float64) -> Array:
        """`[rows, columns]`, decompressed; exact in f64, in f32 rounded once."""
        integers = self.codes.astype(np.int64) - self.zeros.astype(np.int64).repeat(self.group, axis=1)
        return integers.astype(kind) * self.scales.astype(kind).repeat(self.group, axis=1)

    def attributes(self) -> dict[str, Any]:
        """Of the operations that read it; `out_features` of a product that is not gated."""
        return {
            "in_features": self.columns, "out_features": self.rows, "bits": self.bits, "group": self.group,
            "asymmetric": self.zero_points is not None,
        }  # fmt: skip


def packed(matrix: Matrix, up: Matrix | None = None, filler: np.random.Generator | None = None) -> Array:
    """The bytes of a matrix, or of a gated pair.

    Args:
        filler: fills padding, which must not matter, with anything; by default as the description says.
    """
    sections = [_sections(each, filler) for each in (matrix, up) if each is not None]
    turns = [np.stack(same, axis=1).reshape(-1, *same[0].shape[1:]) for same in zip(*sections, strict=True)]
    return np.concatenate([section.reshape(-1).view(np.uint8) for section in turns])


def _sections(matrix: Matrix, filler: np.random.Generator | None) -> list[Array]:
    rows = -(-matrix.rows // LANES) * LANES
    columns = -(-matrix.columns // COLUMNS) * COLUMNS
    middle = 1 << (matrix.bits - 1)
    codes = np.full((rows, columns), middle, np.uint8)
    groups = matrix.scales.shape[1]
    scales = np.zeros((rows, groups), np.float16)
    zeros = np.zeros((rows, groups), np.uint8)
    if matrix.zero_points is not None:
        codes[: matrix.rows] = matrix.zero_points[:, -1:]
        zeros[: matrix.rows] = matrix.zero_points
    if filler is not None:
        codes = filler.integers(0, 2 * middle, codes.shape, np.uint8)
        zeros[matrix.rows :] = filler.integers(0, 256, zeros[matrix.rows :].shape, np.uint8)
    codes[: matrix.rows, : matrix.columns] = matrix.codes
    scales[: matrix.rows] = matrix.scales
    if matrix.bits == 4:
        halves = codes.reshape(rows, columns // 8, 2, 4)
        quads = halves[:, :, 0] | halves[:, :, 1] << 4
    else:
        quads = codes.reshape(rows, columns // 4, 4)
    blocks = rows // LANES
    found = [
        quads.reshape(blocks, LANES, -1, 4).transpose(0, 2, 1, 3),
        scales.reshape(blocks, LANES, groups).transpose(0, 2, 1),
    ]
    if matrix.zero_points is not None:
        found.append(zeros.reshape(blocks, LANES, groups).transpose(0, 2, 1))
    return [np.ascontiguousarray(section) for section in found]


def same_bits(ours: Array, theirs: Array) -> bool:
    """Equal to the last bit, the sign of zero too; one NaN is as good as another."""
    nan = np.isnan(ours)
    if ours.shape != theirs.shape or not np.array_equal(nan, np.isnan(theirs)):
        return False
    return np.array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))
