"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` and a status of HTTP.

`kind` is ours: the class in `edgert.errors`, so that `edgert.Client` raises the same one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from edgert.errors import (
    BundleError,
    BusyError,
    ChatTemplateError,
    ContextOverflowError,
    DeviceError,
    EdgertError,
    UnknownModelError,
    UsageError,
    WorkerError,
)

MAX_MESSAGE_CHARS = 1000

# The first class that fits decides: status, type, code.
_TABLE: tuple[tuple[type[EdgertError], int, str, str], ...] = (
    (ContextOverflowError, 400, "invalid_request_error", "context_length_exceeded"),
    (UsageError, 400, "invalid_request_error", "invalid_value"),
    (ChatTemplateError, 400, "invalid_request_error", "chat_template_failed"),
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (BusyError, 429, "rate_limit_error", "busy"),
    (WorkerError, 503, "server_error", "worker_failed"),
    (DeviceError, 503, "server_error", "device_failed"),
    (BundleError, 503, "server_error", "bundle_error"),
)


class RefusedError(UsageError):
    """A request that is turned away before the engine sees it.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, e.g. `messages.0.content`; None for none.
        code: one word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str = "invalid_value",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def body(message: str, type_: str, code: str | None, *, param: str | None = None, kind: str | None = None) -> Any:
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 1] + "…"
    return {"error": {"message": message, "type": type_, "param": param, "code": code, "kind": kind}}


def explain(error: EdgertError) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers for an error."""
    if isinstance(error, RefusedError):
        type_ = "authentication_error" if error.status == 401 else "invalid_request_error"
        content = body(str(error), type_, error.code, param=error.param, kind="UsageError")
        return error.status, content, error.headers
    kind = type(error).__name__
    fallback = (EdgertError, 500, "server_error", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower())
    _, status, type_, code = next((row for row in _TABLE if isinstance(error, row[0])), fallback)
    headers = {}
    if isinstance(error, BusyError):
        # Whole seconds is all that the header can say; a zero would mean a client that asks again at once.
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    param = "model" if isinstance(error, UnknownModelError) else None
    content = body(str(error), type_, code, param=param, kind=kind)
    if isinstance(error, ContextOverflowError):
        content["error"] |= {"tokens": error.tokens, "limit": error.limit}
    return status, content, headers


def answer(error: EdgertError) -> JSONResponse:
    status, content, headers = explain(error)
    return JSONResponse(content, status, headers)


async def on_edgert_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EdgertError)
    return answer(error)


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """What Starlette's router refuses: no such path, or another method."""
    status = int(getattr(error, "status_code", 500))
    message = {404: "no such path", 405: "this path takes another method"}.get(status, str(error))
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return JSONResponse(body(message, "invalid_request_error", code), status, getattr(error, "headers", None))


async def on_other_error(_: Request, error: Exception) -> JSONResponse:
    """A fault of ours. The client gets no more than its kind: a message may hold paths or a prompt."""
    return JSONResponse(body(f"internal error: {type(error).__name__}", "server_error", "internal_error"), 500)
