"""From what HTTP asks to `contract.Request`s."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from edgert.service.api.errors import RefusedError
from edgert.service.api.schemas import (
    ChatRequest,
    CompletionRequest,
    InputItem,
    Message,
    Part,
    Sampled,
    StructuredOutputs,
)
from edgert.service.api.tools import parameters, required_call
from edgert.service.contract import Constraint, Request

# Tokens of thought for OpenAI's words; None for no limit. A word alone says nothing exact; a budget does.
EFFORTS: Mapping[str, int | None] = {
    "none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768, "max": None,
}  # fmt: skip
_OURS = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_PENALTIES = ("frequency_penalty", "presence_penalty", "logit_bias")  # nothing and 0 mean the same
MAX_SEED = 2**64


def client_of(http: HttpRequest, user: str | None) -> str:
    """Whom queueing is fair to: the user that is named, else the program."""
    address = "" if http.client is None else http.client.host
    return f"{address} {user or http.headers.get('user-agent', '')}"[:128]


def sampling(
    form: Sampled, *, stop: str | Sequence[str] | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Fields of `SamplingParams`; those that are not asked for are left out."""
    asked = {name: value for name in _SAMPLING if (value := getattr(form, name)) is not None}
    asked |= {name: value for name in _PENALTIES if (value := getattr(form, name))}
    if stop:
        asked["stop"] = [stop] if isinstance(stop, str) else list(stop)
    if max_tokens is not None:
        asked["max_tokens"] = max_tokens
    return asked


def choices(request: Request, count: int) -> list[Request]:
    """The same request several times, each with a seed of its own where one is given."""
    if count == 1:
        return [request]
    seed = request.sampling.get("seed")
    seeds = [{} if seed is None else {"seed": (seed + each) % MAX_SEED} for each in range(count)]
    return [Request(**{**vars(request), "sampling": {**request.sampling, **each}}) for each in seeds]


def chat(form: ChatRequest, http: HttpRequest) -> Request:
    """What `POST /v1/chat/completions` asks of the engine.

    Raises:
        RefusedError: fields that contradict each other.
    """
    tools = None
    constraint = _constraint(form)
    if form.tools and form.tool_choice != "none":
        # `parameters` is there for those templates that look into it unasked.
        tools = [
            {"type": "function", "function": {**function, "parameters": parameters(function)}}
            for function in functions(form)
        ]
        if constraint is not None:
            message = "tools with a response_format are supported for tool_choice none only"
            raise RefusedError(message, param="response_format", code="unsupported_parameter")
        constraint = _forced(form, functions(form))
    elif form.tool_choice not in (None, "none", "auto"):
        raise RefusedError("tool_choice: there are no tools to choose from", param="tool_choice")
    template = dict(form.chat_template_kwargs or {})
    for name in _OURS:
        if name in template:
            raise RefusedError(f"chat_template_kwargs: {name} is set by the server", param="chat_template_kwargs")
    asked = sampling(form, stop=form.stop, max_tokens=form.max_completion_tokens or form.max_tokens)
    if form.logprobs:
        asked["logprobs"] = form.top_logprobs or 0
    elif form.top_logprobs:
        raise RefusedError("top_logprobs: logprobs must be true", param="top_logprobs")
    return _request(
        form, http,
        messages=[_message(each, number) for number, each in enumerate(form.messages)],
        tools=tools, sampling=asked, constraint=constraint,
        **reasoning(form.reasoning_effort, form.reasoning_budget, template),
    )  # fmt: skip


def functions(form: ChatRequest) -> list[dict[str, Any]]:
    return [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in form.tools or ()]


def completion(form: CompletionRequest, http: HttpRequest) -> list[Request]:
    """What `POST /v1/completions` asks, one for each prompt."""
    asked = sampling(form, stop=form.stop, max_tokens=form.max_tokens)
    if form.logprobs is not None:
        asked["logprobs"] = form.logprobs
    constraint = _structured(form.structured_outputs)
    prompt = form.prompt
    prompts: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0:1], str) else prompt
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    return [_request(form, http, prompt=each, sampling=asked, constraint=constraint) for each in prompts]


def _request(form: Sampled, http: HttpRequest, **fields: Any) -> Request:
    return Request(
        model=form.model,
        priority=form.priority or "interactive",
        client=client_of(http, form.user or form.safety_identifier),
        keep_alive_s=form.keep_alive,
        **fields,
    )


