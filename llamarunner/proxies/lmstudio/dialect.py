"""LM Studio's port: the table of its routes, and what each does."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Model
from llamarunner.errors import EngineGoneError, LlamaRunnerError
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import json_kind, read_object
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.figures import note_figures
from llamarunner.proxies.lmstudio import describe
from llamarunner.proxies.lmstudio.errors import FieldError, NoModelError, error_body, repeat_message, stream_error
from llamarunner.proxies.openai import OpenAIRoutes
from llamarunner.proxies.proxy import route
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.sse import DONE, amend_lines, event_batches
from llamarunner.proxies.stream import EventStream
from llamarunner.proxies.upstream import parse_answer, read_all, read_block
from llamarunner.proxies.v1_errors import anthropic_error, is_anthropic
from llamarunner.runners.manager import Lease

_CHAT = "/v1/chat/completions"


class LMStudioDialect:
    name = "lmstudio"
    title = "LM Studio"
    open_paths: tuple[str, ...] = ()

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._openai = LMStudioOpenAI(relay, self)

    def routes(self) -> list[web.RouteDef]:
        return [
            *self._openai.routes(),
            *route("GET", "/api/v0/models", self._models),
            web.get("/api/v0/models/{model:.+}", self._model),
            *route("POST", "/api/v0/chat/completions", self._relay.traced(self, self._chat)),
        ]

    # -- errors ------------------------------------------------------------------------------------------------------

    def error_body(self, error: LlamaRunnerError, path: str) -> object:
        return error_body(error, (model.name for model in self._relay.catalog if not model.problem), path)

    def error_status(self, error: LlamaRunnerError, path: str) -> int:
        return error.status

    def stream_error(self, error: LlamaRunnerError, path: str) -> object:
        return stream_error(error, path)

    def refuse_key(self, path: str) -> object:
        message = (
            "An LM Studio API token is required to make requests to this server. Provide it with the 'Bearer' scheme "
            "in the Authorization header. See https://lmstudio.ai/docs/developer/core/authentication."
        )
        if is_anthropic(path):
            return anthropic_error(401, message)
        kind = "invalid_request" if path.startswith("/api/") else "invalid_request_error"
        return {"error": {"type": kind, "code": "invalid_api_key", "message": message}}

    # -- REST v0 -----------------------------------------------------------------------------------------------------

    async def _models(self, _request: web.Request) -> web.Response:
        usable = [model for model in self._relay.catalog if not model.problem]
        return json_response({"object": "list", "data": [self._record(model) for model in usable]})

    async def _model(self, request: web.Request) -> web.Response:
        return json_response(self._record(self._relay.catalog.find(request.match_info["model"].rstrip("/"))))

    def _record(self, model: Model) -> dict[str, Any]:
        return describe.model_v0(model, self._relay.manager.residence(model.name))

    async def _chat(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        raw, body = await read_object(request)
        model = self._openai.begin(body, trace)
        if self._openai.check_chat(body, model):
            raw = orjson.dumps(body)
        keep = self._openai.keep_alive(body)
        async with self._relay.ask(model, _CHAT, raw, trace, keep_alive_s=keep) as (upstream, lease):
            tail = _Tail(model, lease, trace)
            if trace.stream:
                return await self._stream(request, upstream, trace, tail)
            answer = parse_answer(await read_all(upstream))
        trace.first_byte = time.monotonic()
        note_figures(trace, answer)
        choices = answer.get("choices") or [{}]
        tail.finish_reason = choices[0].get("finish_reason") or ""
        return json_response({**answer, **tail.fields(answer.get("timings") or {})})

    async def _stream(
        self, request: web.Request, upstream: aiohttp.ClientResponse, trace: RequestTrace, tail: _Tail
    ) -> web.StreamResponse:
        """The engine's events as they are, but for the one with the figures, which gets LM Studio's own as well."""
        stream = EventStream(request, trace, self)
        try:
            async for events in event_batches(partial(read_block, upstream)):
                trace.output_tokens = (trace.output_tokens or 0) + len(events)
                await stream.write(b"".join(b"data: " + tail.add_to(event) + b"\n\n" for event in events))
        except EngineGoneError as error:
            await stream.fail(error)
        return await stream.end()


class LMStudioOpenAI(OpenAIRoutes):
    """/v1/* as LM Studio has it, with its `ttl` (seconds) as an extension."""

    def model_record(self, model: Model) -> dict[str, Any]:
        created = int(model.modified_at)  # LM Studio leaves it out, and strict clients break on that
        return {"id": model.name, "object": "model", "created": created, "owned_by": "organization_owner"}

    def amend(self, data: bytes) -> bytes:
        return amend_lines(data, b'"error"', repeat_message)

    def keep_alive(self, body: dict[str, Any]) -> float | None:
        ttl = body.get("ttl")
        if ttl is None:
            return None
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or ttl < 0:
            raise FieldError("'ttl' must be a number of seconds")
        return float(ttl)

    def find(self, body: dict[str, Any]) -> Model:
        """Without a name, the one model that is loaded."""
        if body.get("model") in (None, ""):
            loaded = self._relay.manager.loaded
            if len(loaded) == 1:
                return loaded[0]
            raise NoModelError(
                "Multiple models are loaded. Please specify a model by providing a 'model' field in the request body."
                if loaded
                else "No models loaded. Please load a model in the developer page or use the `lms load` command."
            )
        if not isinstance(body["model"], str):
            raise FieldError(f"'model' must be a string, not {json_kind(body['model'])}")
        return super().find(body)

    def check_chat(self, body: dict[str, Any], model: Model) -> bool:
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise FieldError("'messages' field is required")
        return super().check_chat(body, model)

    def check_completion(self, body: dict[str, Any], model: Model) -> bool:
        if body.get("prompt") is None:
            raise FieldError("'prompt' field is required")
        return super().check_completion(body, model)

    def check_embeddings(self, body: dict[str, Any], model: Model) -> bool:
        if body.get("input") is None:
            raise FieldError("'input' field is required")
        return super().check_embeddings(body, model)


class _Tail:
    """What LM Studio adds to the end of an answer."""

    def __init__(self, model: Model, lease: Lease, trace: RequestTrace) -> None:
        self._model = model
        self._context = lease.runner.context
        self._trace = trace
        self.finish_reason = ""

    def add_to(self, event: bytes) -> bytes:
        """The event, and with the figures where it has the engine's. Only the last events are decoded."""
        has_figures = b'"timings"' in event
        if self._trace.first_byte is None and b'"content":null' not in event:
            self._trace.first_byte = time.monotonic()
        if event == DONE or (b'"finish_reason":null' in event and not has_figures):
            return event
        try:
            record = orjson.loads(event)
        except orjson.JSONDecodeError:
            return event
        if not isinstance(record, dict):
            return event
        for choice in record.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if isinstance(record.get("error"), dict):
            self._trace.error = "the engine reported an error"
            repeat_message(record)
            return orjson.dumps(record)
        if not has_figures:
            return event
        note_figures(self._trace, record)
        return orjson.dumps({**record, **self.fields(record["timings"])})

    def fields(self, timings: dict[str, Any]) -> dict[str, Any]:
        first = self._trace.first_byte or time.monotonic()
        # an answer that is not streamed shows no first token: the prompt's time is when it came
        waited = first - self._trace.started if self._trace.stream else (timings.get("prompt_ms") or 0.0) / 1000
        return {
            "stats": describe.stats(timings, waited, self.finish_reason, self._context),
            "model_info": describe.model_info(self._model, self._context),
            "runtime": describe.runtime(self._model.settings.engine),
        }
