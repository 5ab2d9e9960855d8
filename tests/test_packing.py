"""Packed weights: the bytes of the layout, what comes back out of them, and the file they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_ops
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import BundleError
from edgert.kernelfile import ALIGNMENT, DATA, INDEX, PackedWeights, PackedWriter, make_unusable
from edgert.packing import BLOCK, Matrix, PackedShape, pack, scale_fault, shape_of, unpack

Array = np.ndarray[Any, np.dtype[Any]]

# bits, columns, columns of a group
SIZES = [(4, 8, 8), (4, 40, 40), (4, 96, 32), (4, 256, 128), (8, 4, 4), (8, 36, 36), (8, 64, 32), (8, 192, 64)]


def matrix(
    rows: int, size: tuple[int, int, int], seed: int, *, asymmetric: bool = True, signed: bool = False
) -> tuple[Matrix, kernel_ops.Matrix]:
    """A random matrix as it lies in a model, and the same by the numbers."""
    bits, columns, group = size
    random = np.random.default_rng(seed)
    scales = random.standard_normal((rows, columns // group)).astype(np.float16)
    codes = random.integers(0, 1 << bits, (rows, columns), np.uint8)
    zeros = random.integers(0, 1 << bits, scales.shape, np.uint8) if asymmetric else None
    stored = codes ^ (1 << (bits - 1)) if signed else codes  # two's complement of code - middle
    if bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    return Matrix(stored, scales, zeros, 4 if bits == 4 else 8, signed), kernel_ops.Matrix(codes, scales, zeros, bits)


def unaligned(array: Array) -> Array:
    """The same numbers where no vector begins, as in a mapped file."""
    memory = np.empty(array.nbytes + 1, np.uint8)
    memory[1:] = array.reshape(-1).view(np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_layout(size: tuple[int, int, int], rows: int, asymmetric: bool, signed: bool, seed: int) -> None:
    """Byte for byte what a second implementation, straight from the description, makes of the same numbers."""
    ours, theirs = matrix(rows, size, seed, asymmetric=asymmetric, signed=signed)
    ours = Matrix(unaligned(ours.codes), ours.scales, ours.zero_points, ours.bits, signed)
    packed, shape = pack([ours]), shape_of([ours])
    np.testing.assert_array_equal(packed, kernel_ops.packed(theirs))
    assert packed.nbytes == shape.bytes
    np.testing.assert_array_equal(unpack(packed, shape), theirs.weights(np.float32))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_gate_and_up(size: tuple[int, int, int], rows: int, asymmetric: bool, seed: int) -> None:
    pairs = [matrix(rows, size, seed + number, asymmetric=asymmetric) for number in range(2)]
    packed = pack([ours for ours, _ in pairs], gated=True)
    np.testing.assert_array_equal(packed, kernel_ops.packed(pairs[0][1], pairs[1][1]))
    shape = shape_of([ours for ours, _ in pairs], gated=True)
    assert (shape.out_features, packed.nbytes) == (rows, shape.bytes)
    both = np.concatenate([theirs.weights(np.float32) for _, theirs in pairs])
    np.testing.assert_array_equal(unpack(packed, shape), both)


def test_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces: every chunk is one block."""
    monkeypatch.setattr("edgert.packing._CHUNK_BYTES", 1)
    sizes = [(rows, matrix(rows, (4, 96, 32), rows)) for rows in (32, 16, 21)]
    parts = [ours for _, (ours, _) in sizes]
    everything = [theirs for _, (_, theirs) in sizes]
    joined = kernel_ops.Matrix(
        *(np.concatenate([getattr(m, name) for m in everything]) for name in ("codes", "scales", "zero_points")), 4
    )
    packed = pack(parts)
    np.testing.assert_array_equal(packed, kernel_ops.packed(joined))
    assert shape_of(parts).out_features == 69
    into = np.zeros(shape_of(parts).bytes, np.uint8)
    assert pack(parts, into) is into
    np.testing.assert_array_equal(into, packed)


