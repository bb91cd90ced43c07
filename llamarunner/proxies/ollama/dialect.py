"""Ollama's port: the table of its routes, and what each does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Model
from llamarunner.errors import (
    EngineGoneError,
    EngineRefusalError,
    LlamaRunnerError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import parse_object, read_body
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.figures import note_figures
from llamarunner.proxies.ollama import describe
from llamarunner.proxies.ollama.answer import Answer, bare_reply, line
from llamarunner.proxies.ollama.errors import error_body
from llamarunner.proxies.ollama.fields import check_request
from llamarunner.proxies.ollama.lines import LineStream
from llamarunner.proxies.ollama.messages import (
    chat_body,
    completion_body,
    generate_body,
    generate_messages,
    infill_body,
)
from llamarunner.proxies.ollama.openai import OllamaOpenAI
from llamarunner.proxies.ollama.options import keep_alive_s
from llamarunner.proxies.proxy import route
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.sse import event_batches
from llamarunner.proxies.upstream import GONE, read_block
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)

API_VERSION = "0.30.1"
"""The Ollama release whose API this is. Clients compare it as dotted numbers; our own version is in `Server`."""

_MOST_TOKENS = 2**31  # llama.cpp counts them in 32 bits
_NOT_TOKENS = "context holds numbers that are no tokens of this model"


class OllamaDialect:
    name = "ollama"
    title = "Ollama"
    open_paths: tuple[str, ...] = ("/", "/api/version")

    def __init__(self, relay: Relay, memory: Callable[[], Mapping[int, tuple[int, int]]]) -> None:
        """`memory` gives (RAM, GPU) bytes of each engine by its process."""
        self._relay = relay
        self._memory = memory
        self._openai = OllamaOpenAI(relay, self)

    def routes(self) -> list[web.RouteDef]:
        traced = self._relay.traced
        return [
            *route("GET", "/", self._greet),
            *route("GET", "/api/version", self._version),
            *route("GET", "/api/tags", self._tags),
            *route("GET", "/api/ps", self._ps),
            *route("POST", "/api/show", self._show),
            *route("POST", "/api/chat", traced(self, self._chat)),
            *route("POST", "/api/generate", traced(self, self._generate)),
            *self._openai.routes(),
        ]

    # -- errors ------------------------------------------------------------------------------------------------------

    def error_body(self, error: LlamaRunnerError, path: str) -> object:
        return error_body(error, path)

    def error_status(self, error: LlamaRunnerError, path: str) -> int:
        return error.status

    def stream_error(self, error: LlamaRunnerError, path: str) -> object:
        return error_body(error, path)

    def refuse_key(self, path: str) -> object:
        if path.startswith("/v1/"):
            return {"error": {"message": "unauthorized", "type": "authentication_error", "param": None, "code": None}}
        return {"error": "unauthorized"}

    # -- what there is -----------------------------------------------------------------------------------------------

    async def _greet(self, _request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, _request: web.Request) -> web.Response:
        return json_response({"version": API_VERSION})

    async def _tags(self, _request: web.Request) -> web.Response:
        return json_response(describe.tags(self._relay.catalog))

    async def _ps(self, _request: web.Request) -> web.Response:
        manager = self._relay.manager
        residences = [(model, manager.residence(model.name)) for model in self._relay.catalog]
        known = [(model, residence) for model, residence in residences if residence is not None]
        return json_response(describe.running(known, self._memory(), datetime.now(UTC)))

    async def _show(self, request: web.Request) -> web.Response:
        body = await _fields(request, "ShowRequest")
        name = body.get("model") or body.get("name")
        if not name:
            raise RequestError("model is required")
        model = self._relay.catalog.find(name)
        return json_response(describe.show(model, name, user_agent=request.headers.get("User-Agent", "")))

    # -- answers -----------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        body = await _fields(request, "ChatRequest")
        if not body.get("model"):
            raise RequestError("model is required")
        model, keep = self._begin(body, trace)
        if not body.get("messages"):
            return await self._load_or_unload(body, model, keep, trace, chat=True)
        asked = orjson.dumps(chat_body(body, model))
        return await self._answer(request, trace, model, "/v1/chat/completions", asked, keep, body)

    async def _generate(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        body = await _fields(request, "GenerateRequest")
        if not body.get("model"):
            raise ModelNotFoundError("")
        model, keep = self._begin(body, trace)
        if not body.get("prompt"):
            return await self._load_or_unload(body, model, keep, trace, chat=False)
        if model.is_embedding_only:
            raise UnsupportedError(f'"{body["model"]}" does not support generate')
        if body.get("template"):
            raise RequestError("a template of the request's own is not supported", hint="use raw mode")
        if body.get("raw"):
            if body.get("system") or body.get("context"):
                raise RequestError("raw mode does not support template, system, or context")
            asked = orjson.dumps(completion_body(body, model, body["prompt"]))
            return await self._answer(request, trace, model, "/completion", asked, keep, body)
        if body.get("suffix"):
            return await self._answer(
                request, trace, model, "/infill", orjson.dumps(infill_body(body, model)), keep, body
            )
        if body.get("context"):
            return await self._continue(request, trace, model, keep, body)
        asked = orjson.dumps(generate_body(body, model))
        return await self._answer(request, trace, model, "/v1/chat/completions", asked, keep, body)

    def _begin(self, body: Mapping[str, Any], trace: RequestTrace) -> tuple[Model, float | None]:
        """What every request for an answer says first."""
        trace.model, trace.stream = body["model"], body.get("stream", True)
        model = self._relay.catalog.find(trace.model)
        trace.model = model.name
        return model, keep_alive_s(body.get("keep_alive"))

    async def _load_or_unload(
        self, body: Mapping[str, Any], model: Model, keep: float | None, trace: RequestTrace, *, chat: bool
    ) -> web.Response:
        """Without a prompt, a request only loads its model, or with keep_alive 0 lets it go."""
        if keep == 0:
            self._relay.manager.expire(model)
            return json_response(bare_reply(body["model"], "unload", chat=chat))
        async with self._relay.manager.acquire(model, trace, keep_alive_s=keep):
            pass
        return json_response(bare_reply(body["model"], "load", chat=chat))

    async def _continue(
        self, request: web.Request, trace: RequestTrace, model: Model, keep: float | None, body: dict[str, Any]
    ) -> web.StreamResponse:
        """A prompt that follows on the tokens of an earlier answer: rendered, and put behind them as text."""
        if not all(0 <= token < _MOST_TOKENS for token in body["context"]):
            raise RequestError(_NOT_TOKENS)
        turn = {"messages": generate_messages(body, model), "add_generation_prompt": True}
        completion_body(body, model, "")  # what is wrong with the request is told before its model is loaded
        async with self._relay.manager.acquire(model, trace, keep_alive_s=keep) as lease:
            try:
                earlier = await self._relay.call(lease, "/detokenize", {"tokens": body["context"]})
            except EngineRefusalError as refusal:
                raise RequestError(_NOT_TOKENS) from refusal
            rendered = await self._relay.call(lease, "/apply-template", turn)
            asked = orjson.dumps(completion_body(body, model, earlier["content"] + rendered["prompt"]))
            async with self._relay.ask_under(lease, "/completion", asked) as upstream:
                return await self._write(request, trace, model, body, upstream, lease)

    async def _answer(
        self,
        request: web.Request,
        trace: RequestTrace,
        model: Model,
        path: str,
        asked: bytes,
        keep: float | None,
        body: Mapping[str, Any],
    ) -> web.StreamResponse:
        async with self._relay.ask(model, path, asked, trace, keep_alive_s=keep) as (upstream, lease):
            return await self._write(request, trace, model, body, upstream, lease)

    async def _write(
        self,
        request: web.Request,
        trace: RequestTrace,
        model: Model,
        body: Mapping[str, Any],
        upstream: aiohttp.ClientResponse,
        lease: Lease,
    ) -> web.StreamResponse:
        """The engine's stream in Ollama's shape, streamed or whole."""
        chat = request.path.startswith("/api/chat")
        load_ns = round(lease.waited_s * 1e9)
        answer = Answer(body["model"], chat=chat, started_ns=round(trace.started * 1e9), load_ns=load_ns)
        writer = LineStream(request, trace) if trace.stream else None
        try:
            await _read(upstream, answer, trace, writer)
            context = None if chat or body.get("raw") else await self._context(lease, body, model, answer)
        except LlamaRunnerError as error:
            if writer is None or not writer.has_begun:
                raise
            return await writer.fail(error)
        note_figures(trace, {"timings": answer.timings, "usage": answer.usage})
        if writer is None:
            return json_response(answer.whole(context))
        await writer.write(line(answer.final(context)))
        return await writer.end()

    async def _context(self, lease: Lease, body: Mapping[str, Any], model: Model, answer: Answer) -> list[int] | None:
        """The tokens of prompt and answer, which clients may send back to go on from here; None where the engine has no
        way to tell."""
        if body.get("suffix") or not lease.plan.is_llama_cpp:
            return None
        try:
            rendered = await self._relay.call(lease, "/apply-template", {"messages": generate_messages(body, model)})
            text = rendered["prompt"] + "".join(answer.content)
            tokens = await self._relay.call(lease, "/tokenize", {"content": text, "add_special": True})
        except EngineRefusalError as refusal:
            logger.info("%s: no context for this answer: %s", model.name, refusal)
            return None
        return [*(body.get("context") or ()), *tokens["tokens"]]


async def _read(
    upstream: aiohttp.ClientResponse, answer: Answer, trace: RequestTrace, writer: LineStream | None
) -> None:
    """Take in the engine's whole stream, writing on as it comes. Raises EngineGoneError where it ends too soon."""
    async for events in event_batches(partial(read_block, upstream)):
        trace.output_tokens = (trace.output_tokens or 0) + len(events)
        lines, error = answer.feed_all(events)
        if lines:
            trace.first_byte = trace.first_byte or time.monotonic()
            if writer is not None:
                await writer.write(lines)
        if error is not None:
            raise error
    if not answer.finish_reason:
        raise EngineGoneError(GONE)


async def _fields(request: web.Request, struct: str) -> dict[str, Any]:
    """The body's fields, in lower case: to Go, `Model` is `model`."""
    body = parse_object(await read_body(request))
    return check_request({key.lower(): value for key, value in body.items()}, struct)
