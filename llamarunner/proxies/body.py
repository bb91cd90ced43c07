"""Reading a request's JSON body, with an exact word for everything that can be wrong with it."""

from __future__ import annotations

import json
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


class LoneSurrogateError(RequestError):
    """Half of what two escapes make together."""


async def read_object(request: web.Request, *, into: str = "an object") -> tuple[bytes, dict[str, Any]]:
    """The body, and the JSON object in it: see `parse_object`.

    Clients that cut a text in the midst of an emoji send half of a surrogate pair. Go's decoder makes U+FFFD of it, and
    so do we, as neither our decoder nor llama-server's takes it."""
    raw = await read_body(request)
    try:
        return raw, parse_object(raw, into=into)
    except LoneSurrogateError:
        raw = without_lone_surrogates(raw)
        return raw, parse_object(raw, into=into)


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
        kind = LoneSurrogateError if error.msg.endswith("surrogate in string") else RequestError
        raise kind(_syntax_error(raw, error)) from None
    if not isinstance(parsed, dict):
        raise RequestError(f"json: cannot unmarshal {json_kind(parsed)} into {into}")
    return parsed


def without_lone_surrogates(raw: bytes) -> bytes:
    """The same JSON with U+FFFD for each; what is no JSON for another reason stays as it is."""
    try:
        text = json.dumps(json.loads(raw), ensure_ascii=False)
    except (ValueError, RecursionError):
        return raw
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _syntax_error(raw: bytes, error: orjson.JSONDecodeError) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:2] == b"\0":
        return "the request body must be UTF-8, and this looks like UTF-16"
    text = raw.decode("utf-8", "replace")
    if "depth" in error.msg:
        return "json: exceeded max depth"
    if "infinity" in error.msg:
        return "json: cannot unmarshal number into Go value of type float64"
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
