"""How long a request may take to arrive. aiohttp has no deadline for headers or bodies, so that a client which sends a
byte now and then would hold its connection for ever. How long the answer takes is nobody's business here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from llamarunner.errors import RequestError
from llamarunner.units import format_duration

_LEAST_RATE = 1024  # bytes a second of a body, on average over each timeout
_LATE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class SlowBodyError(RequestError):
    status = 408
    code = "request_timeout"


class ArrivalWatch(asyncio.Protocol):
    """Stands between a connection and aiohttp's protocol, and passes everything on. A request's headers must be whole
    within `timeout_s` of their first byte, or of the connection; its body must keep coming."""

    def __init__(self, inner: web.RequestHandler, timeout_s: float) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._received = 0
        self._request: web.Request | None = None  # that is being served
        self.is_late = False

    @contextmanager
    def serving(self, request: web.Request) -> Iterator[None]:
        """Its headers are there, and whoever is inside reads its body and answers it."""
        self._request = request
        self._disarm()
        if not request.content.is_eof() and "Upgrade" not in request.headers:
            self._arm()
        try:
            yield
        finally:
            self._request = None
            self._disarm()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._arm()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self._request is None:  # the first byte after an answer
            self._arm()
        self._received += len(data)
        self._inner.data_received(data)

    def eof_received(self) -> None:
        self._inner.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _arm(self) -> None:
        self._received = 0
        self._timer = self._loop.call_later(self._timeout_s, self._check)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        transport, request = self._transport, self._request
        if transport is None or transport.is_closing():
            return
        if request is None:
            if self._received:
                transport.write(_LATE)
            transport.close()
        elif not request.content.is_eof():
            is_ours = not transport.is_reading()  # what it sent is still to be read
            if is_ours or self._received >= _LEAST_RATE * self._timeout_s:
                self._arm()
            else:
                self.is_late = True
                limit = format_duration(self._timeout_s)
                request.content.set_exception(SlowBodyError(f"the request's body did not arrive within {limit}"))
                request.content.feed_eof()  # or aiohttp would wait for the rest of it


@web.middleware
async def _watched(request: web.Request, handler: Handler) -> web.StreamResponse:
    watch = request.transport.get_protocol() if request.transport is not None else None
    if not isinstance(watch, ArrivalWatch):
        return await handler(request)
    with watch.serving(request):
        response = await handler(request)
        if watch.is_late:
            response.force_close()
        return response


arrival_middleware: Middleware = _watched
"""Goes before all others."""


class WatchedSite(web.TCPSite):
    """Listens like a TCPSite, with an ArrivalWatch before each connection."""

    def __init__(self, runner: web.AppRunner, host: str, port: int, *, timeout_s: float) -> None:
        super().__init__(runner, host, port)
        self._address = (host, port)
        self._timeout_s = timeout_s

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None  # the runner was set up
        host, port = self._address
        self._server = await asyncio.get_running_loop().create_server(
            lambda: ArrivalWatch(server(), self._timeout_s), host, port, backlog=1024, reuse_address=True
        )
