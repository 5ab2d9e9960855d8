"""Images and sound in conversations, on a model made by hand whose towers are one product each."""

from __future__ import annotations

import base64
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import tiny_media
from PIL import Image
from tiny_media import IMAGE, image_rows

import edgert
from edgert import backends
from edgert.backends.simulated import Fault, SimulatedBackend
from edgert.bundle import Bundle
from edgert.choice import _towers
from edgert.device import DeviceConfig
from edgert.errors import BundleError, PlanError, UsageError
from edgert.executor import SequenceRun
from edgert.features import Places, Taken, beginning, whole
from edgert.graph import BlockGraph
from edgert.grid import Grid
from edgert.kvcache import KvCache
from edgert.media import prepare_image
from edgert.placement import Plan
from edgert.profile import Measurement, Profile
from edgert.profiler import Profiler
from edgert.session import Model
from edgert.shapes import StaticShapes

RED = np.full((8, 8, 3), (250, 10, 10), np.uint8)
BLUE = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
TONE = (np.sin(np.arange(900) / 7).astype(np.float32), 1600)
CPU = "CPU@f32"


@pytest.fixture(scope="module")
def path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_media.make(demo_path, tmp_path_factory.mktemp("media") / "media.edge")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return edgert.load(path, device=CPU)


def ask(*parts: Any) -> list[dict[str, Any]]:
    """A question of texts, pictures and sounds."""

    def part(each: Any) -> dict[str, Any]:
        kind = "text" if isinstance(each, str) else "audio" if isinstance(each, tuple) else "image"
        return {"type": kind, kind: each}

    return [{"role": "user", "content": [part(each) for each in parts]}]


def logits(model: Model, *parts: Any) -> np.ndarray[Any, Any]:
    """After the prompt, of a fresh sequence."""
    prompt = model._chat(ask(*parts), None)
    run = model._engine.executor.open()
    run.media = prompt.media
    found = run.prefill(prompt.tokens, chunk=64)
    assert found is not None
    return found[0].copy()


