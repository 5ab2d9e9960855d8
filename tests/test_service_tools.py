"""Calls of tools: read out of text, forced by a schema, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_service import FakeService, words
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from served import KEY, serving

from edgert.service.api.tools import Call, Found, ListReader, MarkedReader, NamedReader, Reader, required_call

HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CASES = {
    "plain text": ("Just words.", ["Just words."]),
    "hermes": (HERMES, [Call("f", '{"a": 1}')]),
    "text first": (f"Let me look.\n\n{HERMES}\n", ["Let me look.", Call("f", '{"a": 1}')]),
    "two calls": (f"{HERMES}\n{HERMES}", [Call("f", '{"a": 1}')] * 2),
    "end mark missing": (HERMES.removesuffix("</tool_call>"), [Call("f", '{"a": 1}')]),
    "no call between marks": (f"a \n<tool_call>oops</tool_call> b {HERMES}", [
        "a \n<tool_call>oops</tool_call> b", Call("f", '{"a": 1}'),
    ]),
    "cut off": ('x <tool_call>{"name": "f", "argu', ['x <tool_call>{"name": "f", "argu']),
    "looks like a mark": ("a <tool_x> b <", ["a <tool_x> b <"]),
    "mistral": ('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"b": "ü"}}]', [
        Call("f", "{}"), Call("g", '{"b": "ü"}'),
    ]),
    "newer mistral": ('ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', [
        "ok", Call("f", '{"a": 1}'), Call("g", "{}"),
    ]),
    "llama": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', [
        Call("f", '{"a": 1}'), Call("g", "{}"),
    ]),
    "bare": (' {"name": "f", "parameters": {"a": 1}}', [Call("f", '{"a": 1}')]),
    "bare list": ('[{"name": "f", "arguments": "{\\"a\\": 1}"}]', [Call("f", '{"a": 1}')]),
    "bare, of no known function": ('{"name": "Ann", "parameters": {}}', ['{"name": "Ann", "parameters": {}}']),
    "other JSON": ('{"answer": 42}', ['{"answer": 42}']),
    "arguments are no object": ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    ]),
    "white space only": (" \n ", [" \n "]),
    "nested deeply": (f'<tool_call>{"[" * 5000}</tool_call>', [f'<tool_call>{"[" * 5000}</tool_call>']),
    "nothing": ("", []),
}  # fmt: skip


def read(reader: Reader, pieces: list[str]) -> Found:
    """All that comes out, neighbouring text joined."""
    found: Found = []
    for each in [*(part for piece in pieces for part in reader.feed(piece)), *reader.finish()]:
        if isinstance(each, str) and found and isinstance(found[-1], str):
            found[-1] += each
        else:
            found.append(each)
    return found


@pytest.mark.parametrize("name", CASES)
def test_calls_in_text(name: str) -> None:
    text, expected = CASES[name]
    assert read(MarkedReader(["f", "g"]), [text]) == expected
    assert read(MarkedReader(["f", "g"]), list(text)) == expected


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_how_text_is_divided_makes_no_difference(data: st.DataObject) -> None:
    parts = [text for text, _ in CASES.values() if len(text) < 300] + ["<", "[", "{", "\n", "</tool_call>", "[TOOL"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(MarkedReader(["f", "g"]), pieces) == read(MarkedReader(["f", "g"]), [text])


def test_text_before_a_call_is_not_held_back() -> None:
    reader = MarkedReader(["f"])
    assert reader.feed("I will look") == ["I will look"]
    assert reader.feed(" up <") == [" up"]
    assert reader.feed("b> now") == [" <b> now"]


def test_arguments_of_a_named_call_come_as_they_are_written() -> None:
    assert read(NamedReader("f"), ['{"a"', ": 1}"]) == [Call("f", '{"a"'), Call(None, ": 1}")]


def test_an_unfinished_list_is_text() -> None:
    assert read(ListReader(), ['[{"name": "f", "argu']) == ['[{"name": "f", "argu']


FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "add",
        "parameters": {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/Number"}}, "required": ["x"],
            "additionalProperties": False, "$defs": {"Number": {"type": "integer"}},
        },
    },
    {"name": "now"},
]  # fmt: skip


def accepts(schema: object, text: str) -> bool:
    """Whether llguidance lets a model write the text and stop."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = tokenizer.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("text", "one", "several"),
    [
        ('[{"name":"add","arguments":{"x":3}}]', True, True),
        ('[{"name":"add","arguments":{"x":3}},{"name":"now","arguments":{}}]', False, True),
        ('[{"name":"add","arguments":{"x":"3"}}]', False, False),
        ('[{"name":"now","arguments":{"x":3}}]', False, False),
        ('[{"name":"other","arguments":{}}]', False, False),
        ("[]", False, False),
    ],
)
def test_a_required_call_can_be_nothing_else(text: str, one: bool, several: bool) -> None:
    assert accepts(required_call(FUNCTIONS, parallel=False).value, text) is one
    assert accepts(required_call(FUNCTIONS, parallel=True).value, text) is several


