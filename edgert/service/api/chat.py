"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from edgert.errors import EdgertError
from edgert.service.api import asking, errors, generations
from edgert.service.api.generations import Numbered
from edgert.service.api.reading import read
from edgert.service.api.schemas import ChatRequest
from edgert.service.api.state import state_of
from edgert.service.api.streams import Later, Stream
from edgert.service.api.tools import Call, Found, ListReader, MarkedReader, NamedReader, Reader
from edgert.service.contract import Delta

DONE = b"data: [DONE]\n\n"


async def create(http: HttpRequest) -> Response:
    state = state_of(http)
    form = await read(http, ChatRequest, state.settings.body_bytes)
    requests = asking.choices(asking.chat(form, http), form.n or 1)
    state.write_down(http, requests[0])
    answer = Answer(form, len(requests))
    deltas = generations.run(state.service, requests, state.record(http), state.metrics)
    if form.stream:
        return Stream(answer.events(deltas), failure)
    return Later(answer.whole(deltas))


def failure(error: EdgertError) -> bytes:
    """The event that tells a reader of an error after the first text."""
    return b"event: error\ndata: " + json.dumps(errors.explain(error)[1]).encode() + b"\n\n"


class Choice:
    """One of the answers, taken apart into thoughts, content and calls.

    Attributes:
        notes: what the reader should know beside the text.
        finish: as OpenAI names it; None while it goes on.
    """

    def __init__(self, reader: Reader | None, *, parallel: bool) -> None:
        self._reader = reader
        self._parallel = parallel
        self._calls = 0
        self._told = 0
        self._left_out = 0
        self.notes: list[str] = []
        self.finish: str | None = None

    def take(self, delta: Delta) -> Found:
        """Content and calls in a delta that holds no thoughts."""
        if self._reader is None:
            found: Found = [delta.text] if delta.text else []
        else:
            found = self._reader.feed(delta.text)
            if delta.finish_reason is not None:
                found += self._reader.finish()
            if found:
                found = [each for each in found if isinstance(each, str) or self._wanted(each)]
        if delta.finish_reason is not None:
            stopped = delta.finish_reason == "stop"
            self.finish = "tool_calls" if stopped and self._calls else delta.finish_reason
            if self._left_out:
                self.notes.append(f"{self._left_out} more calls were left out: parallel_tool_calls is false")
        return found

    def _wanted(self, call: Call) -> bool:
        if call.name is not None:
            if self._calls and not self._parallel:
                self._left_out += 1
                return False
            self._calls += 1
        return True

    def call_json(self, call: Call) -> dict[str, Any]:
        """The next call, or the next part of the arguments of the last, as a delta has it."""
        if call.name is None:
            return {"index": self._told - 1, "function": {"arguments": call.arguments}}
        self._told += 1
        return {"index": self._told - 1, **_new_call(call)}


