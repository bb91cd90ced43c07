"""Ollama's port: the table of its routes, and what there is to be told of models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.gguf import read_header, read_tensors
from llamarunner.catalog.librarian import Librarian
from llamarunner.config.schema import ClientContext
from llamarunner.errors import LlamaRunnerError, ModelFileError, RequestError
from llamarunner.proxies.dialect import JSON_TYPE, json_response
from llamarunner.proxies.ollama import describe
from llamarunner.proxies.ollama.answering import Answering
from llamarunner.proxies.ollama.asking import Asking, read_fields
from llamarunner.proxies.ollama.cloud import cloud_routes
from llamarunner.proxies.ollama.embedding import Embedding
from llamarunner.proxies.ollama.errors import error_body, stream_error
from llamarunner.proxies.ollama.library import LibraryRoutes
from llamarunner.proxies.ollama.openai import OllamaOpenAI
from llamarunner.proxies.ollama.show import Files, show
from llamarunner.proxies.proxy import route
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.v1_errors import anthropic_error, is_anthropic

logger = logging.getLogger(__name__)

API_VERSION = "0.30.1"
"""The Ollama release whose API this is. Clients compare it as dotted numbers; our own version is in `Server`."""


class OllamaDialect:
    name = "ollama"
    title = "Ollama"
    open_paths: tuple[str, ...] = ("/", "/api/version")

    def __init__(
        self,
        relay: Relay,
        memory: Callable[[], Mapping[int, tuple[int, int]]],
        librarian: Librarian,
        *,
        client_context: ClientContext = "grow-only",
    ) -> None:
        """`memory` gives (RAM, GPU) bytes of each engine by its process."""
        self._relay = relay
        self._memory = memory
        self._library = LibraryRoutes(relay, self, librarian)
        asking = Asking(relay, client_context)
        self._openai = OllamaOpenAI(relay, self, asking)
        self._answering = Answering(relay, asking)
        self._embedding = Embedding(relay, asking)
        self._tags_of: Catalog | None = None
        self._tags_body = b""  # of /api/tags, for that catalogue

    def routes(self) -> list[web.RouteDef]:
        traced = self._relay.traced
        return [
            *route("GET", "/", self._greet),
            *route("GET", "/api/version", self._version),
            *route("GET", "/api/tags", self._tags),
            *route("GET", "/api/ps", self._ps),
            *route("POST", "/api/show", self._show),
            *route("POST", "/api/chat", traced(self, self._answering.chat)),
            *route("POST", "/api/generate", traced(self, self._answering.generate)),
            *route("POST", "/api/embed", traced(self, self._embedding.embed)),
            *route("POST", "/api/embeddings", traced(self, self._embedding.embeddings)),
            *self._library.routes(),
            *cloud_routes(),
            *self._openai.routes(),
        ]

    # -- errors ------------------------------------------------------------------------------------------------------

    def error_body(self, error: LlamaRunnerError, path: str) -> object:
        return error_body(error, path)

    def error_status(self, error: LlamaRunnerError, path: str) -> int:
        return error.status

    def stream_error(self, error: LlamaRunnerError, path: str) -> object:
        return stream_error(error, path)

    def refuse_key(self, path: str) -> object:
        if is_anthropic(path):
            return anthropic_error(401, "unauthorized")
        if path.startswith("/v1/"):
            return {"error": {"message": "unauthorized", "type": "authentication_error", "param": None, "code": None}}
        return {"error": "unauthorized"}

    # -- what there is -----------------------------------------------------------------------------------------------

    async def _greet(self, _request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, _request: web.Request) -> web.Response:
        return json_response({"version": API_VERSION})

    async def _tags(self, _request: web.Request) -> web.Response:
        """Made once for each catalogue, in a thread: thousands of models take a while, and clients ask often."""
        catalog, body = self._relay.catalog, self._tags_body
        if catalog is not self._tags_of:
            body = await asyncio.to_thread(lambda: orjson.dumps(describe.tags(catalog)))
            self._tags_of, self._tags_body = catalog, body
        return web.Response(body=body, headers={"Content-Type": JSON_TYPE})

    async def _ps(self, _request: web.Request) -> web.Response:
        manager, catalog = self._relay.manager, self._relay.catalog
        models = (*catalog, *manager.strays(catalog))
        residences = [(model, manager.residence(model.name)) for model in models]
        known = [(model, residence) for model, residence in residences if residence is not None]
        return json_response(describe.running(known, self._memory(), datetime.now(UTC)))

    async def _show(self, request: web.Request) -> web.Response:
        body = await read_fields(request, "ShowRequest")
        name = body.get("model") or body.get("name")
        if not name:
            raise RequestError("model is required")
        model = self._relay.catalog.find(name)
        files = await asyncio.to_thread(_look_into, model, verbose=body.get("verbose", False))
        return json_response(show(model, body, files, user_agent=request.headers.get("User-Agent", "")))


def _look_into(model: Model, *, verbose: bool) -> Files:
    """Reads the model's files. One that cannot be read tells nothing: what is wrong with it, its load will say."""
    projector, tensors = None, None
    try:
        projector = read_header(model.mmproj).metadata if model.mmproj is not None else None
        tensors = read_tensors(model.path) if verbose else None
    except ModelFileError as error:
        logger.info("%s: %s", model.name, error)
    return Files(projector, tensors)
