"""ONNX in: optimum's names, hand-made names, encoders, f16, attacks by external data. ONNX out: `format='onnx'`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import openvino as ov
import pytest
from edgert.converters import compile as compile_model
from edgert.converters import onnx_bundle, onnx_source, quality
from edgert.converters.canonical import cache_names
from edgert.converters.compress import compress
from onnx import TensorProto, helper
from tiny_models import VOCAB_SIZE, tiny

from edgert.errors import ConversionError, ParityError, UsageError

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported_onnx(
    decoder_folder: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders with model.onnx, configuration and tokenizer, one a task."""
    made = {}
    for task, source, family in (("decoder", decoder_folder, "qwen3"), ("encoder", encoder_folder, "bert")):
        folder = tmp_path_factory.mktemp("onnx") / f"tiny-{family}"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        onnx_bundle._export(tiny(family), task, folder / "model.onnx")  # type: ignore[arg-type]
        made[task] = folder
    return made


@pytest.fixture
def known_onnx(exported_onnx: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after it: the tiny decoder's ONNX export is taken from the fixture above."""

    def known(model: object, task: str, path: Path) -> dict[str, tuple[int, ...]]:
        shutil.copytree(exported_onnx[task], path.parent, dirs_exist_ok=True)
        return dict.fromkeys(cache_names(2)[0], (2, 2, 5, 32))

    monkeypatch.setattr(onnx_bundle, "_export", known)


@pytest.fixture
def decoder_onnx(exported_onnx: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the decoder's folder, to damage."""
    return Path(shutil.copytree(exported_onnx["decoder"], tmp_path / "tiny-qwen3"))


def test_decoder(decoder_onnx: Path, tmp_path: Path) -> None:
    bundle = compile_model(decoder_onnx, tmp_path / "out.edge", weights="int8")
    assert (bundle.facts.task, bundle.facts.name, bundle.facts.format) == ("decoder", "tiny-qwen3", "openvino")
    row, cut, *_ = bundle.report.checks
    assert cut["check"] == "cut at every boundary"
    assert cut["relative_error"] <= 1e-5
    assert row["against"].startswith("onnxruntime ")
    assert 0 < row["relative_error"] < 1e-4
    assert {(r["role"], r["precision"]) for r in bundle.report.precisions} >= {("linear", "u8"), ("head", "u8")}
    assert bundle.graph is not None
    assert len(bundle.graph.blocks) == 6


def test_encoder(exported_onnx: dict[str, Path], tmp_path: Path) -> None:
    bundle = compile_model(exported_onnx["encoder"] / "model.onnx", tmp_path / "out.edge", weights="fp16")
    assert (bundle.facts.task, bundle.facts.name) == ("encoder", "tiny-bert")
    assert bundle.report.checks[0]["relative_error"] < 1e-4


def rename_ports(path: Path, names: dict[str, str]) -> None:
    proto = onnx.load(path)
    for port in (*proto.graph.input, *proto.graph.output):
        port.name = names.get(port.name, port.name)
    for node in proto.graph.node:
        for ports in (node.input, node.output):
            ports[:] = [names.get(name, name) for name in ports]
    onnx.save(proto, path)


def test_hand_made_names(decoder_onnx: Path, tmp_path: Path) -> None:
    path = decoder_onnx / "model.onnx"
    past, present = cache_names(2)
    names = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions", "logits": "scores"}
    names |= {name: f"cache_in_{i}" for i, name in enumerate(past)}
    names |= {name: f"cache_out_{i}" for i, name in enumerate(present)}
    rename_ports(path, names)
    model, task, rows = onnx_source.convert(path, lambda stage: None)
    assert task == "decoder"
    assert rows[0]["relative_error"] < 1e-4
    assert [p.any_name for p in model.outputs] == ["logits"]


def test_swapped_caches_are_noticed(decoder_onnx: Path) -> None:
    """Without known names caches are matched by order; a file in another order must not pass."""
    past, present = cache_names(2)
    names = {name: f"in_{i}" for i, name in enumerate(past)} | {name: f"out_{i}" for i, name in enumerate(present)}
    rename_ports(decoder_onnx / "model.onnx", names)
    proto = onnx.load(decoder_onnx / "model.onnx")
    outputs = list(proto.graph.output)
    del proto.graph.output[1:]
    proto.graph.output.extend([outputs[2], outputs[1], *outputs[3:]])
    onnx.save(proto, decoder_onnx / "model.onnx")
    reference = quality.torch_decoder(tiny("qwen3"))
    model, _, _ = onnx_source.convert(decoder_onnx / "model.onnx", lambda stage: None)
    with pytest.raises(ParityError):  # both sides swap alike: only the true source can tell
        quality.check_decoder(
            quality.openvino_decoder(model), reference, vocab_size=VOCAB_SIZE, window=None, against="transformers"
        )


def test_half(decoder_onnx: Path, tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = decoder_onnx / "model.onnx"
    onnx.save(convert_float_to_float16(onnx.load(path), disable_shape_infer=True), path)
    bundle = compile_model(path, tmp_path / "out.edge", weights="fp16")
    assert 1e-6 < bundle.report.checks[0]["relative_error"] < onnx_source.HALF_LIMIT


def test_no_cache(decoder_onnx: Path) -> None:
    proto = onnx.load(decoder_onnx / "model.onnx")
    keep = [p for p in proto.graph.input if not p.name.startswith("past")]
    shapes = {p.name: [1, 2, 4, 32] for p in proto.graph.input if p.name.startswith("past")}
    constants = [helper.make_tensor(n, TensorProto.FLOAT, s, [0.0] * 256) for n, s in shapes.items()]
    del proto.graph.input[:], proto.graph.output[1:]
    proto.graph.input.extend(keep)
    proto.graph.initializer.extend(constants)
    onnx.save(proto, decoder_onnx / "model.onnx")
    with pytest.raises(ConversionError, match="logits but no KV cache"):
        onnx_source.convert(decoder_onnx / "model.onnx", lambda stage: None)


def test_unknown_input(decoder_onnx: Path) -> None:
    rename_ports(decoder_onnx / "model.onnx", {"position_ids": "other_mask"})
    with pytest.raises(ConversionError, match="input 'other_mask' is not understood"):
        onnx_source.convert(decoder_onnx / "model.onnx", lambda stage: None)


def test_ir_with_explicit_caches(decoder_onnx: Path, tmp_path: Path) -> None:
    """An IR folder as OpenVINO makes it from ONNX, its caches still inputs and outputs."""
    model = ov.Core().read_model(decoder_onnx / "model.onnx")
    (decoder_onnx / "model.onnx").unlink()
    ov.save_model(model, decoder_onnx / "openvino_model.xml", compress_to_fp16=False)
    bundle = compile_model(decoder_onnx, tmp_path / "out.edge", weights="fp16")
    assert (bundle.report.source, bundle.facts.task) == ("openvino: tiny-qwen3", "decoder")
    written = ov.Core().read_model(bundle.model_path)
    quality.check_decoder(
        quality.openvino_decoder(written), quality.torch_decoder(tiny("qwen3")),
        vocab_size=VOCAB_SIZE, window=None, against="transformers", limit=1e-2,
    )  # fmt: skip


def test_garbage_and_missing_config(decoder_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\x00garbage" * 100)
    (tmp_path / "empty.onnx").touch()
    for name in ("garbage.onnx", "empty.onnx"):
        with pytest.raises(ConversionError, match=r"is no (valid )?ONNX"):
            onnx_source.read(tmp_path / name)
    (decoder_onnx / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config.json: missing"):
        compile_model(decoder_onnx, tmp_path / "out.edge")


def with_external(
    folder: Path, location: str, *, offset: int = 0, length: int = 16, where: str = "initializer"
) -> Path:
    """A minimal model one of whose tensors lies at `location`."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    add = helper.make_node("Add", ["x", "weight"], ["y"])
    if where == "initializer":
        graph = helper.make_graph([add], "g", [x], [y], [tensor])
    elif where == "attribute":
        graph = helper.make_graph([helper.make_node("Constant", [], ["weight"], value=tensor), add], "g", [x], [y])
    else:
        inner = helper.make_graph([helper.make_node("Identity", ["weight"], ["z"])], "inner", [], [], [tensor])
        inner.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [4]))
        flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
        choice = helper.make_node("If", ["flag"], ["weight"], then_branch=inner, else_branch=inner)
        graph = helper.make_graph([choice, add], "g", [x], [y], [flag])
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString())
    return path


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph"])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", ""])
def test_external_data_outside(location: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ConversionError, match="outside the model's folder"):
        onnx_source.read(with_external(folder, location, where=where))


def test_external_data_links(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "real").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 16)
    (folder / "soft").symlink_to(secret)
    (folder / "way").symlink_to(tmp_path)
    os.link(secret, folder / "hard")
    for location, message in (("soft", "symbolic link"), ("way/secret", "symbolic link"), ("hard", "hard links")):
        with pytest.raises(ConversionError, match=message):
            onnx_source.read(with_external(folder, location))


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [(0, 16, None), (8, 16, "takes bytes 8 to 24"), (-8, 16, "takes bytes"), (0, 2**62, "takes bytes")],
)
def test_external_data_bounds(offset: int, length: int, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\0" * 16)
    path = with_external(tmp_path, "weights", offset=offset, length=length)
    if message is None:
        assert onnx_source.read(path).graph.node
    else:
        with pytest.raises(ConversionError, match=message):
            onnx_source.read(path)
    with pytest.raises(ConversionError, match="missing"):
        onnx_source.read(with_external(tmp_path, "nothing"))


@pytest.mark.usefixtures("known_onnx")
@pytest.mark.parametrize(("weights", "linear"), [("int4", ("u4", 32)), ("fp16", ("f16", None))])
def test_onnx_bundle(weights: str, linear: tuple[str, int | None], decoder_folder: Path, tmp_path: Path) -> None:
    group = {"group_size": 32} if weights == "int4" else {}
    bundle = compile_model(decoder_folder, tmp_path / "o.edge", format="onnx", weights=weights, **group)  # type: ignore[arg-type]
    assert (bundle.facts.format, bundle.facts.task, bundle.graph) == ("onnx", "decoder", None)
    rows = {row["role"]: row for row in bundle.report.precisions}
    assert (rows["linear"]["precision"], rows["linear"]["group_size"]) == linear
    assert {role: row["elements"] for role, row in rows.items() if role != "norms+other"} == {
        "embedding": 16384, "linear": 98304, "head": 16384,
    }  # fmt: skip
    assert bundle.report.checks[0]["relative_error"] < 1e-4
    past, present = cache_names(2)
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids", "logits")}
    decoder = quality.onnx_decoder(bundle.model_path, dict(zip(past, present, strict=True)), names)
    limit = 0.8 if weights == "int4" else 1e-2  # random weights suffer from INT4
    quality.check_decoder(
        decoder, quality.torch_decoder(tiny("qwen3")), vocab_size=VOCAB_SIZE, window=None, against="source", limit=limit
    )
    assert not re.search(rb"site-packages|\.py\b", bundle.model_path.read_bytes())  # nothing of the build machine


def test_tied_weights(tmp_path: Path) -> None:
    """The exporter leaves a Transpose before the head of a model whose embedding is its head."""
    source = tiny("gpt2")
    caches = onnx_bundle._export(source, "decoder", tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    weights = {tensor.name for tensor in proto.graph.initializer}
    assert not [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    assert onnx_bundle._check(source, "decoder", tmp_path / "model.onnx", caches, VOCAB_SIZE)["relative_error"] < 1e-4
    rows = onnx_bundle.precision_table(compress(proto, "int8"))
    assert {(row["role"], row["precision"]) for row in rows} >= {("embedding", "u8"), ("head", "u8"), ("linear", "u8")}


def test_onnx_bundle_of_an_encoder(encoder_folder: Path, tmp_path: Path) -> None:
    bundle = compile_model(encoder_folder, tmp_path / "o.edge", format="onnx", weights="int8")
    assert (bundle.facts.format, bundle.facts.task) == ("onnx", "encoder")


@pytest.mark.usefixtures("known_onnx")
def test_large_onnx_is_written_beside(decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_bundle, "EXTERNAL_BEYOND", 1000)
    bundle = compile_model(decoder_folder, tmp_path / "o.edge", format="onnx", weights="fp16")
    assert bundle.files["model.onnx.data"]["bytes"] > 200_000
    quality.onnx_session(bundle.model_path)


def test_onnx_from_onnx(exported_onnx: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'onnx' needs a Hugging Face model"):
        compile_model(exported_onnx["decoder"], tmp_path / "o.edge", format="onnx")
