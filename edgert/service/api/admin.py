"""What is not inference: models, loading and unloading, the state of the service, events, health, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from edgert.errors import EdgertError, UnknownModelError
from edgert.service.api.errors import RefusedError, explain
from edgert.service.api.state import State, state_of
from edgert.service.api.streams import Later, Stream
from edgert.service.contract import ModelStatus, ServiceEvent

HEARTBEAT_S = 15.0
_VERBS = ("load", "unload")


async def models(http: HttpRequest) -> Response:
    state = state_of(http)
    return JSONResponse({"object": "list", "data": [_model_json(state, each) for each in state.service.models()]})


async def model(http: HttpRequest) -> Response:
    state = state_of(http)
    name = http.path_params["name"]
    for each in state.service.models():
        if each.name == name:
            return JSONResponse(_model_json(state, each))
    if name in _VERBS:
        message = f"/v1/models/{name} takes POST"
        raise RefusedError(message, status=405, code="method_not_allowed", headers={"allow": "POST"})
    raise UnknownModelError(f"no model is named {name[:256]!r}")


def _model_json(state: State, model: ModelStatus) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": state.started_s, "owned_by": "edgert",
        "edgert": {"task": model.task, "state": model.state, "context_length": model.context_length},
    }  # fmt: skip


async def load(http: HttpRequest) -> Response:
    from edgert.service.api.reading import read
    from edgert.service.api.schemas import LoadRequest

    state = state_of(http)
    form = await read(http, LoadRequest, state.settings.body_bytes)

    async def work() -> Response:
        loaded = await state.service.load(form.model, pin=form.pin, keep_alive_s=form.keep_alive)
        return JSONResponse(loaded.to_json())

    return Later(work())


async def unload(http: HttpRequest) -> Response:
    from edgert.service.api.reading import read
    from edgert.service.api.schemas import UnloadRequest

    state = state_of(http)
    form = await read(http, UnloadRequest, state.settings.body_bytes)

    async def work() -> Response:
        return JSONResponse((await state.service.unload(form.model)).to_json())

    return Later(work())


async def status(http: HttpRequest) -> Response:
    return JSONResponse(state_of(http).service.status().to_json())


async def metrics(http: HttpRequest) -> Response:
    state = state_of(http)
    text = state.metrics.text()
    from edgert.service.api.metrics import CONTENT_TYPE

    return Response(text, headers={"content-type": CONTENT_TYPE})


async def health(http: HttpRequest) -> Response:
    """200 only when the engine has just answered; the body says why not."""
    service = state_of(http).service
    found = await service.health()
    if found.ready:
        return JSONResponse({"status": "ok", "detail": found.detail})
    loading = any(each.state in ("loading", "recovering") for each in service.models())
    return JSONResponse({"status": "loading" if loading else "unavailable", "detail": found.detail}, 503)


async def events(http: HttpRequest) -> Response:
    """Events as they come. A reader that lost the connection says `Last-Event-ID` and gets what it missed."""
    last = http.headers.get("last-event-id", "")
    return Stream(_events(state_of(http), int(last) if last.isdecimal() and len(last) < 19 else None), _failure)


async def _events(state: State, last: int | None) -> AsyncGenerator[bytes, None]:
    source = cast("AsyncGenerator[ServiceEvent, None]", state.service.events())
    async with aclosing(source):
        # Asked for before the past is read, so that nothing falls between the two.
        coming = asyncio.create_task(_next(source))
        try:
            await asyncio.sleep(0)
            seen = last
            missed = [] if last is None else [each for each in state.service.status().events if each.number > last]
            yield b": edgert\n\n" + b"".join(map(_event, missed))
            if missed:
                seen = missed[-1].number
            while True:
                done, _ = await asyncio.wait({coming}, timeout=HEARTBEAT_S)
                if not done:
                    yield b":\n\n"  # or a connection that died would never be noticed
                    continue
                event = coming.result()
                if event is None:
                    return
                coming = asyncio.create_task(_next(source))
                if seen is None or event.number > seen:
                    yield _event(event)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _next(source: AsyncGenerator[ServiceEvent, None]) -> ServiceEvent | None:
    return await anext(source, None)


def _event(event: ServiceEvent) -> bytes:
    return f"id: {event.number}\ndata: {json.dumps(event.to_json())}\n\n".encode()


def _failure(error: EdgertError) -> bytes:
    return b"event: error\ndata: " + json.dumps(explain(error)[1]).encode() + b"\n\n"
