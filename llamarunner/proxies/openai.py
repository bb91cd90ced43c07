"""/v1/*: OpenAI's API, which both ports offer. llama-server speaks it, so requests and answers pass through as bytes.

What differs between the ports (how models are listed, the words of errors, defaults) is in their subclasses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import LlamaRunnerError, RequestError, UnsupportedError
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import json_kind, parse_object, read_body
from llamarunner.proxies.dialect import Dialect, json_response
from llamarunner.proxies.openai_body import check_messages, check_tools
from llamarunner.proxies.proxy import route
from llamarunner.proxies.relay import Relay

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
}


def openai_error(error: LlamaRunnerError, message: str, *, code: str | None = None) -> dict[str, Any]:
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class OpenAIRoutes(ABC):
    def __init__(self, relay: Relay, dialect: Dialect) -> None:
        self._relay = relay
        self._dialect = dialect

    def routes(self) -> list[web.RouteDef]:
        return [
            *route("GET", "/v1/models", self._list),
            web.get("/v1/models/{model:.+}", self._retrieve),
            *route("POST", "/v1/chat/completions", self._traced("/v1/chat/completions", self.check_chat)),
            *route("POST", "/v1/completions", self._traced("/v1/completions", self.check_completion)),
            *route("POST", "/v1/embeddings", self._traced("/v1/embeddings", self.check_embeddings)),
        ]

    @abstractmethod
    def model_record(self, model: Model) -> dict[str, Any]: ...

    @abstractmethod
    def amend(self, data: bytes) -> bytes:
        """An engine's answer, or whole lines of it, with what the dialect changes."""

    @abstractmethod
    def keep_alive(self, body: dict[str, Any]) -> float | None:
        """The dialect's own extension that says how long the model stays."""

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
        if model.is_embedding_only:
            raise UnsupportedError(f'"{model.name}" does not support chat')
        check_messages(body.get("messages"), model)
        if body.get("tools") is not None:
            check_tools(body["tools"])
        return False

    def check_completion(self, body: dict[str, Any], model: Model) -> bool:
        if model.is_embedding_only:
            raise UnsupportedError(f'"{model.name}" does not support completion')
        return False

    def check_embeddings(self, body: dict[str, Any], model: Model) -> bool:
        require_embeddings(model)
        return False

    async def _list(self, request: web.Request) -> web.Response:
        """Another LlamaRunner is told of our own models alone: two that use each other would list them in a circle."""
        is_one_of_us = request.headers.get("User-Agent", "").startswith("llamarunner/")
        usable = [
            model for model in self._relay.catalog if not model.problem and not (is_one_of_us and model.is_remote)
        ]
        return json_response({"object": "list", "data": [self.model_record(model) for model in usable]})

    async def _retrieve(self, request: web.Request) -> web.Response:
        model = self._relay.catalog.find(request.match_info["model"].rstrip("/"))
        return json_response(self.model_record(model))

    def _traced(
        self, path: str, check: Callable[[dict[str, Any], Model], bool]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def forward(request: web.Request, trace: RequestTrace) -> web.StreamResponse:
            raw = await read_body(request)
            body = parse_object(raw)
            model = self.begin(body, trace)
            if check(body, model):
                raw = orjson.dumps(body)
            async with self._relay.ask(model, path, raw, trace, keep_alive_s=self.keep_alive(body)) as (upstream, _):
                return await self._relay.pass_through(request, upstream, trace, self._dialect, self.amend)

        return self._relay.traced(self._dialect, forward)


def require_embeddings(model: Model) -> None:
    """An engine must be started for embeddings: one that was not cannot make them."""
    if Capability.EMBEDDING not in model.capabilities:
        raise UnsupportedError(
            f"{model.name} does not support embeddings", hint="set `embeddings = true` for it in config.toml"
        )