@pytest.mark.parametrize(
    ("sizes", "gated", "message"),
    [
        ([(17, (4, 64, 32)), (16, (4, 64, 32))], False, r"\[17, 16\] rows, expected multiples of 16 before the last"),
        ([(16, (4, 64, 32)), (16, (8, 64, 32))], False, "bits is 4 of one matrix and 8 of another"),
        ([(16, (4, 64, 32)), (16, (4, 96, 32))], False, "in_features is 64 of one matrix and 96 of another"),
        ([(16, (4, 64, 32)), (16, (4, 64, 64))], False, "groups differ"),
        ([(16, (4, 64, 32)), (32, (4, 64, 32))], True, r"gate and up have \[16, 32\] rows"),
        ([(16, (4, 64, 32))], True, r"gate and up have \[16\] rows"),
        ([(16, (4, 48, 16))], False, r"group is 16, expected in_features \(48\) or a multiple of 32"),
    ],
)
def test_what_does_not_fit(sizes: list[tuple[int, tuple[int, int, int]]], gated: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([matrix(rows, size, 0)[0] for rows, size in sizes], gated=gated)


def test_zero_points_of_some_only() -> None:
    parts = [matrix(16, (4, 64, 32), 0, asymmetric=asymmetric)[0] for asymmetric in (True, False)]
    with pytest.raises(ValueError, match="only some have zero points"):
        pack(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_features": 0}, r"out_features is 0, expected 1 to 2\^31 - 1"),
        ({"in_features": 2**31}, r"in_features is 2147483648, expected 1 to 2\^31 - 1"),
        ({"bits": 3}, "bits is 3, expected 4 or 8"),
        ({"in_features": 68}, "in_features is 68, expected a multiple of 8"),
        ({"group": 0}, "group is 0"),
        ({"group": 48}, r"group is 48, expected in_features \(64\) or a multiple of 32 that divides it"),
    ],
)
def test_shapes_that_are_none(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"out_features": 5, "in_features": 64, "bits": 4, "group": 32, "asymmetric": True}
    assert PackedShape(**good).bytes == BLOCK * (32 + 2 * 3)
    with pytest.raises(ValueError, match=message):
        PackedShape(**{**good, **change})