def reasoning(effort: str | None, budget: int | None, template: dict[str, Any]) -> dict[str, Any]:
    """`reasoning_budget` and `template` of a request; templates that know these variables are told as well."""
    if effort is not None:
        template.setdefault("reasoning_effort", effort)
        if effort == "none":
            template.setdefault("enable_thinking", False)
        budget = EFFORTS[effort] if budget is None else budget
    return {"reasoning_budget": budget, "template": template}


def format_constraint(kind: str, schema: Mapping[str, Any] | None) -> Constraint | None:
    """Of a `response_format`."""
    if kind == "text":
        return None
    return Constraint("json") if kind == "json_object" or schema is None else Constraint("json_schema", schema)


def _constraint(form: ChatRequest) -> Constraint | None:
    chosen = form.response_format
    if chosen is None or chosen.type == "text":
        return _structured(form.structured_outputs)
    if form.structured_outputs is not None:
        message = "structured_outputs and response_format exclude each other"
        raise RefusedError(message, param="structured_outputs")
    if chosen.type == "json_schema" and chosen.json_schema is None:
        message = "response_format.json_schema: Field required"
        raise RefusedError(message, param="response_format.json_schema", code="missing_required_parameter")
    return format_constraint(chosen.type, chosen.json_schema.schema_ if chosen.json_schema else None)


def _structured(form: StructuredOutputs | None) -> Constraint | None:
    if form is None:
        return None
    kinds = {"json_schema": form.json_schema, "regex": form.regex, "choice": form.choice, "lark": form.grammar}
    given = [(kind, value) for kind, value in kinds.items() if value is not None]
    if len(given) != 1:
        message = "structured_outputs: exactly one of json, regex, choice and grammar is expected"
        raise RefusedError(message, param="structured_outputs")
    return Constraint(*given[0])  # type: ignore[arg-type]


def _forced(form: ChatRequest, given: Sequence[Mapping[str, Any]]) -> Constraint | None:
    """What holds the answer to a call; None where the model is free."""
    choice = form.tool_choice
    if choice is None or choice in ("auto", "none"):
        return None
    if choice == "required":
        return required_call(given, parallel=form.parallel_tool_calls is not False)
    assert not isinstance(choice, str)
    for function in given:
        if function["name"] == choice.function.name:
            return Constraint("json_schema", parameters(function))
    message = f"tool_choice: no tool is named {choice.function.name}"
    raise RefusedError(message, param="tool_choice")


def _message(message: Message, number: int) -> dict[str, Any]:
    """As chat templates expect it: text as one string, arguments of calls as objects, `system` for `developer`."""
    content = joined(message.content)
    where = f"messages.{number}"
    if content is None and message.role != "assistant":
        message_ = f"{where}.content: Field required"
        raise RefusedError(message_, param=f"{where}.content", code="missing_required_parameter")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{where}.tool_calls.{place}.function.arguments"),
                },
            }
            for place, call in enumerate(message.tool_calls)
        ]
    return plain


def input_message(item: InputItem) -> dict[str, Any]:
    """Of an item of `POST /v1/responses`."""
    return {"role": "system" if item.role == "developer" else item.role, "content": joined(item.content) or ""}


def joined(content: str | Sequence[Part] | None) -> str | list[dict[str, Any]] | None:
    """Text as one string, as every chat template takes it; a list of parts where images or sound are among them."""
    if content is None or isinstance(content, str):
        return content
    parts = [_plain(part) for part in content]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _plain(part: Part) -> dict[str, Any]:
    if part.image_url is not None and part.type in ("image_url", "input_image"):
        url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
        return {"type": "image_url", "image_url": {"url": url}}
    if part.input_audio is not None and part.type == "input_audio":
        return {"type": "input_audio", "input_audio": {"data": part.input_audio.data, "format": "wav"}}
    return {"type": "text", "text": part.text or part.refusal or ""}


def without_media(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for people to read: of images and sound only that they are there."""

    def part(each: Any) -> Any:
        return each if each["type"] == "text" else {"type": each["type"]}

    return [
        {**message, "content": [part(each) for each in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _arguments(text: str, where: str) -> Any:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RefusedError(f"{where}: a JSON object in a string is expected", param=where)
    return value