SERVICE = FakeService({
    "auto": words(f"Let me see. {HERMES}"),
    "twice": words(f"{HERMES} {HERMES}"),
    "list": words('[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'),
    "arguments": words('{"a": 1}'),
    "cut": words('{"a":', finish="length"),
})  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}},
    {"type": "function", "function": {"name": "g", "description": "nothing"}},
]
HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with serving(SERVICE) as url, OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: OpenAI, stream: bool, **more: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """Content, calls and the reason to finish; of a stream, put together as its reader would."""
    SERVICE.requests.clear()
    if not stream:
        choice = client.chat.completions.create(messages=HELLO, **more).choices[0]
        called = [call.function for call in choice.message.tool_calls or [] if call.type == "function"]
        return choice.message.content or "", [(call.name, call.arguments) for call in called], choice.finish_reason
    content, finish = "", None
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(messages=HELLO, stream=True, **more):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
        for call in delta.tool_calls or []:
            assert call.function is not None
            if call.function.name is not None:
                assert call.id is not None
                assert call.id.startswith("call_")
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
    return content, [(name, arguments) for name, arguments in calls.values()], finish


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_may_call(client: OpenAI, stream: bool) -> None:
    found = ask(client, stream, model="auto", tools=TOOLS)
    assert found == ("Let me see.", [("f", '{"a": 1}')], "tool_calls")
    tools = SERVICE.requests[0].tools
    assert tools is not None
    assert [tool["function"]["name"] for tool in tools] == ["f", "g"]
    assert SERVICE.requests[0].constraint is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_may_not_call(client: OpenAI, stream: bool) -> None:
    content, calls, finish = ask(client, stream, model="auto", tools=TOOLS, tool_choice="none")
    assert (content, calls, finish) == (f"Let me see. {HERMES}", [], "stop")
    assert SERVICE.requests[0].tools is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_must_call(client: OpenAI, stream: bool) -> None:
    found = ask(client, stream, model="list", tools=TOOLS, tool_choice="required")
    assert found == ("", [("f", '{"a": 1}'), ("g", "{}")], "tool_calls")
    assert SERVICE.requests[0].constraint is not None
    assert SERVICE.requests[0].constraint.value["items"]["anyOf"][1]["properties"]["name"] == {"const": "g"}


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_must_call_one_function(client: OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "f"}}
    assert ask(client, stream, model="arguments", tools=TOOLS, tool_choice=choice) == (
        "", [("f", '{"a": 1}')], "tool_calls",
    )  # fmt: skip
    assert SERVICE.requests[0].constraint is not None
    assert SERVICE.requests[0].constraint.value == TOOLS[0]["function"]["parameters"]
    assert ask(client, stream, model="cut", tools=TOOLS, tool_choice=choice) == ("", [("f", '{"a":')], "length")


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_and_the_reader_is_told(client: OpenAI, stream: bool) -> None:
    assert ask(client, stream, model="twice", tools=TOOLS, parallel_tool_calls=False)[1] == [("f", '{"a": 1}')]
    if not stream:
        answer = client.chat.completions.create(model="twice", messages=HELLO, tools=TOOLS, parallel_tool_calls=False)
        assert "1 more calls were left out" in answer.edgert["notes"][0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}}, "no tool is named h"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools with a response_format"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ],
)
def test_contradictions_are_refused(client: OpenAI, more: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="auto", messages=HELLO, **more)