@pytest.mark.parametrize(
    ("scales", "fault"),
    [
        (np.array([1.0, -2.5e-3, 65504.0, 0.0]), None),
        (np.array([1.0, 1e-3], np.float16), None),
        (np.array([np.inf], np.float16), "a scale is not finite"),
        (np.array([1.0, 1e5]), "a scale is not finite in f16"),
        (np.array([np.nan]), "a scale is not finite in f16"),
        (np.array([1.0, 1e-6]), "scale 1e-06 loses more than 2^-10 in f16"),
        (np.array([1e-9]), "scale 1e-09 loses more than 2^-10 in f16"),
    ],
)
def test_scales_that_f16_cannot_hold(scales: Array, fault: str | None) -> None:
    assert scale_fault(scales) == fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two matrices, one of them under two names."""
    with PackedWriter(tmp_path, {"c": "its scales are odd"}) as writer:
        for name, rows in (("a", 5), ("b", 5), ("c", 40)):
            ours = matrix(rows, (4, 64, 32), rows)[0]
            writer.add(name, shape_of([ours]), rows, lambda ours=ours: pack([ours]))  # type: ignore[misc]
    return tmp_path


def test_the_file(folder: Path) -> None:
    found = PackedWeights.open(folder)
    assert found is not None
    assert found.refused == {"c": "its scales are odd"}
    assert found.unusable is None
    for name, rows in (("a", 5), ("b", 5), ("c", 40)):
        ours = matrix(rows, (4, 64, 32), rows)[0]
        array = found.get(name, shape_of([ours]))
        assert array is not None
        np.testing.assert_array_equal(array, pack([ours]))
        assert array.ctypes.data % ALIGNMENT == 0
    assert found.entries["a"].offset == found.entries["b"].offset  # the same content, once
    assert (folder / DATA).stat().st_size < 2 * 608 + 3 * 608
    assert found.get("d", found.entries["a"].shape) is None
    with pytest.raises(BundleError, match=r"'a' is PackedShape\(out_features=5, .* the model has .*out_features=40"):
        found.get("a", found.entries["c"].shape)


def test_no_file_or_another_version(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert PackedWeights.open(tmp_path_factory.mktemp("none")) is None
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "version": 2}))
    assert PackedWeights.open(folder) is None


def test_nothing_to_pack(tmp_path: Path) -> None:
    with PackedWriter(tmp_path, {}):
        pass
    assert not (tmp_path / DATA).exists()
    found = PackedWeights.open(tmp_path)
    assert found is not None
    assert not found.entries


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), PackedWriter(tmp_path, {}):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_unusable(folder: Path) -> None:
    make_unusable(folder, "it is all wrong")
    assert not (folder / DATA).exists()
    found = PackedWeights.open(folder)
    assert found is not None
    assert found.unusable == "it is all wrong"


def entry(**change: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes an entry of the index, or its shape."""

    def damage(index: dict[str, Any]) -> dict[str, Any]:
        row = index["matrices"]["a"]
        for name, value in change.items():
            (row["shape"] if name in row["shape"] else row)[name] = value
        return index

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: [], "has no object 'matrices'"),
        (lambda index: {**index, "matrices": []}, "has no object 'matrices'"),
        (lambda index: {**index, "refused": None}, "has no object 'refused' of texts"),
        (lambda index: {**index, "refused": {"a": 1}}, "has no object 'refused' of texts"),
        (lambda index: {**index, "unusable": 1}, "unusable is 1, expected a text or null"),
        (lambda index: {**index, "matrices": {"a": 1}}, "'a': entry is 1, expected an object"),
        (entry(offset=-64), r"'a': offset is -64, expected a multiple of 64 from 0"),
        (entry(offset=32), r"'a': offset is 32, expected a multiple of 64 from 0"),
        (entry(offset=2**40), r"'a': it ends at byte \d+, kernels.bin has \d+"),
        (entry(offset="0"), "offset is '0', expected int"),
        (entry(bytes=1), r"'a': bytes is 1, expected 608 for PackedShape"),
        (entry(out_features=2**30), r"'a': bytes is 608, expected \d+ for PackedShape\(out_features=1073741824"),
        (entry(out_features=-1), r"'a': out_features is -1, expected 1 to 2\^31 - 1"),
        (entry(bits=5), "bits is 5"),
        (entry(group=7), "'a': group is 7"),
        (entry(asymmetric=1), "asymmetric is 1, expected bool"),
        (entry(code="import os"), "unknown field 'code'"),
    ],
)
def test_a_damaged_index(folder: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(damage(index)))
    with pytest.raises(BundleError, match=message):
        PackedWeights.open(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, b"{", "kernels.json is no JSON"),
        (INDEX, b"\xff", "kernels.json is no JSON"),
        (INDEX, b"[" * 100_000, "kernels.json is no JSON"),
        (DATA, b"", "kernels.bin cannot be mapped"),
        (DATA, b"\0" * 64, r"it ends at byte 608, kernels.bin has 64"),
    ],
)
def test_damaged_files(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        PackedWeights.open(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / DATA).unlink()
    with pytest.raises(BundleError, match=r"kernels\.bin cannot be mapped"):
        PackedWeights.open(folder)


def test_an_index_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.kernelfile.MAX_INDEX_BYTES", 100)
    with pytest.raises(BundleError, match=r"kernels.json has \d+ bytes, at most 100 allowed"):
        PackedWeights.open(folder)
