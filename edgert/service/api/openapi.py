"""`GET /openapi.json`: the service as OpenAPI 3.1. What may be asked comes from schemas.py itself."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from edgert import __version__
from edgert.service.api import schemas
from edgert.service.contract import ModelStatus, Status

_REF = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}


async def create(_: HttpRequest) -> Response:
    return Response(_document(), headers={"content-type": "application/json"})


@cache
def _document() -> bytes:
    return json.dumps(document(), separators=(",", ":")).encode()


def document() -> dict[str, Any]:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgert serve",
            "version": __version__,
            "description": "Language models on this machine. The paths are OpenAI's; fields that nobody knows are "
            "ignored, known ones that edgert does not support are refused by name, and without a temperature the most "
            "likely token is taken.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"key": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Over TCP: what the token file holds. The Unix socket needs none.",
                }
            },
            "schemas": {**_requests(), **_answers()},
        },
    }


def _requests() -> dict[str, Any]:
    forms: list[type[schemas.Asked]] = [
        schemas.ChatRequest, schemas.CompletionRequest, schemas.EmbeddingsRequest, schemas.ResponsesRequest,
        schemas.LoadRequest, schemas.UnloadRequest,
    ]  # fmt: skip
    _, found = models_json_schema([(form, "validation") for form in forms], ref_template=_REF)
    definitions: dict[str, Any] = found["$defs"]
    for form in forms:
        if form.unsupported:
            # Said so that programs can tell before they ask: only the value that changes nothing is valid.
            definitions[form.__name__]["properties"] |= {
                name: {"enum": [None, *(list(each) if isinstance(each, tuple) else each for each in neutral)]}
                for name, neutral in form.unsupported.items()
            }
    return definitions


def _answers() -> dict[str, Any]:
    usage = _object(
        prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
        completion_tokens_details=_object(reasoning_tokens=_COUNT), edgert=_ref("Cost"),
    )  # fmt: skip
    choice = _object(index=_COUNT, finish_reason={"enum": ["stop", "length", "tool_calls"]})
    completion = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "usage": _ref("Usage")}
    model = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, edgert={"type": "object"})
    found: dict[str, Any] = {
        "Cost": _object(
            queue_ms=_NUMBER, prefill_ms=_NUMBER, decode_ms=_NUMBER, provenance={"enum": ["measured", "emulated"]},
            joules={"type": ["number", "null"]}, joules_provenance=_TEXT,
        ),
        "Usage": usage,
        "ChatCompletion": _object(
            object={"const": "chat.completion"}, choices=_array(_with(choice, message={"type": "object"})), **completion
        ),
        "Completion": _object(
            object={"const": "text_completion"}, choices=_array(_with(choice, text=_TEXT)), **completion
        ),
        "Embeddings": _object(
            object={"const": "list"}, model=_TEXT, usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
            data=_array(_object(object={"const": "embedding"}, index=_COUNT, embedding={"type": ["array", "string"]})),
        ),
        "Response": _object(
            id=_TEXT, object={"const": "response"}, status={"enum": ["completed", "incomplete"]}, model=_TEXT,
            output=_array({"type": "object"}),
        ),
        "Model": model,
        "Models": _object(object={"const": "list"}, data=_array(_ref("Model"))),
        "Health": _object(status={"enum": ["ok", "loading", "unavailable"]}, detail=_TEXT),
        "Error": _object(
            error=_object(
                message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]},
                kind={"type": ["string", "null"]},
            )
        ),
    }  # fmt: skip
    for cls in (ModelStatus, Status):
        schema = TypeAdapter(cls).json_schema(mode="serialization", ref_template=_REF)
        found |= schema.pop("$defs", {})
        found[cls.__name__] = schema
    return found


def _paths() -> dict[str, Any]:
    busy = {"429": _error("A queue is full; Retry-After says when to come again.", retry=True)}
    engine = {"404": _error("No such model."), "503": _error("No worker or device can do it."), **busy}
    names = {"type": "string", "minLength": 1, "not": {"enum": ["load", "unload"]}}
    name = {"name": "name", "in": "path", "required": True, "schema": names}
    return {
        "/v1/chat/completions": _post("Go on with a conversation", "ChatRequest", "ChatCompletion", engine, sse=True),
        "/v1/completions": _post("Go on with a text", "CompletionRequest", "Completion", engine, sse=True),
        "/v1/responses": _post("Answer, as the Responses API", "ResponsesRequest", "Response", engine, sse=True),
        "/v1/embeddings": _post("Texts as vectors", "EmbeddingsRequest", "Embeddings", engine),
        "/v1/models/load": _post("Load a model, pin or unpin it", "LoadRequest", "ModelStatus", engine),
        "/v1/models/unload": _post("Unload a model", "UnloadRequest", "ModelStatus", engine),
        "/v1/models": _get("The models there are", {"200": _json("Models", "The models.")}),
        "/v1/models/{name}": {
            **_get(
                "One model",
                {"200": _json("Model", "It."), "404": _error("No such model."), "405": _error("Not by GET.")},
            ),
            "parameters": [name],
        },
        "/v1/status": _get("All that the service knows of itself", {"200": _json("Status", "It.")}),
        "/v1/events": _get(
            "What happens, as it happens", {"200": _events("Events; Last-Event-ID gets what was missed.")}
        ),
        "/health": _get(
            "Whether the engine answers",
            {"200": _json("Health", "It does."), "503": _json("Health", "It does not, or is loading.")},
            open_=True,
        ),
        "/metrics": _get("For Prometheus", {"200": {"description": "Numbers.", "content": {"text/plain": {}}}}),
    }


def _post(summary: str, form: str, answer: str, more: dict[str, Any], *, sse: bool = False) -> dict[str, Any]:
    good = _json(answer, "The answer" + ("; as events where `stream` is true." if sse else "."))
    if sse:
        good["content"]["text/event-stream"] = {}
    refusals = {
        "400": _error("Something is wrong with the request; `param` names it."),
        "401": _error("The key is missing or wrong."),
        "403": _error("This web page or host name is not let in."),
        "408": _error("The body came too slowly."),
        "413": _error("The body is too long."),
        "415": _error("The body is no application/json."),
    }
    body = {"required": True, "content": {"application/json": {"schema": _ref(form)}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": {"200": good, **refusals, **more}}}


def _get(summary: str, responses: dict[str, Any], *, open_: bool = False) -> dict[str, Any]:
    refused = {"403": _error("This web page or host name is not let in.")}
    if open_:
        return {"get": {"summary": summary, "security": [], "responses": {**responses, **refused}}}
    return {"get": {"summary": summary, "responses": {**responses, **refused, "401": _error("The key is missing.")}}}


def _json(name: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(name)}}}


def _error(description: str, *, retry: bool = False) -> dict[str, Any]:
    answer = _json("Error", description)
    if retry:
        answer["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}}
    return answer


def _events(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"text/event-stream": {}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=name)}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _with(schema: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return _object(**schema["properties"], **properties)
