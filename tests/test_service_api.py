"""The endpoints, asked by OpenAI's own client over a real connection."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_service import FakeService, words
from openai import OpenAI
from pydantic import BaseModel
from served import KEY, serving

from edgert.errors import (
    BundleError,
    BusyError,
    ChatTemplateError,
    ContextOverflowError,
    DeviceHungError,
    EdgertError,
    SamplingError,
    WorkerError,
)
from edgert.service.contract import Constraint, Delta

SERVICE = FakeService({
    "count": words("one two three"),
    "cut": words("one two", finish="length"),
    "thinker": [
        Delta("let me", reasoning=True, token=1), Delta(" see", reasoning=True, token=2), *words("the answer"),
    ],
    "noted": [Delta("a", token=1), Delta("b", token=2, notes=("NPU failed; CPU goes on",)), *words("")],
    "json": words('{"name": "Ann", "age": 3}'),
    "given-up": [Delta("a", token=1), Delta("", finish_reason="cancelled")],
})  # fmt: skip
HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(SERVICE) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    SERVICE.requests.clear()
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo", messages=HELLO, max_completion_tokens=9, temperature=0.5, top_p=0.9, seed=7, stop="x",
        frequency_penalty=1, presence_penalty=0, logit_bias={"5": 3}, user="me",
        extra_body={
            "top_k": 4, "min_p": 0.1, "keep_alive": "5m", "priority": "background", "reasoning_budget": 3,
            "chat_template_kwargs": {"enable_thinking": True}, "some_other_servers_field": 1,
        },
    )  # fmt: skip
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("hello there", "stop")
    asked = SERVICE.requests[0]
    assert asked.sampling == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 7, "stop": ["x"], "max_tokens": 9,
        "frequency_penalty": 1.0, "logit_bias": {"5": 3.0},
    }  # fmt: skip
    assert (asked.priority, asked.keep_alive_s, asked.reasoning_budget) == ("background", 300.0, 3)
    assert asked.template == {"enable_thinking": True}
    assert asked.client == "127.0.0.1 me"


def test_usage_has_times_and_joules(client: OpenAI) -> None:
    usage = client.chat.completions.create(model="echo", messages=HELLO).usage
    assert usage is not None
    assert usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 1},
        "edgert": {
            "queue_ms": 1.5, "prefill_ms": 2.5, "decode_ms": 4.0, "provenance": "measured", "joules": 0.5,
            "joules_provenance": "measured",
        },
    }  # fmt: skip


def test_chat_streams(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="count", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [c.choices[0].delta.content for c in chunks[:-2]] == ["", "one ", "two ", "three"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_streams_to_an_async_client(url: str) -> None:
    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(model="count", messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(main()) == "one two three"


def test_several_choices_have_seeds_of_their_own(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="count", messages=HELLO, n=3, seed=2**64 - 1)
    assert [choice.message.content for choice in answer.choices] == ["one two three"] * 3
    assert sorted(request.sampling["seed"] for request in SERVICE.requests) == [0, 1, 2**64 - 1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 15)


def test_several_choices_stream_side_by_side(client: OpenAI) -> None:
    texts = ["", "", ""]
    finished = []
    for chunk in client.chat.completions.create(model="count", messages=HELLO, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert texts == ["one two three"] * 3
    assert sorted(finished) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_apart_from_the_answer(client: OpenAI, stream: bool) -> None:
    thoughts, text = "", ""
    if stream:
        for chunk in client.chat.completions.create(model="thinker", messages=HELLO, stream=True):
            thoughts += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            text += chunk.choices[0].delta.content or ""
    else:
        message = client.chat.completions.create(model="thinker", messages=HELLO).choices[0].message
        thoughts, text = message.reasoning_content, message.content  # type: ignore[attr-defined,assignment]
    assert (thoughts, text) == ("let me see", "the answer")


@pytest.mark.parametrize(("effort", "budget"), [("none", 0), ("low", 1024), ("max", None)])
def test_effort_is_a_budget(client: OpenAI, effort: Any, budget: int | None) -> None:
    client.chat.completions.create(model="echo", messages=HELLO, reasoning_effort=effort)
    assert SERVICE.requests[0].reasoning_budget == budget
    assert SERVICE.requests[0].template.get("enable_thinking", True) is (effort != "none")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: OpenAI, stream: bool) -> None:
    found: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(
            model="count", messages=HELLO, logprobs=True, top_logprobs=2, stream=True
        ):
            found += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    else:
        answer = client.chat.completions.create(model="count", messages=HELLO, logprobs=True, top_logprobs=2)
        assert answer.choices[0].logprobs is not None
        found = answer.choices[0].logprobs.content or []
    assert SERVICE.requests[0].sampling["logprobs"] == 2
    assert [each.token for each in found] == ["one ", "two ", "three"]
    assert (found[0].bytes, found[0].logprob) == (list(b"one "), -0.5)
    assert [(top.token, top.logprob) for top in found[1].top_logprobs] == [("two ", -0.5), ("no", -1.5)]


class Person(BaseModel):
    name: str
    age: int


def test_a_schema_is_parsed_back(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="json", messages=HELLO, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=3)
    constraint = SERVICE.requests[0].constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"
    assert constraint.value["properties"]["age"]["type"] == "integer"


@pytest.mark.parametrize(
    ("body", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, Constraint("json")),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint("choice", ["a", "b"])),
        ({"structured_outputs": {"grammar": "start: /a/"}}, Constraint("lark", "start: /a/")),
        ({"structured_outputs": {"json": {"type": "null"}}}, Constraint("json_schema", {"type": "null"})),
    ],
)
def test_constraints(client: OpenAI, body: dict[str, Any], constraint: Constraint | None) -> None:
    client.chat.completions.create(model="echo", messages=HELLO, extra_body=body)
    assert SERVICE.requests[0].constraint == constraint


def test_messages_reach_the_template_as_it_knows_them(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    client.chat.completions.create(model="echo", messages=messages)
    function = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert SERVICE.requests[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [function]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_notes_reach_the_reader(client: OpenAI, stream: bool) -> None:
    found = []
    if stream:
        for chunk in client.chat.completions.create(model="noted", messages=HELLO, stream=True):
            found += getattr(chunk, "edgert", {"notes": []})["notes"]
    else:
        found = client.chat.completions.create(model="noted", messages=HELLO).edgert["notes"]  # type: ignore[attr-defined]
    assert found == ["NPU failed; CPU goes on"]


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=["a b", "c"], n=2, max_tokens=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a b"), (1, "a b"), (2, "c"), (3, "c")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 20)
    client.completions.create(model="echo", prompt=[5, 6])
    assert SERVICE.requests[-1].prompt == [5, 6]


def test_completions_stream(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="cut", prompt="x", stream=True, logprobs=1))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[1].choices[0].logprobs is not None
    assert chunks[1].choices[0].logprobs.tokens == ["two"]
    assert chunks[1].choices[0].logprobs.text_offset == [4]
    assert chunks[1].choices[0].logprobs.top_logprobs == [{"two": -0.5, "no": -1.5}]


def test_embeddings(client: OpenAI, http: httpx.Client) -> None:
    answer = client.embeddings.create(model="echo", input=["a", "b"])
    assert [each.embedding for each in answer.data] == [pytest.approx([0.6, 0.8, 0.0]), pytest.approx([0.6, 0.8, 1.0])]
    assert answer.usage.prompt_tokens == 4
    raw = http.post("/v1/embeddings", json={"model": "echo", "input": "a", "encoding_format": "base64"}).json()
    assert struct.unpack("<3f", base64.b64decode(raw["data"][0]["embedding"])) == pytest.approx((0.6, 0.8, 0.0))
    with pytest.raises(openai.BadRequestError, match="dimensions is 2"):
        client.embeddings.create(model="echo", input="a", dimensions=2)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo", *SERVICE.scripts]
    assert client.models.retrieve("echo").owned_by == "edgert"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(
        model="thinker", input="hello", instructions="be brief", max_output_tokens=5, reasoning={"effort": "low"}
    )
    assert answer.output_text == "the answer"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.status == "completed"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (7, 1)
    asked = SERVICE.requests[0]
    assert asked.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert (asked.sampling, asked.reasoning_budget) == ({"max_tokens": 5}, 1024)


def test_responses_parse_a_schema(client: OpenAI) -> None:
    answer = client.responses.parse(
        model="json", input=[{"role": "user", "content": [{"type": "input_text", "text": "who?"}]}], text_format=Person
    )
    assert answer.output_parsed == Person(name="Ann", age=3)
    assert SERVICE.requests[0].messages == [{"role": "user", "content": "who?"}]
    assert SERVICE.requests[0].constraint is not None


def test_responses_stream(client: OpenAI) -> None:
    with client.responses.stream(model="thinker", input="hello") as stream:
        events = [event.type for event in stream]
        assert stream.get_final_response().output_text == "the answer"
    item = ["response.output_item.added", "response.content_part.added"]
    done = ["response.content_part.done", "response.output_item.done"]
    assert events == [
        "response.created", "response.in_progress",
        *item, "response.reasoning_text.delta", "response.reasoning_text.delta", "response.reasoning_text.done", *done,
        *item, "response.output_text.delta", "response.output_text.delta", "response.output_text.done", *done,
        "response.completed",
    ]  # fmt: skip


def test_a_response_cut_off_is_incomplete(client: OpenAI) -> None:
    events = list(client.responses.create(model="cut", input="hello", stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details is not None
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("chat/completions", "audio", {"voice": "x"}), ("chat/completions", "functions", [{"name": "f"}]),
        ("chat/completions", "store", True), ("chat/completions", "modalities", ["text", "audio"]),
        ("completions", "echo", True), ("completions", "suffix", "x"), ("completions", "best_of", 2),
        ("responses", "previous_response_id", "resp_1"), ("responses", "store", True),
        ("responses", "background", True),
        ("responses", "tools", [{"type": "web_search"}]), ("responses", "truncation", "auto"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(http: httpx.Client, path: str, field: str, value: Any) -> None:
    given: Any = {"chat/completions": {"messages": HELLO}, "completions": {"prompt": "x"}, "responses": {"input": "x"}}
    good = {"model": "echo", **given[path]}
    answer = http.post(f"/v1/{path}", json={**good, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"]
    assert http.post(f"/v1/{path}", json={**good, field: None}).status_code == 200


def test_files_are_refused_by_name(client: OpenAI) -> None:
    part: Any = {"type": "file", "file": {"file_id": "file-1"}}
    with pytest.raises(openai.BadRequestError, match="of type file are not supported") as caught:
        client.chat.completions.create(model="echo", messages=[{"role": "user", "content": [part]}])
    assert caught.value.param == "messages.0.content.0"


ERRORS: list[tuple[EdgertError, int, str, str]] = [
    (SamplingError("top_p is 2"), 400, "invalid_value", "SamplingError"),
    (ContextOverflowError("too long", tokens=9, limit=8), 400, "context_length_exceeded", "ContextOverflowError"),
    (ChatTemplateError("roles must alternate"), 400, "chat_template_failed", "ChatTemplateError"),
    (BusyError("full", retry_after_s=1.2), 429, "busy", "BusyError"),
    (WorkerError("all failed"), 503, "worker_failed", "WorkerError"),
    (DeviceHungError("NPU hangs"), 503, "device_failed", "DeviceHungError"),
    (BundleError("damaged"), 503, "bundle_error", "BundleError"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "kind"), ERRORS)
def test_errors(client: OpenAI, error: EdgertError, status: int, code: str, kind: str, stream: bool) -> None:
    SERVICE.error, SERVICE.error_after = error, 0
    try:
        with pytest.raises(openai.APIStatusError, match=str(error)) as caught:
            client.chat.completions.create(model="count", messages=HELLO, stream=stream)
    finally:
        SERVICE.error = None
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.body["kind"] == kind  # type: ignore[index]
    assert caught.value.response.headers.get("retry-after") == ("2" if status == 429 else None)


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_error_within_a_stream_is_an_event(client: OpenAI, http: httpx.Client) -> None:
    SERVICE.error, SERVICE.error_after = WorkerError("gone for good"), 2
    try:
        text = ""
        with pytest.raises(openai.APIError, match="gone for good"):  # noqa: PT012
            for chunk in client.chat.completions.create(model="count", messages=HELLO, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "one two "
        events = list(client.responses.create(model="count", input="x", stream=True))
        assert events[-1].type == "response.failed"
        assert events[-1].response.error is not None
        assert events[-1].response.error.message == "gone for good"
        raw = http.post("/v1/completions", json={"model": "count", "prompt": "x", "stream": True}).text
        assert raw.rstrip().split("\n\n")[-1].startswith("event: error\ndata: ")
        with pytest.raises(openai.InternalServerError, match="gone for good"):
            client.chat.completions.create(model="count", messages=HELLO, n=2)
    finally:
        SERVICE.error = None


def test_a_generation_that_the_service_gave_up_is_no_answer(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="gave up"):
        client.chat.completions.create(model="given-up", messages=HELLO)
