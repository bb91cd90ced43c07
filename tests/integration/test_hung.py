"""A hung engine as clients and onlookers see it; engines written down while they run."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from serving import soon

from llamarunner import paths
from llamarunner.events import RunnerState

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("base", "path"),
    [("ollama", "/api/chat"), ("ollama", "/v1/chat/completions"), ("lmstudio", "/v1/chat/completions")],
)
async def test_its_clients_are_told_in_the_stream_and_the_next_is_served(
    run_service: Any, base: str, path: str
) -> None:
    async with run_service({"smol": {"hang_timeout": 0.5, "restart_hung": True}}) as serving:
        serving.script.set(tokens=["Hello", "!"], hang="token:1")
        ask = {"model": "smol", "messages": HI, "stream": True}
        async with aiohttp.ClientSession(serving.url(base)) as session:
            async with session.post(path, json=ask) as answer:
                assert answer.status == 200
                raw = await answer.read()
            assert b"Hello" in raw
            assert b"[DONE]" not in raw
            assert json.loads(raw.strip().splitlines()[-1].removeprefix(b"data: "))["error"]
            serving.script.set(tokens=["Hello", "!"])
            async with session.post(path, json=ask) as answer:
                assert b"Hello" in await answer.read()
        assert [bool(trace.error) for trace in serving.finished] == [True, False]


async def test_it_is_seen_before_anything_is_done(run_service: Any) -> None:
    async with run_service({"smol": {"hang_timeout": 0.5}}) as serving:
        serving.script.set(tokens=["Hello", "!"], hang="token:1")
        ask = {"model": "smol", "messages": HI}
        async with aiohttp.ClientSession(serving.ollama) as session, session.post("/api/chat", json=ask):
            (view,) = await soon(lambda: [m for m in serving.service.backend.snapshot().models if m.hung_s])
            assert (view.state, view.in_flight) == (RunnerState.READY, 1)
            assert view.problem.startswith("no sign of life for ")
            before = serving.service.backend.snapshot().revisions["models"]
            await soon(lambda: serving.service.backend.snapshot().revisions["models"] > before)


async def test_engines_are_written_down_while_they_run(run_service: Any) -> None:
    async with run_service() as serving:
        folder = paths.state_dir() / "engines"
        ask = {"model": "smol", "messages": HI, "stream": False}
        async with aiohttp.ClientSession(serving.ollama) as session, session.post("/api/chat", json=ask) as answer:
            assert answer.status == 200
        (pid,) = serving.service.manager.pids
        (file,) = await soon(lambda: list(folder.glob("*.json")))
        (engine,) = json.loads(file.read_text())["engines"]
        assert (engine["pid"], engine["model"]) == (pid, "smol")
    assert list(folder.iterdir()) == []
