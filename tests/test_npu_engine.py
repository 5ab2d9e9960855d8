"""A bundle with blobs on an NPU: it runs there, and where its blobs are stale another device serves meanwhile."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgert.converters.npu import NpuOptions, add_blobs
from fake_npu import GOOD, FakeNpu, calls, fake, plug_in

import edgert
from edgert import bundle as bundles
from edgert.bundle import Bundle
from edgert.cli import main
from edgert.errors import BundleError, DeviceFailedError, MissingBlobError
from edgert.npu import compiler, library
from edgert.npu.blobs import BlobStore
from edgert.npu.compiler import Candidate, Compiler
from edgert.session import Model
from edgert.shapes import StaticShapes

PROMPT = "It was a dark night, and the old man went down to the river again to see what was there"
SHAPES = StaticShapes((16,), (64, 128))
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def npu_path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with blobs for 4000, whose compiler is a fake one."""
    folder = tmp_path_factory.mktemp("npu")
    known = Bundle.open(demo_path)
    tool = fake(folder)
    with pytest.MonkeyPatch.context() as patch, bundles.create(folder / "demo.edge") as draft:
        patch.setattr(compiler, "find_all", lambda: [Candidate("fake", tool, "in a test")])
        for name in known.files:
            (draft.path / name).parent.mkdir(exist_ok=True)
            shutil.copy(demo_path / name, draft.path / name)
        unfinished = Bundle(draft.path, known.facts, known.report, known.graph, {})
        add_blobs(unfinished, NpuOptions(("4000",), SHAPES), lambda stage: None)
        draft.finish(known.facts, known.report, known.graph)
    return folder / "demo.edge"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeNpu:
    return plug_in(monkeypatch)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Compiler | None], threading.Event]:
    """Lets this machine have a compiler, or none; it is found when the event is set."""

    def put(tool: Compiler | None) -> threading.Event:
        ready = threading.Event()

        def find_all() -> list[Candidate]:
            assert ready.wait(60)
            return [Candidate("fake", tool, "in a test")]

        monkeypatch.setattr(compiler, "find_all", find_all)
        return ready

    return put


def configs(model: Model) -> list[str]:
    return [str(config) for config in model.plan.configs]


def check_rows(model: Model, demo: Model) -> None:
    """As all that crosses a boundary is f16, and all else exact, so are the logits."""
    tokens = demo.tokenizer.encode(PROMPT)
    expected = demo.score(tokens)
    assert np.abs(model.score(tokens) - expected).max() <= 2e-2 * np.abs(expected).max()


def test_on_an_npu(npu_path: Path, demo: Model, device: FakeNpu, cache: Path) -> None:
    model = edgert.load(npu_path, device="NPU")
    assert model._engine.preparing is None
    assert configs(model) == ["CPU@f32", "NPU@f16"]
    assert model.context_length == 128
    check_rows(model, demo)
    expected = demo.generate(PROMPT, max_tokens=60)
    found = model.generate(PROMPT, max_tokens=60)  # through both buckets
    assert found.tokens == expected.tokens
    assert found.events == ()
    assert {blob.parent for blob in device.loaded} == {npu_path / "npu"}
    shapes = {b.shape for b in BlobStore(npu_path).blobs() if npu_path / "npu" / b.file in device.loaded}
    assert {str(shape) for shape in shapes} == {"1+64", "1+128", "16+64", "1+0"}
    assert not cache.exists()


def test_stale_blobs_are_made_again_while_the_cpu_serves(
    npu_path: Path, demo: Model, device: FakeNpu, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    install: Callable[[Compiler | None], threading.Event], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tool = fake(tmp_path)
    ready = install(tool)
    monkeypatch.setattr(library, "openvino_version", lambda: "2031.1.0")
    expected = demo.generate(PROMPT, max_tokens=NEW_TOKENS).tokens
    with caplog.at_level(logging.INFO, "edgert"):
        model = edgert.load(npu_path, device="NPU", fallback="CPU@f32")
        assert configs(model) == ["CPU@f32"]
        assert "installed is 2031.1.0; CPU@f32 serves until it is compiled" in model.plan.explain()
        assert model.generate(PROMPT, max_tokens=NEW_TOKENS).tokens == expected
        assert device.loaded == []
        before = model.stream(PROMPT, max_tokens=NEW_TOKENS)
        tokens = [next(before).token]
        preparing = model._engine.preparing
        assert preparing is not None
        ready.set()
        preparing.join(120)
        assert not preparing.is_alive()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        "the submodels for the NPU are compiled; it serves from now on"
    ]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.endswith("CPU@f32 serves until it is compiled")
    assert configs(model) == ["CPU@f32", "NPU@f16"]
    assert len(calls(tool)) == 5  # body at a chunk and a token with both buckets, and the head
    assert model.generate(PROMPT, max_tokens=NEW_TOKENS).tokens == expected
    assert device.loaded
    assert all(blob.is_relative_to(cache) for blob in device.loaded)
    tokens += [piece.token for piece in before]  # what was under way goes on where it was
    assert tokens == list(expected)

    again = edgert.load(npu_path, device="NPU")
    assert again._engine.preparing is None
    assert configs(again) == ["CPU@f32", "NPU@f16"]
    assert len(calls(tool)) == 5
    Bundle.open(npu_path, verify=True)


