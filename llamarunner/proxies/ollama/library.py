"""What changes Ollama's models: pull, push, create, copy, delete, and the blobs that `create` is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from llamarunner.catalog.create import Recipe
from llamarunner.catalog.librarian import Librarian
from llamarunner.catalog.manifests import ManifestError, normal_digest
from llamarunner.catalog.names import InvalidNameError, ModelName
from llamarunner.catalog.pull import Progress
from llamarunner.errors import LlamaRunnerError, ModelNotFoundError, RequestError, UnsupportedError
from llamarunner.events import RequestTrace
from llamarunner.proxies.dialect import Dialect, json_response
from llamarunner.proxies.ollama.answer import line
from llamarunner.proxies.ollama.asking import read_fields
from llamarunner.proxies.ollama.errors import OptionError
from llamarunner.proxies.ollama.lines import LineStream
from llamarunner.proxies.ollama.options import effective
from llamarunner.proxies.proxy import route
from llamarunner.proxies.relay import Relay

_BLOCK = 1024**2  # bytes of an upload that are written at once


class LibraryRoutes:
    def __init__(self, relay: Relay, dialect: Dialect, librarian: Librarian) -> None:
        self._relay = relay
        self._dialect = dialect
        self._librarian = librarian

    def routes(self) -> list[web.RouteDef]:
        traced = self._relay.traced
        return [
            *route("POST", "/api/pull", traced(self._dialect, self._pull)),
            *route("POST", "/api/push", self._push),
            *route("POST", "/api/create", traced(self._dialect, self._create)),
            *route("POST", "/api/copy", self._copy),
            *route("DELETE", "/api/delete", self._delete),
            *route("HEAD", "/api/blobs/{digest}", self._has_blob),
            *route("POST", "/api/blobs/{digest}", self._put_blob),
        ]

    # -- with progress -----------------------------------------------------------------------------------------------

    async def _pull(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        body = await read_fields(request, "PullRequest")
        trace.model, trace.stream = _name_of(body), body.get("stream", True)
        lines = self._librarian.pulls.pull(trace.model, insecure=body.get("insecure", False))
        return await _tell(request, trace, lines)

    async def _create(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        body = await read_fields(request, "CreateRequest")
        trace.model, trace.stream = _name_of(body), body.get("stream", True)
        name, recipe = ModelName.parse(trace.model), recipe_of(body)
        return await _tell(request, trace, self._librarian.create(name, recipe, body.get("from", "")))

    async def _push(self, request: web.Request) -> web.Response:
        body = await read_fields(request, "PushRequest")
        name = _name_of(body)
        if not name:
            raise RequestError("model is required")
        self._relay.catalog.find(name)
        return json_response({"error": "pushing to a registry is not supported; `ollama push` does it"}, 403)

    # -- at once -----------------------------------------------------------------------------------------------------

    async def _copy(self, request: web.Request) -> web.Response:
        body = await read_fields(request, "CopyRequest")
        source, target = body.get("source", ""), body.get("destination", "")
        if not source:
            raise RequestError('source "" is invalid')
        try:
            destination = ModelName.parse(target)
        except InvalidNameError:
            raise RequestError(f'destination "{target}" is invalid') from None
        try:
            await self._librarian.copy(source, destination)
        except ModelNotFoundError:
            return json_response({"error": f'model "{source}" not found'}, 404)
        return web.Response()

    async def _delete(self, request: web.Request) -> web.Response:
        name = _name_of(await read_fields(request, "DeleteRequest"))
        if not name:
            raise RequestError('name "" is invalid')
        await self._librarian.delete(name)
        return web.Response()

    # -- blobs -------------------------------------------------------------------------------------------------------

    async def _has_blob(self, request: web.Request) -> web.Response:
        digest = _digest_of(request)
        found = await asyncio.to_thread(self._librarian.library.blob, digest)
        return web.Response(status=404 if found is None else 200)

    async def _put_blob(self, request: web.Request) -> web.Response:
        """Of any size: it goes to the disk as it comes."""
        digest, library = _digest_of(request), self._librarian.library
        if await asyncio.to_thread(library.blob, digest) is not None:
            while await request.content.readany():  # a client that is answered while it sends takes that for a failure
                pass
            return web.Response(status=200)
        await asyncio.to_thread(library.check_space, request.content_length or 0, digest[:19])
        with await asyncio.to_thread(library.upload, digest) as upload:
            waiting = bytearray()
            while block := await request.content.readany():
                waiting += block
                if len(waiting) >= _BLOCK:
                    data, waiting = bytes(waiting), bytearray()
                    await asyncio.to_thread(upload.write, data)
            await asyncio.to_thread(upload.write, bytes(waiting))
            await asyncio.to_thread(upload.commit)
        return web.Response(status=201)


async def _tell(request: web.Request, trace: RequestTrace, lines: AsyncGenerator[Progress, None]) -> web.StreamResponse:
    """Each step as a line; or, unstreamed, only how it ended."""
    writer = LineStream(request, trace) if trace.stream else None
    last = Progress("success")
    async with aclosing(lines):
        try:
            async for last in lines:
                if writer is not None:
                    await writer.write(line(last.as_record()))
        except LlamaRunnerError as error:
            if writer is None or not writer.has_begun:
                raise
            return await writer.fail(error)
    return json_response(last.as_record()) if writer is None else await writer.end()


def recipe_of(body: Mapping[str, Any]) -> Recipe:
    """What /api/create asks for. Raises RequestError in Go's or Ollama's words. Pure."""
    if body.get("quantize") or body.get("quantization"):
        raise UnsupportedError("quantize is not supported: llama.cpp's llama-quantize makes such a file")
    if not body.get("from") and not body.get("files"):
        raise RequestError("neither 'from' or 'files' was specified")
    licenses = body.get("license") or []
    return Recipe(
        files=_digests(body, "files"),
        adapters=_digests(body, "adapters"),
        parameters=_parameters(body.get("parameters", {})),
        system=body.get("system") or None,
        template=body.get("template") or None,
        messages=tuple(body["messages"]) if body.get("messages") else None,
        licenses=tuple(_texts([licenses] if isinstance(licenses, str) else licenses)),
    )


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Each of its type: a model with one of another would refuse every question."""
    try:
        effective(given, {})
    except OptionError as error:
        raise RequestError(error.message) from None  # 500 is for a request's own options
    return {name: value for name, value in given.items() if value is not None}


def _digests(body: Mapping[str, Any], field: str) -> dict[str, str]:
    digests = body.get(field, {})
    for name, digest in digests.items():
        if not isinstance(digest, str):
            raise RequestError(f"{field}: {name} must be the digest of a blob")
    return dict(digests)


def _texts(values: object) -> Iterable[str]:
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise RequestError("license must be a text or a list of texts")
    return values


def _name_of(body: Mapping[str, Any]) -> str:
    name: str = body.get("model") or body.get("name") or ""
    return name


def _digest_of(request: web.Request) -> str:
    try:
        return normal_digest(request.match_info["digest"])
    except ManifestError as error:
        raise RequestError(error.message) from None
