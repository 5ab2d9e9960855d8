"""Blobs that a bundle's submodels need: made once, found where they are, made again where they are stale."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openvino as ov
import pytest
from fake_npu import GOOD, NEEDS_ONE_TILE, calls, fake, product

from edgert.bundle import Bundle
from edgert.errors import BundleError, DeviceFailedError, MissingBlobError
from edgert.npu import library
from edgert.npu.blobs import BlobStore
from edgert.npu.compiler import Compiled, Compiler, Failed, Limits
from edgert.npu.library import Library, make
from edgert.shapes import StaticShape, StaticShapes

LIMITS = Limits(seconds=120)
SHAPE = StaticShape(1, 64)


@pytest.fixture
def tool(tmp_path: Path) -> Compiler:
    return fake(tmp_path)


@pytest.fixture
def bundle(fake_bundle: Callable[..., Path]) -> Bundle:
    """An opened bundle, to whose folder blobs may be added."""
    return Bundle.open(fake_bundle())


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def path_of(blob: Path) -> Path:
    """What a driver does with a blob, for those who only want to know which it was."""
    return blob


def never() -> ov.Model:
    raise AssertionError("nothing is to be compiled")


def refusing(why: str = "made for another driver") -> Callable[[Path], Path]:
    def load(blob: Path) -> Path:
        raise DeviceFailedError(f"NPU@f16 does not take {blob.name}: {why}")

    return load


def test_identical_submodels_are_compiled_once(tmp_path: Path, tool: Compiler) -> None:
    store = BlobStore(tmp_path)
    first = make(store, product(), (1, 2), SHAPE, "4000", tool, LIMITS)
    second = make(store, product(), (3, 4), SHAPE, "4000", tool, LIMITS)
    assert (first.file, first.identity) == (second.file, second.identity)
    assert [(b.first, b.last) for b in store.blobs()] == [(1, 2), (3, 4)]
    assert len(calls(tool)) == 1
    for other in (product(seed=1), product(width=63)):
        make(store, other, (5, 6), SHAPE, "4000", tool, LIMITS)
    make(store, product(), (1, 2), SHAPE, "5010", tool, LIMITS)
    assert len(calls(tool)) == 4
    assert {path.name for path in store.folder.iterdir()} == {"index.json", *(b.file for b in store.blobs())}
    assert list(tmp_path.glob(".npu-*")) == []


def test_what_fails_on_all_tiles_is_tried_on_one(tmp_path: Path) -> None:
    tool = fake(tmp_path, NEEDS_ONE_TILE + GOOD)
    blob = make(BlobStore(tmp_path), product(), (1, 1), SHAPE, "3720", tool, LIMITS)
    assert blob.identity.properties == {"NPU_TILES": "1"}
    assert "NPU_TILES=1" in calls(tool)[0].split()
    again = make(BlobStore(tmp_path), product(), (2, 2), SHAPE, "3720", tool, LIMITS)
    assert again.identity == blob.identity
    assert len(calls(tool)) == 1


@pytest.mark.parametrize(("kind", "attempts"), [("rejected", 2), ("aborted", 2), ("timeout", 1), ("memory", 1)])
def test_failures_in_the_compilers_words(tmp_path: Path, kind: Any, attempts: int) -> None:
    asked: list[object] = []

    def refuse(xml: Path, out: Path, platform: str, properties: dict[str, str], limits: Limits) -> Compiled | Failed:
        asked.append(properties)
        return Failed(kind, f"reason {len(asked)}")

    store = BlobStore(tmp_path)
    message = f"fake-1: blocks 3-4 at 1\\+64 for 4000: {kind}: reason 1"
    with pytest.raises(DeviceFailedError, match=message):
        make(store, product(), (3, 4), SHAPE, "4000", SimpleNamespace(version="fake-1", compile=refuse), LIMITS)  # type: ignore[arg-type]
    assert asked == [{}, {"NPU_TILES": "1"}][:attempts]
    assert store.blobs() == ()
    assert list(tmp_path.rglob("*.xml")) == []


def test_found_in_the_bundle(bundle: Bundle, tool: Compiler, cache: Path) -> None:
    store = BlobStore(bundle.path)
    rows = [make(store, product(seed=i), (1 + i, 1 + i), SHAPE, "4000", tool, LIMITS) for i in range(2)]
    make(store, product(), (1, 2), StaticShape(16, 64), "4000", tool, LIMITS)
    make(store, product(), (1, 3), StaticShape(32, 128), "5010", tool, LIMITS)
    found = Library(bundle, "4000")
    assert found.get((2, 2), SHAPE, path_of, never) == bundle.path / "npu" / rows[1].file
    assert found.starts == {1, 2, 3}
    assert found.shapes == StaticShapes((16,), (64,))
    other = Library(bundle, "3720")
    assert (other.starts, other.shapes) == (set(), None)
    for blocks, shape in (((1, 3), SHAPE), ((2, 2), StaticShape(1, 128))):
        with pytest.raises(
            MissingBlobError, match=rf"blocks {blocks[0]}-{blocks[1]} at {re.escape(str(shape))}: there is none"
        ):
            found.get(blocks, shape, path_of, never)
    assert not cache.exists()


def test_stale(bundle: Bundle, tool: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    make(BlobStore(bundle.path), product(), (1, 1), SHAPE, "4000", tool, LIMITS)
    with pytest.raises(MissingBlobError, match="made for another driver"):
        Library(bundle, "4000").get((1, 1), SHAPE, refusing(), never)
    known = library.openvino_version()
    monkeypatch.setattr(library, "openvino_version", lambda: "2031.1.0")
    with pytest.raises(MissingBlobError, match=rf"it is of OpenVINO {known}, installed is 2031\.1\.0"):
        Library(bundle, "4000").get((1, 1), SHAPE, path_of, never)


def test_what_is_missing_is_compiled_into_the_cache(
    bundle: Bundle, tool: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(bundle.path.rglob("*"))
    complete = Library(bundle, "4000", complete=True, find_compiler=lambda: tool)
    blob = complete.get((1, 1), SHAPE, path_of, product)
    assert blob.is_relative_to(cache)
    assert len(calls(tool)) == 1
    assert complete.get((1, 1), SHAPE, path_of, never) == blob
    assert Library(bundle, "4000").get((1, 1), SHAPE, path_of, never) == blob
    assert sorted(bundle.path.rglob("*")) == before
    monkeypatch.setattr(library, "openvino_version", lambda: "2031.1.0")
    newer = complete.get((1, 1), SHAPE, path_of, product)
    assert newer != blob
    assert not blob.exists()


def test_a_refused_blob_is_made_again(bundle: Bundle, tool: Compiler, cache: Path) -> None:
    make(BlobStore(bundle.path), product(), (1, 1), SHAPE, "4000", tool, LIMITS)

    def load(blob: Path) -> Path:
        return blob if blob.is_relative_to(cache) else refusing()(blob)

    complete = Library(bundle, "4000", complete=True, find_compiler=lambda: tool)
    assert complete.get((1, 1), SHAPE, load, product).is_relative_to(cache)
    assert len(calls(tool)) == 2


def test_without_a_compiler(bundle: Bundle) -> None:
    complete = Library(bundle, "4000", complete=True, find_compiler=lambda: None)
    with pytest.raises(DeviceFailedError, match="edgert doctor"):
        complete.get((1, 1), SHAPE, path_of, never)


def index(rows: Callable[[dict[str, Any]], Any]) -> Callable[[Path, str], None]:
    def change(folder: Path, blob: str) -> None:
        data = json.loads((folder / "index.json").read_text())
        rows(data)
        (folder / "index.json").write_text(json.dumps(data))

    return change


def text(content: str) -> Callable[[Path, str], None]:
    return lambda folder, blob: (folder / "index.json").write_text(content) and None


def cut_short(folder: Path, blob: str) -> None:
    (folder / blob).write_bytes((folder / blob).read_bytes()[:-1])


def flipped(folder: Path, blob: str) -> None:
    content = (folder / blob).read_bytes()
    (folder / blob).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def gone(folder: Path, blob: str) -> None:
    (folder / blob).unlink()


DAMAGES = {
    "no JSON": text("{"),
    "nothing": text(""),
    "another version": index(lambda data: data.update(version=2)),
    "a file outside": index(lambda data: data["blobs"][0].update(file="../model.bin")),
    "a negative size": index(lambda data: data["blobs"][0].update(bytes=-1)),
    "cut short": cut_short,
    "a bit flipped": flipped,
    "gone": gone,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_an_error(bundle: Bundle, tool: Compiler, damage: str) -> None:
    row = make(BlobStore(bundle.path), product(), (1, 1), SHAPE, "4000", tool, LIMITS)
    DAMAGES[damage](bundle.path / "npu", row.file)
    with pytest.raises(BundleError):
        Library(bundle, "4000", complete=True, find_compiler=lambda: tool).get((1, 1), SHAPE, path_of, never)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_emptied(
    bundle: Bundle, tool: Compiler, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    complete = Library(bundle, "4000", complete=True, find_compiler=lambda: tool)
    blob = complete.get((1, 1), SHAPE, path_of, product)
    good = blob.read_bytes()
    DAMAGES[damage](blob.parent, blob.name)
    with pytest.raises(MissingBlobError), caplog.at_level(logging.WARNING):
        Library(bundle, "4000").get((1, 1), SHAPE, path_of, never)
    assert "a damaged cache of NPU blobs is emptied" in caplog.text
    assert complete.get((1, 1), SHAPE, path_of, product).read_bytes() == good
