"""Clients of `edgert serve`, for programs on the same machine: `edgert.Client`, and `edgert.AsyncClient` under asyncio.

    with edgert.Client() as client:
        print(client.chat("bookworm", "Good evening").text)

They find the service as it finds itself: the user's socket, or what `EDGERT_SERVE_…` and serve.toml say. Where systemd
holds the socket (`edgert service install`), connecting starts it. Errors are those that the engine itself raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.service.wire import (
    Answer,
    Part,
    Target,
    answer,
    chat_body,
    control_body,
    embed_body,
    event,
    find,
    http,
    part,
    prompt_body,
    raise_error,
    translated,
    vectors,
)

if TYPE_CHECKING:
    import httpx

Messages = str | Sequence[Mapping[str, Any]]


class Client:
    """A connection to the service; may be used by several threads.

    Args:
        url: `http://127.0.0.1:11535` or `unix:/run/…`; None to find it.
        socket: a Unix socket, instead of `url`.
        key: for TCP; None for the user's token file, which is only sent to this machine.
        timeout_s: for an answer to begin, or to go on; None to wait as long as it takes.

    Raises:
        UnreachableError: from any method, when no service answers or it does not let this client in.
        MissingDependencyError: httpx is not installed.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        socket: str | Path | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.target: Target = find(url, socket, key)
        library = http()
        transport = library.HTTPTransport(uds=str(self.target.socket) if self.target.socket else None)
        self._http: httpx.Client = library.Client(transport=transport, **self.target.options(timeout_s))

    def generate(self, model: str, prompt: str | Sequence[int], **options: Any) -> Answer:
        """The continuation of a prompt. Options are fields of `POST /v1/completions`, e.g. `max_tokens`, `seed`."""
        return answer(self._post("/v1/completions", prompt_body(model, prompt, options)))

    def stream(self, model: str, prompt: str | Sequence[int], **options: Any) -> Iterator[Part]:
        """As `generate`, piece by piece. Closing the iterator ends the generation."""
        return self._stream("/v1/completions", prompt_body(model, prompt, options, stream=True))

    def chat(self, model: str, messages: Messages, **options: Any) -> Answer:
        """The answer to a conversation, or to one message. Options are fields of `POST /v1/chat/completions`."""
        return answer(self._post("/v1/chat/completions", chat_body(model, messages, options)))

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> Iterator[Part]:
        """As `chat`, piece by piece. Closing the iterator ends the generation."""
        return self._stream("/v1/chat/completions", chat_body(model, messages, options, stream=True))

    def embed(self, model: str, texts: Sequence[str]) -> list[list[float]]:
        """A vector of length 1 for each text."""
        return vectors(self._post("/v1/embeddings", embed_body(model, texts)))

    def models(self) -> list[str]:
        """Names of what can be asked for."""
        return [each["name"] for each in self.status()["models"]]

    def ps(self) -> list[dict[str, Any]]:
        """The loaded models, each as `contract.ModelStatus`."""
        return [each for each in self.status()["models"] if each["state"] != "unloaded"]

    def status(self) -> dict[str, Any]:
        """The whole service, as `contract.Status`."""
        return self._get("/v1/status")

    def health(self) -> dict[str, Any]:
        """`status`, which is `ok` where the service is usable, and `detail`."""
        return self._get("/health", also=503)

    def load(self, model: str, *, pin: bool | None = None, keep_alive: float | str | None = None) -> dict[str, Any]:
        """Load a model and wait until it is ready; `keep_alive` is in seconds, or text such as `5m`."""
        return self._post("/v1/models/load", control_body(model, pin=pin, keep_alive=keep_alive))

    def unload(self, model: str) -> dict[str, Any]:
        """Unload a model once its requests have ended."""
        return self._post("/v1/models/unload", control_body(model))

    def events(self) -> Iterator[dict[str, Any]]:
        """What happens in the service from now on, each as `contract.ServiceEvent`."""
        with self._lines("GET", "/v1/events") as lines:
            for line in lines:
                if (data := event(line)) is not None:
                    yield data

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self, path: str, also: int = 200) -> dict[str, Any]:
        with translated(self.target):
            response = self._http.get(path)
        return _checked(response, self.target, also)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with translated(self.target):
            response = self._http.post(path, json=body)
        return _checked(response, self.target)

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Part]:
        with self._lines("POST", path, body) as lines:
            for line in lines:
                data = event(line)
                if data is not None and (found := part(data)) is not None:
                    yield found

    @contextmanager
    def _lines(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[Iterator[str]]:
        with translated(self.target), self._http.stream(method, path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise_error(response.status_code, response.content, response.headers, self.target)
            yield response.iter_lines()


class AsyncClient:
    """`Client` under asyncio: the same methods, to be awaited or iterated with `async for`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        socket: str | Path | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.target: Target = find(url, socket, key)
        library = http()
        transport = library.AsyncHTTPTransport(uds=str(self.target.socket) if self.target.socket else None)
        self._http: httpx.AsyncClient = library.AsyncClient(transport=transport, **self.target.options(timeout_s))

    async def generate(self, model: str, prompt: str | Sequence[int], **options: Any) -> Answer:
        return answer(await self._post("/v1/completions", prompt_body(model, prompt, options)))

    def stream(self, model: str, prompt: str | Sequence[int], **options: Any) -> AsyncIterator[Part]:
        return self._stream("/v1/completions", prompt_body(model, prompt, options, stream=True))

    async def chat(self, model: str, messages: Messages, **options: Any) -> Answer:
        return answer(await self._post("/v1/chat/completions", chat_body(model, messages, options)))

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> AsyncIterator[Part]:
        return self._stream("/v1/chat/completions", chat_body(model, messages, options, stream=True))

    async def embed(self, model: str, texts: Sequence[str]) -> list[list[float]]:
        return vectors(await self._post("/v1/embeddings", embed_body(model, texts)))

    async def models(self) -> list[str]:
        return [each["name"] for each in (await self.status())["models"]]

    async def ps(self) -> list[dict[str, Any]]:
        return [each for each in (await self.status())["models"] if each["state"] != "unloaded"]

    async def status(self) -> dict[str, Any]:
        return await self._get("/v1/status")

    async def health(self) -> dict[str, Any]:
        return await self._get("/health", also=503)

    async def load(
        self, model: str, *, pin: bool | None = None, keep_alive: float | str | None = None
    ) -> dict[str, Any]:
        return await self._post("/v1/models/load", control_body(model, pin=pin, keep_alive=keep_alive))

    async def unload(self, model: str) -> dict[str, Any]:
        return await self._post("/v1/models/unload", control_body(model))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        async with self._lines("GET", "/v1/events") as lines:
            async for line in lines:
                if (data := event(line)) is not None:
                    yield data

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _get(self, path: str, also: int = 200) -> dict[str, Any]:
        with translated(self.target):
            response = await self._http.get(path)
        return _checked(response, self.target, also)

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with translated(self.target):
            response = await self._http.post(path, json=body)
        return _checked(response, self.target)

    async def _stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Part]:
        async with self._lines("POST", path, body) as lines:
            async for line in lines:
                data = event(line)
                if data is not None and (found := part(data)) is not None:
                    yield found

    @asynccontextmanager
    async def _lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[AsyncIterator[str]]:
        with translated(self.target):
            async with self._http.stream(method, path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise_error(response.status_code, response.content, response.headers, self.target)
                yield response.aiter_lines()


def _checked(response: httpx.Response, target: Target, also: int = 200) -> dict[str, Any]:
    if response.status_code not in (200, also):
        raise_error(response.status_code, response.content, response.headers, target)
    data = response.json()
    return data if isinstance(data, dict) else {"data": data}
