"""The NPU compiler at arm's length, with the real one where it is set up; and the store of blobs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import psutil
import pytest
from fake_npu import GOOD, calls, fake, product, save

from edgert.errors import BundleError, EdgertError, UsageError
from edgert.npu import compiler, setup
from edgert.npu.blobs import BlobStore, Identity, hash_ir, rename
from edgert.npu.compiler import PLATFORMS, Compiled, Compiler, Failed, Limits
from edgert.shapes import StaticShape

LIMITS = Limits(seconds=120)
needs_compiler = pytest.mark.skipif(
    compiler.find() is None, reason="no NPU compiler: edgert doctor --setup npu-compiler"
)


@pytest.fixture
def xml(tmp_path: Path) -> Path:
    """A matrix product, saved."""
    return save(product(), tmp_path / "model.xml")


def run(tool: Compiler, xml: Path, limits: Limits = LIMITS) -> Compiled | Failed:
    """A run, after which nothing lies beside the model but the blob."""
    before = set(xml.parent.iterdir())
    out = xml.with_suffix(".blob")
    outcome = tool.compile(xml, out, "4000", {"PERFORMANCE_HINT": "LATENCY"}, limits)
    assert set(xml.parent.iterdir()) - before == ({out} if isinstance(outcome, Compiled) else set())
    return outcome


def test_a_blob(xml: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tool = fake(tmp_path_factory.mktemp("tool"))
    outcome = run(tool, xml)
    assert isinstance(outcome, Compiled)
    blob = outcome.blob.read_bytes()
    assert blob.partition(b"\n")[2] == xml.read_bytes() + xml.with_suffix(".bin").read_bytes()
    (properties,) = calls(tool)
    assert set(properties.split()) == {
        "LOG_LEVEL=LOG_INFO", "NPU_COMPILER_TYPE=FAKE", "PERFORMANCE_HINT=LATENCY", "NPU_PLATFORM=4000",
    }  # fmt: skip
    assert (outcome.compile_s, outcome.estimated_us, outcome.blob_bytes) == (0.25, 12.5, len(blob))
    assert outcome.peak_rss_bytes > 0


def test_without_an_estimate(xml: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outcome = run(fake(tmp_path_factory.mktemp("tool"), GOOD.rpartition("print")[0]), xml)
    assert isinstance(outcome, Compiled)
    assert outcome.estimated_us is None


def test_rejected_with_the_compilers_words(xml: Path) -> None:
    log = "\\x1b[31m[ERROR] 10:00:00.000 [vpux-compiler] Tiling Pass failed : too wide\\x1b[0m"
    said = r"Exception from src\\core.cpp:1:\nCompilation failed. result: 4 - Compiler returned msg:\nno such op\n\n"
    program = f"import sys; print('[INFO] 10:00:00.0 [x] y'); print('{log}'); sys.stderr.write('{said}'); sys.exit(1)"
    outcome = run(fake(xml.parent, program), xml)
    assert outcome == Failed("rejected", "Tiling Pass failed : too wide; no such op")


def test_abort_is_a_value(xml: Path) -> None:
    program = "import os, sys; sys.stderr.write('LLVM ERROR: cannot select\\n'); sys.stderr.flush(); os.abort()"
    assert run(fake(xml.parent, program), xml) == Failed("aborted", "LLVM ERROR: cannot select")


def test_an_end_without_a_blob_is_an_abort(xml: Path) -> None:
    outcome = run(fake(xml.parent, "print('compile_s 1.0')"), xml)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "aborted"


def test_time_limit_ends_the_whole_tree(xml: Path) -> None:
    program = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
open(sys.argv[0] + ".pid", "w").write(str(child.pid))
threading.Event().wait()
"""
    folder = xml.parent / "program"
    folder.mkdir()
    outcome = run(fake(folder, program), xml, Limits(seconds=3))
    assert outcome == Failed("timeout", "not done after 3 s")
    pid = int((folder / "fake.py.pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_memory_limit(xml: Path) -> None:
    program = "import threading; hold = bytearray(b'x' * (400 << 20)); threading.Event().wait()"
    outcome = run(fake(xml.parent, program), xml, Limits(seconds=120, memory_bytes=200 << 20))
    assert outcome == Failed("memory", "over 0.2 GiB of memory")


def test_a_run_that_lost_its_wine_server_is_repeated(xml: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tool")
    count = folder / "count"
    program = f"""
with open({str(count)!r}, "a") as file: file.write("x")
if len(open({str(count)!r}).read()) < 3: sys.exit("wine client error:0: recvmsg: Connection reset by peer")
"""
    outcome = run(fake(folder, "import sys" + program + GOOD), xml)
    assert isinstance(outcome, Compiled)
    assert count.read_text() == "xxx"


def test_a_compiler_that_does_not_start(xml: Path) -> None:
    outcome = run(Compiler("none", "1", (str(xml.parent / "no-such-program"),)), xml)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "aborted"
    assert "no-such-program" in outcome.reason


def test_unknown_platform_and_missing_model(xml: Path) -> None:
    tool = fake(xml.parent, GOOD)
    with pytest.raises(UsageError, match=r"'4001'.*3720, 4000, 5010"):
        tool.compile(xml, xml.with_suffix(".blob"), "4001", {}, LIMITS)
    with pytest.raises(UsageError, match=r"none\.xml"):
        tool.compile(xml.with_name("none.xml"), xml.with_suffix(".blob"), "4000", {}, LIMITS)


def test_openvino_without_its_compiler_says_so(xml: Path) -> None:
    """Through child.py and the NPU plugin, which Linux wheels have without the compiler."""
    place = compiler.find_all()[0]
    if place.available:
        pytest.skip("this OpenVINO has its compiler")
    outcome = run(compiler._in_python("openvino", "PLUGIN"), xml)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "rejected"
    assert "openvino_intel_npu_compiler_loader" in outcome.reason


def test_looking_for_it_imports_no_openvino() -> None:
    code = "import sys; from edgert.npu import compiler; compiler.find_all(); sys.exit('openvino' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_places_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path))
    places = compiler.find_all()
    assert [p.name for p in places] == ["openvino", "driver", "wine"]
    assert not places[2].available
    if sys.platform.startswith("linux"):
        assert str(tmp_path) in places[2].detail
        assert places[2].remedy == "edgert doctor --setup npu-compiler"


@needs_compiler
@pytest.mark.parametrize("platform", PLATFORMS)
def test_real_compiler_is_deterministic(xml: Path, platform: str) -> None:
    tool = compiler.find()
    assert tool is not None
    folder = xml.parent / "Ü mit Leerzeichen"  # neither blanks nor letters beyond ASCII may matter
    folder.mkdir()
    blobs = []
    for name in ("one", "two"):
        model = product()
        rename(model)
        path = save(model, folder / f"{name}.xml")
        outcome = tool.compile(path, path.with_suffix(".blob"), platform, {}, LIMITS)
        assert isinstance(outcome, Compiled), outcome
        assert outcome.estimated_us is not None
        assert outcome.estimated_us > 0
        blobs.append(outcome.blob.read_bytes())
    assert blobs[0] == blobs[1]
    assert sorted(p.name for p in folder.iterdir()) == [
        "one.bin", "one.blob", "one.xml", "two.bin", "two.blob", "two.xml",
    ]  # fmt: skip


@needs_compiler
def test_real_compiler_rejects(tmp_path: Path) -> None:
    tool = compiler.find()
    assert tool is not None
    outcome = run(tool, save(product(width=ov.Dimension()), tmp_path / "dynamic.xml"))
    assert isinstance(outcome, Failed)
    assert outcome.kind == "rejected"
    assert "upper bound" in outcome.reason


@needs_compiler
def test_real_compiler_twice_at_once(tmp_path: Path) -> None:
    tool = compiler.find()
    assert tool is not None
    paths = [save(product(seed=seed), tmp_path / f"{seed}.xml") for seed in range(6)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda p: tool.compile(p, p.with_suffix(".blob"), "4000", {}, LIMITS), paths))
    assert all(isinstance(outcome, Compiled) for outcome in outcomes), outcomes
    assert len({outcome.blob.read_bytes() for outcome in outcomes if isinstance(outcome, Compiled)}) == 6


def test_setup_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(setup, "wine_program", lambda: None)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(EdgertError, match=r"Wine and MinGW's gcc not found.*sudo apt-get install .*wine64 gcc-mingw"):
        setup.setup(print)
    assert list(tmp_path.iterdir()) == []


def test_setup_is_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(EdgertError, match="win32"):
        setup.setup(print)


def test_setup_takes_no_other_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], environment: object = None) -> None:
        Path(command[-1], "openvino-2026.4.1-cp311-cp311-win_amd64.whl").write_bytes(b"something else")

    monkeypatch.setattr(setup, "_call", download)
    monkeypatch.setattr(setup, "openvino_version", lambda: "2026.4.1")
    found = hashlib.sha256(b"something else").hexdigest()[:12]
    with pytest.raises(EdgertError, match=f"has hash {found}….*expected bfddae6d6d3a"):
        setup._libraries(tmp_path, tmp_path)
    monkeypatch.setattr(setup, "openvino_version", lambda: "2031.1.0")
    with pytest.raises(EdgertError, match=r"2031\.1\.0"):
        setup._libraries(tmp_path, tmp_path)


