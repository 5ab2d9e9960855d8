"""Images and sound over HTTP, and in a worker: what arrives, what is refused, what is shared."""

from __future__ import annotations

import base64
import io
import socket
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_media
from fake_service import FakeService
from PIL import Image
from served import KEY, serving
from worker_client import Inside, load_of

import edgert
from edgert.service.api.asking import without_media
from edgert.service.api.openapi import document
from edgert.service.api.schemas import ChatRequest
from edgert.service.protocol import MAX_LINE_BYTES, Drop, Dropped, Start, decode, encode
from edgert.service.settings import Settings


def png(seed: int) -> str:
    """A picture as a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wav() -> str:
    """A sound in base64."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(1600)
        file.writeframes((np.sin(np.arange(900) / 7) * 9000).astype(np.int16).tobytes())
    return base64.b64encode(buffer.getvalue()).decode()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def said(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


# The HTTP side, with a service that only remembers what it was asked


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def http(service: FakeService) -> Iterator[httpx.Client]:
    with serving(service) as url, httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def test_parts_reach_the_engine(http: httpx.Client, service: FakeService) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": wav(), "format": "wav"}}
    content = said("What ", image(png(1)), sound, "?")[0]["content"]
    answer = http.post("/v1/chat/completions", json={"model": "echo", "messages": said(*content)})
    assert answer.status_code == 200, answer.text
    assert service.requests[-1].messages[0]["content"] == content
    parts = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": png(1), "detail": "auto"}]
    answer = http.post("/v1/responses", json={"model": "echo", "input": [{"role": "user", "content": parts}]})
    assert answer.status_code == 200, answer.text
    assert service.requests[-1].messages[0]["content"] == [{"type": "text", "text": "What?"}, image(png(1))]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (image("https://example.org/cat.png"), "only data: URLs"),
        (image("http://169.254.169.254/latest/meta-data"), "only data: URLs"),
        (image("file:///etc/passwd"), "only data: URLs"),
        (image("/etc/passwd"), "only data: URLs"),
        ({"type": "image_url"}, "needs its image_url"),
        ({"type": "input_image", "image_url": "ftp://example.org/cat.png"}, "only data: URLs"),
        ({"type": "input_image", "file_id": "file-1"}, "needs its image_url"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}, "wav"),
        ({"type": "input_audio"}, "needs its input_audio"),
        ({"type": "video_url", "video_url": {"url": "data:,"}}, "video_url are not supported"),
    ],
)
def test_other_urls_are_refused_by_name(http: httpx.Client, part: dict[str, Any], message: str) -> None:
    for path, body in (
        ("chat/completions", {"messages": said(part)}),
        ("responses", {"input": [{"role": "user", "content": [part]}]}),
    ):
        answer = http.post(f"/v1/{path}", json={"model": "echo", **body})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_logs_hold_no_pictures() -> None:
    messages = [{"role": "system", "content": "Hi"}, *said("What ", image(png(1)))]
    assert without_media(messages) == [
        {"role": "system", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "image_url"}]},
    ]


def test_the_document_says_so() -> None:
    part = document()["components"]["schemas"]["Part"]
    assert {"image_url", "input_image", "input_audio"} <= set(part["properties"]["type"]["enum"])


def test_a_body_fits_a_line_of_the_worker() -> None:
    """A worker ends where a line is longer than it may be; no body that the HTTP side takes gets there."""
    url = "data:image/png;base64," + "A" * (Settings().body_bytes - 1000)
    form = ChatRequest.model_validate({"model": "m", "messages": said(image(url))})
    assert isinstance(form.messages[0].content, list)
    line = encode(Start(1, messages=said(image(url))))
    assert len(line) < MAX_LINE_BYTES
    assert decode(line) == Start(1, messages=said(image(url)))


# The worker


@pytest.fixture(scope="module")
def path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_media.make(demo_path, tmp_path_factory.mktemp("media") / "media.edge")


@pytest.fixture(scope="module")
def worker(path: Path) -> Iterator[Inside]:
    inside = Inside(load_of(path, device="CPU@f32"))
    yield inside
    assert inside.end() == 0


MESSAGES = said("Of ", image(png(1)), " he said:")
OPTIONS: dict[str, Any] = {"sampling": {"max_tokens": 8, "seed": 3, "temperature": 0.8, "repetition_penalty": 1.2}}


def test_a_worker_says_what_the_model_says(worker: Inside, path: Path) -> None:
    model = edgert.load(path, device="CPU@f32")
    request = worker.start(messages=MESSAGES, sampling={"max_tokens": 8})
    worker.finish(request)
    result = model.chat(MESSAGES, max_tokens=8)
    assert worker.tokens(request) == list(result.tokens)
    assert worker.started[request].prompt_tokens == result.timings.prompt_tokens  # with the tokens of the image


def test_a_crash_is_replayed(worker: Inside) -> None:
    whole = worker.start(messages=MESSAGES, **OPTIONS)
    (text,) = worker.finish(whole)
    tokens = worker.tokens(whole)
    rest = worker.start(messages=MESSAGES, generated=tokens[:3], **OPTIONS)
    worker.finish(rest)
    assert worker.tokens(rest) == tokens[3:]
    assert text.endswith("".join(piece.text for piece in worker.pieces[rest]))


