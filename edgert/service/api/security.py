"""Who may ask, checked before anything else is: a middleware of plain ASGI.

What web pages can do to a server on the same machine is the list: names that turn into 127.0.0.1 after the page has
loaded (DNS rebinding, CVE-2024-28224), forms and `text/plain` that need no preflight, and `*` in CORS headers. On the
Unix socket the file's mode is the key; over TCP it is a bearer token.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgert.service.api.errors import body

HEADERS = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
                                 b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)  # fmt: skip
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(?:\s*,\s*[A-Za-z0-9-]+)*")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class _Refusal(NamedTuple):
    status: int
    message: str
    code: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Guard:
    """Turns away what may not come in, and gives each answer its headers.

    Args:
        app: what is guarded.
        host: where the service listens, as it was configured.
        origins: web pages, beside the service's own, that may ask.
        key: what TCP clients must send; None for none, and then only loopback addresses are let in.
    """

    def __init__(self, app: ASGIApp, *, host: str, origins: tuple[str, ...], key: str | None) -> None:
        self.app = app
        self.names = {*_LOOPBACK, host.lower().strip("[]")} - {"0.0.0.0", "::", ""}
        self.origins = {origin for each in origins if (origin := _origin(each)) is not None}
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers[name] = headers[name] + b"," + value if name in headers else value
        extra = list(HEADERS)
        if not _is_page(scope["path"]):
            extra.append((b"cache-control", b"no-store"))
        refusal = self._check_host(scope, headers)
        origin = None
        if refusal is None and b"origin" in headers:
            origin = headers[b"origin"].decode("latin-1")
            refusal, foreign = self._check_origin(scope, headers, origin)
            if foreign:
                extra += [
                    (b"access-control-allow-origin", origin.encode("latin-1")),
                    (b"access-control-expose-headers", b"retry-after"),
                    (b"vary", b"origin"),
                ]
                if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                    await _send(send, 204, b"", extra + _preflight(headers))
                    return
        if refusal is None:
            refusal = self._check_key(scope, headers) or _check_content_type(scope, headers)
        if refusal is not None:
            type_ = "authentication_error" if refusal.status == 401 else "invalid_request_error"
            content = json.dumps(body(refusal.message, type_, refusal.code)).encode()
            extra += [(b"content-type", b"application/json"), *refusal.headers]
            await _send(send, refusal.status, content, extra)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check_host(self, scope: Scope, headers: Mapping[bytes, bytes]) -> _Refusal | None:
        """Whether the client meant this service by the name that it used."""
        given = headers.get(b"host")
        local = is_unix_socket(scope)
        if local and given is None:
            return None
        name, port = _split_host((given or b"").decode("latin-1"))
        server = scope.get("server") or ("", None)
        if local:
            good = name in self.names or name == "edgert"
        else:
            # An address, unlike a name, cannot be made to mean another machine.
            named = name in self.names or (name == server[0] and _is_address(name))
            good = named and (port or _DEFAULT_PORTS[scope["scheme"]]) == (server[1] or _DEFAULT_PORTS[scope["scheme"]])
        if good:
            return None
        return _Refusal(403, "the Host header names another machine or port than this service's", "host_not_allowed")

    def _check_origin(self, scope: Scope, headers: Mapping[bytes, bytes], text: str) -> tuple[_Refusal | None, bool]:
        """A refusal or None, and whether it is another origin that may ask."""
        origin = _origin(text)
        if origin is not None:
            if origin == _origin(f"{scope['scheme']}://{headers.get(b'host', b'').decode('latin-1')}"):
                return None, False
            if origin in self.origins:
                return None, True
        message = "web pages of this origin may not ask; see the setting `origins`"
        return _Refusal(403, message, "origin_not_allowed"), False

    def _check_key(self, scope: Scope, headers: Mapping[bytes, bytes]) -> _Refusal | None:
        path = scope["path"]
        if is_unix_socket(scope) or path == "/health" or _is_page(path):
            return None
        if self.key is None:
            client = scope.get("client")
            if client is not None and _is_loopback(client[0]):
                return None
            return _Refusal(403, "without a key only this machine is let in", "no_key_configured")
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.key):
            return None
        header = (b"www-authenticate", b'Bearer realm="edgert"')
        message = "the key is missing or wrong: send `Authorization: Bearer KEY`"
        return _Refusal(401, message, "invalid_api_key", (header,))


def is_unix_socket(scope: Scope) -> bool:
    """Whether the connection came over the Unix socket.

    The missing client alone does not say so: a TCP peer that resets its connection at once has none either. The
    server's own end has a port on TCP whatever the peer does.
    """
    server = scope.get("server")
    return scope.get("client") is None and server is not None and server[1] is None


def _is_page(path: str) -> bool:
    """Whether it is the dashboard, which holds nothing that is worth a key."""
    return path == "/" or path.startswith("/ui/")


def _check_content_type(scope: Scope, headers: Mapping[bytes, bytes]) -> _Refusal | None:
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    given = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if given == b"application/json":
        return None
    return _Refusal(415, "the Content-Type must be application/json", "content_type")


def _preflight(headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    allowed = [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")]
    asked = headers.get(b"access-control-request-headers", b"").decode("latin-1").strip()
    if _HEADER_NAMES.fullmatch(asked):
        allowed.append((b"access-control-allow-headers", asked.encode()))
    if headers.get(b"access-control-request-private-network") == b"true":
        allowed.append((b"access-control-allow-private-network", b"true"))
    return allowed


async def _send(send: Send, status: int, content: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    if status != 204:
        headers = [*headers, (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _split_host(text: str) -> tuple[str, int | None]:
    """Name and port of a Host header; an empty name where it is none."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", text.strip())
    if match is None:
        return "", None
    return match[1].lower().strip("[]"), None if match[2] is None else int(match[2])


def _origin(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None where it is no origin of a web page."""
    try:
        parts = urlsplit(text)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        return None
    return parts.scheme, parts.hostname, port


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback
