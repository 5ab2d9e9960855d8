"""Bundles whose towers or `media.json` lie: each is refused in one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import tiny_media
from tiny_media import HIDDEN, IMAGE, SIDE

import edgert
from edgert.batch import open_lanes
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.diffusion import Signature
from edgert.errors import (
    BundleError,
    ContextOverflowError,
    DeviceFailedError,
    DeviceNonsenseError,
    EdgertError,
    UsageError,
)
from edgert.executor import Executor
from edgert.features import FEATURES, MAX_WIDTH, Medium, Taken, media_of
from edgert.media import read_audio
from edgert.placement import Plan
from edgert.session import Model

PICTURE = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
CPU = "CPU@f32"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def whole(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_media.make(demo_path, tmp_path_factory.mktemp("whole") / "media.edge")


@pytest.fixture
def forge(whole: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """A copy of the bundle with something changed, sizes in the manifest made to agree."""

    def make(change: Callable[[Path], object]) -> Path:
        path = tmp_path / "forged.edge"
        shutil.copytree(whole, path)
        change(path)
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            entry["bytes"] = (path / name).stat().st_size
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return make


def says(part: str, **lie: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        media = json.loads((path / "media.json").read_text())
        media[part].update(lie)
        (path / "media.json").write_text(json.dumps(media))

    return change


def gives(rows: list[int], value: float = 0.1) -> Callable[[Path], object]:
    """Another vision tower, whose `features` have a shape."""

    def change(path: Path) -> None:
        pixels = ops.parameter([1, 3, SIDE, SIDE], ov.Type.f32)
        pixels.output(0).set_names({"pixel_values"})
        total = ops.reduce_sum(pixels, ops.constant(np.arange(4)))
        features = ops.broadcast(
            ops.multiply(total, ops.constant(np.float32(value))), ops.constant(np.array(rows, np.int64))
        )
        features.output(0).set_names({"features"})
        for file in (path / "towers" / "vision").iterdir():
            file.unlink()
        ov.save_model(ov.Model([features], [pixels], "tower"), path / "towers" / "vision" / "model.xml")

    return change


def question(*pictures: Any) -> list[Json]:
    parts: list[Json] = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def refused(path: Path, kind: type[EdgertError] = BundleError) -> str:
    with pytest.raises(kind) as caught:
        edgert.load(path, device=CPU).chat(question(PICTURE), max_tokens=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "lie", "message"),
    [
        ("image", {"tower": "../vision"}, "tower is '../vision'"),
        ("image", {"tower": "nowhere"}, "the manifest lists no towers/nowhere/model.xml"),
        ("image", {"token": -5}, "token is -5, expected 0"),
        ("image", {"token": 5000, "expansion": [5000] * 4}, "token 5000 is outside the vocabulary of 4096"),
        ("image", {"expansion": [40, *[IMAGE] * 4, 4096]}, "token 4096 is outside"),
        ("image", {"expansion": [IMAGE] * 65537}, "expansion has 65537 tokens, expected up to 65536"),
        ("image", {"height": 10**12}, "height is 1000000000000, expected 1 to 4096"),
        ("image", {"mean": [float("nan")] * 3}, "mean is nan"),
        ("image", {"std": [0, 1, 1]}, "std is 0.0"),
        ("image", {"grid": [-2, -2]}, "grid is"),
        ("audio", {"suffix": [4096]}, "token 4096 is outside"),
        ("audio", {"subsampling": [[1, 0, 0]]}, "subsampling has"),
        ("audio", {"n_fft": 16384, "window": 16384, "frames": 60000, "hop": 16}, "frames × max_pieces × n_fft is"),
    ],
)
def test_lies_in_media_json(forge: Callable[..., Path], part: str, lie: Json, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        _ = Bundle.open(forge(says(part, **lie))).media
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([4, 1], f"gives features [4, 1], expected [rows, {HIDDEN}]"),
        ([4, HIDDEN // 2], f"gives features [4, {HIDDEN // 2}]"),
        ([1, 4, HIDDEN], "gives features [1, 4,"),
        ([], "gives features []"),
        ([5, HIDDEN], "it gives 5 rows for 4 tokens of an image"),
    ],
)
def test_towers_of_another_shape(forge: Callable[..., Path], rows: list[int], message: str) -> None:
    assert message in refused(forge(gives(rows)))


def test_a_tower_that_gives_no_numbers_is_named(forge: Callable[..., Path]) -> None:
    message = refused(forge(gives([4, HIDDEN], float("nan"))), DeviceNonsenseError)
    assert message == "CPU@f32 failed: tower vision gives infinite values or NaN"


def test_media_json_promises_what_the_model_takes(forge: Callable[..., Path], demo_path: Path) -> None:
    def text_only(path: Path) -> None:
        for name in ("model.xml", "model.bin"):
            shutil.copy(demo_path / name, path / name)

    assert "the model takes no features" in refused(forge(text_only))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"bidirectional": True}, "bidirectional is True, but the model has no input 'image_ids'"),
        ({"grid": [2, 2]}, "grid is (2, 2), but the model has no axes of positions"),
    ],
)
def test_media_json_belongs_to_the_model(forge: Callable[..., Path], lie: Json, message: str) -> None:
    assert message in refused(forge(says("image", **lie)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (FEATURES, [-1, -1, -1], "axis 2 of 1 to"),
        (FEATURES, [-1, -1, MAX_WIDTH + 1], f"axis 2 of 1 to {MAX_WIDTH}"),
        (FEATURES, [-1, HIDDEN], "expected 3 axes"),
        ("position_ids", [7, -1, -1], "expected 3 axes, axis 0 of 3"),
    ],
)
def test_inputs_of_no_known_shape(name: str, shape: list[int], message: str) -> None:
    parameters = [ops.parameter(shape, ov.Type.f32), ops.parameter([-1, -1], ov.Type.boolean)]
    for parameter, own in zip(parameters, (name, "feature_mask"), strict=True):
        parameter.output(0).set_names({own})
    with pytest.raises(BundleError) as caught:
        Taken.of(ov.Model([p.output(0) for p in parameters], parameters, "decoder"))
    assert message in str(caught.value)


def test_features_without_their_mask() -> None:
    features = ops.parameter([-1, -1, HIDDEN], ov.Type.f32)
    features.output(0).set_names({FEATURES})
    with pytest.raises(BundleError, match="no 'feature_mask'"):
        Taken.of(ov.Model([features.output(0)], [features], "decoder"))


@pytest.fixture(scope="module")
def model(whole: Path) -> Model:
    return edgert.load(whole, device=CPU)


def test_no_penalty_and_no_bias_sees_a_picture_as_a_token(model: Model) -> None:
    result = model.chat(
        question(PICTURE), max_tokens=3, repetition_penalty=1.5, frequency_penalty=1.0, presence_penalty=1.0,
        logit_bias={IMAGE: -100.0}, logprobs=2,
    )  # fmt: skip
    assert len(result.tokens) == 3
    assert all(0 <= token < model.facts.vocab_size for token in result.tokens)
    with pytest.raises(UsageError, match="token -1 is outside the vocabulary"):
        model.generate([1, -1])


def test_pictures_beyond_the_context_are_not_looked_at(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Medium] = []
    image = model._towers.image
    monkeypatch.setattr(model._towers, "image", lambda source: seen.append(found := image(source)) or found)
    most = model.context_length // 6  # tokens of a picture
    with pytest.raises(ContextOverflowError, match=r"content\[170\]: with it images and sound are 1026 tokens"):
        model.chat(question(*[PICTURE] * 500))
    assert len(seen) == most + 1


def test_pictures_beyond_the_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * 3 * SIDE * SIDE
    monkeypatch.setattr("edgert.prompts.MAX_HELD_BYTES", 2 * size)
    model._chat(question(PICTURE, PICTURE, PICTURE, PICTURE // 2), None)  # those of the same pixels are held once
    with pytest.raises(UsageError, match=rf"content\[2\]: .* take {3 * size} bytes of memory"):
        model._chat(question(PICTURE, PICTURE // 2, PICTURE // 3), None)


def test_rows_that_cannot_be_had_leave_nothing_in_the_next_step(packed_path: Path, tmp_path: Path) -> None:
    def fails() -> Any:
        raise DeviceFailedError("no tower")

    bundle = Bundle.open(tiny_media.make(packed_path, tmp_path / "packed.edge"))
    assert bundle.graph is not None
    rows = np.ones((2, HIDDEN), np.float32)
    good = Medium("image", b"good", [IMAGE] * 2, IMAGE, lambda: (rows, ()))
    bad = Medium("image", b"bad", [IMAGE] * 2, IMAGE, fails)
    executor = Executor(bundle, Plan.single(bundle.graph, DeviceConfig("CPU", "kernels")))
    text, found = [50, 51, 52, 53], []
    for before in (None, [*good.tokens, *bad.tokens]):
        lanes = open_lanes(executor, kv_bytes=2**24)
        assert lanes.batched
        if before:
            lane = lanes.open()
            lane.media = media_of([good, bad])
            with pytest.raises(DeviceFailedError, match="no tower"):
                lanes.step([(lane, before)])
        found.append(lanes.step([(lanes.open(), text)])[0].copy())
    assert np.array_equal(*found)


def test_long_sound_is_refused_before_it_is_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.media.audio.resample", lambda *_: pytest.fail("resampled"))
    with pytest.raises(UsageError, match=r"audio: 3\.0 s, the limit is 2 s"):
        read_audio((np.zeros(3000, np.float32), 1000), 16_000, seconds=2)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ([], "holds a list, expected an object"),
        ({"inputs": {"x": {"dims": ["9" * 5000], "type": "f32"}}, "outputs": []}, "a dimension is '9999"),
        ({"inputs": {"x": {"dims": [""], "type": "f32"}}, "outputs": []}, "a dimension is ''"),
        ({"inputs": {"x": {"dims": ["2"], "type": "f8"}}, "outputs": []}, "type is 'f8'"),
    ],
)
def test_lies_in_denoiser_json(whole: Path, tmp_path: Path, lie: Any, message: str) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    names = {name: manifest["files"][name] for name in ("model.xml", "model.bin")}
    for name in names:
        shutil.copy(whole / name, tmp_path / name)
    (tmp_path / "denoiser.json").write_text(json.dumps(lie))
    names["denoiser.json"] = {"bytes": len(json.dumps(lie)), "sha256": ""}
    manifest["files"] = names
    manifest["model"].update(task="denoiser", vocab_size=0, context_length=0)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        Signature.read(Bundle.open(tmp_path))
    assert message in str(caught.value)
