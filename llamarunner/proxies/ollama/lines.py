"""An answer as lines of JSON (NDJSON)."""

from __future__ import annotations

from aiohttp import web

from llamarunner.errors import EngineGoneError, LlamaRunnerError
from llamarunner.events import RequestPhase, RequestTrace
from llamarunner.proxies.figures import loggable
from llamarunner.proxies.ollama.answer import line
from llamarunner.proxies.ollama.errors import error_message

_TYPE = "application/x-ndjson"


class LineStream:
    """Takes whole lines only: clients parse what each read gives them. The headers wait for the first line, so that
    what fails before it has its own status."""

    def __init__(self, request: web.Request, trace: RequestTrace) -> None:
        self._request = request
        self._trace = trace
        self._response = web.StreamResponse(headers={"Content-Type": _TYPE, "X-Accel-Buffering": "no"})

    @property
    def has_begun(self) -> bool:
        return self._response.prepared

    async def write(self, lines: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)
            self._trace.phase = RequestPhase.STREAMING
        self._trace.bytes_out += len(lines)
        await self._response.write(lines)

    async def fail(self, error: LlamaRunnerError) -> web.StreamResponse:
        """End what was begun with an error line."""
        self._trace.error = loggable(error)
        message = error_message(error, self._request.path)
        if isinstance(error, EngineGoneError):
            message = f"an error was encountered while running the model: {message}"
        await self.write(line({"error": message}))
        return await self.end()

    async def end(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response
