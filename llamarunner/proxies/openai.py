"""/v1/*: OpenAI's API and Anthropic's, which both ports offer. llama-server speaks them, so requests and answers pass
through as bytes.

What differs between the ports (how models are listed, the words of errors, defaults) is in their subclasses; what is
peculiar to one API, in `responses`, `messages` and `detour`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import EngineRefusalError, RequestError, UnsupportedError
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import QuotingError, json_kind, read_object
from llamarunner.proxies.detour import Detour, dimensions_detour, infill_detour
from llamarunner.proxies.dialect import Dialect, json_response
from llamarunner.proxies.extras import check_detokenize, check_rerank, check_tokenize
from llamarunner.proxies.messages import amend_messages, check_counted_body, check_messages_body
from llamarunner.proxies.ollama.preset import (
    lay_under_chat,
    lay_under_completion,
    lay_under_messages,
    lay_under_response,
)
from llamarunner.proxies.openai_body import check_messages, check_tools, require_chat
from llamarunner.proxies.proxy import route
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.responses import ResponseEvents, check_responses_body
from llamarunner.runners.demand import NO_DEMAND, Demand

_NO_SUCH_ROUTE = (404, 405, 501)


class OpenAIRoutes(ABC):
    def __init__(self, relay: Relay, dialect: Dialect) -> None:
        self._relay = relay
        self._dialect = dialect

    def routes(self) -> list[web.RouteDef]:
        return [
            *route("GET", "/v1/models", self._list),
            web.get("/v1/models/{model:.+}", self._retrieve),
            *self._post("/v1/chat/completions", self.check_chat),
            *self._post("/v1/completions", self.check_completion, detour=infill_detour),
            *self._post("/v1/embeddings", self.check_embeddings, detour=dimensions_detour),
            *self._post("/v1/responses", self.check_responses, amend=ResponseEvents),
            *self._post("/v1/messages", self.check_messages, amend=lambda: amend_messages),
            *self._post("/v1/messages/count_tokens", self.check_counted, amend=lambda: amend_messages),
            *self._post("/v1/rerank", check_rerank),
            *self._post("/tokenize", check_tokenize),
            *self._post("/detokenize", check_detokenize),
        ]

    @abstractmethod
    def model_record(self, model: Model) -> dict[str, Any]: ...

    def model_records(self, model: Model) -> list[dict[str, Any]]:
        """One for each name it is listed under."""
        return [self.model_record(model)]

    @abstractmethod
    def amend(self, data: bytes) -> bytes:
        """An engine's answer, or whole lines of it, with what the dialect changes."""

    @abstractmethod
    def keep_alive(self, body: dict[str, Any]) -> float | None:
        """The dialect's own extension that says how long the model stays."""

    def demand(self, body: dict[str, Any], model: Model) -> Demand:
        """The dialect's own extension that says how the model must be loaded."""
        return NO_DEMAND

    def find(self, body: dict[str, Any]) -> Model:
        """The model the body names."""
        name = body.get("model")
        if name is None or name == "":
            raise RequestError("model is required")
        if not isinstance(name, str):
            raise RequestError(f"model must be a string, not {json_kind(name)}")
        return self._relay.catalog.find(name)

    def begin(self, body: dict[str, Any], trace: RequestTrace) -> Model:
        """The model of `body`; what `trace` may know of both."""
        if isinstance(name := body.get("model"), str):
            trace.model = name
        stream = body.get("stream")
        if stream is not None and not isinstance(stream, bool):
            raise RequestError(f"stream must be true or false, not {json_kind(stream)}")
        trace.stream = stream is True
        model = self.find(body)
        trace.model = model.name
        return model

    def check_chat(self, body: dict[str, Any], model: Model) -> bool:
        """Raise RequestError for what the engine must not see; True where `body` was changed."""
        require_chat(model)
        check_messages(body.get("messages"), model)
        if body.get("tools") is not None:
            check_tools(body["tools"])
        return lay_under_chat(body, model)

    def check_completion(self, body: dict[str, Any], model: Model) -> bool:
        if model.is_embedding_only:
            raise UnsupportedError(f'"{model.name}" does not support completion')
        return lay_under_completion(body, model)

    def check_embeddings(self, body: dict[str, Any], model: Model) -> bool:
        require_embeddings(model)
        return False

    def check_responses(self, body: dict[str, Any], model: Model) -> bool:
        require_chat(model)
        is_changed = check_responses_body(body, model)
        return lay_under_response(body, model) or is_changed

    def check_messages(self, body: dict[str, Any], model: Model) -> bool:
        require_chat(model)
        check_messages_body(body, model)
        return lay_under_messages(body, model)

    def check_counted(self, body: dict[str, Any], model: Model) -> bool:
        require_chat(model)
        check_counted_body(body, model)
        return lay_under_messages(body, model)

    async def _list(self, request: web.Request) -> web.Response:
        """Another LlamaRunner is told of our own models alone: two that use each other would list them in a circle."""
        is_one_of_us = request.headers.get("User-Agent", "").startswith("llamarunner/")
        usable = [
            model for model in self._relay.catalog if not model.problem and not (is_one_of_us and model.is_remote)
        ]
        records = [record for model in usable for record in self.model_records(model)]
        return json_response({"object": "list", "data": records})

    async def _retrieve(self, request: web.Request) -> web.Response:
        model = self._relay.catalog.find(request.match_info["model"].rstrip("/"))
        return json_response(self.model_record(model))

    def _post(
        self,
        path: str,
        check: Callable[[dict[str, Any], Model], bool],
        *,
        detour: Callable[[dict[str, Any], Model], Detour | None] = lambda _body, _model: None,
        amend: Callable[[], Callable[[bytes], bytes]] | None = None,
    ) -> list[web.RouteDef]:
        """The route of one API. `amend` makes, for each answer, what changes it, in place of the dialect's own."""

        async def forward(request: web.Request, trace: RequestTrace) -> web.StreamResponse:
            raw, body = await read_object(request)
            model = self.begin(body, trace)
            if check(body, model):
                raw = orjson.dumps(body)
            change = self.amend if amend is None else amend()
            asked_path = path
            if other := detour(body, model):
                asked_path, raw, change = other.path, orjson.dumps(other.body), other.amend
            keep, demand = self.keep_alive(body), self.demand(body, model)
            try:
                async with self._relay.ask(model, asked_path, raw, trace, keep_alive_s=keep, demand=demand) as (
                    upstream,
                    _,
                ):
                    return await self._relay.pass_through(request, upstream, trace, self._dialect, change)
            except EngineRefusalError as refusal:
                if refusal.status in _NO_SUCH_ROUTE and amend is not None:
                    raise _not_served(model, path, refusal) from refusal
                raise

        return route("POST", path, self._relay.traced(self._dialect, forward))


def require_embeddings(model: Model) -> None:
    """An engine must be started for embeddings: one that was not cannot make them."""
    if Capability.EMBEDDING not in model.capabilities:
        raise UnsupportedError(
            f"{model.name} does not support embeddings", hint="set `embeddings = true` for it in config.toml"
        )


def _not_served(model: Model, path: str, refusal: EngineRefusalError) -> QuotingError:
    summary = f"the engine of {model.name} does not serve {path}"
    return QuotingError(f"{summary}, use /v1/chat/completions instead (it says: {refusal})", summary=summary)
