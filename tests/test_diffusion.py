"""Diffusion transformers: export, gate, cuts, placements, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the extra `diffusion`")

import openvino as ov
import torch
from edgert.converters.diffusion import families, transformer
from tiny_diffusion import check, relative_error, save_pipeline, tiny

import edgert
from edgert.architecture import from_config
from edgert.cli import main
from edgert.diffusion import Denoiser, Port, Signature
from edgert.errors import BundleError, ConversionError, DeviceNonsenseError, ParityError, PlanError, UsageError
from edgert.graph import BlockKind

LIMIT = 1e-3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny-ltx2")


@pytest.fixture(scope="module")
def exported() -> ov.Model:
    """The export of `tiny()`, which takes seconds; to be cloned."""
    return transformer.export(tiny())


@pytest.fixture(scope="module")
def bundle(pipeline: Path, exported: ov.Model) -> edgert.Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "export", lambda model, exporter: exported.clone())
        return edgert.compile(pipeline, pipeline.parent / "ltx2.edge", weights="fp16")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return arrays(tiny(), transformer.SIZES[0])


def arrays(model: Any, sizes: families.Sizes) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in transformer.example(model, sizes).items()}


def errors(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert list(found) == list(expected) == ["sample", "audio_sample"]
    return max(relative_error(found[name], expected[name]) for name in expected)


def test_bundle(bundle: edgert.Bundle) -> None:
    assert (bundle.facts.task, bundle.facts.architecture) == ("denoiser", "LTX2VideoTransformer3DModel")
    assert bundle.facts.parameters == sum(p.numel() for p in tiny().parameters())
    assert [row["check"] for row in bundle.report.checks] == ["samples of two sizes", "cut at every boundary"]
    assert bundle.graph is not None
    assert bundle.graph.reason is None
    kinds = [block.kind for block in bundle.graph.blocks]
    assert kinds.count(BlockKind.ATTENTION) >= 2
    assert BlockKind.FFN in kinds


def test_denoises_as_diffusers_does(bundle: edgert.Bundle) -> None:
    model, source = edgert.load_denoiser(bundle.path), tiny()
    for sizes in (*transformer.SIZES, families.Sizes(1, 1, 2, 2, 1, 2)):  # sizes change from call to call
        values = transformer.example(source, sizes)
        with torch.no_grad():
            expected = source(**values, return_dict=False)
        found = model.denoise({name: tensor.numpy() for name, tensor in values.items()})
        assert errors(found, dict(zip(found, (e.numpy() for e in expected), strict=True))) < LIMIT


def test_two_placements(bundle: edgert.Bundle, inputs: dict[str, Any]) -> None:
    assert bundle.graph is not None
    last = len(bundle.graph.blocks) - 1
    expected = edgert.load_denoiser(bundle.path).denoise(inputs)
    for starts in ([0, last // 2], range(last + 1)):
        # Two configurations that compute the same with f16 weights, and are compiled apart; later rules win.
        configs = ["CPU@f32", "CPU@f32+dq"]
        place = ",".join(f"{start}-{last}={configs[number % 2]}" for number, start in enumerate(starts))
        model = edgert.load_denoiser(bundle.path, place=place)
        assert len(model.plan.placements) == len(starts)
        assert errors(model.denoise(inputs), expected) < 1e-5


def test_fit_knows_the_weights_from_the_configuration(bundle: edgert.Bundle, pipeline: Path) -> None:
    config = json.loads((pipeline / "transformer" / "config.json").read_text("utf-8"))
    shape = from_config(config, weights="fp16")
    assert shape.parameters == bundle.facts.parameters
    assert _bytes(shape.graph, "f16") == sum(r["bytes"] for r in bundle.report.precisions if r["precision"] == "f16")
    assert bundle.graph is not None
    assert sum(b.flops_per_token for b in shape.graph.blocks) == sum(b.flops_per_token for b in bundle.graph.blocks)
    modulated = tiny("ltx2.3")
    shape = from_config(json.loads(modulated.to_json_string()))
    assert shape.parameters == sum(p.numel() for p in modulated.parameters())
    with pytest.raises(UsageError, match="num_layers is 0"):
        from_config({**config, "num_layers": 0})


def test_fit_knows_int4(
    tmp_path: Path, pipeline: Path, exported: ov.Model, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "export", lambda model, exporter: exported.clone())
    source = pipeline / "transformer"  # a transformer alone will do
    bundle = edgert.compile(source, tmp_path / "int4.edge", weights="int4")
    config = json.loads((source / "config.json").read_text("utf-8"))
    shape = from_config(config, weights="int4")
    table = [row for row in bundle.report.precisions if row["role"] == "linear"]
    assert {row["precision"] for row in table} == {"u4", "u8"}
    tables = sum(r["bytes"] for r in bundle.report.precisions if (r["role"], r["precision"]) == ("norms+other", "f16"))
    assert sum(_bytes(shape.graph, kind) for kind in ("u4", "u8", "f16")) == tables + sum(r["bytes"] for r in table)
    exact = tiny()(**{name: torch.from_numpy(array) for name, array in inputs.items()}, return_dict=False)
    found = edgert.load_denoiser(bundle.path).denoise(inputs)
    assert errors(found, dict(zip(found, (e.detach().numpy() for e in exact), strict=True))) < 0.2


def _bytes(graph: edgert.BlockGraph, kind: str) -> int:
    return sum(block.weight_bytes.get(kind, 0) for block in graph.blocks)


def test_a_wrong_export_is_refused(exported: ov.Model) -> None:
    model = tiny()
    with torch.no_grad():  # one layer's scale of one stream
        model.transformer_blocks[1].audio_scale_shift_table[1] += 0.1
    with pytest.raises(ParityError, match=r"samples of two sizes: relative error .* against diffusers"):
        transformer.check(exported.clone(), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": np.zeros(2, np.float32)}, "input 'sigma': no such input; there are hidden_states, audio"),
        ({"timestep": None}, r"input 'timestep' is missing: expected f32 \[batch, video\]"),
        ({"timestep": np.zeros((2, 24))}, r"input 'timestep' is float64, expected an array f32 \[batch, video\]"),
        ({"timestep": [[0.0]]}, "input 'timestep' is list, expected an array f32"),
        ({"timestep": np.zeros(2, np.float32)}, r"input 'timestep' has shape \[2\], expected f32 \[batch, video\]"),
        (
            {"timestep": np.zeros((2, 25), np.float32)},
            r"input 'timestep' has shape \[2, 25\], expected .*; 'hidden_states' has video 24",
        ),
        ({"video_coords": np.zeros((2, 2, 24, 2), np.float32)}, r"shape \[2, 2, 24, 2\], expected f32 \[batch, 3, vi"),
        (
            {"encoder_attention_mask": np.ones((2, 6), np.float32)},
            "'encoder_attention_mask' is float32, expected .*i64",
        ),
    ],
)
def test_inputs_are_checked(inputs: dict[str, Any], bundle: edgert.Bundle, change: Any, message: str) -> None:
    wrong = {name: array for name, array in {**inputs, **change}.items() if array is not None}
    with pytest.raises(UsageError, match=message):
        Signature.read(bundle).check(wrong)


def test_an_empty_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"input 'x' has shape \[0\]"):
        Signature({"x": Port(("video",), "f32")}, ("y",)).check({"x": np.zeros(0, np.float32)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "NPU@f16"}, "NPU"),
        ({"device": "CPU@kernels"}, "edgert's kernels are for decoders"),
        ({"place": "prefill:*=CPU@f32,decode:*=CPU@bf16"}, "a denoiser has one phase"),
    ],
)
def test_plans_that_do_not_fit(bundle: edgert.Bundle, options: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        edgert.load_denoiser(bundle.path, **options)


def test_a_failing_device_is_named(bundle: edgert.Bundle, inputs: dict[str, Any]) -> None:
    class Broken:
        def infer(self, values: dict[str, Any]) -> dict[str, Any]:
            raise DeviceNonsenseError("CPU@f32 failed: NaN in its output 'sample'")

    model = edgert.load_denoiser(bundle.path)
    model._chain.runners = [Broken()]  # type: ignore[list-item]
    with pytest.raises(DeviceNonsenseError, match="CPU@f32") as caught:
        model.denoise(inputs)
    assert caught.value.unit == "CPU"


def test_text_and_latents_are_told_apart(bundle: edgert.Bundle, demo_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a denoiser makes no text; edgert\.load_denoiser opens it"):
        edgert.load(bundle.path)
    with pytest.raises(UsageError, match=r"holds no denoiser but a model of text; edgert\.load opens it"):
        edgert.load_denoiser(demo_path)


def test_command_line(bundle: edgert.Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bundle.path)
    for asked in (["run", path, "Once"], ["eval", path, "--text", __file__]):
        assert main(asked) == 2
        assert "a denoiser makes no text" in capsys.readouterr().err
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["task"] == "denoiser"
    assert main(["plan", path, "--place", "*=CPU@f32,ffn=CPU@bf16"]) == 0
    assert "CPU@bf16" in capsys.readouterr().out


def test_a_damaged_signature(bundle: edgert.Bundle, tmp_path: Path) -> None:
    (tmp_path / "denoiser.json").write_text('{"inputs": {"x": {"dims": ["batch"], "type": "f8"}}, "outputs": []}')
    with pytest.raises(BundleError, match=r"denoiser.json: .*inputs.x: type is 'f8'"):
        Signature.read(replace(bundle, path=tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "UNet2DConditionModel is no transformer that edgert exports; known: L",
        ),
        ({"num_layers": 3}, "weights are missing, the first is transformer_blocks.2."),
    ],
)
def test_folders_that_cannot_be_loaded(pipeline: Path, tmp_path: Path, change: Any, message: str) -> None:
    source = pipeline / "transformer"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    with pytest.raises(ConversionError, match=message):
        transformer.load(tmp_path)


def test_a_pipeline_without_a_transformer(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}", "utf-8")
    with pytest.raises(ConversionError, match="a pipeline without transformer/"):
        edgert.compile(tmp_path, tmp_path / "x.edge")
    assert Denoiser.__doc__


def test_options_for_decoders_are_refused(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="awq is for decoders; tiny-ltx2 is a diffusion transformer"):
        edgert.compile(pipeline, tmp_path / "x.edge", awq=True)


def test_optimum_exports_ltx2_and_no_later_one(tmp_path: Path) -> None:
    model = tiny(num_layers=1)
    assert transformer.check(transformer.export(model, "optimum"), model)["relative_error"] < LIMIT
    with pytest.raises(ConversionError, match=r"optimum-intel cannot export it: .*'NoneType' object has no attribute"):
        transformer.export(tiny("ltx2.3", num_layers=1), "optimum")


def test_matrix_rows(tmp_path: Path) -> None:
    rows = check(tmp_path, families=["ltx2.3"], weights=["fp16"], num_layers=1)
    assert [row["family"] for row in rows] == ["ltx2.3"]
    assert rows[0]["parity"] < LIMIT
    assert rows[0]["cut"] < 1e-5
    assert "error" not in rows[0]
