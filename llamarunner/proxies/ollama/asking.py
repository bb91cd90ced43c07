"""What requests for an answer have in common: their fields read, their model found, its lease asked for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ClientContext
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import parse_object, read_body
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.ollama.answer import bare_reply
from llamarunner.proxies.ollama.demands import demand_of
from llamarunner.proxies.ollama.fields import check_request
from llamarunner.proxies.ollama.options import unknown
from llamarunner.proxies.ollama.parameters import keep_alive_s
from llamarunner.proxies.relay import Relay
from llamarunner.runners.demand import Demand
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)

_MOST_NAMES = 200


class Asking:
    def __init__(self, relay: Relay, client_context: ClientContext) -> None:
        self._relay = relay
        self._client_context = client_context
        self._told: set[str] = set()  # unknown options that the log has named

    def begin(self, body: Mapping[str, Any], trace: RequestTrace) -> tuple[Model, float | None]:
        """The model, and how long it stays afterwards; what every request for an answer says first."""
        trace.model, trace.stream = body["model"], body.get("stream", True)
        model = self._relay.catalog.find(trace.model)
        trace.model = model.name
        self._report_unknown(body.get("options") or {}, trace)
        return model, keep_alive_s(body.get("keep_alive"))

    def _report_unknown(self, options: Mapping[str, Any], trace: RequestTrace) -> None:
        """In the request's record, and once in the log."""
        names = unknown(options)
        trace.ignored = ", ".join(names)
        for name in names:
            if name not in self._told and len(self._told) < _MOST_NAMES:
                self._told.add(name)
                logger.warning("a client set the option %s, which is unknown and ignored", name)

    def demand(self, model: Model, body: Mapping[str, Any]) -> Demand:
        return demand_of(body.get("options") or {}, model.preset.parameters, self._client_context)

    @asynccontextmanager
    async def lease(
        self, model: Model, body: Mapping[str, Any], keep: float | None, trace: RequestTrace
    ) -> AsyncIterator[Lease]:
        demand = self.demand(model, body)
        async with self._relay.manager.acquire(model, trace, keep_alive_s=keep, demand=demand) as lease:
            yield lease

    async def load(self, model: Model, body: Mapping[str, Any], keep: float | None, trace: RequestTrace) -> None:
        async with self.lease(model, body, keep, trace):
            pass

    async def load_or_unload(
        self, body: Mapping[str, Any], model: Model, keep: float | None, trace: RequestTrace, *, chat: bool
    ) -> web.Response:
        """Without a prompt, a request only loads its model, or with keep_alive 0 lets it go."""
        if keep == 0:
            self._relay.manager.expire(model)
            return json_response(bare_reply(body["model"], "unload", chat=chat))
        await self.load(model, body, keep, trace)
        return json_response(bare_reply(body["model"], "load", chat=chat))


async def read_fields(request: web.Request, struct: str) -> dict[str, Any]:
    """The body's fields, in lower case: to Go, `Model` is `model`. `struct` is its name for the request."""
    body = parse_object(await read_body(request), into=f"Go value of type api.{struct}")
    return check_request({key.lower(): value for key, value in body.items()}, struct)
