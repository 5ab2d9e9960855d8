"""`POST /v1/responses`: text in, text out. Nothing is stored, so clients send all of a conversation each time."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from edgert.errors import EdgertError
from edgert.service.api import asking, errors, generations
from edgert.service.api.errors import RefusedError
from edgert.service.api.generations import Numbered
from edgert.service.api.reading import read
from edgert.service.api.schemas import ResponsesRequest
from edgert.service.api.state import state_of
from edgert.service.api.streams import Later, Stream
from edgert.service.contract import Delta, Request, Usage


async def create(http: HttpRequest) -> Response:
    state = state_of(http)
    form = await read(http, ResponsesRequest, state.settings.body_bytes)
    request = _request(form, http)
    state.write_down(http, request)
    answer = Answer(form)
    deltas = generations.run(state.service, [request], state.record(http), state.metrics)
    if form.stream:
        return Stream(answer.events(deltas), answer.failure)
    return Later(answer.whole(deltas))


def _request(form: ResponsesRequest, http: HttpRequest) -> Request:
    messages = [] if form.instructions is None else [{"role": "system", "content": form.instructions}]
    if isinstance(form.input, str):
        messages.append({"role": "user", "content": form.input})
    else:
        messages += [asking.input_message(item) for item in form.input]
    constraint = None
    chosen = form.text.format if form.text else None
    if chosen is not None:
        if chosen.type == "json_schema" and chosen.schema_ is None:
            message = "text.format.schema: Field required"
            raise RefusedError(message, param="text.format.schema", code="missing_required_parameter")
        constraint = asking.format_constraint(chosen.type, chosen.schema_)
    return Request(
        model=form.model,
        messages=messages,
        sampling=asking.sampling(form, max_tokens=form.max_output_tokens),
        constraint=constraint,
        priority=form.priority or "interactive",
        client=asking.client_of(http, form.user or form.safety_identifier),
        keep_alive_s=form.keep_alive,
        **asking.reasoning(form.reasoning.effort if form.reasoning else None, form.reasoning_budget, {}),
    )


class Answer:
    """The response object as it grows, and the events that tell of it."""

    def __init__(self, form: ResponsesRequest) -> None:
        self._form = form
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = time.time()
        self._output: list[dict[str, Any]] = []
        self._parts: list[str] = []  # of the last item's text
        self._usage: Usage | None = None
        self._notes: list[str] = []
        self._number = 0

    async def whole(self, deltas: AsyncGenerator[Numbered, None]) -> Response:
        status = "incomplete"
        async for _, delta in deltas:
            status = self._keep(delta) or status
            if delta.text:
                if not self._open_for(delta):
                    self._finish_item("completed")
                    self._new_item(delta)
                self._parts.append(delta.text)
        self._finish_item(status)
        return JSONResponse(self._response(status))

    async def events(self, deltas: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        status = "incomplete"
        opening = self._event("response.created", response=self._response("in_progress"))
        opening += self._event("response.in_progress", response=self._response("in_progress"))
        try:
            async for _, delta in deltas:
                status = self._keep(delta) or status
                event, opening = opening, b""
                if delta.text:
                    if not self._open_for(delta):
                        event += self._close("completed") + self._open(delta)
                    self._parts.append(delta.text)
                    event += self._delta(delta.text)
                if event:
                    yield event
            kind = "response.completed" if status == "completed" else "response.incomplete"
            yield opening + self._close(status) + self._event(kind, response=self._response(status))
        finally:
            await deltas.aclose()

    def failure(self, error: EdgertError) -> bytes:
        """Events that end a stream which cannot go on."""
        told = errors.explain(error)[1]["error"]
        event = self._close("incomplete")
        code = "rate_limit_exceeded" if told["code"] == "busy" else "server_error"
        failed = {**self._response("failed"), "error": {"code": code, "message": told["message"]}}
        return event + self._event("response.failed", response=failed)

    def _keep(self, delta: Delta) -> str | None:
        """Take over what is not text; the status where it is the last delta."""
        self._usage = delta.usage or self._usage
        self._notes += delta.notes
        return None if delta.finish_reason is None else "completed" if delta.finish_reason == "stop" else "incomplete"

    def _open_for(self, delta: Delta) -> bool:
        """Whether the delta goes on with the last item."""
        kind = "reasoning" if delta.reasoning else "message"
        return bool(self._output) and self._output[-1]["type"] == kind

    def _new_item(self, delta: Delta) -> None:
        self._parts = []
        if delta.reasoning:
            self._output.append({
                "id": f"rs_{secrets.token_hex(16)}", "type": "reasoning", "summary": [], "content": [],
                "status": "in_progress",
            })  # fmt: skip
        else:
            self._output.append({
                "id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "content": [],
                "status": "in_progress",
            })  # fmt: skip

    def _part(self, text: str) -> dict[str, Any]:
        if self._output[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _finish_item(self, status: str) -> None:
        if self._output:
            self._output[-1] |= {"status": status, "content": [self._part("".join(self._parts))]}

    def _open(self, delta: Delta) -> bytes:
        self._new_item(delta)
        item = self._output[-1]
        place = {"output_index": len(self._output) - 1}
        return self._event("response.output_item.added", item=item, **place) + self._event(
            "response.content_part.added", item_id=item["id"], content_index=0, part=self._part(""), **place
        )

    def _delta(self, text: str) -> bytes:
        item = self._output[-1]
        more: dict[str, Any] = {} if item["type"] == "reasoning" else {"logprobs": []}
        return self._event(
            f"response.{self._text_kind()}.delta",
            item_id=item["id"], output_index=len(self._output) - 1, content_index=0, delta=text, **more,
        )  # fmt: skip

    def _text_kind(self) -> str:
        return "reasoning_text" if self._output[-1]["type"] == "reasoning" else "output_text"

    def _close(self, status: str) -> bytes:
        """The end of the last item, if there is one."""
        if not self._output:
            return b""
        self._finish_item(status)
        item = self._output[-1]
        place: dict[str, Any] = {"output_index": len(self._output) - 1}
        within = {"item_id": item["id"], "content_index": 0, **place}
        part = item["content"][0]
        more: dict[str, Any] = {} if item["type"] == "reasoning" else {"logprobs": []}
        return (
            self._event(f"response.{self._text_kind()}.done", text=part["text"], **within, **more)
            + self._event("response.content_part.done", part=part, **within)
            + self._event("response.output_item.done", item=item, **place)
        )

    def _event(self, kind: str, **content: Any) -> bytes:
        told = json.dumps({"type": kind, "sequence_number": self._number, **content}, separators=(",", ":"))
        self._number += 1
        return f"event: {kind}\ndata: {told}\n\n".encode("ascii")

    def _response(self, status: str) -> dict[str, Any]:
        form = self._form
        over = status in ("completed", "incomplete")
        format_ = form.text.format if form.text else None
        told = {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "model": form.model,
            "output": self._output if status != "in_progress" else [], "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": form.instructions, "metadata": form.metadata or {}, "parallel_tool_calls": True,
            "temperature": form.temperature, "top_p": form.top_p, "tool_choice": "auto", "tools": [],
            "max_output_tokens": form.max_output_tokens, "previous_response_id": None, "store": False,
            "background": False, "truncation": "disabled",
            "completed_at": time.time() if status == "completed" else None,
            "reasoning": {"effort": form.reasoning.effort if form.reasoning else None, "summary": None},
            "text": {"format": format_.model_dump(by_alias=True, exclude_none=True) if format_ else {"type": "text"}},
            "usage": _usage_json(self._usage) if over and self._usage else None,
        }  # fmt: skip
        if over and self._notes:
            told["edgert"] = {"notes": self._notes}
        return told


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "edgert": generations.edgert_json(usage),
    }