def test_hash_is_of_what_is_computed(tmp_path: Path) -> None:
    first = hash_ir(save(product(), tmp_path / "a.xml"))
    again = product()
    for op in again.get_ordered_ops():
        op.set_friendly_name(f"other/{op.get_friendly_name()}")
    assert hash_ir(save(again, tmp_path / "b.xml")) == first
    assert (tmp_path / "a.xml").read_bytes() != (tmp_path / "b.xml").read_bytes()
    others = [product(seed=1), product(name="z"), product(dtype=np.float32), product(width=63)]
    hashes = {hash_ir(save(model, tmp_path / f"{i}.xml")) for i, model in enumerate(others)}
    assert len(hashes | {first}) == 5


IDENTITY = Identity("0" * 64, 1, "2026.4.1", "plugin-2026.4.1", "4000", {"PERFORMANCE_HINT": "LATENCY"})
SHAPE = StaticShape(64, 512)


def compiled(folder: Path, content: bytes = b"blob") -> Compiled:
    path = folder / "made.blob"
    path.write_bytes(content)
    return Compiled(path, 1.25, 1, len(content), 12.5)


def test_store(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "bundle")
    assert store.blobs() == ()
    assert store.find(IDENTITY) is None
    row = store.add(IDENTITY, (1, 1), SHAPE, compiled(tmp_path))
    assert not (tmp_path / "made.blob").exists()
    assert BlobStore(tmp_path / "bundle").blobs() == (row,)
    assert (row.bytes, row.estimated_us, row.shape) == (4, 12.5, SHAPE)
    found = store.find(IDENTITY)
    assert found is not None
    assert found.read_bytes() == b"blob"
    for stale in ({"openvino": "2026.5.0"}, {"ir_sha256": "1" * 64}, {"platform": "5010"}, {"properties": {}}):
        assert store.find(replace(IDENTITY, **stale)) is None


