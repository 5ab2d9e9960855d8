"""The worker, with the repository's own model: what it answers is what `edgert.load` generates, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_client import Process, load_of

import edgert
from edgert.bundle import Bundle
from edgert.service.protocol import (
    MAX_LINE_BYTES,
    Cancel,
    Drop,
    Dropped,
    Embed,
    Failed,
    Ping,
    Pong,
    Ready,
    Stop,
)
from edgert.service.worker.plans import chosen
from edgert.session import Model

PROMPT = "It was a dark night, and the old man"
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 17, "max_tokens": 20}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def worker(demo_path: Path) -> Iterator[Process]:
    """One that all tests of this file share, in a process and a sandbox of its own, on the default plan."""
    with Process(replace(load_of(demo_path), sandbox=True, verify=True)) as client:
        client.wait_for(Ready)
        yield client


@pytest.fixture(scope="module")
def model(demo_path: Path) -> Model:
    """The same model on the same plan, in this process."""
    return edgert.load(demo_path, plan=chosen(load_of(demo_path), Bundle.open(demo_path)))


def test_ready_tells_what_there_is(worker: Process, demo: Model) -> None:
    (ready,) = (message for message in worker.others if isinstance(message, Ready))
    assert (ready.task, ready.context_length) == ("decoder", 1024)
    assert ready.plan == ready.plans[0].name
    assert ready.plans[0].units == ["CPU"]
    assert ready.plans[0].blocks[0]["kinds"] == {"embed": 1, "attention": 4, "ffn": 4, "head": 1}
    assert not ready.emulated


@pytest.mark.parametrize("sampling", [{"max_tokens": 24}, SEEDED, {"max_tokens": 24, "stop": ["man", "the "]}])
def test_the_text_is_that_of_load(worker: Process, model: Model, sampling: dict[str, Any]) -> None:
    expected = model.generate(PROMPT, **sampling)
    id = worker.start(PROMPT, sampling=sampling)
    assert worker.finish(id) == [expected.text]
    assert worker.tokens(id) == list(expected.tokens)
    last = worker.pieces[id][-1]
    assert last.finish_reason == expected.finish_reason
    assert last.prefill_us > 0
    assert last.decode_us > 0


def test_a_chat_is_that_of_load(worker: Process, model: Model) -> None:
    messages = [{"role": "user", "content": "Good evening, sir."}]
    id = worker.start(messages=messages, sampling={"max_tokens": 12})
    assert worker.finish(id) == [model.chat(messages, max_tokens=12).text]


def test_eight_at_once_get_what_each_gets_alone(worker: Process) -> None:
    prompts = [f"Chapter {n}. The {noun} and" for n, noun in enumerate(("sea", "house", "king", "dog") * 2)]
    sampling = [{**SEEDED, "seed": n} if n % 2 else {"max_tokens": 20} for n in range(8)]
    alone = [worker.ask(prompt, sampling=each) for prompt, each in zip(prompts, sampling, strict=True)]
    ids = [worker.start(prompt, sampling=each) for prompt, each in zip(prompts, sampling, strict=True)]
    assert worker.finish(*ids) == alone


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": {"max_tokens": 20}},
        {"sampling": SEEDED},
        {"sampling": {**SEEDED, "stop": ["late"], "frequency_penalty": 0.5}},
        {"sampling": SEEDED, "constraint": "json_schema", "constraint_value": SCHEMA},
    ],
)
def test_another_worker_goes_on_with_the_same_text(worker: Process, options: dict[str, Any]) -> None:
    if "stop" in options["sampling"]:  # one that comes late, over the border of two tokens
        text = worker.ask(PROMPT, **options)
        options = {**options, "sampling": {**options["sampling"], "stop": [text[40:46]]}}
    whole = worker.start(PROMPT, **options)
    worker.finish(whole)
    tokens, pieces = worker.tokens(whole), worker.pieces[whole]
    assert len(tokens) > 6
    again = [worker.start(PROMPT, **options, generated=tokens[:count]) for count in range(len(tokens))]
    worker.finish(*again)
    for count, id in enumerate(again):
        assert worker.tokens(id) == tokens[count:]
        assert [piece.text for piece in worker.pieces[id]] == [piece.text for piece in pieces[count:]]


def test_structured_output_validates(worker: Process) -> None:
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 60}
    text = worker.ask(PROMPT, sampling=sampling, constraint="json_schema", constraint_value=SCHEMA)
    found = json.loads(text)
    assert set(found) == {"name", "old"}
    assert isinstance(found["old"], bool)
    assert worker.ask(PROMPT, constraint="choice", constraint_value=["calm", "stormy"]) in ("calm", "stormy")


def test_a_shared_beginning_is_prefilled_once(worker: Process, book: list[int]) -> None:
    system = book[:200]
    first, second = (worker.start([*system, token], sampling={"max_tokens": 4}) for token in (300, 301))
    worker.finish(first, second)
    assert worker.started[first].cached_tokens == 0
    assert worker.started[second].cached_tokens == 200
    third = worker.start([*system, 301, *worker.tokens(second), 302], sampling={"max_tokens": 4})
    worker.finish(third)
    assert worker.started[third].cached_tokens == 204


def test_cancel_ends_a_generation(worker: Process) -> None:
    id = worker.start(PROMPT, sampling={"max_tokens": 900})
    while len(worker.pieces[id]) < 3:
        worker.read()
    worker.send(Cancel(id))
    worker.send(Cancel(12345))  # nobody's
    worker.finish(id)
    assert worker.pieces[id][-1].finish_reason == "cancelled"
    worker.send(Ping(77))
    pong = worker.wait_for(Pong)
    assert pong.id == 77
    assert pong.kv_bytes == pong.idle_kv_bytes > 0
    worker.send(Drop())
    assert worker.wait_for(Dropped).freed_bytes > 0
    worker.send(Ping(78))
    assert worker.wait_for(Pong).kv_bytes == 0


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"prompt": ""}, "EmptyPromptError"),
        ({"prompt": PROMPT, "sampling": {"temperature": -1}}, "SamplingError"),
        ({"prompt": PROMPT, "constraint": "regex", "constraint_value": "("}, "UsageError"),
    ],
)
def test_what_cannot_be_done_is_refused(worker: Process, options: dict[str, Any], kind: str) -> None:
    id = worker.start(**options)
    worker.finish(id)
    assert worker.refused[id].kind == kind


def test_an_overflow_tells_its_numbers(worker: Process) -> None:
    id = worker.start([5] * 1000, sampling={"max_tokens": 30})
    worker.finish(id)
    refused = worker.refused[id]
    assert (refused.kind, refused.tokens, refused.limit) == ("ContextOverflowError", 1030, 1024)
    worker.send(Embed(999, ["a"]))
    while 999 not in worker.refused:
        worker.read()
    assert "expected 'encoder'" in worker.refused[999].message


# How it ends


def test_stop_finishes_what_runs(demo_path: Path) -> None:
    with Process(load_of(demo_path, device="CPU@f32", max_tokens=9)) as client:
        id = client.start(PROMPT)
        client.send(Stop())
        client.finish(id)
        assert len(client.tokens(id)) == 9
        assert client.end() == 0


def test_the_end_of_input_ends_it(demo_path: Path) -> None:
    with Process(None) as client:
        assert client.end() == 0
    with Process(load_of(demo_path, device="CPU@f32")) as client:
        client.wait_for(Ready)
        client.start(PROMPT, sampling={"max_tokens": 900})
        assert client.end() == 0


@pytest.mark.parametrize("line", [b'{"is":"Start"}\n', b"\xff\n", b"x" * (MAX_LINE_BYTES + 1)])
def test_another_language_ends_it(line: bytes) -> None:
    with Process(None) as client:
        client.write(line)
        assert client.process.wait(60) == 2


def test_a_broken_line_ends_a_loaded_one(demo_path: Path) -> None:
    with Process(load_of(demo_path, device="CPU@f32")) as client:
        client.wait_for(Ready)
        client.write(b'{"is":"Hello","secret":"prompt"}\n')
        assert client.process.wait(60) == 2
        assert client.end() == 2
        assert b"secret" not in b"".join(client.complaints)


def test_what_cannot_be_loaded_is_told(tmp_path: Path, demo_path: Path) -> None:
    for load, kind in (
        (load_of(tmp_path / "none.edge"), "BundleError"),
        (load_of(demo_path, device="CPU@nothing"), "UnknownDeviceError"),
        (load_of(demo_path, device="CPU", objective="latency"), "UsageError"),
        (load_of(demo_path, device="CPU@f32", kv_bytes=1), "UsageError"),
    ):
        with Process(load) as client:
            assert client.wait_for(Failed).kind == kind
            assert client.process.wait(60) == 1
