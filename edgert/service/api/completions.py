"""`POST /v1/completions`: plain text goes on."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from edgert.service.api import asking, generations
from edgert.service.api.chat import DONE, failure
from edgert.service.api.errors import RefusedError
from edgert.service.api.generations import Numbered
from edgert.service.api.reading import read
from edgert.service.api.schemas import CompletionRequest
from edgert.service.api.state import state_of
from edgert.service.api.streams import Later, Stream
from edgert.service.contract import Delta

MAX_GENERATIONS = 64  # of one HTTP request


async def create(http: HttpRequest) -> Response:
    state = state_of(http)
    form = await read(http, CompletionRequest, state.settings.body_bytes)
    prompts = asking.completion(form, http)
    each = form.n or 1
    if len(prompts) * each > MAX_GENERATIONS:
        message = f"{len(prompts)} prompts with n {each} are {len(prompts) * each} answers, at most {MAX_GENERATIONS}"
        raise RefusedError(message, param="n")
    requests = [request for prompt in prompts for request in asking.choices(prompt, each)]
    state.write_down(http, requests[0])
    answer = Answer(form, len(requests), len(prompts))
    deltas = generations.run(state.service, requests, state.record(http), state.metrics)
    if form.stream:
        return Stream(answer.events(deltas), failure)
    return Later(answer.whole(deltas))


class Answer:
    """The two forms of the answer."""

    def __init__(self, form: CompletionRequest, count: int, prompts: int) -> None:
        self._count = count
        self._prompts = prompts
        self._with_logprobs = form.logprobs is not None
        self._with_usage = bool(form.stream_options and form.stream_options.include_usage)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": form.model,
        }  # fmt: skip
        self._prefix = f"data: {json.dumps(self._head, separators=(',', ':'))[:-1]},"
        self._suffix = ',"usage":null}\n\n' if self._with_usage else "}\n\n"
        self._lengths = [0] * count

    async def whole(self, deltas: AsyncGenerator[Numbered, None]) -> Response:
        found = await generations.all_of(deltas)
        choices = []
        notes: list[str] = []
        for index in range(self._count):
            own = found.get(index, [])
            notes += [note for delta in own for note in delta.notes]
            choices.append({
                "index": index,
                "text": "".join(delta.text for delta in own),
                "logprobs": self._logprobs(index, own),
                "finish_reason": own[-1].finish_reason if own else None,
            })  # fmt: skip
        usage = generations.total([d.usage for each in found.values() for d in each if d.usage], self._prompts)
        content = {**self._head, "choices": choices, "usage": generations.usage_json(usage)}
        if notes:
            content["edgert"] = {"notes": notes}
        return JSONResponse(content)

    async def events(self, deltas: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        usages = {}
        silent = True
        try:
            async for index, delta in deltas:
                if delta.usage is not None:
                    usages[index] = delta.usage
                if not (silent or delta.text or delta.finish_reason or delta.notes or self._with_logprobs):
                    continue
                silent = False
                logprobs = json.dumps(self._logprobs(index, [delta]))
                finish = json.dumps(delta.finish_reason)
                extra = f',"edgert":{json.dumps({"notes": delta.notes})}' if delta.notes else ""
                yield (
                    f'{self._prefix}"choices":[{{"index":{index},"text":{json.dumps(delta.text)},'
                    f'"logprobs":{logprobs},"finish_reason":{finish}}}]{extra}{self._suffix}'
                ).encode("ascii")
            tail = DONE
            if self._with_usage:
                usage = generations.total([usages[number] for number in sorted(usages)], self._prompts)
                told = json.dumps(generations.usage_json(usage))
                tail = f'{self._prefix}"choices":[],"usage":{told}}}\n\n'.encode() + DONE
            yield tail
        finally:
            await deltas.aclose()

    def _logprobs(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for delta in deltas:
            if delta.logprob is not None:
                told["tokens"].append(delta.text if delta.token_text is None else delta.token_text)
                told["token_logprobs"].append(delta.logprob)
                told["top_logprobs"].append({text: logprob for _, text, logprob in reversed(delta.top)})
                told["text_offset"].append(self._lengths[index])
            self._lengths[index] += len(delta.text)
        return told
