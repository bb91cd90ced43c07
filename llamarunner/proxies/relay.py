"""The hot path: one request to one runner, its answer passed on.

Bytes that need no translation are not decoded: of a stream only the events are counted, and what the engine says of
tokens and times is read from the last of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.errors import EngineGoneError, EngineRefusalError, LlamaRunnerError
from llamarunner.events import EventBus, RequestFinished, RequestPhase, RequestStarted, RequestTrace
from llamarunner.proxies.dialect import SSE_TYPE, Dialect, error_response
from llamarunner.runners.manager import Lease, RunnerManager

logger = logging.getLogger(__name__)

_TAIL_BYTES = 64 * 1024  # enough for the last event with its timings and usage
_ERROR_BYTES = 64 * 1024  # an engine's error that is longer is cut
GONE = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"

Handler = Callable[[web.Request, RequestTrace], Awaitable[web.StreamResponse]]


def upstream_session() -> aiohttp.ClientSession:
    """For asking engines: as many connections as there are requests, no deadline but for connecting. A long prompt may
    take minutes before its first byte.

    Every request has a connection of its own: llama-server closes one after a stream, and a request that met it
    closing would fail for no fault of its engine.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


class Relay:
    """What every dialect needs to serve a request."""

    def __init__(
        self,
        manager: RunnerManager,
        catalog: Callable[[], Catalog],
        *,
        bus: EventBus,
        session: aiohttp.ClientSession,
    ) -> None:
        self.manager = manager
        self._catalog = catalog
        self._bus = bus
        self._session = session

    @property
    def catalog(self) -> Catalog:
        return self._catalog()

    def traced(self, dialect: Dialect, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """`handler` with a trace of its own, and its errors in the dialect's words."""

        async def handle(request: web.Request) -> web.StreamResponse:
            trace = RequestTrace(
                dialect=dialect.name,
                endpoint=request.path,
                client=request.remote or "",
                user_agent=request.headers.get("User-Agent", ""),
            )
            self._bus.publish(RequestStarted(trace))
            try:
                response = await handler(request, trace)
                trace.phase = RequestPhase.FAILED if trace.error else RequestPhase.DONE
            except LlamaRunnerError as error:
                trace.error, trace.phase = str(error), RequestPhase.FAILED
                response = error_response(dialect, error, request.path)
            except (asyncio.CancelledError, ConnectionResetError):
                trace.status, trace.phase, trace.error = 499, RequestPhase.CANCELLED, "the client left"
                raise
            except Exception:
                trace.status, trace.phase, trace.error = 500, RequestPhase.FAILED, "internal error"
                raise
            finally:
                trace.finished = time.monotonic()
                self._bus.publish(RequestFinished(trace))
            trace.status = response.status
            return response

        return handle

    @asynccontextmanager
    async def ask(
        self, model: Model, path: str, body: bytes, trace: RequestTrace, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, Lease]]:
        """The engine's answer to `body` posted to `path`, its status below 400, and the lease it is given under.

        Leaving the block with the answer unread closes the connection, and the engine stops generating.
        """
        async with self.manager.acquire(model, trace, keep_alive_s=keep_alive_s) as lease:
            headers = {**lease.headers, "Content-Type": "application/json"}
            try:
                async with self._session.post(lease.base_url + path, data=body, headers=headers) as upstream:
                    if upstream.status >= 400:
                        raise _refusal(upstream.status, await upstream.content.read(_ERROR_BYTES))
                    yield upstream, lease
            except aiohttp.ClientConnectionResetError:
                raise  # our own client's connection, not the engine's
            except (aiohttp.ClientError, TimeoutError) as error:
                raise await self._gone(lease, error) from error

    async def ask_json(
        self, model: Model, path: str, body: object, trace: RequestTrace, *, keep_alive_s: float | None = None
    ) -> dict[str, Any]:
        """The engine's whole answer, as an object."""
        async with self.ask(model, path, orjson.dumps(body), trace, keep_alive_s=keep_alive_s) as (upstream, _):
            answer = orjson.loads(await upstream.read())
            if not isinstance(answer, dict):
                raise EngineGoneError("the engine answered with something that is not an object")
            note_figures(trace, answer)
            return answer

    async def call(self, lease: Lease, path: str, body: object) -> dict[str, Any]:
        """A quick question to the engine under a lease already held (tokenize, apply-template)."""
        headers = {**lease.headers, "Content-Type": "application/json"}
        async with self._session.post(lease.base_url + path, data=orjson.dumps(body), headers=headers) as upstream:
            raw = await upstream.read()
            if upstream.status >= 400:
                raise _refusal(upstream.status, raw[:_ERROR_BYTES])
            answer = orjson.loads(raw)
            if not isinstance(answer, dict):
                raise EngineGoneError(f"the engine's answer to {path} is not an object")
            return answer

    async def _gone(self, lease: Lease, error: Exception) -> EngineGoneError:
        """Say what became of the engine. Its end is often noticed an instant after its connections break."""
        logger.warning("%s: the connection to the engine broke: %s", lease.runner.model.name, error)
        await asyncio.sleep(0.05)
        cause = lease.runner.error
        return EngineGoneError(GONE, hint=cause.message if cause is not None else "")

    async def pass_through(
        self, request: web.Request, upstream: aiohttp.ClientResponse, trace: RequestTrace, dialect: Dialect
    ) -> web.StreamResponse:
        """The answer as it is, status and type included."""
        content_type = upstream.headers.get("Content-Type", "application/json")
        if not content_type.startswith("text/event-stream"):
            return await _whole(upstream, trace, content_type)
        response = sse_response()
        await response.prepare(request)
        trace.phase = RequestPhase.STREAMING
        tail: deque[bytes] = deque()
        tail_bytes = 0
        try:
            while block := await upstream.content.readany():
                if trace.first_byte is None and b'"content":null' not in block:
                    trace.first_byte = time.monotonic()
                trace.output_tokens = (trace.output_tokens or 0) + block.count(b"data: {")
                trace.bytes_out += len(block)
                tail.append(block)
                tail_bytes += len(block)
                while tail_bytes - len(tail[0]) >= _TAIL_BYTES:
                    tail_bytes -= len(tail.popleft())
                await response.write(block)
        except aiohttp.ClientPayloadError as error:
            trace.error = f"{GONE}: {error}"
            body = orjson.dumps(dialect.stream_error(EngineGoneError(GONE), request.path))
            await response.write(b"data: " + body + b"\n\n")
        _note_last_events(trace, b"".join(tail))
        await response.write_eof()
        return response


