"""What clients may ask, as pydantic models: strict about types and bounds, blind to fields that nobody knows.

Fields are OpenAI's, with those extensions that other local servers have too (`top_k`, `min_p`, `repetition_penalty`,
`chat_template_kwargs`, `structured_outputs`, `keep_alive`) and `reasoning_budget`, `priority`. A known field that asks
for what edgert does not do is refused by name (`unsupported`); hints that change nothing in the answer are not looked
at.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_MESSAGES = 2048
MAX_PARTS = 1024  # of a message
MAX_TOKENS = 2**20  # of a prompt that is given as tokens
MAX_CHOICES = 16
MAX_INT = 2**31 - 1
MAX_KEEP_ALIVE_S = 1e9
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_DURATION = r"^-?([0-9]{1,9}(\.[0-9]{1,6})?(s|ms)?|[0-9]{1,5}(\.[0-9]{1,6})?[mh])$"

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=2**26)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Schema = dict[str, Any]
MAX_BIASES = 1024
MAX_NOTES = 16


def _few(data: Any, most: int) -> Any:
    """Of an object, before its members are looked at: each wrong one would become an error of some 500 bytes."""
    if isinstance(data, dict) and len(data) > most:
        raise ValueError(f"at most {most} members are allowed, not {len(data)}")
    return data


Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(lambda data: _few(data, MAX_BIASES)),
]
Notes = Annotated[dict[str, Text], Field(max_length=MAX_NOTES), BeforeValidator(lambda data: _few(data, MAX_NOTES))]


def seconds(value: Any) -> Any:
    """`"5m"`, `"1.5h"`, `"300"` as seconds; what is no text as it is."""
    if isinstance(value, str) and re.fullmatch(_DURATION, value):
        number = value.rstrip("mhs")
        return float(number) * _UNITS[value[len(number) :]]
    if isinstance(value, str):
        raise ValueError('expected seconds, or text such as "5m" or "1.5h"')
    return value


KeepAlive = Annotated[
    float,
    Field(ge=-MAX_KEEP_ALIVE_S, le=MAX_KEEP_ALIVE_S),
    BeforeValidator(
        seconds,
        json_schema_input_type=Annotated[float, Field(ge=-MAX_KEEP_ALIVE_S, le=MAX_KEEP_ALIVE_S)]
        | Annotated[str, Field(pattern=_DURATION)],
    ),
]
DataUrl = Annotated[str, Field(pattern="^[dD][aA][tT][aA]:", max_length=2**26)]
Token = Annotated[int, Field(ge=0, le=MAX_INT)]


class Asked(BaseModel):
    """What all requests share.

    Attributes:
        unsupported: fields that are refused, with the values that mean as much as their absence.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, defer_build=True)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}


class ImageUrl(Asked):
    url: DataUrl


class InputAudio(Asked):
    data: Text
    format: Literal["wav"]


class Part(Asked):
    """Text, or for models that take them an image or a sound. `detail` of an image changes nothing."""

    type: Literal["text", "input_text", "output_text", "refusal", "image_url", "input_image", "input_audio"]
    text: Text | None = None
    refusal: Text | None = None
    image_url: ImageUrl | DataUrl | None = None
    input_audio: InputAudio | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind in ("file", "input_file", "video_url"):
            raise ValueError(f"parts of type {kind} are not supported, only text, images and sound")
        if kind in ("text", "input_text", "output_text") and not isinstance(data.get("text"), str):
            raise ValueError(f"a part of type {kind} needs its text")
        if kind in ("image_url", "input_image"):
            given = data.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str):
                raise ValueError(f"a part of type {kind} needs its image_url: a data: URL")
            if not url[:5].lower() == "data:":
                raise ValueError("image_url: only data: URLs are taken, no other URL is ever fetched")
        if kind == "input_audio" and not isinstance(data.get("input_audio"), dict):
            raise ValueError("a part of type input_audio needs its input_audio: data and format")
        return data


# The first wrong one ends it: an error for each of a million would take gigabytes.
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class CalledFunction(Asked):
    name: Name
    arguments: Text


class ToolCall(Asked):
    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Parts | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None


class Function(Asked):
    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Asked):
    type: Literal["function"]
    function: Function


class NamedFunction(Asked):
    name: Name


class NamedTool(Asked):
    type: Literal["function"]
    function: NamedFunction


class JsonFormat(Asked):
    name: Name
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonFormat | None = None


class StructuredOutputs(Asked):
    """Exactly one of them: as vLLM has it; `grammar` is in llguidance's dialect of Lark."""

    json_schema: Schema | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1, max_length=65536)
    choice: list[Stop] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = Field(None, min_length=1, max_length=2**20)


class StreamOptions(Asked):
    include_usage: bool | None = None


class Sampled(Asked):
    """What all requests that generate text share. Without a temperature the most likely token is taken."""

    model: Name
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = None
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    user: str | None = Field(None, max_length=4096)
    safety_identifier: str | None = Field(None, max_length=4096)
    priority: Literal["interactive", "background"] | None = None
    keep_alive: KeepAlive | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (), "function_call": (), "functions": ([],), "modalities": (["text"],),
        "moderation": (), "prediction": (), "store": (False,), "verbosity": ("medium",), "web_search_options": (),
    }  # fmt: skip

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Stops | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    reasoning_budget: int | None = Field(None, ge=0, le=MAX_INT)
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1,), "echo": (False,), "suffix": ("",),
    }  # fmt: skip

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64, fail_fast=True)]
        | Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Stops | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: int | None = Field(None, ge=0, le=20)
    structured_outputs: StructuredOutputs | None = None
    stream_options: StreamOptions | None = None


class EmbeddingsRequest(Asked):
    """`POST /v1/embeddings`."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=65536)
    user: str | None = Field(None, max_length=4096)
    keep_alive: KeepAlive | None = None


class InputItem(Asked):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts


class TextFormat(Asked):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Asked):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Asked):
    effort: Effort | None = None


class ResponsesRequest(Sampled):
    """`POST /v1/responses`, for text, images and sound."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,), "background_options": (), "context_management": ([],), "conversation": (), "image": (),
        "include": ([],), "max_tool_calls": (), "moderation": (), "previous_response_id": (), "prompt": (),
        "store": (False,), "tool_choice": ("auto", "none"), "tools": ([],), "top_logprobs": (0,),
        "truncation": ("disabled",),
    }  # fmt: skip

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    reasoning_budget: int | None = Field(None, ge=0, le=MAX_INT)
    metadata: Notes | None = None


class LoadRequest(Asked):
    """`POST /v1/models/load`."""

    model: Name
    pin: bool | None = None
    keep_alive: KeepAlive | None = None


class UnloadRequest(Asked):
    """`POST /v1/models/unload`."""

    model: Name
