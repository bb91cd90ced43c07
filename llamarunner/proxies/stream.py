"""An answer as server-sent events."""

from __future__ import annotations

import orjson
from aiohttp import web

from llamarunner.errors import LlamaRunnerError
from llamarunner.events import RequestPhase, RequestTrace
from llamarunner.proxies.dialect import SSE_TYPE, Dialect
from llamarunner.proxies.figures import loggable


class EventStream:
    """An SSE answer. Its headers wait for the first bytes, so that what fails before them has its own status."""

    def __init__(self, request: web.Request, trace: RequestTrace, dialect: Dialect) -> None:
        self._request = request
        self._trace = trace
        self._dialect = dialect
        self._response = web.StreamResponse(
            # no proxy on the way shall hold events back
            headers={"Content-Type": SSE_TYPE, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._response.prepared:
            await self._response.prepare(self._request)
            self._trace.phase = RequestPhase.STREAMING
        self._trace.bytes_out += len(data)
        await self._response.write(data)

    async def fail(self, error: LlamaRunnerError) -> None:
        """End what was begun with the dialect's error event, or raise `error` where nothing was."""
        if not self._response.prepared:
            raise error
        self._trace.error = loggable(error)
        body = self._dialect.stream_error(error, self._request.path)
        name = b"event: error\n" if isinstance(body, dict) and body.get("type") == "error" else b""
        # the empty line ends an event that may have been cut short
        await self.write(b"\n" + name + b"data: " + orjson.dumps(body) + b"\n\n")

    async def end(self) -> web.StreamResponse:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write_eof()
        return self._response