def test_identical_submodels_share_a_file(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assert store.share(IDENTITY, (3, 3), SHAPE) is None
    store.add(IDENTITY, (1, 1), SHAPE, compiled(tmp_path))
    row = store.share(IDENTITY, (3, 3), SHAPE)
    assert row is not None
    assert [(b.first, b.file) for b in store.blobs()] == [(1, row.file), (3, row.file)]
    other = replace(IDENTITY, ir_sha256="2" * 64)
    store.add(other, (1, 1), SHAPE, compiled(tmp_path, b"new"))  # takes the place of the first row
    assert store.find(IDENTITY) is not None  # still there for the other
    store.add(replace(other, ir_sha256="3" * 64), (3, 3), SHAPE, compiled(tmp_path, b"newer"))
    assert store.find(IDENTITY) is None
    assert len(list(store.folder.glob("*.blob"))) == 2


def test_a_changed_blob_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    row = store.add(IDENTITY, (1, 1), SHAPE, compiled(tmp_path))
    (store.folder / row.file).write_bytes(b"bLob")
    with pytest.raises(BundleError, match=row.file):
        store.find(IDENTITY)
    (store.folder / row.file).unlink()
    with pytest.raises(BundleError, match="missing"):
        store.find(IDENTITY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../outside.blob"}, "file name"),
        ({"file": "/etc/passwd"}, "file name"),
        ({"bytes": -1}, "out of range"),
        ({"bytes": "4"}, "bytes"),
        ({"first": 5}, "out of range"),
        ({"shape": {"query": 0, "past": 0}}, "out of range"),
        ({"shape": {"query": 1}}, "past"),
        ({"compile_s": float("nan")}, "out of range"),
        ({"extra": 1}, "extra"),
        ({"identity": {}}, "ir_sha256"),
    ],
)
def test_hostile_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    store = BlobStore(tmp_path)
    store.add(IDENTITY, (1, 1), SHAPE, compiled(tmp_path))
    path = store.folder / "index.json"
    index = json.loads(path.read_text())
    index["blobs"][0] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(BundleError, match=message):
        store.blobs()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"blobs": []}', '{"version": 2, "blobs": []}', '{"version": 1, "blobs": {}}', "[" * 9999],
)
def test_hostile_index(tmp_path: Path, text: str) -> None:
    store = BlobStore(tmp_path)
    store.folder.mkdir()
    (store.folder / "index.json").write_text(text)
    with pytest.raises(BundleError, match=r"index\.json"):
        store.blobs()
