"""Models that see or hear: towers, `media.json`, the decoder's inputs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from edgert.converters import compile as compile_model
from edgert.converters import pretrained
from edgert.converters.compress import precision_table
from edgert.converters.media import bundling, check
from edgert.converters.media.compiling import warn_of_adapters
from edgert.converters.media.families import VISION, vision_of
from edgert.converters.media.folders import Names
from edgert.converters.media.pictures import image_size
from edgert.converters.media.towers import export_tower
from edgert.converters.sources import load_tokenizer
from PIL import Image
from tiny_multimodal import AUDIO, BOI, EOI, IMAGE, TABLE, build, write_vl_folder
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from edgert.bundle import Bundle
from edgert.errors import ConversionError, ParityError, UsageError
from edgert.graph import BlockKind
from edgert.media import prepare_image


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vl_folder(tmp_path_factory.mktemp("source") / "tiny-gemma3", "gemma3")


@pytest.fixture(scope="module")
def gemma3_bundle(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(gemma3, tmp_path_factory.mktemp("media") / "g.edge", weights="int8", kernels=False)


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vl_folder(tmp_path_factory.mktemp("source") / "tiny-qwen3-vl", "qwen3_vl")


def test_tower_and_media(gemma3_bundle: Bundle) -> None:
    media = gemma3_bundle.media
    assert media is not None
    assert media.audio is None
    image = media.image
    assert image is not None
    assert image.expansion.count(image.token) == 4
    assert (image.placeholder, image.token, image.height, image.width) == (BOI, IMAGE, 32, 32)
    assert [token for token in image.expansion if token in (BOI, IMAGE, EOI)] == [BOI, *[IMAGE] * 4, EOI]
    assert (image.fit, image.resample, image.bidirectional, image.grid) == ("stretch", "bilinear", True, None)
    tower = ov.Core().read_model(gemma3_bundle.tower_path("vision"))
    assert {port.any_name: list(port.shape) for port in tower.inputs} == {"pixel_values": [1, 3, 32, 32]}
    assert {port.any_name: list(port.shape) for port in tower.outputs} == {"features": [4, 64]}
    graph = gemma3_bundle.graph
    assert graph is not None
    assert [(block.kind, block.name) for block in graph.towers] == [(BlockKind.TOWER, "vision")]
    assert graph.towers[0].total_weight_bytes > 10_000
    assert len(graph.blocks) == 6


def test_the_report_says_what_was_compared(gemma3_bundle: Bundle) -> None:
    rows = {row["check"]: row["relative_error"] for row in gemma3_bundle.report.checks}
    for name in ("vision tower", "logits with a picture of noise", "logits with a picture of a gradient"):
        assert rows[name] < 1e-5
    assert "vision tower" in {row["role"] for row in gemma3_bundle.report.precisions}


@pytest.mark.parametrize(("limit", "kind"), [(1.0, "u8"), (1e-6, "f32")])
def test_weights_of_a_tower_are_int8_if_it_bears_that(limit: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundling, "TOWER_LIMIT", limit)
    model = build("llava")
    vision = vision_of(model.config)
    picture = check.gradient((1, 3, 32, 32))
    tower = export_tower(
        model, lambda pixels: vision.features(model, vision.call(model.config, pixels)),
        {"pixel_values": torch.from_numpy(picture)},
    )  # fmt: skip
    written = bundling._compressed(tower, {"pixel_values": picture})
    rows = precision_table(written)
    assert max(rows, key=lambda row: row["elements"])["precision"] == kind


def test_the_tower_in_the_bundle_still_sees(gemma3: Path, gemma3_bundle: Bundle) -> None:
    assert gemma3_bundle.media is not None
    spec = gemma3_bundle.media.image
    assert spec is not None
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    inputs = prepare_image(pixels, spec)
    tower = ov.Core().compile_model(gemma3_bundle.tower_path("vision"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    model = pretrained.load(gemma3, "decoder")
    with torch.no_grad():
        expected = model.get_image_features(torch.from_numpy(inputs["pixel_values"])).pooler_output[0].numpy()
    assert np.max(np.abs(tower(inputs)["features"] - expected)) <= 2e-2 * np.max(np.abs(expected))


def test_deep_features_and_positions(qwen3_vl: Path, tmp_path: Path) -> None:
    """DeepStack adds to layers, M-RoPE has three axes, and the picture need not be square."""
    bundle = compile_model(qwen3_vl, tmp_path / "q.edge", weights="fp16", kernels=False, image_size=(32, 48))
    assert bundle.media is not None
    image = bundle.media.image
    assert image is not None
    assert (image.height, image.width, image.grid, image.expansion) == (32, 48, (2, 3), (IMAGE,) * 6)
    model = ov.Core().read_model(bundle.model_path)
    shapes = {port.any_name: port.get_partial_shape() for port in model.inputs}
    assert shapes["features"][2].get_length() == 3 * 64
    assert shapes["position_ids"][0].get_length() == 3
    assert max(row["relative_error"] for row in bundle.report.checks) < 1e-5


def test_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_check", lambda *arguments: [])
    folder = write_vl_folder(tmp_path / "llava", "llava", layers=1)
    with pretrained.quiet():
        model, task, _, media = pretrained.convert_whole(folder, "general", lambda stage: None, None)
    assert (task, media) == ("decoder", None)
    inputs = {port.any_name for port in model.inputs}
    assert inputs == {"input_ids", "attention_mask", "position_ids", "beam_idx"}


def test_a_wrong_tower_is_refused() -> None:
    model = build("llava")
    vision = vision_of(model.config)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return vision.features(model, vision.call(model.config, pixels))

    picture = check.noise((1, 3, 32, 32))
    tower = export_tower(model, run, {"pixel_values": torch.from_numpy(picture)})
    with pytest.raises(ParityError, match="vision tower: relative error"):
        check.check_tower(
            "vision", tower, lambda values: 1.01 * run(torch.from_numpy(values["pixel_values"])).detach().numpy(),
            [{"pixel_values": picture}],
        )  # fmt: skip


def test_a_tower_has_a_fixed_shape() -> None:
    model = build("llava")
    with pytest.raises(ConversionError, match=r"llava: a tower gives \[.*, expected a fixed"):
        export_tower(model, lambda pixels: pixels[pixels > 0][:, None], {"pixel_values": torch.rand(1, 3, 8, 8)})


def test_what_depends_on_shapes_only_is_not_in_the_tower() -> None:
    """Not recorded: positions looked up in a table; recorded: what is made of the input, in place, too."""
    model = build("llava")

    def run(pixels: torch.Tensor) -> torch.Tensor:
        table = torch.arange(64.0).reshape(8, 8)
        known = table[torch.arange(8).flip(0)].cumsum(0)
        known[0] = pixels[0, 0, 0]
        return known + pixels[0, 0]

    tower = export_tower(model, run, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert not {"Range", "CumSum", "Reverse"} & {node.get_type_name() for node in tower.get_ops()}
    pixels = torch.rand(1, 3, 8, 8)
    found = ov.Core().compile_model(tower, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels.numpy())["features"]
    np.testing.assert_allclose(found, run(pixels).numpy(), rtol=1e-6)


def test_patches_are_those_of_the_processor() -> None:
    """Qwen-VL's order, against transformers' own image processor."""
    config = build("qwen3_vl").config
    settings = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3}
    size = {"shortest_edge": 256, "longest_edge": 4096}
    processor = Qwen2VLImageProcessorPil(**settings, image_std=[0.5] * 3, size=size)
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    expected = processor(Image.fromarray(picture), return_tensors="pt")
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    found = VISION["qwen3_vl"].call(config, pixels)
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert found["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("gemma3", (64, 64), r"image_size is \(64, 64\), but gemma3 takes \(32, 32\) only"),
        ("qwen3_vl", (40, 48), r"image_size is \(40, 48\), expected multiples of 16 for qwen3_vl"),
        ("qwen3_vl", (256, 256), r"image_size \(256, 256\) is 256 tokens, qwen3_vl takes 16 at most"),
    ],
)
def test_sizes_that_are_refused(family: str, wanted: tuple[int, int], message: str) -> None:
    config = build(family).config
    with pytest.raises(UsageError, match=message):
        image_size(Path(), config, vision_of(config), TABLE[family].image, wanted)


@pytest.mark.parametrize(
    ("side", "settings", "message"),
    [
        (10**7, {}, "pictures of 320000000 x 320000000 pixels, expected sides of 1 to 4096"),
        (0, {}, "pictures of 0 x 0 pixels"),
        ("abc", {}, "the settings of its processor or towers: "),
        (8, {"max_pixels": "many"}, "the settings of its processor or towers: "),
        (8, {"max_pixels": -5}, "the settings of its processor or towers: "),
    ],
)
def test_files_that_lie_about_sizes(side: Any, settings: dict[str, Any], message: str) -> None:
    config = build("qwen3_vl").config
    config.vision_config.__dict__["patch_size"] = side  # as transformers, which checks neither
    with pytest.raises(ConversionError, match=message):
        image_size(Path(), config, vision_of(config), settings, None)


def test_tokens_of_a_picture_come_from_the_files(gemma3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma3, tmp_path / "copy"))
    names = Names(folder, build("mistral3").config, load_tokenizer(folder))
    assert names.sequence("{image_token}", []) == [IMAGE]
    assert names.sequence("<boi>*<eoi>", [7, 7]) == [BOI, 7, 7, EOI]
    assert names.sequence("{image_break_token}", []) == [8]
    with pytest.raises(ConversionError, match="its tokenizer has no token '<nowhere>'"):
        names.sequence("<nowhere>", [])
    assert AUDIO not in names.sequence("a\n\n*", [])


def test_a_folder_without_preprocessor(gemma3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma3, tmp_path / "copy"))
    (folder / "processor_config.json").write_text(json.dumps({}), "utf-8")
    with pytest.raises(ConversionError, match=r"has neither preprocessor_config\.json nor image_processor"):
        compile_model(folder, tmp_path / "out.edge", kernels=False)


def test_wrong_arguments(decoder_folder: Path, gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.edge"
    with pytest.raises(UsageError, match=r"image_size is \(0, 32\), expected \(height, width\), each 1 to 4096"):
        compile_model(gemma3, out, image_size=(0, 32))
    with pytest.raises(UsageError, match="excludes text_only"):
        compile_model(gemma3, out, image_size=(32, 32), text_only=True)
    with pytest.raises(UsageError, match=r"image_size is \(32, 32\), but .* is a model of text only"):
        compile_model(decoder_folder, out, image_size=(32, 32), kernels=False)
    with pytest.raises(UsageError, match="exporter 'optimum' exports text only"):
        compile_model(gemma3, out, exporter="optimum", kernels=False)


def test_adapters_are_not_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_adapters(tmp_path)
    assert not caplog.records
    (tmp_path / "vision-lora").mkdir()
    (tmp_path / "vision-lora" / "adapter_config.json").write_text("{}", "utf-8")
    warn_of_adapters(tmp_path)
    assert "['vision-lora'] are adapters, which are not applied" in caplog.text
