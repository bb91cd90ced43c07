"""The hot path: one request to one runner, its answer passed on.

Bytes that need no translation are not decoded: of a stream only the events are counted, and what the engine says of
tokens and times is read from the last of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.errors import EngineGoneError, EngineRefusalError, LlamaRunnerError
from llamarunner.events import EventBus, RequestFinished, RequestPhase, RequestStarted, RequestTrace
from llamarunner.proxies.adapt import adapt
from llamarunner.proxies.clients import Clients
from llamarunner.proxies.dialect import TRACE, Dialect, error_response
from llamarunner.proxies.figures import loggable, note_figures
from llamarunner.proxies.guard import shown_key
from llamarunner.proxies.sse import WholeLines
from llamarunner.proxies.stream import EventStream
from llamarunner.proxies.upstream import (
    ERROR_BYTES,
    GONE,
    TOO_LONG,
    parse_answer,
    read_all,
    read_block,
    read_most,
    refusal,
)
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.manager import Lease, RunnerManager

logger = logging.getLogger(__name__)

_NOTICE_S = 5.0  # within which the end of an engine that takes no connections must show
_TAIL_BYTES = 64 * 1024  # enough for the last event with its timings and usage

_CANNOT_NOW = (502, 503, 504)

Shorten = Callable[[Lease, EngineRefusalError], Awaitable[bytes]]
"""A body with less of the prompt, for an engine that refused the whole one."""

Handler = Callable[[web.Request, RequestTrace], Awaitable[web.StreamResponse]]


class Relay:
    """What every dialect needs to serve a request."""

    def __init__(
        self,
        manager: RunnerManager,
        catalog: Callable[[], Catalog],
        *,
        bus: EventBus,
        session: aiohttp.ClientSession,
        clients: Clients | None = None,
    ) -> None:
        self.manager = manager
        self._clients = clients or Clients({})
        self._catalog = catalog
        self._bus = bus
        self._session = session

    @property
    def catalog(self) -> Catalog:
        return self._catalog()

    def traced(self, dialect: Dialect, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """`handler` with a trace of its own, and its errors in the dialect's words."""

        async def handle(request: web.Request) -> web.StreamResponse:
            trace = self._trace(dialect, request)
            request[TRACE] = trace
            self._bus.publish(RequestStarted(trace))
            try:
                response = await handler(request, trace)
                trace.phase = RequestPhase.FAILED if trace.error else RequestPhase.DONE
                trace.status = response.status
            except LlamaRunnerError as error:
                trace.error, trace.phase = loggable(error), RequestPhase.FAILED
                response = error_response(dialect, error, request.path)
                trace.status = response.status
            except (asyncio.CancelledError, ConnectionResetError):
                trace.status, trace.phase, trace.error = 499, RequestPhase.CANCELLED, "the client left"
                raise
            except Exception:
                trace.status, trace.phase, trace.error = 500, RequestPhase.FAILED, "internal error"
                raise
            finally:
                trace.finished = time.monotonic()
                self._bus.publish(RequestFinished(trace))
            return response

        return handle

    def _trace(self, dialect: Dialect, request: web.Request) -> RequestTrace:
        headers, address = request.headers, _address(request)
        key = shown_key(headers.get("Authorization", ""), headers.get("X-Api-Key", ""))
        client = self._clients.recognise(key, address[0])
        return RequestTrace(
            dialect=dialect.name,
            endpoint=request.path,
            client=":".join(address) if address[0] else "",
            user_agent=headers.get("User-Agent", ""),
            client_name=client.name if client is not None else "",
            priority=client.priority if client is not None else 0,
        )

    @asynccontextmanager
    async def ask(
        self,
        model: Model,
        path: str,
        body: bytes,
        trace: RequestTrace,
        *,
        keep_alive_s: float | None = None,
        demand: Demand = NO_DEMAND,
        shorten: Shorten | None = None,
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, Lease]]:
        """The engine's answer to `body` posted to `path`, its status below 400, and the lease it is given under.

        Where the engine gives none, another replica is asked, if there is one. Where it refuses a prompt that is too
        long, the body that `shorten` returns is asked in its place. Leaving the block with the answer unread closes the
        connection, and the engine stops generating.
        """
        async with AsyncExitStack() as held:
            yield await self._ask(held, model, path, body, trace, shorten, keep_alive_s=keep_alive_s, demand=demand)

    async def _ask(
        self,
        held: AsyncExitStack,
        model: Model,
        path: str,
        body: bytes,
        trace: RequestTrace,
        shorten: Shorten | None,
        **acquire: Any,
    ) -> tuple[aiohttp.ClientResponse, Lease]:
        tried: list[str] = []
        while True:
            lease = None
            try:
                async with AsyncExitStack() as attempt:
                    lease = await attempt.enter_async_context(
                        self.manager.acquire(model, trace, avoid=tried, **acquire)
                    )
                    upstream = await attempt.enter_async_context(self.ask_shortened(lease, path, body, trace, shorten))
                    held.push_async_exit(attempt.pop_all())
                    return upstream, lease
            except (EngineGoneError, EngineRefusalError) as error:
                if lease is None or not await self._may_ask_again(lease, error, tried):
                    raise
                tried.append(lease.name)

    async def _may_ask_again(self, lease: Lease, error: LlamaRunnerError, tried: Collection[str]) -> bool:
        """Whether another replica may answer, or the next runner where the one that was asked has just ended."""
        if not _gave_no_answer(error) or lease.name in tried:
            return False
        if self.manager.no_answer(lease, tried):
            logger.warning("%s gave no answer, another replica is asked: %s", lease.name, error)
            return True
        if isinstance(error, UnreachedError):
            await _wait_ended(lease)
            return True
        return False

    @asynccontextmanager
    async def ask_shortened(
        self, lease: Lease, path: str, body: bytes, trace: RequestTrace, shorten: Shorten | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """As `ask`, under a lease already held."""
        async with AsyncExitStack() as held:
            try:
                upstream = await held.enter_async_context(self.ask_under(lease, path, body, trace))
            except EngineRefusalError as refusal:
                if shorten is None or refusal.kind != TOO_LONG:
                    raise
                body = await shorten(lease, refusal)
                upstream = await held.enter_async_context(self.ask_under(lease, path, body, trace))
            yield upstream

    @asynccontextmanager
    async def ask_under(
        self, lease: Lease, path: str, body: bytes, trace: RequestTrace | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """As `ask`, under a lease already held: whoever asked for a second one could wait for its own first."""
        body, stripped = adapt(body, path, lease.plan)
        if trace is not None:
            trace.stripped = stripped
        headers = {**lease.headers, "Content-Type": "application/json"}
        try:
            upstream = await self._session.post(
                lease.base_url + path, data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            raise UnreachedError(GONE, hint="it takes no connections") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise await _gone(lease, error) from error
        async with upstream:
            with lease.runner.answers.receiving(upstream):
                if upstream.status >= 300:
                    raise refusal(upstream.status, await read_most(upstream, ERROR_BYTES))
                yield upstream

    async def call(self, lease: Lease, path: str, body: object) -> dict[str, Any]:
        """A quick question to the engine under a lease already held (tokenize, apply-template)."""
        async with self.ask_under(lease, path, orjson.dumps(body)) as upstream:
            return parse_answer(await read_all(upstream))

    async def pass_through(
        self,
        request: web.Request,
        upstream: aiohttp.ClientResponse,
        trace: RequestTrace,
        dialect: Dialect,
        amend: Callable[[bytes], bytes],
    ) -> web.StreamResponse:
        """The answer with its status and type. `amend` is given whole lines of a stream, or a whole answer, and returns
        them as the dialect has them."""
        content_type = upstream.headers.get("Content-Type", "application/json")
        if not content_type.startswith("text/event-stream"):
            return await _whole(upstream, trace, content_type, amend)
        stream = EventStream(request, trace, dialect)
        lines = WholeLines()
        tail: deque[bytes] = deque()
        tail_bytes = 0
        try:
            while block := await read_block(upstream):
                events = block.count(b"data: {")
                if trace.first_byte is None and events > block.count(b'"content":null'):
                    trace.first_byte = time.monotonic()
                trace.output_tokens = (trace.output_tokens or 0) + events
                amended = amend(lines.feed(block))
                tail.append(amended)
                tail_bytes += len(amended)
                while tail_bytes - len(tail[0]) >= _TAIL_BYTES:
                    tail_bytes -= len(tail.popleft())
                await stream.write(amended)
        except EngineGoneError as error:
            await stream.fail(error)
        _note_last_events(trace, b"".join(tail))
        return await stream.end()


def _gave_no_answer(error: LlamaRunnerError) -> bool:
    """Nothing was answered, or by a server that says it cannot just now."""
    return isinstance(error, EngineGoneError) or error.status in _CANNOT_NOW


class UnreachedError(EngineGoneError):
    """The engine never saw the request."""


async def _gone(lease: Lease, error: Exception) -> EngineGoneError:
    """Say what became of the engine. Its end is often noticed an instant after its connections break."""
    logger.warning("%s: the connection to the engine broke: %s", lease.runner.model.name, error)
    await asyncio.sleep(0.05)
    cause = lease.runner.error
    return EngineGoneError(GONE, hint=cause.message if cause is not None else "")


async def _wait_ended(lease: Lease) -> None:
    """Raises EngineGoneError where the runner goes on."""
    try:
        async with asyncio.timeout(_NOTICE_S):
            await lease.runner.wait_ended()
    except TimeoutError as error:
        raise await _gone(lease, error) from error


def _address(request: web.Request) -> tuple[str, str]:
    """The client's address and port; empty where its connection is gone."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return (str(peer[0]), str(peer[1])) if isinstance(peer, tuple) else ("", "")


async def _whole(
    upstream: aiohttp.ClientResponse, trace: RequestTrace, content_type: str, amend: Callable[[bytes], bytes]
) -> web.Response:
    body = amend(await read_all(upstream))
    trace.first_byte = time.monotonic()
    trace.bytes_out = len(body)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        note_figures(trace, answer)
    return web.Response(body=body, status=upstream.status, headers={"Content-Type": content_type})


def _note_last_events(trace: RequestTrace, tail: bytes) -> None:
    for line in tail.split(b"\n"):
        if line.startswith(b"data: {") and any(key in line for key in (b'"timings"', b'"usage"', b'"error"')):
            try:
                event = orjson.loads(line[6:])
            except orjson.JSONDecodeError:
                logger.debug("an event of %s bytes could not be read for its figures", len(line))
                continue
            note_figures(trace, event)
            if "error" in event or event.get("type") == "error":
                trace.error = trace.error or "the engine reported an error"
