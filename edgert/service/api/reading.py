"""A request's body, read within limits and checked."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from edgert.errors import BusyError
from edgert.service.api.errors import RefusedError
from edgert.service.api.state import state_of

if TYPE_CHECKING:
    from edgert.service.api.schemas import Asked

Form = TypeVar("Form", bound="Asked")

MAX_DEPTH = 96  # JSON schemas of OpenAI have 10 at most; parsers in the worker give up at 128
MAX_OBJECTS = 2**17  # each takes some 100 bytes of memory, and may be written with three
BODY_SECONDS = 60.0  # from the first byte to the last
LARGE_AT_ONCE = 4  # bodies as long as they may be; they stay in memory until they are answered
LARGE_BYTES = 2**18  # shorter ones always find room: as many run and wait as `queue` and `max_sequences` let
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = {"str", "int", "float", "bool", "dict", "list"}


async def read(request: Request, form: type[Form], limit: int) -> Form:
    """The body as a `form`.

    Raises:
        RefusedError: it is too long, too slow, no JSON, or not what the form asks for.
        BusyError: it is large, and so are many others.
    """
    body = await _body(request, limit)
    return check(parse(body), form)


async def _body(request: Request, limit: int) -> bytes:
    too_long = RefusedError(f"the body is longer than {limit} bytes", status=413, code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_long
    state = state_of(request)
    record = state.record(request)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_long
                record.body_bytes += len(part)
                state.body_bytes += len(part)
                if size > LARGE_BYTES and state.body_bytes > LARGE_AT_ONCE * limit:
                    raise BusyError("too many large requests at once; try again in 1 s", retry_after_s=1.0)
                parts.append(part)
    except TimeoutError:
        message = f"the body did not come within {BODY_SECONDS:g} seconds"
        raise RefusedError(message, status=408, code="body_too_slow") from None
    except ClientDisconnect:
        raise RefusedError("the client went away", status=400, code="client_gone") from None
    return b"".join(parts)


def parse(body: bytes) -> Any:
    """JSON as RFC 8259 has it and no further: no NaN, no number beyond a float, no name twice, no half a character,
    nothing deeper than `MAX_DEPTH`, no more than `MAX_OBJECTS`.

    Raises:
        RefusedError: the body is something else.
    """
    objects = 0

    def count(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS} objects")
        return _object(pairs)

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_constant, parse_float=_float, object_pairs_hook=count)
        if _SURROGATE.search(body):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _too_deep() from None
    except UnicodeEncodeError:
        raise RefusedError("the body holds half of a surrogate pair", code="invalid_json") from None
    except ValueError as error:
        raise RefusedError(f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper(data, MAX_DEPTH):
        raise _too_deep()
    return data


def _deeper(data: Any, depth: int) -> bool:
    """Whether lists and objects are nested in more levels than that."""
    level = [data] if isinstance(data, (dict, list)) else []
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)


def _too_deep() -> RefusedError:
    return RefusedError(f"the body is nested too deeply, at most {MAX_DEPTH} levels are taken", code="invalid_json")


def check(data: Any, form: type[Form]) -> Form:
    """Data as a form.

    Raises:
        RefusedError: names the field that is wrong or not supported.
    """
    from pydantic import ValidationError

    if not isinstance(data, dict):
        raise RefusedError("the body is no JSON object")
    for name, neutral in form.unsupported.items():
        if data.get(name) is not None and data[name] not in neutral:
            allowed = f" beyond {json.dumps(neutral[0])}" if neutral else ""
            message = f"{name} is not supported{allowed} by this server"
            raise RefusedError(message, param=name, code="unsupported_parameter")
    try:
        return form.model_validate(data)
    except ValidationError as error:
        # Of a union's errors the deepest one about something else than the type tells of the branch that was meant.
        errors = error.errors(include_url=False, include_context=False)
        worst = max(errors, key=lambda each: (len(_fields(each["loc"])), not each["type"].endswith("_type")))
        path = ".".join(_fields(worst["loc"]))
        code = "missing_required_parameter" if worst["type"] == "missing" else "invalid_value"
        message = worst["msg"].removeprefix("Value error, ")
        raise RefusedError(f"{path or 'the body'}: {message}", param=path or None, code=code) from None


def _fields(path: tuple[int | str, ...]) -> list[str]:
    """The path without pydantic's names for branches of a union."""
    return [
        str(part)
        for part in path
        if isinstance(part, int) or (re.fullmatch("[a-z_]+", part) is not None and part not in _TYPES)
    ]


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    """A number with a point or an exponent; 4.0 is an integer, as JSON Schema says and some clients write it."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a member twice")
    return found
