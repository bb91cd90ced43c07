"""One HTTP server speaking one dialect: its life, and what all of them do to every request."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterable, Sequence
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from llamarunner import __version__
from llamarunner.config.schema import ProxyConfig
from llamarunner.errors import LlamaRunnerError, PortTakenError, RequestError
from llamarunner.events import EventBus, ProxyChanged
from llamarunner.ports import holder_of
from llamarunner.proxies.arrival import WatchedSite, arrival_middleware
from llamarunner.proxies.body import UNREAD
from llamarunner.proxies.dialect import TRACE, Dialect, error_response
from llamarunner.proxies.guard import Guard, cors_signal, guard_middleware

logger = logging.getLogger(__name__)

_BEGUN = web.RequestKey("begun", bool)  # headers were sent
_STOP_S = 1.0  # answers have been drained before; what is left may be cut


class ProxyServer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def is_running(self) -> bool: ...

    async def start(self) -> None:
        """Listen. Raises PortTakenError, or OSError for an address that is not ours."""
        ...

    async def stop(self) -> None: ...


class ProxyDialect(Dialect, Protocol):
    """A dialect with routes: what makes a server of it."""

    @property
    def title(self) -> str: ...

    def routes(self) -> Iterable[web.RouteDef]: ...

    def refuse_key(self, path: str) -> object: ...

    @property
    def open_paths(self) -> Iterable[str]: ...


class HttpProxy:
    """The ProxyServer of a dialect, on aiohttp."""

    def __init__(
        self,
        dialect: ProxyDialect,
        config: ProxyConfig,
        *,
        host: str,
        max_body: int,
        request_timeout_s: float,
        bus: EventBus,
        client_keys: Sequence[str] = (),
    ) -> None:
        """`client_keys` open it as well as the key of its `config`, where that has one."""
        self.dialect = dialect
        self.config = config
        self.host = host
        self.port = config.port
        self.problem: LlamaRunnerError | None = None
        self._max_body = max_body
        self._request_timeout_s = request_timeout_s
        self._client_keys = client_keys
        self._bus = bus
        self._runner: web.AppRunner | None = None

    @property
    def name(self) -> str:
        return self.dialect.name

    @property
    def title(self) -> str:
        return self.dialect.title

    @property
    def is_enabled(self) -> bool:
        return self.config.enabled

    @property
    def is_running(self) -> bool:
        return self._runner is not None

    async def start(self) -> None:
        if self._runner is not None:
            return
        # handler_cancellation: a client that leaves during a long prompt must be noticed at once
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_STOP_S,
            keepalive_timeout=75,
        )
        await runner.setup()
        try:
            site = WatchedSite(runner, self.host, self.config.port, timeout_s=self._request_timeout_s)
            await site.start()
        except OSError as error:
            await runner.cleanup()
            self.problem = await self._explain(error)
            self._bus.publish(ProxyChanged(self.name, running=False, problem=str(self.problem)))
            raise self.problem from error
        self._runner = runner
        self.problem = None
        self.port = runner.addresses[0][1]
        self._bus.publish(ProxyChanged(self.name, running=True))
        logger.info("%s listens on %s port %s", self.title, self.host, self.port)

    async def _explain(self, error: OSError) -> LlamaRunnerError:
        if error.errno == errno.EADDRINUSE:
            holder = await asyncio.to_thread(holder_of, self.host, self.config.port)
            return PortTakenError(self.host, self.config.port, holder)
        if error.errno == errno.EACCES:
            return LlamaRunnerError(
                f"{self.host}:{self.config.port} may not be opened by this user", hint="use a port above 1023"
            )
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            return LlamaRunnerError(f"{self.host} is not an address of this machine", hint="see `ip address`")
        return LlamaRunnerError(f"{self.host}:{self.config.port} cannot be opened: {error.strerror or error}")

    async def stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
            self._bus.publish(ProxyChanged(self.name, running=False))

    def _application(self) -> web.Application:
        key = self.config.api_key
        guard = Guard(
            bound_host=self.host,
            allowed_hosts=self.config.allowed_hosts,
            cors_origins=self.config.cors_origins,
            api_key=key.get_secret_value() if key is not None else None,
            client_keys=self._client_keys,
        )
        application = web.Application(
            client_max_size=self._max_body,
            middlewares=[
                arrival_middleware,
                guard_middleware(guard, self.dialect.refuse_key, self.dialect.open_paths),
                self._errors_in_dialect(),
            ],
        )
        application.router.add_routes(self.dialect.routes())
        application.on_response_prepare.append(_sign)
        application.on_response_prepare.append(cors_signal(guard))
        return application

    def _errors_in_dialect(self) -> Middleware:
        @web.middleware
        async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
            response = await translate(request, handler)
            if request.get(UNREAD):
                response.force_close()
            return response

        async def translate(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                return await handler(request)
            except LlamaRunnerError as error:
                return error_response(self.dialect, error, request.path)
            except web.HTTPException as refusal:
                if refusal.status < 400:
                    raise
                return self._refused(request, refusal)
            except ConnectionResetError:
                raise
            except Exception:
                logger.exception("%s %s failed in an unforeseen way", request.method, request.path)
                if request.get(_BEGUN):
                    raise  # the connection is cut: an answer in the midst of another would only confuse
                unforeseen = LlamaRunnerError("internal error", hint="the log has the details")
                return error_response(self.dialect, unforeseen, request.path)

        return answer

    def _refused(self, request: web.Request, refusal: web.HTTPException) -> web.StreamResponse:
        error = UnknownRouteError(request.method, request.path, refusal.status, refusal.reason)
        response = error_response(self.dialect, error, request.path)
        if "Allow" in refusal.headers:
            response.headers["Allow"] = refusal.headers["Allow"]
        return response


class UnknownRouteError(RequestError):
    """No such path (404) or method (405), or whatever else the HTTP server itself refuses."""

    code = "unknown_route"

    def __init__(self, method: str, path: str, status: int, reason: str) -> None:
        super().__init__(f"{method} {path}: {reason}")
        self.method = method
        self.path = path
        self.status = status


def route(method: str, path: str, handler: Handler) -> list[web.RouteDef]:
    """`path` with and without a slash at its end, which some clients add; GET answers HEAD as well."""
    paths = [path] if path.endswith("/") else [path, f"{path}/"]
    if method == "GET":
        return [web.get(each, handler) for each in paths]
    return [web.route(method, each, handler) for each in paths]


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    request[_BEGUN] = True
    response.headers["Server"] = f"LlamaRunner/{__version__}"
    trace = request.get(TRACE)
    if trace is None:
        return
    if trace.stripped:
        response.headers["X-LlamaRunner-Stripped"] = trace.stripped
    if trace.truncated:
        response.headers["X-LlamaRunner-Truncated"] = trace.truncated
