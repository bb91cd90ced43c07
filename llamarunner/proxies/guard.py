"""Who may ask: the Host header against DNS rebinding, the Origin header against pages in a browser, and the key.

Loopback is no trust boundary: any page the user visits can send requests to it. So a Host that is not a name of this
machine is refused, and so is an Origin that is neither local nor configured, for every method.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from llamarunner.proxies.dialect import json_response

_APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")  # desktop clients, as Ollama allows them
_LOCAL_ENDINGS = (".localhost", ".local", ".internal")  # no public name server knows any such name
_ALLOWED_HEADERS = (
    "Authorization, Content-Type, User-Agent, Accept, X-Requested-With, X-Api-Key, Anthropic-Version, Anthropic-Beta, "
    "Anthropic-Dangerous-Direct-Browser-Access, OpenAI-Beta, "
    "x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, x-stainless-helper-method, "
    "x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-poll-helper, "
    "x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"
)


@dataclass(frozen=True, slots=True)
class Guard:
    """`bound_host` is the address the proxy listens on; `allowed_hosts` further names clients may call it by."""

    bound_host: str
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    api_key: str | None = None
    client_keys: Sequence[str] = ()  # which open as well what `api_key` opens

    def admits_host(self, host_headers: Sequence[str]) -> bool:
        """Exactly one Host header, naming this machine."""
        if len(host_headers) != 1:
            return False
        name = host_name(host_headers[0])
        if name is None:
            return False
        if name == "localhost" or name.endswith(_LOCAL_ENDINGS):
            return True
        if name == socket.gethostname().lower() or name in (host.lower() for host in self.allowed_hosts):
            return True
        return self._admits_address(name)

    def _admits_address(self, name: str) -> bool:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        bound = _address(self.bound_host)
        if bound is not None and bound.is_unspecified:
            return True  # listening everywhere: any address that reached us is ours; a rebound name is no address
        # a private one is what a port forwarded from another machine or a container is called by
        return address.is_loopback or address.is_private or address == bound

    def admits_origin(self, origin: str) -> bool:
        if any(_pattern(allowed).fullmatch(origin) for allowed in self.cors_origins):
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.scheme in _APP_SCHEMES:
            return True
        name = (parts.hostname or "").lower()
        local = name in ("localhost", "0.0.0.0") or name.endswith(".localhost")
        return parts.scheme in ("http", "https") and (local or _is_loopback(name))

    def admits_key(self, authorization: str, api_key_header: str) -> bool:
        if self.api_key is None:
            return True
        given = shown_key(authorization, api_key_header).encode("utf-8", "replace")
        matches = [hmac.compare_digest(given, key.encode()) for key in (self.api_key, *self.client_keys)]
        return any(matches)  # all of them compared, so that the time does not tell which it was


def shown_key(authorization: str, api_key_header: str) -> str:
    """Of the two headers that may hold one; "" where none does."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else api_key_header


def host_name(header: str) -> str | None:
    """The name or address of a Host header, lower-case and without port; None for what is none."""
    text = header.strip().lower()
    if not text or any(mark in text for mark in "@/\\ \t,"):
        return None
    if text.startswith("["):
        name, bracket, port = text[1:].partition("]")
        port = port.removeprefix(":")
        return name if bracket and (not port or port.isdigit()) else None
    name, _, port = text.partition(":")
    if port and not port.isdigit():
        return None
    return name.rstrip(".") or None


@lru_cache(maxsize=64)
def _pattern(origin: str) -> re.Pattern[str]:
    """Of an origin in which "*" stands for anything, as in "chrome-extension://*"."""
    return re.compile(".*".join(map(re.escape, origin.split("*"))))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_loopback


def guard_middleware(guard: Guard, refuse_key: Callable[[str], object], open_paths: Iterable[str] = ()) -> Middleware:
    """`refuse_key(path)` is the dialect's body for a request without the right key; `open_paths` need none."""
    without_key = frozenset(open_paths)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not guard.admits_host(request.headers.getall("Host", [])):
            return web.Response(status=403)
        origin = request.headers.get("Origin")
        if origin is not None and not guard.admits_origin(origin):
            return web.Response(status=403)
        if request.method == "OPTIONS" and origin is not None:
            response: web.StreamResponse = web.Response(status=204)
        else:
            key = request.headers.get("X-Api-Key", "")
            if request.path not in without_key and not guard.admits_key(request.headers.get("Authorization", ""), key):
                response = json_response(refuse_key(request.path), 401)
                response.headers["WWW-Authenticate"] = "Bearer"
            else:
                response = await handler(request)
        return response

    return check


def cors_signal(guard: Guard) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """For `on_response_prepare`: a stream has sent its headers long before its handler returns."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin")
        if origin is not None and guard.admits_origin(origin):
            _add_cors(response, request, origin)

    return add


def _add_cors(response: web.StreamResponse, request: web.Request, origin: str) -> None:
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Vary"] = "Origin"
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = _ALLOWED_HEADERS
        response.headers["Access-Control-Max-Age"] = "43200"
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            response.headers["Access-Control-Allow-Private-Network"] = "true"
