"""What the two clients share: where the service is, what is sent, what comes back, and errors as the engine's own."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from edgert import errors
from edgert.errors import (
    BusyError,
    ContextOverflowError,
    EdgertError,
    MissingDependencyError,
    ServiceError,
    UnreachableError,
    UsageError,
)
from edgert.service.daemon import keys
from edgert.service.settings import is_loopback, read

CONNECT_S = 10.0  # systemd holds a connection while it starts the service


@dataclass(frozen=True)
class Target:
    """Where the service is.

    Attributes:
        socket: a Unix socket; None for TCP.
        url: of TCP; a placeholder for a socket.
        key: what TCP clients send; None for none.
    """

    socket: Path | None
    url: str
    key: str | None = field(default=None, repr=False)

    def options(self, timeout_s: float | None) -> dict[str, Any]:
        """Of an httpx client. Proxies are for other machines."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = http().Timeout(timeout_s, connect=CONNECT_S)
        return {"base_url": self.url, "headers": headers, "timeout": timeout, "trust_env": False}

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket else self.url


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: without the model's thoughts, which `reasoning` has.
        finish_reason: `stop`, `length`, or `tool_calls`.
        tool_calls: as OpenAI writes them: `{"id", "type", "function": {"name", "arguments"}}`.
        usage: tokens, and under `edgert` times and joules with where they come from.
    """

    text: str
    reasoning: str
    finish_reason: str | None
    tool_calls: tuple[Mapping[str, Any], ...]
    usage: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What one step adds to an answer.

    Attributes:
        text: may be empty; `reasoning` says whether it is the model's thoughts.
        tool_calls: pieces of calls, as OpenAI's `delta.tool_calls`.
        finish_reason, usage: near the end; None before.
    """

    text: str
    reasoning: bool = False
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None


def http() -> ModuleType:
    """httpx, which only clients need."""
    try:
        return importlib.import_module("httpx")
    except ImportError as error:
        raise MissingDependencyError("httpx is not installed; pip install 'edgert[serve]'") from error


def find(url: str | None, socket: str | Path | None, key: str | None) -> Target:
    """The service that is meant.

    Raises:
        UsageError: both are given, or the URL is none.
        ServiceError: the user's token cannot be read.
    """
    if url is not None and socket is not None:
        raise UsageError(f"url {url!r} and socket {str(socket)!r} are given, expected one of them at most")
    if url is not None and url.startswith("unix:"):
        socket = url.removeprefix("unix:").removeprefix("//")
    if socket is None and url is None:
        settings, _ = read({}, os.environ)
        socket = settings.socket
        url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
        if settings.key_file is not None and socket is None:
            key = key or keys.read_key(settings.key_file)
    if socket is not None:
        return Target(Path(socket).expanduser().absolute(), "http://localhost")
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"url {url!r}, expected http://HOST:PORT or unix:PATH")
    token = keys.token_file(os.environ)
    if key is None and is_loopback(parts.hostname) and token.exists():
        key = keys.read_key(token)
    return Target(None, f"{parts.scheme}://{parts.netloc}", key)


def prompt_body(
    model: str, prompt: str | Sequence[int], options: Mapping[str, Any], stream: bool = False
) -> dict[str, Any]:
    text = prompt if isinstance(prompt, str) else list(prompt)
    return {"model": model, "prompt": text, **_one(options), **_streamed(stream)}


def chat_body(
    model: str, messages: str | Sequence[Mapping[str, Any]], options: Mapping[str, Any], stream: bool = False
) -> dict[str, Any]:
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": said, **_one(options), **_streamed(stream)}


def embed_body(model: str, texts: Sequence[str]) -> dict[str, Any]:
    return {"model": model, "input": list(texts)}


def control_body(model: str, **options: Any) -> dict[str, Any]:
    return {"model": model, **{name: value for name, value in options.items() if value is not None}}


def _one(options: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("n", "stream", "stream_options"):
        if name in options:
            raise UsageError(f"{name}: the client asks for one answer at a time, and streams with `stream` methods")
    return options


def _streamed(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


def answer(data: Mapping[str, Any]) -> Answer:
    """Of a completion or a chat completion."""
    first = data["choices"][0]
    message = first.get("message", {})
    return Answer(
        first.get("text") or message.get("content") or "",
        message.get("reasoning_content") or "",
        first.get("finish_reason"),
        tuple(message.get("tool_calls") or ()),
        data.get("usage") or {},
    )


def part(data: Mapping[str, Any]) -> Part | None:
    """Of a chunk; None where there is nothing in it."""
    usage = data.get("usage")
    first = data["choices"][0] if data.get("choices") else {}
    delta = first.get("delta", {})
    thoughts = delta.get("reasoning_content")
    text = thoughts or first.get("text") or delta.get("content") or ""
    found = Part(text, bool(thoughts), tuple(delta.get("tool_calls") or ()), first.get("finish_reason"), usage)
    return None if found == Part("") else found


def vectors(data: Mapping[str, Any]) -> list[list[float]]:
    return [each["embedding"] for each in data["data"]]


def event(line: str) -> dict[str, Any] | None:
    """The object of a line of server-sent events; None for a line without one.

    Raises:
        EdgertError: it tells of one.
    """
    if not line.startswith("data:"):
        return None
    text = line.removeprefix("data:").strip()
    if text == "[DONE]":
        return None
    data: dict[str, Any] = json.loads(text)
    if "error" in data:
        raise _error(data["error"], {})
    return data


def raise_error(status: int, content: bytes, headers: Mapping[str, str], target: Target) -> NoReturn:
    """The error that an answer tells of."""
    try:
        told = json.loads(content)["error"]
        message = str(told["message"])
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"{target}: HTTP {status}: {content[:200]!r}") from None
    if status in (401, 403):
        raise UnreachableError(f"{target}: {message}")
    raise _error(told, headers)


def _error(told: Mapping[str, Any], headers: Mapping[str, str]) -> EdgertError:
    message, kind = str(told.get("message", "")), told.get("kind")
    if kind == "BusyError":
        return BusyError(message, retry_after_s=float(headers.get("retry-after", "1")))
    if kind == "ContextOverflowError":
        return ContextOverflowError(message, tokens=int(told.get("tokens", 0)), limit=int(told.get("limit", 0)))
    found = getattr(errors, str(kind), None)
    if isinstance(found, type) and issubclass(found, EdgertError):
        with suppress(TypeError):  # one that needs more than a message
            return found(message)
    return UsageError(message) if told.get("type") == "invalid_request_error" else ServiceError(message)


@contextmanager
def translated(target: Target) -> Iterator[None]:
    """What goes wrong on the way, as `UnreachableError`."""
    httpx = http()
    try:
        yield
    except httpx.ConnectError as error:
        raise UnreachableError(
            f"no service answers at {target}; start one with `edgert serve BUNDLE`, or have it started when it is "
            "needed with `edgert service install --now BUNDLE`"
        ) from error
    except httpx.TimeoutException as error:
        raise UnreachableError(f"{target}: no answer in time ({type(error).__name__})") from error
    except httpx.TransportError as error:
        raise UnreachableError(
            f"{target}: the connection broke: {error}; its log says more (`edgert service logs`, where systemd runs it)"
        ) from error