def test_caches_are_shared_by_the_same_picture_only(worker: Inside) -> None:
    worker.send(Drop())
    worker.wait_for(Dropped)
    first, same, other = (
        worker.start(messages=said("Tell me of ", image(png(n)), " now, please"), sampling={"max_tokens": 2})
        for n in (5, 5, 6)
    )
    worker.finish(first, same, other)
    count = worker.started[first].prompt_tokens
    assert worker.started[same].cached_tokens == count - 1
    assert worker.started[other].cached_tokens < count - 12
    assert worker.tokens(same) == worker.tokens(first)


def test_sound_and_several_at_once(worker: Inside) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": wav(), "format": "wav"}}
    prompts = [said("Hear ", sound), MESSAGES, said("Good evening"), said(image(png(7)), image(png(8)), "both")]
    alone = [worker.ask(messages=prompt, sampling={"max_tokens": 6}) for prompt in prompts]
    together = worker.finish(*(worker.start(messages=prompt, sampling={"max_tokens": 6}) for prompt in prompts))
    assert together == alone


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([image("https://example.org/a.png")], "only data: URLs"),
        ([image("data:image/png;base64,AAAA")], "messages[0].content[0]"),
        ([image("data:image/png,AAAA")], "base64"),
        ([{"type": "image", "image": "/etc/hostname"}], "programs that load the model themselves"),
        (["<image>"], "hold 0 images, the chat template made 1 places"),
    ],
)
def test_what_is_wrong_costs_the_request_only(
    worker: Inside, parts: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    request = worker.start(messages=said(*parts), sampling={"max_tokens": 2})
    worker.finish(request)
    assert worker.refused[request].kind == "UsageError"
    assert message in worker.refused[request].message
    assert worker.ask(messages=said("Hello"), sampling={"max_tokens": 2})


def test_a_broken_tower_costs_the_request_only(demo_path: Path, tmp_path: Path) -> None:
    path = tiny_media.make(demo_path, tmp_path / "few.edge", rows=3)
    inside = Inside(load_of(path, device="CPU@f32"))
    text = inside.start(messages=said("Good evening"), sampling={"max_tokens": 12})
    broken = inside.start(messages=MESSAGES, sampling={"max_tokens": 2})
    inside.finish(text, broken)
    assert inside.refused[broken].kind == "BundleError"
    assert len(inside.tokens(text)) > 0
    assert inside.end() == 0


def test_a_model_of_text_refuses_by_name(demo_path: Path) -> None:
    inside = Inside(load_of(demo_path, device="CPU@f32"))
    request = inside.start(messages=MESSAGES)
    inside.finish(request)
    assert "'bookworm' takes no images" in inside.refused[request].message
    assert inside.end() == 0


def test_images_stay_whole_in_small_chunks(demo_path: Path, tmp_path: Path) -> None:
    path = tiny_media.make(demo_path, tmp_path / "together.edge", together=True)
    texts = []
    for chunk in (512, 2):
        inside = Inside(load_of(path, device="CPU@f32", prefill_chunk=chunk))
        texts.append(inside.ask(messages=MESSAGES, sampling={"max_tokens": 6}))
        assert inside.end() == 0
    assert texts[0] == texts[1]


def test_parked_caches_keep_their_pictures(path: Path, tmp_path: Path) -> None:
    first = Inside(load_of(path, device="CPU@f32"))
    text = first.ask(messages=MESSAGES, sampling={"max_tokens": 4})
    first.send(Drop(str(tmp_path / "park")))
    assert first.wait_for(Dropped).parked == 1
    assert first.end() == 0
    second = Inside(load_of(path, device="CPU@f32", park=str(tmp_path / "park")))
    request = second.start(messages=MESSAGES, sampling={"max_tokens": 4})
    assert second.finish(request) == [text]
    assert second.started[request].cached_tokens == second.started[request].prompt_tokens - 1
    assert second.end() == 0


def test_the_kernels_run_several_with_pictures_in_one_step(packed_path: Path, tmp_path: Path) -> None:
    path = tiny_media.make(packed_path, tmp_path / "packed.edge")
    inside = Inside(load_of(path, device="CPU@kernels"))
    assert inside.serving._on.lanes is not None
    assert inside.serving._on.lanes.batched
    prompts = [MESSAGES, said("Good evening, sir"), said("Of ", image(png(2)), " he said:")]
    options: dict[str, Any] = {"sampling": {"max_tokens": 6, "logprobs": 0}}
    alone = [inside.start(messages=prompt, **options) for prompt in prompts]
    for request in alone:
        inside.finish(request)
    inside.send(Drop())
    together = [inside.start(messages=prompt, **options) for prompt in prompts]
    inside.finish(*together)

    def likely(request: int) -> list[float | None]:
        return [piece.logprob for piece in inside.pieces[request]]

    for one, other in zip(alone, together, strict=True):
        assert likely(other) == pytest.approx(likely(one), abs=1e-3)
    assert likely(alone[0]) != pytest.approx(likely(alone[2]), abs=1e-2)
    assert inside.end() == 0
