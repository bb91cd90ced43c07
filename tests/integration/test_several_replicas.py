"""One model on several servers or engines: through the whole service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from serving import Script, Serving, scripted_config, serve

CHAT = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}
LOCAL = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}], "stream": False}
BUSY = {"http_error": {"status": 503, "body": {"error": {"message": "busy", "code": 503}}}}


@dataclass
class Boxes:
    here: Serving
    others: list[Serving]
    scripts: list[Script]

    def asked(self) -> list[int]:
        return [len(script.requests("/v1/chat/completions")) for script in self.scripts]


@asynccontextmanager
async def boxes(folder: Path) -> AsyncIterator[Boxes]:
    """Two servers that both have "far", and one that uses them."""
    async with AsyncExitStack() as stack:
        others, scripts, engines = [], [], {}
        for number in (1, 2):
            (folder / str(number)).mkdir()
            config, there = scripted_config(folder / str(number), {"far": {"parallel": 4}})
            other = await stack.enter_async_context(serve(folder / str(number) / "home", config, there))
            others.append(other)
            scripts.append(there["far"])
            engines[f"box{number}"] = {"kind": "remote", "url": other.lmstudio}
        model = {"path": "far", "engine": "box1", "also_on": ["box2"], "parallel": 4}
        here = serve(folder / "home", {"engines": engines, "models": {"far": model}})
        yield Boxes(await stack.enter_async_context(here), others, scripts)


async def ask(client: httpx.AsyncClient, here: Serving) -> httpx.Response:
    return await client.post(f"{here.lmstudio}/v1/chat/completions", json=CHAT)


async def test_requests_side_by_side_go_to_both(tmp_path: Path) -> None:
    async with boxes(tmp_path) as all_, httpx.AsyncClient(timeout=30) as client:
        for script in all_.scripts:
            script.set(prompt_s=0.2)
        answers = await asyncio.gather(*(ask(client, all_.here) for _ in range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert all_.asked() == [4, 4]


async def test_where_one_cannot_answer_another_does_and_the_client_notices_nothing(tmp_path: Path) -> None:
    async with boxes(tmp_path) as all_, httpx.AsyncClient(timeout=30) as client:
        assert (await ask(client, all_.here)).status_code == 200
        await all_.others[0].service.stop(0)  # nobody listens there any more
        for _ in range(6):
            assert (await ask(client, all_.here)).status_code == 200
        all_.scripts[1].set(http_error={"status": 503, "body": {"error": {"message": "busy", "code": 503}}})
        assert (await ask(client, all_.here)).status_code in (500, 503), "none is left"


async def test_a_server_that_says_it_cannot_just_now_is_passed_over_for_a_while(tmp_path: Path) -> None:
    async with boxes(tmp_path) as all_, httpx.AsyncClient(timeout=30) as client:
        all_.scripts[0].set(http_error={"status": 503, "body": {"error": {"message": "busy", "code": 503}}})
        for _ in range(10):
            assert (await ask(client, all_.here)).status_code == 200
        assert all_.asked()[0] == 3, "three strikes"


async def test_an_answer_that_breaks_off_is_not_asked_for_again(tmp_path: Path) -> None:
    async with boxes(tmp_path) as all_, httpx.AsyncClient(timeout=30) as client:
        for script in all_.scripts:
            script.set(drop="token:1")
        body = {**CHAT, "stream": True}
        async with client.stream("POST", f"{all_.here.lmstudio}/v1/chat/completions", json=body) as answer:
            text = (await answer.aread()).decode()
        assert answer.status_code == 200
        assert '"error"' in text
        assert sum(all_.asked()) == 1


async def test_each_replica_is_asked_once_at_most(run_service: Callable[..., Any]) -> None:
    async with (
        run_service({"smol": {"replicas": 3}}) as serving,
        aiohttp.ClientSession(serving.ollama) as session,
    ):
        serving.script.set(**BUSY)
        async with session.post("/api/chat", json=LOCAL) as answer:
            assert answer.status == 503
        assert len(serving.script.requests()) == 3
        assert sorted(serving.starts) == ["smol", "smol#2", "smol#3"]
        (trace,) = serving.finished
        assert trace.status == 503
        serving.script.set()
        async with session.post("/api/chat", json=LOCAL) as answer:
            assert answer.status == 200
        assert len(serving.script.requests()) == 1


async def test_the_replica_that_answers_is_the_one_whose_times_are_told(run_service: Callable[..., Any]) -> None:
    async with (
        run_service({"smol": {"replicas": 2}}) as serving,
        aiohttp.ClientSession(serving.ollama) as session,
    ):
        serving.script.set(exit={"at": "prompt", "code": 1})
        async with session.post("/api/chat", json=LOCAL) as answer:
            assert answer.status in (500, 502, 503)
        (trace,) = serving.finished
        assert trace.load_started is not None
        assert trace.granted is not None
        assert trace.started <= trace.load_started <= trace.granted <= trace.finished
