"""The service over HTTP: which path leads where. `create_app` is all that others need.

What only some requests need (pydantic, prometheus_client) is imported when the first of them comes: a service that
nobody has asked yet stays small.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgert.errors import EdgertError
from edgert.service import logs
from edgert.service.api import admin
from edgert.service.api.errors import on_edgert_error, on_http_error, on_other_error
from edgert.service.api.security import Guard
from edgert.service.api.state import RECORD, Record, State
from edgert.service.contract import Service
from edgert.service.settings import Settings

Endpoint = Callable[[Request], Awaitable[Response]]

DASHBOARD = Path(__file__).parents[1] / "dashboard"
CLIENT_GONE = 499  # nginx's number for it; only in metrics and logs, as nobody is there to be answered
_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
}  # fmt: skip
_LATE = ("chat", "completions", "embeddings", "responses", "openapi")


def create_app(service: Service, settings: Settings, *, key: str | None) -> Starlette:
    """The service as an ASGI application.

    Args:
        key: what clients over TCP must send as a bearer token; None for none, and then only this machine is let in.
    """
    state = State(service, settings)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _late("chat"), methods=["POST"]),
            Route("/v1/completions", _late("completions"), methods=["POST"]),
            Route("/v1/embeddings", _late("embeddings"), methods=["POST"]),
            Route("/v1/responses", _late("responses"), methods=["POST"]),
            Route("/v1/models", admin.models),
            Route("/v1/models/load", admin.load, methods=["POST"]),
            Route("/v1/models/unload", admin.unload, methods=["POST"]),
            Route("/v1/models/{name}", admin.model),
            Route("/v1/status", admin.status),
            Route("/v1/events", admin.events),
            Route("/health", admin.health),
            Route("/metrics", admin.metrics),
            Route("/openapi.json", _late("openapi")),
            *_pages(DASHBOARD),
        ],
        middleware=[
            Middleware(Account, state=state),
            Middleware(Guard, host=settings.host, origins=settings.origins, key=key),
        ],
        exception_handlers={
            EdgertError: on_edgert_error,
            HTTPException: on_http_error,
            Exception: on_other_error,
        },
    )
    app.router.redirect_slashes = False  # a redirect would name the host that the client claimed
    app.state.edgert = state
    return app


def warm_up() -> None:
    """Import what the first request needs, where it is known that requests will come."""
    for module in _LATE:
        import_module(f"edgert.service.api.{module}")


def _late(module: str) -> Endpoint:
    """`create` of a module of `api` that is imported when it is asked."""

    async def endpoint(request: Request) -> Response:
        create: Endpoint = import_module(f"edgert.service.api.{module}").create
        return await create(request)

    return endpoint


def _pages(folder: Path) -> list[Route]:
    """The dashboard: the files that are there now and no others, whatever a path may say."""
    files = sorted(each for each in folder.glob("*") if each.suffix in _TYPES) if folder.is_dir() else []
    return [
        Route(path, _page(file))
        for file in files
        for path in (f"/ui/{file.name}", *(["/"] if file.name == "index.html" else []))
    ]


def _page(file: Path) -> Endpoint:
    async def page(request: Request) -> Response:
        headers = {"content-type": _TYPES[file.suffix], "cache-control": "no-cache"}
        return Response(file.read_bytes(), headers=headers)

    return page


class Account:
    """Counts and writes down each request as it ends."""

    def __init__(self, app: ASGIApp, *, state: State) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        code = CLIENT_GONE
        complete = False

        async def watched(message: Message) -> None:
            nonlocal code, complete
            if message["type"] == "http.response.start":
                code = message["status"]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            code, complete = 500, True
            raise
        finally:
            self._close(scope, code if complete else CLIENT_GONE, (time.perf_counter() - began) * 1e3)

    def _close(self, scope: Scope, code: int, ms: float) -> None:
        endpoint = endpoint_of(scope["path"])
        self.state.metrics.request(endpoint, code)
        record: Record = scope.get(RECORD) or Record()
        self.state.body_bytes -= record.body_bytes
        usages = record.usage.values()
        quiet = code < 400 and scope["method"] != "POST"
        logs.event(
            "request",
            level=logging.DEBUG if quiet else logging.INFO,
            endpoint=endpoint,
            model=record.model if record.usage else None,
            code=code,
            prompt_tokens=sum(usage.prompt_tokens for usage in usages) if record.usage else None,
            completion_tokens=sum(usage.completion_tokens for usage in usages) if record.usage else None,
            ms=round(ms, 1),
            prompt=record.prompt,
            answer=None if record.answer is None else "".join(record.answer),
        )


_ENDPOINTS = {
    "/", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/models", "/v1/models/load",
    "/v1/models/unload", "/v1/status", "/v1/events", "/health", "/metrics", "/openapi.json",
}  # fmt: skip


def endpoint_of(path: str) -> str:
    """The path as a label: one of a few, whatever clients ask for."""
    if path in _ENDPOINTS:
        return path
    for prefix in ("/v1/models/", "/ui/"):
        if path.startswith(prefix):
            return f"{prefix}{{name}}"
    return "other"