def test_blobs_that_the_driver_refuses(
    npu_path: Path, demo: Model, device: FakeNpu, tmp_path: Path,
    install: Callable[[Compiler | None], threading.Event],
) -> None:  # fmt: skip
    device.refused.append(npu_path)
    install(fake(tmp_path)).set()
    model = edgert.load(npu_path, device="NPU")
    assert model._engine.preparing is not None
    model._engine.preparing.join(120)
    assert configs(model) == ["CPU@f32", "NPU@f16"]
    assert model.generate(PROMPT, max_tokens=NEW_TOKENS).tokens == demo.generate(PROMPT, max_tokens=NEW_TOKENS).tokens


@pytest.mark.parametrize(
    ("program", "reason"),
    [(None, "none is here"), ("import sys; sys.exit('[ERROR] 1:0 [vpux] no room left')\n" + GOOD, "no room left")],
)
def test_the_cpu_goes_on_where_nothing_can_be_compiled(
    npu_path: Path, demo: Model, device: FakeNpu, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    install: Callable[[Compiler | None], threading.Event], program: str | None, reason: str,
) -> None:  # fmt: skip
    device.refused.append(npu_path)
    install(fake(tmp_path, program) if program else None).set()
    model = edgert.load(npu_path, device="NPU", fallback="CPU@f32")
    assert model._engine.preparing is not None
    model._engine.preparing.join(120)
    assert configs(model) == ["CPU@f32"]
    (unused,) = [r.getMessage() for r in caplog.records if "stays unused" in r.getMessage()]
    assert reason in unused
    assert model.generate(PROMPT, max_tokens=NEW_TOKENS).tokens == demo.generate(PROMPT, max_tokens=NEW_TOKENS).tokens


def test_a_bundle_without_blobs(demo_path: Path, device: FakeNpu) -> None:
    with pytest.raises(MissingBlobError, match="there is none"):
        edgert.load(demo_path, device="NPU", fallback=None)


def test_blobs_for_another_platform(npu_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "5010")
    with pytest.raises(MissingBlobError, match="there is none"):
        edgert.load(npu_path, device="NPU", fallback=None)


def test_a_driver_that_hides_its_platform(npu_path: Path, device: FakeNpu) -> None:
    del device.devices()[0].details["platform"]
    with pytest.raises(DeviceFailedError, match="does not tell its platform"):
        edgert.load(npu_path, device="NPU", fallback=None)


def forged(npu_path: Path, target: Path, name: str, content: bytes) -> Path:
    """A copy with another file, whose size and hash in the manifest are right."""
    path = Path(shutil.copytree(npu_path, target / "forged.edge"))
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": bundles.sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{" * 9999, b'{"version": 1, "blobs": [{}]}', b"\xff\xfe"],
)
def test_a_forged_index(npu_path: Path, tmp_path: Path, device: FakeNpu, content: bytes) -> None:
    path = forged(npu_path, tmp_path, "npu/index.json", content)
    with pytest.raises(BundleError, match=r"index\.json"):
        edgert.load(path, device="NPU")
    assert main(["inspect", str(path)]) == 2


def test_an_index_that_points_outside(npu_path: Path, tmp_path: Path, device: FakeNpu) -> None:
    index = json.loads((npu_path / "npu" / "index.json").read_text())
    for row in index["blobs"]:
        row["file"] = "../../outside.blob"
    (tmp_path / "outside.blob").write_bytes(b"1\nx")
    path = forged(npu_path, tmp_path, "npu/index.json", json.dumps(index).encode())
    with pytest.raises(BundleError, match="file name"):
        edgert.load(path, device="NPU")
    assert device.loaded == []


def test_a_forged_blob(npu_path: Path, tmp_path: Path, device: FakeNpu) -> None:
    """It has the hash that the manifest says, but not the one that belongs to its identity."""
    name = next(b.file for b in BlobStore(npu_path).blobs() if str(b.shape) == "16+64")
    path = forged(npu_path, tmp_path, f"npu/{name}", b"9\nforgery!!")
    with pytest.raises(BundleError, match="has not the content"):
        edgert.load(path, device="NPU")
    assert device.loaded == []
