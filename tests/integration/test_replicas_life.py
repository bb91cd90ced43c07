"""Requests to a model with replicas, over real HTTP on scripted engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aiohttp

RunService = Callable[..., Any]
ASK = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}], "stream": False}
BUSY = {"http_error": {"status": 503, "body": {"error": {"message": "busy", "code": 503}}}}


async def test_each_replica_is_asked_once_at_most(run_service: RunService) -> None:
    async with (
        run_service({"smol": {"replicas": 3}}) as serving,
        aiohttp.ClientSession(serving.ollama) as session,
    ):
        serving.script.set(**BUSY)
        async with session.post("/api/chat", json=ASK) as answer:
            assert answer.status == 503
        assert len(serving.script.requests()) == 3
        assert sorted(serving.starts) == ["smol", "smol#2", "smol#3"]
        (trace,) = serving.finished
        assert trace.status == 503
        serving.script.set()
        async with session.post("/api/chat", json=ASK) as answer:
            assert answer.status == 200
        assert len(serving.script.requests()) == 1


async def test_the_replica_that_answers_is_the_one_whose_times_are_told(run_service: RunService) -> None:
    async with (
        run_service({"smol": {"replicas": 2}}) as serving,
        aiohttp.ClientSession(serving.ollama) as session,
    ):
        serving.script.set(exit={"at": "prompt", "code": 1})
        async with session.post("/api/chat", json=ASK) as answer:
            assert answer.status in (500, 502, 503)
        (trace,) = serving.finished
        assert trace.load_started is not None
        assert trace.granted is not None
        assert trace.started <= trace.load_started <= trace.granted <= trace.finished