class Answer:
    """What all choices of one request have in common, and the two forms of the answer."""

    def __init__(self, form: ChatRequest, count: int) -> None:
        self._form = form
        self._count = count
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._choices = [
            Choice(_reader(form), parallel=form.parallel_tool_calls is not False) for _ in range(count)
        ]  # fmt: skip
        self._with_usage = bool(form.stream_options and form.stream_options.include_usage)
        head = self._head("chat.completion.chunk")
        self._prefix = f"data: {json.dumps(head, separators=(',', ':'))[:-1]},"
        self._suffix = ',"usage":null}\n\n' if self._with_usage else "}\n\n"
        # Nearly every event is a token of text: all but the text is made once.
        self._plain = [
            (self._chunk(index, '{"content":\0}').partition("\0")) for index in range(count)
        ]  # fmt: skip

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._form.model}

    async def whole(self, deltas: AsyncGenerator[Numbered, None]) -> Response:
        found = await generations.all_of(deltas)
        choices = [self._choice_json(index, found.get(index, [])) for index in range(self._count)]
        usage = generations.total([d.usage for each in found.values() for d in each if d.usage], 1)
        content = {**self._head("chat.completion"), "choices": choices, "usage": generations.usage_json(usage)}
        notes = [note for choice in self._choices for note in choice.notes]
        if notes:
            content["edgert"] = {"notes": notes}
        return JSONResponse(content)

    def _choice_json(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        choice = self._choices[index]
        content: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        logprobs: list[dict[str, Any]] = []
        for delta in deltas:
            choice.notes += delta.notes
            if delta.reasoning:
                thoughts.append(delta.text)
            elif delta.logprob is not None:
                logprobs.append(logprob_json(delta))
            for each in choice.take(_answer_only(delta)):
                if isinstance(each, str):
                    content.append(each)
                elif each.name is None:
                    calls[-1]["function"]["arguments"] += each.arguments
                else:
                    calls.append(_new_call(each))
        message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "refusal": None}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": logprobs, "refusal": None} if self._form.logprobs else None,
            "finish_reason": choice.finish,
        }

    async def events(self, deltas: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        choices = self._choices
        simple = not self._form.logprobs and not self._form.tools
        opened: set[int] = set()
        usages = {}
        try:
            async for index, delta in deltas:
                opening = ""
                if index not in opened:
                    opened.add(index)
                    opening = self._chunk(index, '{"role":"assistant","content":""}')
                if simple and delta.finish_reason is None and not delta.reasoning and not delta.notes:
                    if delta.text or opening:
                        before, _, after = self._plain[index]
                        text = f"{before}{json.dumps(delta.text)}{after}" if delta.text else ""
                        yield (opening + text).encode("ascii")
                    continue
                if delta.usage is not None:
                    usages[index] = delta.usage
                event = opening + self._full(index, choices[index], delta)
                if event:
                    yield event.encode("ascii")
            tail = DONE
            if self._with_usage:
                usage = generations.usage_json(generations.total([usages[n] for n in sorted(usages)], 1))
                tail = f'{self._prefix}"choices":[],"usage":{json.dumps(usage)}}}\n\n'.encode() + DONE
            yield tail
        finally:
            await deltas.aclose()

    def _full(self, index: int, choice: Choice, delta: Delta) -> str:
        """The events of any delta."""
        parts: list[dict[str, Any]] = []
        if delta.reasoning and delta.text:
            parts.append({"reasoning_content": delta.text})
        for each in choice.take(_answer_only(delta)):
            parts.append({"content": each} if isinstance(each, str) else {"tool_calls": [choice.call_json(each)]})
        logprobs = "null"
        if self._form.logprobs and delta.logprob is not None and not delta.reasoning:
            logprobs = json.dumps({"content": [logprob_json(delta)], "refusal": None})
            parts = parts or [{"content": ""}]
        notes = list(delta.notes)
        if choice.finish is not None:
            notes += choice.notes
        if notes and not parts and choice.finish is None:
            parts = [{}]
        chunks = []
        for number, part in enumerate(parts):
            chunks.append(self._chunk(index, json.dumps(part), logprobs if number == 0 else "null", notes=notes))
            notes = []
        if choice.finish is not None:
            chunks.append(self._chunk(index, "{}", finish=json.dumps(choice.finish), notes=notes))
        return "".join(chunks)

    def _chunk(
        self, index: int, delta: str, logprobs: str = "null", finish: str = "null", notes: Sequence[str] = ()
    ) -> str:
        extra = f',"edgert":{json.dumps({"notes": list(notes)})}' if notes else ""
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
        return f'{self._prefix}"choices":[{choice}]{extra}{self._suffix}'


def logprob_json(delta: Delta) -> dict[str, Any]:
    """A token as OpenAI's `logprobs.content` has it."""
    assert delta.logprob is not None
    return {
        **_token_json(delta.text if delta.token_text is None else delta.token_text, delta.logprob),
        "top_logprobs": [_token_json(text, logprob) for _, text, logprob in delta.top],
    }


def _token_json(text: str, logprob: float) -> dict[str, Any]:
    # A token may be a part of a character, and then nobody knows its bytes any more.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _answer_only(delta: Delta) -> Delta:
    """The delta without its thoughts, which no reader of calls may see."""
    if not delta.reasoning:
        return delta
    return Delta("", finish_reason=delta.finish_reason)


def _new_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _reader(form: ChatRequest) -> Reader | None:
    if not form.tools or form.tool_choice == "none":
        return None
    if form.tool_choice in (None, "auto"):
        return MarkedReader([tool.function.name for tool in form.tools])
    if form.tool_choice == "required":
        return ListReader()
    assert not isinstance(form.tool_choice, str)
    assert form.tool_choice is not None
    return NamedReader(form.tool_choice.function.name)
