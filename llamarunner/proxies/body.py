"""Reading a request's JSON body, with an exact word for everything that can be wrong with it."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from llamarunner.errors import BodyTooLargeError, RequestError
from llamarunner.units import format_size

UNREAD = web.RequestKey("unread", bool)
"""A request whose body was not read to its end: its connection must be closed."""


class QuotingError(RequestError):
    """`message` quotes the request, for the client alone; `summary` quotes nobody, and may be kept."""

    def __init__(self, message: str, *, summary: str) -> None:
        super().__init__(message)
        self.summary = summary


async def read_body(request: web.Request) -> bytes:
    """The whole body, unpacked. One that says it is too large is refused unread; one that turns out so, as soon as it
    has."""
    limit = request.client_max_size
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        if "Content-Encoding" in request.headers:
            _leave_unread(request)  # nobody knows how much more is packed in there
        raise _too_large(limit) from None
    except web.RequestPayloadError as error:
        _leave_unread(request)
        encoding = request.headers.get("Content-Encoding", "")
        raise RequestError(f"the request body is broken{encoding and f', or not packed as {encoding}'}") from error


def _leave_unread(request: web.Request) -> None:
    """What aiohttp would read on after the answer, to keep the connection."""
    request[UNREAD] = True
    request.content.feed_eof()


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body is larger than {format_size(limit)}", hint="raise server.max_body")


def parse_object(raw: bytes, *, into: str = "an object") -> dict[str, Any]:
    """The JSON object in `raw`, whatever Content-Type it came with. Raises RequestError in the words of Go's decoder,
    which Ollama's clients know and anyone can read."""
    if not raw.strip():
        raise RequestError("missing request body")
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(_syntax_error(raw, error)) from None
    if not isinstance(parsed, dict):
        raise RequestError(f"json: cannot unmarshal {json_kind(parsed)} into {into}")
    return parsed


def _syntax_error(raw: bytes, error: orjson.JSONDecodeError) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:2] == b"\0":
        return "the request body must be UTF-8, and this looks like UTF-16"
    text = raw.decode("utf-8", "replace")
    if "depth" in error.msg:
        return "json: exceeded max depth"
    if error.pos >= len(text.rstrip()):
        return "unexpected EOF"
    if "\ufffd" in text and "utf-8" in error.msg.lower():
        return "the request body is not valid UTF-8"
    return f"invalid character {text[error.pos]!r} looking for beginning of value"


def json_kind(value: object) -> str:
    """What Go calls this JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
