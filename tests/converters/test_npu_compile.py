"""`edgert compile --npu`: with a compiler that is not one, and with Intel's where it is set up."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from edgert.converters import compile as compile_model
from edgert.converters import npu
from edgert.converters.npu import MAX_SUBMODEL_BYTES, NpuOptions, groups
from fake_npu import calls, fake

from edgert.bundle import Bundle
from edgert.cli import main
from edgert.errors import ConversionError, UsageError
from edgert.graph import Block, BlockGraph, BlockKind
from edgert.npu import compiler
from edgert.npu.blobs import BlobStore
from edgert.npu.compiler import PLATFORMS, Candidate, Compiler
from edgert.shapes import StaticShapes

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "models" / "bookworm"
SHAPES = ("--npu-chunks", "16", "--npu-buckets", "32,64")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = fake(tmp_path)
    install(monkeypatch, made)
    return made


def install(monkeypatch: pytest.MonkeyPatch, tool: Compiler | None) -> None:
    """Let this machine have one compiler, or none."""
    monkeypatch.setattr(compiler, "find_all", lambda: [Candidate("fake", tool, "in a test")])


@pytest.mark.usefixtures("known_export")
def test_command_line(
    decoder_folder: Path,
    tmp_path: Path,
    tool: Compiler,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out.edge"
    assert main(["compile", str(decoder_folder), "-o", str(out), "--npu", "4000,3720", *SHAPES]) == 0
    assert "check logits with static shapes" in capsys.readouterr().out
    bundle = Bundle.open(out, verify=True)
    blobs = BlobStore(out).blobs()
    assert {f"npu/{blob.file}" for blob in blobs} | {"npu/index.json"} == {
        name for name in bundle.files if name.startswith("npu/")
    }
    rows = {(b.identity.platform, b.first, b.last, str(b.shape)) for b in blobs}
    body = {(1, 4, f"{query}+{past}") for query in (1, 16) for past in (32, 64)}
    assert rows == {(platform, *row) for platform in ("3720", "4000") for row in body | {(5, 5, "1+0")}}
    assert len(calls(tool)) == len(blobs) == 10
    linear = {(r["precision"], r["group_size"]) for r in bundle.report.precisions if r["role"] == "linear"}
    assert linear == {("i4", -1)}
    assert all(blob.estimated_us == 12.5 for blob in blobs)

    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "estimated" in shown
    assert "10 blobs, " in shown
    assert main(["inspect", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["npu"]
    assert [row["file"] for row in data["blobs"]] == [blob.file for blob in blobs]
    assert bundle.graph is not None
    weights = [block.total_weight_bytes for block in bundle.graph.blocks]
    assert data["weight_copy_bytes"] == 2 * (4 * sum(weights[1:5]) + weights[5])


@pytest.mark.usefixtures("known_export")
def test_every_block_apart(decoder_folder: Path, tmp_path: Path, tool: Compiler) -> None:
    shapes = StaticShapes((16,), (32,))
    out = tmp_path / "out.edge"
    compile_model(decoder_folder, out, weights="fp16", npu=["5010"], npu_shapes=shapes, npu_split=True)
    found = Counter((b.first, b.last) for b in BlobStore(out).blobs())
    assert found == {(1, 1): 2, (2, 2): 2, (3, 3): 2, (4, 4): 2, (5, 5): 1}


@pytest.mark.usefixtures("known_export")
def test_two_builds_are_the_same(decoder_folder: Path, tmp_path: Path, tool: Compiler) -> None:
    """Down to the bytes that the compiler is given."""
    outs = [tmp_path / name for name in ("one.edge", "two.edge")]
    for out in outs:
        compile_model(decoder_folder, out, npu=["4000"], npu_shapes=StaticShapes((16,), (32,)))
    assert len({(out / "npu" / "index.json").read_bytes() for out in outs}) == 1
    Bundle.open(outs[1], verify=True)


@pytest.mark.usefixtures("known_export")
def test_a_block_that_the_compiler_rejects(
    decoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fake(tmp_path, "import sys; sys.exit('[ERROR] 1:0 [vpux-compiler] Tiling failed')"))
    out = tmp_path / "out.edge"
    assert main(["compile", str(decoder_folder), "-o", str(out), "--npu", "4000", *SHAPES]) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("edgert: error: "))
    assert "blocks 1-4 at 1+32 for 4000: rejected: Tiling failed (attention.0 to ffn.1)" in error
    assert [path.name for path in tmp_path.iterdir() if "edge" in path.name] == []


def test_the_recipe_comes_before_the_compiler(
    decoder_folder: Path, tmp_path: Path, tool: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = compile_model(decoder_folder, tmp_path / "asymmetric.edge", weights="int4", group_size=32)
    with pytest.raises(ConversionError, match=r"NPU: attention\.0: (asymmetric INT4|group size).*--sym.*and \d+ more"):
        npu.add_blobs(bundle, NpuOptions(("4000",), StaticShapes((16,), (32,))), lambda stage: None)
    assert calls(tool) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"npu": ["4001"]}, "'4001'.*3720, 4000, 5010"),
        ({"npu": ["4000"], "group_size": 64}, "group_size -1 or 128"),
        ({"npu": ["4000"], "sym": False}, "sym=False"),
        ({"npu": ["4000"], "format": "onnx"}, "format 'openvino'"),
        ({"npu_split": True}, "need npu"),
        ({"npu_shapes": StaticShapes()}, "need npu"),
    ],
)
def test_bad_options(decoder_folder: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compile_model(decoder_folder, tmp_path / "out.edge", **options)  # type: ignore[arg-type]


def test_without_a_compiler(decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    stages: list[str] = []
    with pytest.raises(ConversionError, match=r"none is here.*in a test"):
        compile_model(decoder_folder, tmp_path / "out.edge", npu=["4000"], progress=stages.append)
    assert stages == ["load"]


def test_submodels_are_as_few_as_memory_allows() -> None:
    third = MAX_SUBMODEL_BYTES // 3
    kinds = [BlockKind.EMBED, *[BlockKind.FFN] * 7, BlockKind.HEAD]
    blocks = [Block(i, k, f"{k}.{i}", None, "x:0", (), {"i4": third}, 0, 0, 0) for i, k in enumerate(kinds)]
    graph = BlockGraph(tuple(blocks), ())
    assert groups(graph, False, range(1, 9)) == [(1, 3), (4, 6), (7, 7), (8, 8)]
    assert groups(graph, False, {2, 3, 4}) == [(1, 1), (2, 4), (5, 7), (8, 8)]  # none is partly on an NPU
    assert groups(graph, True, range(1, 9)) == [(i, i) for i in range(1, 9)]


@pytest.mark.skipif(compiler.find() is None, reason="no NPU compiler: edgert doctor --setup npu-compiler")
@pytest.mark.parametrize(
    ("weights", "platforms", "split"),
    [("int4", PLATFORMS, False), ("fp16", PLATFORMS, False), ("int4", ["3720"], True)],
)
def test_real_compiler_takes_the_demo_model(
    demo_path: Path, tmp_path: Path, weights: str, platforms: Sequence[str], split: bool
) -> None:
    """Every block at one token and at a chunk: as two submodels, and apart for the platform that takes the least."""
    source = Path(shutil.copytree(DEMO_MODEL, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors")))
    for name in ("model.xml", "model.bin"):
        shutil.copy(demo_path / name, source)
    out = tmp_path / "out.edge"
    arguments = ["--weights", weights, "--npu", ",".join(platforms), "--npu-chunks", "64", "--npu-buckets", "256"]
    assert main(["compile", str(source), "-o", str(out), *arguments, *(["--npu-split"] if split else [])]) == 0
    bundle = Bundle.open(out, verify=True)
    blobs = BlobStore(out).blobs()
    if split:
        expected = {(i, i, f"{query}+{256 * (i % 2)}") for i in range(1, 9) for query in (1, 64)}
    else:
        expected = {(1, 8, "1+256"), (1, 8, "64+256")}
    for platform in platforms:
        found = {(b.first, b.last, str(b.shape)) for b in blobs if b.identity.platform == platform}
        assert found == expected | {(9, 9, "1+0")}
    assert bundle.graph is not None
    for blob in blobs:
        assert blob.estimated_us is not None
        assert blob.estimated_us > 0
        held = sum(block.total_weight_bytes for block in bundle.graph.blocks[blob.first : blob.last + 1])
        # Weights stay packed; what comes on top is code and tables, and an INT8 head may become f16.
        assert 0.9 * held < blob.bytes < 1.1 * held + 400_000 * (blob.last - blob.first + 1) + (blob.first == 9) * held
