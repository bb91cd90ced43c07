"""What requests for an answer have in common: their fields read, their model found, its lease asked for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ClientContext
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import read_object
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.ollama.answer import bare_reply
from llamarunner.proxies.ollama.demands import demand_of
from llamarunner.proxies.ollama.fields import check_request
from llamarunner.proxies.ollama.options import unknown
from llamarunner.proxies.ollama.parameters import keep_alive_s
from llamarunner.proxies.relay import Relay, Shorten
from llamarunner.runners.demand import Demand
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)

_MOST_NAMES = 200


@dataclass(frozen=True, slots=True)
class Question:
    """A request for an answer, as far as it is known before any engine is asked."""

    request: web.Request
    fields: Mapping[str, Any]  # of its body, checked
    model: Model
    keep_alive_s: float | None  # how long the model stays afterwards, None for as long as it would
    trace: RequestTrace

    @property
    def is_chat(self) -> bool:
        return self.request.path.startswith("/api/chat")

    @property
    def asked_name(self) -> str:
        """The model as the client spelt it."""
        name: str = self.fields["model"]
        return name


class Asking:
    def __init__(self, relay: Relay, client_context: ClientContext) -> None:
        self._relay = relay
        self._client_context = client_context
        self._told: set[str] = set()  # unknown options that the log has named

    def begin(self, request: web.Request, fields: Mapping[str, Any], trace: RequestTrace) -> Question:
        """Raises ModelNotFoundError, and RequestError for a bad keep_alive."""
        trace.model, trace.stream = fields["model"], fields.get("stream", True)
        model = self._relay.catalog.find(trace.model)
        trace.model = model.name
        self._report_unknown(fields.get("options") or {}, trace)
        return Question(request, fields, model, keep_alive_s(fields.get("keep_alive")), trace)

    def _report_unknown(self, options: Mapping[str, Any], trace: RequestTrace) -> None:
        """In the request's record, and once in the log."""
        names = unknown(options)
        trace.ignored = ", ".join(names)
        for name in names:
            if name not in self._told and len(self._told) < _MOST_NAMES:
                self._told.add(name)
                logger.warning("a client set the option %s, which is unknown and ignored", name)

    def demand(self, model: Model, options: Mapping[str, Any]) -> Demand:
        return demand_of(options, model.preset.parameters, self._client_context)

    @asynccontextmanager
    async def lease(self, question: Question) -> AsyncIterator[Lease]:
        demand = self.demand(question.model, question.fields.get("options") or {})
        async with self._relay.manager.acquire(
            question.model, question.trace, keep_alive_s=question.keep_alive_s, demand=demand
        ) as lease:
            yield lease

    @asynccontextmanager
    async def answer(
        self, question: Question, path: str, body: bytes, shorten: Shorten
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, Lease]]:
        demand = self.demand(question.model, question.fields.get("options") or {})
        async with self._relay.ask(
            question.model,
            path,
            body,
            question.trace,
            keep_alive_s=question.keep_alive_s,
            demand=demand,
            shorten=shorten,
        ) as answer:
            yield answer

    async def load(self, question: Question) -> None:
        async with self.lease(question):
            pass

    async def load_or_unload(self, question: Question, *, chat: bool) -> web.Response:
        """Without a prompt, a request only loads its model, or with keep_alive 0 lets it go."""
        if question.keep_alive_s == 0:
            self._relay.manager.expire(question.model)
            return json_response(bare_reply(question.asked_name, "unload", chat=chat))
        await self.load(question)
        return json_response(bare_reply(question.asked_name, "load", chat=chat))


async def read_fields(request: web.Request, struct: str) -> dict[str, Any]:
    """The body's fields, in lower case: to Go, `Model` is `model`. `struct` is its name for the request."""
    _, body = await read_object(request, into=f"Go value of type api.{struct}")
    return check_request({key.lower(): value for key, value in body.items()}, struct)
