"""Answers /api/chat and /api/generate: asks the engine, shortens a prompt it has no room for, writes its stream on as
Ollama's lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Model
from llamarunner.errors import EngineGoneError, EngineRefusalError, LlamaRunnerError, ModelNotFoundError, RequestError
from llamarunner.events import RequestTrace
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.figures import note_figures
from llamarunner.proxies.ollama import generate
from llamarunner.proxies.ollama.answer import Answer, line, rendered_reply
from llamarunner.proxies.ollama.asking import Asking, read_fields
from llamarunner.proxies.ollama.chat import chat_body, template_question
from llamarunner.proxies.ollama.lines import LineStream
from llamarunner.proxies.ollama.messages import text_only
from llamarunner.proxies.ollama.shortening import Shortening
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.sse import event_batches
from llamarunner.proxies.upstream import GONE, parse_answer, read_all, read_block
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)


class Answering:
    def __init__(self, relay: Relay, asking: Asking) -> None:
        self._relay = relay
        self._asking = asking

    async def chat(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        body = await read_fields(request, "ChatRequest")
        if not body.get("model"):
            raise RequestError("model is required")
        model, keep = self._asking.begin(body, trace)
        if not body.get("messages"):
            return await self._asking.load_or_unload(body, model, keep, trace, chat=True)
        asked = chat_body(body, model)
        if body.get("_debug_render_only"):
            return await self._render(body, model, keep, trace, asked)
        return await self._answer(request, trace, model, generate.CHAT, asked, keep, body)

    async def generate(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        body = await read_fields(request, "GenerateRequest")
        if not body.get("model"):
            raise ModelNotFoundError("")
        model, keep = self._asking.begin(body, trace)
        generate.refuse_picture_making(body)
        if not body.get("prompt"):
            return await self._asking.load_or_unload(body, model, keep, trace, chat=False)
        path, asked = generate.plan(body, model)
        if body.get("_debug_render_only"):
            return await self._render(body, model, keep, trace, asked)
        if body.get("context") and path == generate.COMPLETION:
            return await self._continue(request, trace, model, keep, body, asked)
        return await self._answer(request, trace, model, path, asked, keep, body)

    async def _render(
        self, body: Mapping[str, Any], model: Model, keep: float | None, trace: RequestTrace, asked: dict[str, Any]
    ) -> web.Response:
        """Only the prompt that the model would see."""
        prompt, files = asked.get("prompt") or asked.get("input_prefix"), 0
        if not prompt:
            messages, files = text_only(asked.get("messages") or generate.messages(body, model))
            async with self._asking.lease(model, body, keep, trace) as lease:
                rendered = await self._relay.call(lease, "/apply-template", template_question(asked, messages))
            prompt = rendered["prompt"]
        return json_response(rendered_reply(body["model"], prompt, files, chat="messages" in body))

    async def _continue(
        self,
        request: web.Request,
        trace: RequestTrace,
        model: Model,
        keep: float | None,
        body: Mapping[str, Any],
        asked: dict[str, Any],
    ) -> web.StreamResponse:
        """A prompt that follows on the tokens of an earlier answer: rendered, and put behind them as text."""
        async with self._asking.lease(model, body, keep, trace) as lease:
            try:
                earlier = await self._relay.call(lease, "/detokenize", {"tokens": body["context"]})
            except EngineRefusalError as refusal:
                raise RequestError(generate.NOT_TOKENS) from refusal
            asked["prompt"] = earlier["content"] + (asked["prompt"] or await self._turn(lease, body, model))
            shorten = Shortening(self._relay, model, body, asked, trace)
            async with self._relay.ask_shortened(
                lease, generate.COMPLETION, orjson.dumps(asked), trace, shorten
            ) as upstream:
                return await self._write(request, trace, model, body, upstream, lease)

    async def _turn(self, lease: Lease, body: Mapping[str, Any], model: Model) -> str:
        messages, _ = text_only(generate.messages(body, model))
        rendered = await self._relay.call(lease, "/apply-template", {"messages": messages})
        prompt: str = rendered["prompt"]
        return prompt

    async def _answer(
        self,
        request: web.Request,
        trace: RequestTrace,
        model: Model,
        path: str,
        asked: dict[str, Any],
        keep: float | None,
        body: Mapping[str, Any],
    ) -> web.StreamResponse:
        shorten = Shortening(self._relay, model, body, asked, trace)
        demand = self._asking.demand(model, body)
        async with self._relay.ask(
            model, path, orjson.dumps(asked), trace, keep_alive_s=keep, demand=demand, shorten=shorten
        ) as (
            upstream,
            lease,
        ):
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
            rendered = generate.own_template(body, model) or await self._turn(lease, body, model)
            text = rendered + "".join(answer.content)
            tokens = await self._relay.call(lease, "/tokenize", {"content": text, "add_special": True})
        except EngineRefusalError as refusal:
            logger.info("%s: no context for this answer: %s", model.name, refusal)
            return None
        return [*(body.get("context") or ()), *tokens["tokens"]]


async def _read(
    upstream: aiohttp.ClientResponse, answer: Answer, trace: RequestTrace, writer: LineStream | None
) -> None:
    """Take in the engine's whole answer, writing on as it comes. Raises EngineGoneError where it ends too soon."""
    if upstream.content_type == "application/json":
        lines = answer.feed_whole(parse_answer(await read_all(upstream)))
        await _pass_on(lines, trace, writer)
    else:
        async for events in event_batches(partial(read_block, upstream)):
            trace.output_tokens = (trace.output_tokens or 0) + len(events)
            lines, error = answer.feed_all(events)
            await _pass_on(lines, trace, writer)
            if error is not None:
                raise error
    if not answer.finish_reason:
        raise EngineGoneError(GONE)


async def _pass_on(lines: bytes, trace: RequestTrace, writer: LineStream | None) -> None:
    if lines:
        trace.first_byte = trace.first_byte or time.monotonic()
        if writer is not None:
            await writer.write(lines)
