"""Asking an engine over HTTP: the connections, its answers read to the end or to where they break, its refusals."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson

from llamarunner.errors import EngineError, EngineGoneError, EngineRefusalError

ERROR_BYTES = 64 * 1024  # an engine's error that is longer is cut
NOT_IMPLEMENTED = 501  # llama-server's status for what this model, or the way it was started, does not have
TOO_LONG = "exceed_context_size_error"  # llama-server's kind of refusal
GONE = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"


def upstream_session() -> aiohttp.ClientSession:
    """For asking engines: as many connections as there are requests, no deadline but for connecting. A long prompt may
    take minutes before its first byte.

    Every request has a connection of its own: llama-server closes one after a stream, and a request that met it
    closing would fail for no fault of its engine. One kept open would occupy one of its few HTTP threads, besides.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


async def read_block(upstream: aiohttp.ClientResponse) -> bytes:
    """What has come of the answer; empty at its end. Raises EngineGoneError where it breaks off."""
    try:
        return await upstream.content.readany()
    except aiohttp.ClientError as error:
        raise EngineGoneError(GONE) from error


async def read_all(upstream: aiohttp.ClientResponse) -> bytes:
    """The whole answer. Raises EngineGoneError where it breaks off."""
    try:
        return await upstream.read()
    except aiohttp.ClientError as error:
        raise EngineGoneError(GONE) from error


async def read_most(upstream: aiohttp.ClientResponse, limit: int) -> bytes:
    found = b""
    while len(found) < limit and (block := await read_block(upstream)):
        found += block
    return found[:limit]


def parse_answer(body: bytes) -> dict[str, Any]:
    """The object that an engine answered with. Raises EngineError for anything else."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise EngineError("the engine answered with something that is not a JSON object")
    return answer


def refusal(status: int, body: bytes) -> EngineRefusalError:
    """llama-server answers `{"error": {"code", "message", "type"}}`; a stranger may answer anything."""
    try:
        error = orjson.loads(body)["error"]
        message, kind = str(error["message"]), str(error.get("type", ""))
        context, tokens = (
            each if isinstance(each := error.get(name), int) else 0 for name in ("n_ctx", "n_prompt_tokens")
        )
        return EngineRefusalError(status, message, kind=kind, context=context, prompt_tokens=tokens)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        text = body.decode("utf-8", "replace").strip()
        return EngineRefusalError(status, text or f"the engine answered with status {status}")
