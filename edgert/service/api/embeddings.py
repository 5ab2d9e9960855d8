"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import sys
from array import array

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from edgert.service.api.asking import client_of
from edgert.service.api.errors import RefusedError
from edgert.service.api.reading import read
from edgert.service.api.schemas import EmbeddingsRequest
from edgert.service.api.state import State, state_of
from edgert.service.api.streams import Later
from edgert.service.contract import Usage


async def create(http: HttpRequest) -> Response:
    state = state_of(http)
    form = await read(http, EmbeddingsRequest, state.settings.body_bytes)
    return Later(_embed(state, form, http))


async def _embed(state: State, form: EmbeddingsRequest, http: HttpRequest) -> Response:
    texts = [form.input] if isinstance(form.input, str) else form.input
    found = await state.service.embed(
        form.model, texts, client=client_of(http, form.user), keep_alive_s=form.keep_alive
    )  # fmt: skip
    hidden = len(found.vectors[0])
    if form.dimensions not in (None, hidden):
        # Only models that were trained for it may be cut off, and no bundle says so.
        message = f"dimensions is {form.dimensions}, but {form.model} gives {hidden} and cannot be shortened"
        raise RefusedError(message, param="dimensions", code="unsupported_parameter")
    usage = Usage(prompt_tokens=found.prompt_tokens)
    record = state.record(http)
    record.model, record.usage[0] = form.model, usage
    state.metrics.generation(form.model, usage, None, None)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, form.encoding_format)}
        for index, vector in enumerate(found.vectors)
    ]
    told = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": form.model, "usage": told})


def _encoded(vector: tuple[float, ...], form: str | None) -> list[float] | str:
    """A list, or base64 of little-endian f32: OpenAI's client asks for that where its caller does not say."""
    if form != "base64":
        return list(vector)
    packed = array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()