def sse_response() -> web.StreamResponse:
    """Headers that keep every proxy on the way from holding events back."""
    return web.StreamResponse(
        headers={"Content-Type": SSE_TYPE, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )


async def _whole(upstream: aiohttp.ClientResponse, trace: RequestTrace, content_type: str) -> web.Response:
    body = await upstream.read()
    trace.first_byte = time.monotonic()
    trace.bytes_out = len(body)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        note_figures(trace, answer)
    return web.Response(body=body, status=upstream.status, headers={"Content-Type": content_type})


def _refusal(status: int, body: bytes) -> EngineRefusalError:
    """llama-server answers `{"error": {"code", "message", "type"}}`; a stranger may answer anything."""
    try:
        error = orjson.loads(body)["error"]
        return EngineRefusalError(status, str(error["message"]), kind=str(error.get("type", "")))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        text = body.decode("utf-8", "replace").strip()
        return EngineRefusalError(status, text or f"the engine answered with status {status}")


def note_figures(trace: RequestTrace, answer: dict[str, Any]) -> None:
    """Tokens and rates of a whole answer, or of a stream's event that carries them."""
    usage = answer.get("usage")
    if isinstance(usage, dict):
        trace.prompt_tokens = usage.get("prompt_tokens", trace.prompt_tokens)
        trace.output_tokens = usage.get("completion_tokens", trace.output_tokens)
    timings = answer.get("timings")
    if isinstance(timings, dict):
        cached = timings.get("cache_n") or 0
        trace.prompt_tokens = cached + (timings.get("prompt_n") or 0)
        trace.cached_tokens = cached
        trace.output_tokens = timings.get("predicted_n", trace.output_tokens)
        trace.prompt_tokens_per_s = timings.get("prompt_per_second")
        trace.output_tokens_per_s = timings.get("predicted_per_second")


def _note_last_events(trace: RequestTrace, tail: bytes) -> None:
    for line in tail.split(b"\n"):
        if line.startswith(b"data: {") and any(key in line for key in (b'"timings"', b'"usage"', b'"error"')):
            try:
                event = orjson.loads(line[6:])
            except orjson.JSONDecodeError:
                logger.debug("an event of %s bytes could not be read for its figures", len(line))
                continue
            note_figures(trace, event)
            if isinstance(event.get("error"), dict):
                trace.error = str(event["error"].get("message", "the engine reported an error"))
