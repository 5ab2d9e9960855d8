"""`edgert.compile` from every kind of source, and what it says to bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from edgert.converters import compile as compile_model
from edgert.converters import quality
from edgert.converters.compress import to_fp16
from tiny_models import VOCAB_SIZE, exported, tiny

from edgert.errors import BundleError, ConversionError, MissingDependencyError, UsageError

Copy = Callable[[Path], Path]


def test_decoder(decoder_folder: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    bundle = compile_model(decoder_folder, tmp_path / "out.edge", weights="fp16", kernels=False, progress=stages.append)
    assert stages == ["load", "export", "check", "compress to fp16", "write"]
    facts = bundle.facts
    assert (facts.name, facts.task, facts.architecture, facts.weights) == ("tiny-qwen3", "decoder", "qwen3", "fp16")
    assert (facts.vocab_size, facts.hidden_size, facts.context_length, facts.num_layers) == (256, 64, 256, 2)
    assert (facts.eos_token_ids, facts.bos_token_id, facts.pooling) == ((2,), 1, None)
    assert facts.parameters == pytest.approx(tiny("qwen3").num_parameters(), rel=0.01)
    assert bundle.report.source == "huggingface: tiny-qwen3"
    assert {"edgert", "openvino", "torch", "transformers", "nncf"} <= set(bundle.report.tools)
    assert bundle.graph is not None
    assert len(bundle.graph.blocks) == 6
    assert set(bundle.files) == {
        "model.xml", "model.bin", "graph.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    assert str(decoder_folder.parent) not in bundle.model_path.read_text("utf-8")
    bundle.verify()
    model = ov.Core().read_model(bundle.model_path)
    row = quality.check_decoder(
        quality.openvino_decoder(model), quality.torch_decoder(tiny("qwen3")),
        vocab_size=VOCAB_SIZE, window=None, against="transformers", limit=2e-2,
    )  # fmt: skip
    assert row["relative_error"] > 0


@pytest.mark.usefixtures("known_export")
def test_int4_with_dataset(decoder_folder: Path, text_file: Path, tmp_path: Path) -> None:
    bundle = compile_model(
        decoder_folder, tmp_path / "out.edge", group_size=32, awq=True, dataset=text_file, name="mine"
    )
    assert (bundle.facts.name, bundle.facts.weights) == ("mine", "int4")
    assert ("linear", "u4", 32) in {(r["role"], r["precision"], r["group_size"]) for r in bundle.report.precisions}


def test_encoder(encoder_folder: Path, tmp_path: Path) -> None:
    bundle = compile_model(encoder_folder, tmp_path / "out.edge", weights="int8")
    facts = bundle.facts
    assert (facts.task, facts.pooling, facts.context_length) == ("encoder", "mean", 128)  # model_max_length
    assert bundle.report.checks[0]["relative_error"] < 1e-4


@pytest.mark.parametrize("task", ["decoder", "encoder"])
def test_optimum(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(f"{task}_folder")
    bundle = compile_model(source, tmp_path / "out.edge", weights="int8", exporter="optimum")
    assert bundle.facts.task == task
    assert "optimum-intel" in bundle.report.tools
    assert bundle.report.checks[0]["relative_error"] < 1e-4


def ir_folder(source: Path, target: Path, family: str, name: str = "openvino_model.xml") -> Path:
    target.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / file).write_bytes((source / file).read_bytes())
    _, model = exported(family)
    to_fp16(model)
    ov.save_model(model, target / name, compress_to_fp16=False)
    return target


def test_ir_folder(decoder_folder: Path, tmp_path: Path) -> None:
    source = ir_folder(decoder_folder, tmp_path / "ir", "qwen3")
    bundle = compile_model(source, tmp_path / "out.edge", weights="int8")
    assert (bundle.facts.name, bundle.facts.task, bundle.facts.weights) == ("ir", "decoder", "int8")
    assert bundle.report.source == "openvino: ir"
    again = ir_folder(decoder_folder, tmp_path / "again", "qwen3")
    for file in ("model.xml", "model.bin"):
        (again / f"openvino_{file}").write_bytes((bundle.path / file).read_bytes())
    kept = compile_model(again, tmp_path / "kept.edge", weights="int4")
    assert kept.facts.weights == "source"  # compressed already
    assert kept.report.precisions == bundle.report.precisions


def test_ir_folder_of_an_encoder(encoder_folder: Path, tmp_path: Path) -> None:
    source = ir_folder(encoder_folder, tmp_path / "ir", "bert", "model.xml")
    assert compile_model(source, tmp_path / "out.edge", weights="fp16").facts.task == "encoder"


def test_damaged_ir(decoder_folder: Path, tmp_path: Path) -> None:
    source = ir_folder(decoder_folder, tmp_path / "ir", "qwen3")
    weights = source / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConversionError, match=r"openvino_model\.xml: OpenVINO cannot read it"):
        compile_model(source, tmp_path / "out.edge")
    (source / "openvino_model.xml").write_text("<net><layers/></net>", "utf-8")
    with pytest.raises(ConversionError):
        compile_model(source, tmp_path / "out.edge")


def test_ir_of_something_else(decoder_folder: Path, tmp_path: Path) -> None:
    source = ir_folder(decoder_folder, tmp_path / "ir", "qwen3")
    image = ov.opset13.parameter([1, 3, 8, 8], np.float32, name="image")
    ov.save_model(ov.Model([ov.opset13.relu(image)], [image], "image"), source / "openvino_model.xml")
    with pytest.raises(ConversionError, match="inputs are"):
        compile_model(source, tmp_path / "out.edge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int2"}, "weights is 'int2', expected one of fp16, int8, int4"),
        ({"format": "tflite"}, "format is 'tflite'"),
        ({"exporter": "magic"}, "exporter is 'magic'"),
        ({"group_size": 0}, "group_size is 0, expected -1"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": 12.5}, "group_size is 12.5"),
        ({"weights": "int8", "sym": True}, "are for weights='int4'"),
        ({"dataset": "/no/such/file"}, "no such file"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        compile_model(tmp_path, tmp_path / "out.edge", **arguments)  # type: ignore[arg-type]


def test_existing_output(decoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        compile_model(decoder_folder, tmp_path)


def test_unknown_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    empty, pickled, many, text = tmp_path / "empty", tmp_path / "pickled", tmp_path / "many", tmp_path / "model.txt"
    for folder in (empty, pickled, many):
        folder.mkdir()
    (pickled / "pytorch_model.bin").touch()
    (many / "a.gguf").touch()
    (many / "b.gguf").touch()
    text.touch()
    cases = {
        tmp_path / "none": "no such file or folder",
        empty: r"found no \*\.safetensors",
        pickled: "pickles, which edgert does not load",
        many: "name one of them",
        text: "must end in .gguf, .onnx or .xml",
        "someone/some-model": "no such folder here, and the hub did not give it",
    }
    for source, message in cases.items():
        with pytest.raises(ConversionError, match=message):
            compile_model(source, tmp_path / "out.edge")
    assert not (tmp_path / "out.edge").exists()


def damage_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer_config.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}", "utf-8"), "tokenizer.json: is missing or damaged"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("[1]", "utf-8"), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"garbage"), "safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
            "cannot load it",
        ),
        (lambda f: damage_config(f, model_type="no_such_type"), "not for transformers"),
        (lambda f: damage_config(f, architectures=["T5Model"], is_encoder_decoder=True), "encoder-decoder"),
        (lambda f: damage_config(f, architectures=["Qwen3ForTokenClassification"]), "neither a causal language model"),
        (
            lambda f: damage_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
            "weights are missing, the first is model.layers.2",
        ),
        (lambda f: damage_config(f, auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), "not for transformers"),
    ],
)
def test_damaged_folder(
    damage: Callable[[Path], object], message: str, decoder_folder: Path, tmp_path: Path, copy_of: Copy
) -> None:
    source = copy_of(decoder_folder)
    damage(source)
    with pytest.raises(ConversionError, match=message):
        compile_model(source, tmp_path / "out.edge")
    assert not [path for path in tmp_path.iterdir() if path != source]


class Stop(BaseException):
    """Ctrl-C, but not for pytest."""


@pytest.mark.usefixtures("known_export")
@pytest.mark.parametrize("stage", ["load", "check", "write"])
def test_interrupted_leaves_nothing(stage: str, encoder_folder: Path, tmp_path: Path) -> None:
    def progress(name: str) -> None:
        if name == stage:
            raise Stop

    with pytest.raises(Stop):
        compile_model(encoder_folder, tmp_path / "out.edge", weights="fp16", progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("known_export")
def test_full_disk(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ov.save_model

    def half(model: ov.Model, path: Path, **options: object) -> None:
        real(model, path, **options)
        weights = path.with_suffix(".bin")
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])

    monkeypatch.setattr(ov, "save_model", half)
    with pytest.raises(BundleError, match="cannot be written"):
        compile_model(encoder_folder, tmp_path / "out.edge", weights="fp16")
    assert list(tmp_path.iterdir()) == []


def test_missing_package(decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependencyError, match=r"needs nncf: pip install edgert\[compile\]"):
        compile_model(decoder_folder, tmp_path / "out.edge", weights="int8")


def test_broken_torchvision(decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')", "utf-8")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(MissingDependencyError, match="pip uninstall torchvision"):
        compile_model(decoder_folder, tmp_path / "out.edge")


def test_other_name_is_refused() -> None:
    import edgert.converters

    code = "import sys; sys.path.insert(0, sys.argv[1]); import converters"
    root = Path(edgert.converters.__file__).parents[1]
    child = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert "must be imported as edgert.converters, not as converters" in child.stderr
