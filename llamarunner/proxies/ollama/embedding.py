"""Answers /api/embed and /api/embeddings: one question to the engine for each text, as many at once as it has slots."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from llamarunner.errors import (
    EngineRefusalError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnsupportedError,
)
from llamarunner.events import RequestTrace
from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.ollama.asking import Asking, Question, read_fields
from llamarunner.proxies.ollama.embed import (
    L2,
    RAW,
    TOO_LONG,
    body_of,
    inputs_of,
    is_raw,
    require_embeddings,
    tokens_of,
    vector_of,
)
from llamarunner.proxies.ollama.truncate import without_end
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.upstream import NOT_IMPLEMENTED
from llamarunner.proxies.upstream import TOO_LONG as CONTEXT_EXCEEDED
from llamarunner.proxies.vectors import unit
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)

_PATH = "/v1/embeddings"
_BATCH_EXCEEDED = re.compile(r"is too large to process.*current batch size: (\d+)")


class Embedding:
    def __init__(self, relay: Relay, asking: Asking) -> None:
        self._relay = relay
        self._asking = asking

    async def embed(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        fields = await read_fields(request, "EmbedRequest")
        if not fields.get("model"):
            raise ModelNotFoundError("")
        question = self._begin(request, fields, trace)
        texts = inputs_of(fields.get("input"))
        if not texts:
            await self._asking.load(question)
            return json_response({"model": question.asked_name, "embeddings": []})
        require_embeddings(question.model)
        batch = _Batch(self._relay, question, texts, normalize=L2)
        lease = await batch.run(self._asking)
        vectors = [unit(vector, fields.get("dimensions", 0)) for vector in batch.vectors]
        figures = {
            "total_duration": max(round((time.monotonic() - trace.started) * 1e9), 1),
            "load_duration": max(round(lease.waited_s * 1e9), 1),
            "prompt_eval_count": batch.tokens,
        }
        kept = {name: figure for name, figure in figures.items() if figure}
        return json_response({"model": question.asked_name, "embeddings": vectors, **kept})

    async def embeddings(self, request: web.Request, trace: RequestTrace) -> web.StreamResponse:
        """The older endpoint: one text, and for some models its vector as it comes."""
        fields = await read_fields(request, "EmbeddingRequest")
        if not fields.get("model"):
            raise RequestError("model is required")
        question = self._begin(request, {**fields, "truncate": True}, trace)
        prompt = fields.get("prompt")
        if not prompt:
            await self._asking.load(question)
            return json_response({"embedding": []})
        require_embeddings(question.model)
        normalize = RAW if is_raw(question.model) else L2
        batch = _Batch(self._relay, question, [prompt], normalize=normalize)
        await batch.run(self._asking)
        (vector,) = batch.vectors
        return json_response({"embedding": vector if normalize == RAW else unit(vector)})

    def _begin(self, request: web.Request, fields: Mapping[str, Any], trace: RequestTrace) -> Question:
        question = self._asking.begin(request, fields, trace)
        trace.stream = False
        return question


class _Batch:
    """The texts of one request. Whoever has a lease takes the next one: the first has the request's own, and others
    join as long as the engine has slots free, so that a batch is in nobody's way."""

    def __init__(self, relay: Relay, question: Question, texts: list[str], *, normalize: int) -> None:
        self._relay = relay
        self._question = question
        self._normalize = normalize
        self._texts = texts
        self._untaken = iter(range(len(texts)))
        self._left = len(texts)
        self._all_found = asyncio.Event()
        self._shortened = 0
        self.vectors: list[list[float]] = [[] for _ in texts]
        self.tokens = 0

    async def run(self, asking: Asking) -> Lease:
        async with asking.lease(self._question) as lease:
            more = min(lease.runner.slots or 1, len(self._texts)) - 1
            try:
                async with asyncio.TaskGroup() as group:
                    helpers = [group.create_task(self._help()) for _ in range(more)]
                    await self._work(lease)
                    await self._all_found.wait()
                    for helper in helpers:
                        helper.cancel()  # it has nothing to do, or waits for a slot in vain
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        trace = self._question.trace
        trace.prompt_tokens = self.tokens
        if self._shortened:
            trace.truncated = f"the end of {self._shortened} of {len(self._texts)} inputs"
            logger.info("%s: %s was longer than its context", trace.model, trace.truncated)
        return lease

    async def _help(self) -> None:
        try:
            async with self._relay.manager.acquire(self._question.model) as lease:
                await self._work(lease)
        except OverloadedError:
            logger.debug("%s: no slot to embed in beside the first", self._question.model.name)

    async def _work(self, lease: Lease) -> None:
        for index in self._untaken:
            answer = await self._embed(lease, self._texts[index])
            self.vectors[index] = vector_of(answer)
            self.tokens += tokens_of(answer)
            self._left -= 1
        if not self._left:
            self._all_found.set()

    async def _embed(self, lease: Lease, text: str) -> dict[str, Any]:
        try:
            return await self._relay.call(lease, _PATH, body_of(text, self._normalize))
        except EngineRefusalError as refusal:
            if refusal.status == NOT_IMPLEMENTED:  # it was started without embeddings, whatever its model could do
                raise UnsupportedError(f"{self._question.model.name} does not support embeddings") from refusal
            room = _room(refusal, lease)
            if not room:
                raise
            if not self._question.fields.get("truncate", True):
                raise RequestError(TOO_LONG) from None
        whole = await self._relay.call(lease, "/tokenize", {"content": text, "add_special": True})
        plain = await self._relay.call(lease, "/tokenize", {"content": text, "add_special": False})
        self._shortened += 1
        kept = without_end(whole["tokens"], plain["tokens"], room)
        return await self._relay.call(lease, _PATH, body_of(kept, self._normalize))


def _room(refusal: EngineRefusalError, lease: Lease) -> int:
    """How many tokens an engine that refused a text as too long takes; 0 where that was not the matter."""
    context = refusal.context or lease.runner.context or 0
    if batch := _BATCH_EXCEEDED.search(refusal.message):
        return min(int(batch[1]), context - 1) if context else int(batch[1])
    return context - 1 if refusal.kind == CONTEXT_EXCEEDED and context else 0
