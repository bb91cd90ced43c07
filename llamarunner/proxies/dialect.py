"""What a dialect must be able to say: its errors, before an answer has begun and in the midst of it."""

from __future__ import annotations

import math
from typing import Protocol

import orjson
from aiohttp import web

from llamarunner.errors import LlamaRunnerError
from llamarunner.events import RequestTrace

JSON_TYPE = "application/json; charset=utf-8"
SSE_TYPE = "text/event-stream; charset=utf-8"
TRACE = web.RequestKey("trace", RequestTrace)
"""A request's trace, where it is one for an answer."""


class Dialect(Protocol):
    @property
    def name(self) -> str:
        """ "ollama" or "lmstudio", as in the configuration."""
        ...

    def error_body(self, error: LlamaRunnerError, path: str) -> object:
        """The JSON body, or a str for plain text, that `path` answers this error with."""
        ...

    def error_status(self, error: LlamaRunnerError, path: str) -> int: ...

    def stream_error(self, error: LlamaRunnerError, path: str) -> object:
        """The JSON of the event that ends a stream which had begun."""
        ...


def json_response(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, headers={"Content-Type": JSON_TYPE})


def error_response(dialect: Dialect, error: LlamaRunnerError, path: str) -> web.Response:
    body, status = dialect.error_body(error, path), dialect.error_status(error, path)
    response = web.Response(text=body, status=status) if isinstance(body, str) else json_response(body, status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return response
