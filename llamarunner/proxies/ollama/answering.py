"""Answers /api/chat and /api/generate: asks the engine, shortens a prompt it has no room for, writes its stream on as
Ollama's lines."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamarunner.errors import (
    EngineGoneError,
    EngineRefusalError,
    LlamaRunnerError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)
from llamarunner.events import RequestTrace
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.figures import loggable, note_figures
from llamarunner.proxies.ollama import generate
from llamarunner.proxies.ollama.answer import Answer, line, rendered_reply
from llamarunner.proxies.ollama.asking import Asking, Question, read_fields
from llamarunner.proxies.ollama.chat import chat_body, template_question
from llamarunner.proxies.ollama.lines import LineStream
from llamarunner.proxies.ollama.messages import text_only
from llamarunner.proxies.ollama.shortening import Shortening
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.sse import event_batches
from llamarunner.proxies.upstream import GONE, NOT_IMPLEMENTED, parse_answer, read_all, read_block
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)


class Answering:
    def __init__(self, relay: Relay, asking: Asking) -> None:
        self._relay = relay
        self._asking = asking

    async def chat(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        fields = await read_fields(request, "ChatRequest")
        if not fields.get("model"):
            raise RequestError("model is required")
        question = self._asking.begin(request, fields, trace)
        if not fields.get("messages"):
            return await self._asking.load_or_unload(question, chat=True)
        body = chat_body(fields, question.model)
        if fields.get("_debug_render_only"):
            return await self._render(question, body)
        return await self._answer(question, generate.CHAT, body)

    async def generate(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        fields = await read_fields(request, "GenerateRequest")
        if not fields.get("model"):
            raise ModelNotFoundError("")
        question = self._asking.begin(request, fields, trace)
        generate.refuse_picture_making(fields)
        if not fields.get("prompt"):
            return await self._asking.load_or_unload(question, chat=False)
        path, body = generate.plan(fields, question.model)
        if fields.get("_debug_render_only"):
            return await self._render(question, body)
        if fields.get("context") and path == generate.COMPLETION:
            return await self._continue(question, body)
        return await self._answer(question, path, body)

    async def _render(self, question: Question, body: dict[str, Any]) -> web.Response:
        """Only the prompt that the model would see."""
        prompt, files = body.get("prompt") or body.get("input_prefix"), 0
        if not prompt:
            messages, files = text_only(body.get("messages") or generate.messages(question.fields, question.model))
            async with self._asking.lease(question) as lease:
                rendered = await self._relay.call(lease, "/apply-template", template_question(body, messages))
            prompt = rendered["prompt"]
        return json_response(rendered_reply(question.asked_name, prompt, files, chat=question.is_chat))

    async def _continue(self, question: Question, body: dict[str, Any]) -> web.StreamResponse:
        """A prompt that follows on the tokens of an earlier answer: rendered, and put behind them as text."""
        async with self._asking.lease(question) as lease:
            try:
                earlier = await self._relay.call(lease, "/detokenize", {"tokens": question.fields["context"]})
            except EngineRefusalError as refusal:
                raise RequestError(generate.NOT_TOKENS) from refusal
            body["prompt"] = earlier["content"] + (body["prompt"] or await self._turn(lease, question))
            shorten = Shortening(self._relay, question, body)
            async with self._relay.ask_shortened(
                lease, generate.COMPLETION, orjson.dumps(body), question.trace, shorten
            ) as upstream:
                return await self._write(question, upstream, lease)

    async def _turn(self, lease: Lease, question: Question) -> str:
        messages, _ = text_only(generate.messages(question.fields, question.model))
        rendered = await self._relay.call(lease, "/apply-template", {"messages": messages})
        prompt: str = rendered["prompt"]
        return prompt

    async def _answer(self, question: Question, path: str, body: dict[str, Any]) -> web.StreamResponse:
        shorten = Shortening(self._relay, question, body)
        try:
            async with self._asking.answer(question, path, orjson.dumps(body), shorten) as (upstream, lease):
                return await self._write(question, upstream, lease)
        except EngineRefusalError as refusal:
            if path == generate.INFILL and refusal.status == NOT_IMPLEMENTED:
                raise UnsupportedError(f"{question.model.name} does not support insert") from refusal
            raise

    async def _write(self, question: Question, upstream: aiohttp.ClientResponse, lease: Lease) -> web.StreamResponse:
        """The engine's stream in Ollama's shape, streamed or whole."""
        trace, chat = question.trace, question.is_chat
        load_ns = round(lease.waited_s * 1e9)
        answer = Answer(question.asked_name, chat=chat, started_ns=round(trace.started * 1e9), load_ns=load_ns)
        writer = LineStream(question.request, trace) if trace.stream else None
        try:
            await _read(upstream, answer, trace, writer)
            context = None if chat or question.fields.get("raw") else await self._context(lease, question, answer)
        except LlamaRunnerError as error:
            if writer is None or not writer.has_begun:
                raise
            return await writer.fail(error)
        note_figures(trace, {"timings": answer.timings, "usage": answer.usage})
        if writer is None:
            return json_response(answer.whole(context))
        await writer.write(line(answer.final(context)))
        return await writer.end()

    async def _context(self, lease: Lease, question: Question, answer: Answer) -> list[int] | None:
        """The tokens of prompt and answer, which clients may send back to go on from here; None where the engine has no
        way to tell."""
        fields, model = question.fields, question.model
        if fields.get("suffix") or not lease.plan.is_llama_cpp:
            return None
        try:
            rendered = generate.own_template(fields, model) or await self._turn(lease, question)
            text = rendered + "".join(answer.content)
            tokens = await self._relay.call(lease, "/tokenize", {"content": text, "add_special": True})
        except EngineRefusalError as refusal:
            logger.info("%s: no context for this answer: %s", model.name, loggable(refusal))
            return None
        return [*(fields.get("context") or ()), *tokens["tokens"]]


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