def reference(path: Path, ids: list[int], rows: np.ndarray[Any, Any], positions: np.ndarray[Any, Any] | None = None):
    """Logits of the last token, by OpenVINO alone, with `rows` at the places of images."""
    core = ov.Core()
    compiled = core.compile_model(path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    count = len(ids)
    mask = np.array([ids]) == IMAGE
    features = np.zeros((1, count, tiny_media.HIDDEN), np.float32)
    features[mask] = rows
    positions = np.arange(count)[None] if positions is None else positions
    inputs = {
        "input_ids": np.array([ids]), "attention_mask": np.ones((1, count), np.int64), "position_ids": positions,
        "beam_idx": np.zeros(1, np.int32), "features": features, "feature_mask": mask,
    }  # fmt: skip
    return compiled.create_infer_request().infer(inputs)["logits"][0, -1]


def test_rows_of_the_tower_take_the_place_of_tokens(path: Path, model: Model) -> None:
    spec = model.bundle.media
    assert spec is not None
    assert spec.image is not None
    prompt = model._chat(ask("What is ", BLUE, " beside ", RED, "?"), None)
    assert prompt.ids.count(IMAGE) == 8
    assert [t for t in prompt.tokens if t >= 0] == [t for t in prompt.ids if t != IMAGE]
    rows = np.concatenate([image_rows(prepare_image(each, spec.image)["pixel_values"]) for each in (BLUE, RED)])
    expected = reference(path, prompt.ids, rows)
    found = logits(model, "What is ", BLUE, " beside ", RED, "?")
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_decoding_goes_on_as_prefill_would(model: Model) -> None:
    result = model.chat(ask(BLUE, "And then?"), max_tokens=6)
    prompt = model._chat(ask(BLUE, "And then?"), None)
    run = model._engine.executor.open()
    run.media = prompt.media
    rows = run.forward([*prompt.tokens, *result.tokens[:-1]], keep=len(result.tokens))
    assert rows.argmax(axis=1).tolist() == list(result.tokens)


def test_every_way_to_give_a_picture_is_the_same(path: Path, model: Model, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RED).save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    expected = model._chat(ask(RED), None).tokens
    for source in (buffer.getvalue(), tmp_path / "red.png", str(tmp_path / "red.png"), Image.fromarray(RED)):
        content = [{"type": "image", "image": source}]
        assert model._chat([{"role": "user", "content": content}], None).tokens == expected
    content = [{"type": "image_url", "image_url": {"url": url}}]
    assert model._chat([{"role": "user", "content": content}], None).tokens == expected


def test_a_cache_is_used_again_for_the_same_picture_only(path: Path) -> None:
    model = edgert.load(path, device=CPU)
    first = model.chat(ask(BLUE, "Who is it?"), max_tokens=4)
    again = model.chat(ask(BLUE, "Who is it?"), max_tokens=4)
    assert again.timings.reused_tokens == again.timings.prompt_tokens - 1
    assert again.tokens == first.tokens
    turn = [*ask(BLUE, "Who is it?"), {"role": "assistant", "content": first.text}, *ask("Sure?")]
    assert model.chat(turn, max_tokens=2).timings.reused_tokens >= first.timings.prompt_tokens - 1
    other = model.chat(ask(RED, "Who is it?"), max_tokens=4)
    assert other.timings.reused_tokens < 6  # what stands before the picture
    assert other.tokens == edgert.load(path, device=CPU).chat(ask(RED, "Who is it?"), max_tokens=4).tokens


def test_a_tower_runs_once_for_a_picture(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edgert.load(path, device=CPU)
    calls: list[str] = []
    run = model._towers.run
    monkeypatch.setattr(model._towers, "run", lambda name, inputs: calls.append(name) or run(name, inputs))
    model.chat(ask(BLUE, "and", BLUE, TONE), max_tokens=2)
    model.release()
    model.chat(ask("Now", BLUE), max_tokens=2)
    assert sorted(calls) == ["audio", "vision"]
    model._towers._max_kept_bytes = 0
    model.chat(ask("Or", RED), max_tokens=2)
    model.release()
    model.chat(ask("Or", RED), max_tokens=2)
    assert calls[2:] == ["vision", "vision"]


def test_sound(model: Model) -> None:
    one, other = (logits(model, "Hear: ", (TONE[0] * gain, 1600)) for gain in (1.0, 0.02))
    assert np.abs(one - other).max() > 1e-3
    prompt = model._chat(ask(TONE), None)
    spec = model.bundle.media
    assert spec is not None
    assert spec.audio is not None
    (medium,) = prompt.media.values()
    assert len(medium.rows) == spec.audio.tokens(tiny_media.FRAMES)
    assert 0 < medium.ids.count(spec.audio.token) <= len(medium.rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": b"no picture"}], r"messages\[0\]\.content\[0\]: "),
        ([{"type": "image"}], "needs its image"),
        ([{"type": "image", "image": "missing.png"}], r"missing\.png"),
        ([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], "only data: URLs"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "only data: URLs"),
        ([{"type": "image_url", "image_url": {}}], "url is missing"),
        ([{"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}], "base64"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}], "expected 'wav'"),
        ([{"type": "video", "video": "x"}], "type video are not supported"),
        ([{"type": "audio", "audio": b"RIFF"}], r"content\[0\]: "),
        ([{"type": "text", "text": "a <image>"}], "hold 0 images, the chat template made 1 places"),
        ([{"type": "text", "text": "<image>"}, {"type": "image", "image": RED}], "hold 1 images.* made 2 places"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(model: Model, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        model.chat([{"role": "user", "content": content}])
    assert "\n" not in str(caught.value)


def test_a_model_of_text_takes_no_images(demo: Model) -> None:
    with pytest.raises(UsageError, match=r"model 'bookworm' takes no images"):
        demo.chat(ask(RED))
    with pytest.raises(UsageError, match=r"model 'bookworm' takes no sound"):
        demo.chat(ask(TONE))


def test_text_is_as_before(model: Model, demo: Model) -> None:
    messages = [{"role": "user", "content": "Good evening, sir."}]
    assert model.chat(messages, max_tokens=6).text == demo.chat(messages, max_tokens=6).text
    assert (
        model.generate("It was a dark night", max_tokens=6).text
        == demo.generate("It was a dark night", max_tokens=6).text
    )


@pytest.mark.parametrize("place", ["attention=CPU@f32,ffn=SIM@f32", "prefill:*=SIM@f32,decode:*=CPU@f32"])
@pytest.mark.parametrize("chunk", [3, 512])
def test_placements_write_the_same_text(path: Path, model: Model, place: str, chunk: int) -> None:
    messages = ask("Of ", BLUE, " and ", TONE, " he said:")
    placed = edgert.load(path, place=place, prefill_chunk=chunk)
    assert placed.chat(messages, max_tokens=8).tokens == model.chat(messages, max_tokens=8).tokens


def test_static_shapes(path: Path, model: Model) -> None:
    shapes = StaticShapes(chunks=(8,), buckets=(64, 128))
    static = edgert.load(path, device="CPU@f32+static", static_shapes=shapes)
    messages = ask("Of ", BLUE, " he said:")
    assert static.chat(messages, max_tokens=8).tokens == model.chat(messages, max_tokens=8).tokens


def test_a_cache_is_parked_with_its_pictures(path: Path, tmp_path: Path) -> None:
    messages = ask("Of ", BLUE, " he said:")
    one = edgert.load(path, device=CPU)
    expected = one.chat(messages, max_tokens=4)
    one.export_cache(messages).save(tmp_path / "cache")
    other = edgert.load(path, device=CPU)
    other.import_cache(KvCache.load(tmp_path / "cache"))
    found = other.chat(messages, max_tokens=4)
    assert found.timings.reused_tokens == found.timings.prompt_tokens - 1
    assert found.tokens == expected.tokens
    assert not other._towers._runners  # no tower had to run


def test_failover_takes_the_pictures_along(path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = ask("Of ", BLUE, " he said:")
    broken = SimulatedBackend(Fault(3))
    monkeypatch.setattr(backends, "_load", lambda module: broken if module == "simulated" else _real(module))
    failing = edgert.load(path, place="*=SIM@f32,vision=CPU@f32", fallback=CPU, prefill_chunk=4)
    result = failing.chat(messages, max_tokens=6)
    assert [event.unit for event in result.events] == ["SIM@f32"]
    assert result.tokens == model.chat(messages, max_tokens=6).tokens


_real = backends._load


@pytest.mark.parametrize("kind", ["error", "nan", "hang"])
def test_a_tower_fails_over(path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    broken = SimulatedBackend(Fault(0, kind))
    monkeypatch.setattr(backends, "_load", lambda module: broken if module == "simulated" else _real(module))
    failing = edgert.load(path, place="*=CPU@f32,vision=SIM@f32", fallback=CPU, device_timeout_s=0.02)
    result = failing.chat(ask("Of ", BLUE, " he said:"), max_tokens=4)
    (event,) = result.events
    assert (event.kind, event.unit) == ("failover", "SIM@f32")
    assert "tower vision" in event.detail
    assert result.tokens == model.chat(ask("Of ", BLUE, " he said:"), max_tokens=4).tokens
    assert failing.plan.tower("vision") == DeviceConfig.parse(CPU)
    assert any("tower vision" in warning for warning in failing.plan.warnings)
    broken.released.set()


def test_m_rope(demo_path: Path, tmp_path: Path) -> None:
    """Positions as transformers' Qwen3-VL has them, whatever the chunks are."""
    path = tiny_media.make(demo_path, tmp_path / "mrope.edge", mrope=True)
    model = edgert.load(path, device=CPU)
    assert model.bundle.media is not None
    assert model.bundle.media.image is not None
    prompt = model._chat(ask("What is ", BLUE, " beside ", RED, "?"), None)
    at = [i for i, token in enumerate(prompt.ids) if token == IMAGE]
    places: list[tuple[int, int, int]] = []
    following = 0
    for index in range(len(prompt.ids)):
        if index in at:
            row = at.index(index) % 4
            first = following if row == 0 else places[index - row][0]
            places.append((first, first + row // 2, first + row % 2))
            following = first + 2
        else:
            places.append((following,) * 3)
            following += 1
    rows = np.concatenate(
        [image_rows(prepare_image(each, model.bundle.media.image)["pixel_values"]) for each in (BLUE, RED)]
    )
    expected = reference(path, prompt.ids, rows, np.array(places).T[:, None])
    run = model._engine.executor.open()
    run.media = prompt.media
    for chunk in (64, 3, 1):
        run.rewind(0)
        found = run.prefill(prompt.tokens, chunk=chunk)
        assert found is not None
        assert np.abs(found[0] - expected).max() <= 1e-3 * np.abs(expected).max()
    run.rewind(len(prompt.tokens) - 2)
    again = run.prefill(prompt.tokens[-2:], chunk=64)
    assert again is not None
    assert np.abs(again[0] - expected).max() <= 1e-3 * np.abs(expected).max()
    cut = edgert.load(path, place="attention=CPU@f32,ffn=SIM@f32", prefill_chunk=3)
    messages = ask("What is ", BLUE, " beside ", RED, "?")
    assert cut.chat(messages, max_tokens=6).tokens == model.chat(messages, max_tokens=6).tokens


def test_places_of_text_behind_images_are_the_same_in_any_pieces() -> None:
    tokens = [5, *_image(1), 6, 7, *_image(2), *_image(1), 8]
    taken = Taken(8, axes=3, grid=(2, 2))
    expected = Places(taken).after([], tokens)
    assert expected[:, -1].tolist() == [5 + 6 - 2 - 0] * 3  # 4 texts and 3 images of two places each, counted from 0
    for size in (1, 2, 5):
        places = Places(taken)
        found = [places.after(tokens[:i], tokens[i : i + size]) for i in range(0, len(tokens), size)]
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)


def _image(number: int) -> list[int]:
    from edgert.features import Medium

    return Medium("image", number.to_bytes(16, "big"), [9] * 4, 9, lambda: (np.zeros((4, 8)), [])).tokens


def test_images_stay_whole(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_media.make(demo_path, tmp_path / "together.edge", together=True)
    model = edgert.load(path, device=CPU, prefill_chunk=3)
    seen: list[tuple[list[int], list[int]]] = []
    inputs = SequenceRun._inputs

    def spy(self: SequenceRun, *args: Any, **options: Any) -> Any:
        found = inputs(self, *args, **options)
        seen.append((np.array(found["input_ids"])[0].tolist(), np.array(found["image_ids"])[0].tolist()))
        return found

    monkeypatch.setattr(SequenceRun, "_inputs", spy)
    model.chat(ask("One two three ", BLUE, RED, RED, " four"), max_tokens=2)
    images = [numbers for ids, numbers in seen if IMAGE in ids]
    assert all(ids.count(IMAGE) in (0, 4, 8, 12) for ids, _ in seen)
    assert sum(max(numbers) for numbers in images) == 3
    with pytest.raises(PlanError, match=r"static shapes of 2 tokens a chunk do not hold an image, which takes 4"):
        edgert.load(path, device="CPU@f32+static", static_shapes=StaticShapes(chunks=(2,), buckets=(64,)))


def test_where_an_image_may_be_cut() -> None:
    tokens = [5, *_image(1), 6, *_image(2)]
    assert [beginning(tokens, at) for at in range(11)] == [0, 1, 1, 1, 1, 5, 6, 6, 6, 6, 10]
    assert [whole(tokens, 0, end) for end in (1, 3, 5, 6, 8, 10)] == [1, 1, 5, 6, 6, 10]
    assert [whole(tokens, 1, end) for end in (2, 4, 5)] == [5, 5, 5]


def test_towers_in_plans(path: Path) -> None:
    graph = Bundle.open(path).graph
    assert graph is not None
    assert BlockGraph.from_json(graph.to_json()) == graph
    plan = Plan.explicit(graph, "*=CPU@f32,vision=GPU,tower=SIM@f16,audio=NPU")
    assert {name: str(config) for name, config in plan.towers.items()} == {"vision": "SIM@f16", "audio": "NPU@f16"}
    assert Plan.from_json(plan.to_json()) == plan
    assert "tower audio on NPU@f16" in plan.explain(graph)
    moved = plan.replaced("NPU", DeviceConfig.parse("CPU@kernels"), "gone")
    assert str(moved.tower("audio")) == "CPU@f32+dq"  # the kernels are for decoders
    assert str(Plan.single(graph, DeviceConfig.parse("GPU")).tower("vision")) == "GPU@f16"
    assert str(Plan.single(graph, DeviceConfig.parse("NPU")).tower("vision")) == CPU
    plan.check(graph)
    with pytest.raises(PlanError, match="a tower runs before both phases"):
        Plan.explicit(graph, "*=CPU,decode:vision=GPU")
    with pytest.raises(PlanError, match=r"matches no block.* and towers vision, audio"):
        Plan.explicit(graph, "*=CPU,video=GPU")
    with pytest.raises(PlanError, match="places a tower 'video', the model has vision, audio"):
        Plan(plan.placements, "x", towers={"video": DeviceConfig.parse(CPU)}).check(graph)
    older = {name: value for name, value in plan.to_json().items() if name != "towers"}
    assert not Plan.from_json(older).towers


def test_a_bundle_names_the_tower_that_is_missing(demo_path: Path, tmp_path: Path) -> None:
    path = tiny_media.make(demo_path, tmp_path / "media.edge")
    text = (path / "media.json").read_text("utf-8").replace('"vision"', '"vasion"')
    (path / "media.json").write_text(text, "utf-8")
    with pytest.raises(BundleError, match=r"lists no towers/vasion/model\.xml"):
        edgert.load(path, device=CPU)


def test_a_tower_that_gives_too_few_rows(demo_path: Path, tmp_path: Path) -> None:
    model = edgert.load(tiny_media.make(demo_path, tmp_path / "few.edge", rows=3), device=CPU)
    with pytest.raises(BundleError, match="3 rows for 4 tokens of an image"):
        model.chat(ask(RED), max_tokens=1)
    assert model.chat(ask("Hello"), max_tokens=1).tokens


def test_threads_share_a_tower(model: Model) -> None:
    expected = model.chat(ask(RED, "What?"), max_tokens=4).tokens
    found: list[tuple[int, ...]] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.chat(ask(RED, "What?"), max_tokens=4).tokens))
        for _ in range(3)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_towers_go_where_they_were_quickest(path: Path) -> None:
    graph = Bundle.open(path).graph
    assert graph is not None
    vision, _ = graph.towers

    def row(config: str, latency_us: float, energy_uj: float | None) -> Measurement:
        return Measurement(config, vision.signature, 4, 0, latency_us, 0.0, energy_uj, 1, "measured")

    rows = (row("CPU@f32", 30.0, 1.0), row("GPU@f16+static", 10.0, 9.0), row("NPU@f16", 5.0, 2.0))
    profile = Profile(2, "here", (), measurements=rows)
    assert {k: str(v) for k, v in _towers(graph, profile, "latency", ()).items()} == {"vision": "NPU@f16"}
    assert str(_towers(graph, profile, "latency", ["NPU"])["vision"]) == "GPU@f16"
    assert str(_towers(graph, profile, "tokens_per_joule", ())["vision"]) == CPU
    assert _towers(graph, Profile(2, "here", ()), "latency", ()) == {}


def test_towers_are_measured(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.graph is not None
    grid = Grid(contexts=(8,), chunks=(4,), passes=2, steps=1, rounds=1)
    profile = Profiler(bundle, [DeviceConfig.parse(CPU)], grid).measure()
    rows = {row.block: row for row in profile.measurements}
    for tower, tokens in zip(bundle.graph.towers, (4, 10), strict=True):
        row = rows[tower.signature]
        assert (row.config, row.tokens, row.past, row.runs, row.provenance) == (CPU, tokens, 0, 2, "measured")
