"""Runners without a process: servers elsewhere that are there, are not, go away and come back."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from running import FAKE_ENGINE, Bench, ListLog, children, open_files, soon

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines import remote
from llamarunner.engines.remote import RemoteEngine, list_models
from llamarunner.errors import LoadError, ModelFileError
from llamarunner.events import RunnerState
from llamarunner.runners import health
from llamarunner.runners.runner import UNREACHABLE, Runner

KEY = "sk-remote-4711"
LIFE = ["starting", "loading", "ready"]


class Elsewhere:
    """A server that does what it is told."""

    def __init__(self) -> None:
        self.status = 200
        self.over: asyncio.Event | None = None  # to answer nothing until it is set
        self.asked: list[web.Request] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        if self.over is not None:
            await self.over.wait()
        if request.path == "/v1/chat/completions":
            return await self.stream(request)
        headers = {"Location": "http://127.0.0.1:1/"} if self.status == 302 else {}
        return web.json_response({"data": [{"id": "big"}]}, status=self.status, headers=headers)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while self.status != 200 or len(self.asked) < 5:
            await response.write(b"data: {}\n\n")
            await asyncio.sleep(0.02)
        await response.write(b"data: [DONE]\n\n")
        return response

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Elsewhere]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()


@pytest.fixture
async def elsewhere() -> AsyncIterator[Elsewhere]:
    async with Elsewhere().up() as server:
        yield server


def remote_runner(bench: Bench, url: str, *, check_s: float = 0.05, problem: str = "", **config: str) -> Runner:
    engine = RemoteEngine("box", EngineConfig.model_validate({"kind": "remote", "url": url, **config}))
    bench.log = ListLog()
    runner = Runner(
        Model("m", Path("big"), ModelSettings(engine="box"), problem=problem),
        engine,
        log=bench.log,
        bus=bench.bus,
        guardian=bench.guardian,
        session=bench.session,
        check_s=check_s,
    )
    bench.runners.append(runner)
    return runner


async def failed(runner: Runner) -> LoadError:
    with pytest.raises(LoadError) as caught:
        await asyncio.wait_for(runner.start(), 10)
    assert runner.state is RunnerState.FAILED
    assert runner.error is caught.value
    await asyncio.wait_for(runner.wait_ended(), 1)
    return caught.value


async def test_from_start_to_stop(bench: Bench, elsewhere: Elsewhere) -> None:
    before = children()
    runner = remote_runner(bench, f"{elsewhere.url}/v1", api_key=KEY)
    await runner.start()
    assert bench.states() == LIFE
    assert runner.pid is None
    assert (runner.context, runner.slots) == (None, None)
    assert runner.plan is not None
    assert (runner.plan.base_url, runner.plan.served_model) == (elsewhere.url, "big")
    assert children() == before
    begun = time.monotonic()
    await runner.stop("no longer wanted")
    assert time.monotonic() - begun < 0.5
    assert bench.states() == [*LIFE, "stopping", "stopped"]
    assert runner.error is None
    assert bench.log.closed == 1
    await asyncio.wait_for(runner.wait_ended(), 1)
    await runner.stop("again")


async def test_the_key_goes_to_the_server_and_nowhere_else(
    bench: Bench, elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    runner = remote_runner(bench, elsewhere.url, api_key=KEY)
    await runner.start()
    await soon(lambda: len(elsewhere.asked) > 1)
    assert {request.headers["Authorization"] for request in elsewhere.asked} == {f"Bearer {KEY}"}
    elsewhere.status = 401
    await soon(lambda: runner.state is RunnerState.FAILED)
    told = bench.log.data.decode() + caplog.text + repr((runner.plan, runner.error, bench.events))
    assert "does not accept the key" in told
    assert KEY not in told


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not accept the key"), (302, "redirect"), (404, "has no"), (503, "status 503")]
)
async def test_one_that_refuses(bench: Bench, elsewhere: Elsewhere, status: int, words: str) -> None:
    elsewhere.status = status
    error = await failed(remote_runner(bench, elsewhere.url))
    assert words in error.message
    assert (error.cause, bool(error.hint)) == (UNREACHABLE, True)
    assert words in bench.log.data.decode()
    assert len(elsewhere.asked) == 1
    assert bench.states() == ["starting", "loading", "failed"]


async def test_one_that_is_down_and_comes_back(bench: Bench) -> None:
    async with Elsewhere().up() as server:
        pass
    assert (await failed(remote_runner(bench, server.url))).cause == UNREACHABLE
    async with server.up():
        await remote_runner(bench, server.url).start()
        assert bench.states() == ["starting", "loading", "failed", *LIFE]


async def test_one_that_is_slow(bench: Bench, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ASK_S", 0.2)
    elsewhere.over = asyncio.Event()
    error = await failed(remote_runner(bench, elsewhere.url))
    elsewhere.over.set()
    assert "did not answer within" in error.message


async def test_stopped_while_it_is_asked(bench: Bench, elsewhere: Elsewhere) -> None:
    elsewhere.over = asyncio.Event()
    runner = remote_runner(bench, elsewhere.url)
    starting = asyncio.create_task(runner.start())
    await soon(lambda: elsewhere.asked)
    begun = time.monotonic()
    await runner.stop("changed my mind")
    assert time.monotonic() - begun < 0.5
    with pytest.raises(LoadError, match="was unloaded while loading"):
        await starting
    assert runner.state is RunnerState.STOPPED
    elsewhere.over.set()


async def test_it_is_lost_after_three_misses(bench: Bench, elsewhere: Elsewhere) -> None:
    runner = remote_runner(bench, elsewhere.url)
    ended: list[Runner] = []
    runner.on_ended = ended.append
    await runner.start()
    elsewhere.asked.clear()
    elsewhere.status = 500
    await soon(lambda: ended)
    assert ended == [runner]
    assert runner.state is RunnerState.FAILED
    assert runner.error is not None
    assert f"{elsewhere.url} answers with status 500" in runner.error.message
    assert "(1 of 3)" in bench.log.data.decode()
    assert bench.log.closed == 1
    assert len(elsewhere.asked) in (3, 4)  # one may have been on its way
    await soon(lambda: not any(task.get_name() == "watch m" for task in asyncio.all_tasks()))
    await runner.stop("tidy up")
    assert runner.state is RunnerState.FAILED


async def test_a_miss_or_two_are_forgiven(bench: Bench, elsewhere: Elsewhere) -> None:
    runner = remote_runner(bench, elsewhere.url)
    await runner.start()
    for times in range(1, 4):
        elsewhere.status = 500
        await soon(lambda times=times: bench.log.data.count(b"(1 of 3)") == times)
        elsewhere.status = 200
        count = len(elsewhere.asked)
        await soon(lambda count=count: len(elsewhere.asked) > count + 1)
    assert runner.state is RunnerState.READY
    assert b"(3 of 3)" not in bench.log.data


async def test_one_that_stops_answering_is_given_up(
    bench: Bench, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_TIMEOUT_S", 0.05)
    runner = remote_runner(bench, elsewhere.url)
    await runner.start()
    elsewhere.over = asyncio.Event()
    await soon(lambda: runner.state is RunnerState.FAILED)
    elsewhere.over.set()
    assert runner.error is not None
    assert "did not answer within" in runner.error.message


async def test_an_answer_goes_on_when_its_server_is_given_up(bench: Bench, elsewhere: Elsewhere) -> None:
    runner = remote_runner(bench, elsewhere.url)
    await runner.start()
    assert runner.plan is not None
    async with bench.session.post(runner.plan.base_url + "/v1/chat/completions", headers=runner.plan.headers) as answer:
        elsewhere.status = 500
        await soon(lambda: runner.state is RunnerState.FAILED)
        elsewhere.status = 200
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_lost_while_draining(bench: Bench, elsewhere: Elsewhere) -> None:
    runner = remote_runner(bench, elsewhere.url)
    await runner.start()
    runner.drain("making room")
    elsewhere.status = 500
    await soon(lambda: runner.state is RunnerState.FAILED)


async def test_a_model_with_a_problem_asks_nobody(bench: Bench, elsewhere: Elsewhere) -> None:
    with pytest.raises(ModelFileError):
        await remote_runner(bench, elsewhere.url, problem="it is gone").start()
    assert elsewhere.asked == []


async def test_nothing_is_left_of_many(bench: Bench, elsewhere: Elsewhere) -> None:
    async def one() -> None:
        runner = remote_runner(bench, elsewhere.url)
        await runner.start()
        await runner.stop("next")

    await one()
    files, tasks = open_files(), len(asyncio.all_tasks())
    for _ in range(30):
        await one()
    await soon(lambda: open_files() <= files and len(asyncio.all_tasks()) <= tasks)


class TestTheScriptedEngine:
    """Another process, as another machine would have it."""

    @pytest.fixture
    def port(self) -> Iterator[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        flags = ["--script", json.dumps({"load_s": 0}), "--port", str(port), "--alias", "big"]
        env = {**os.environ, "LLAMA_API_KEY": KEY}
        engine = subprocess.Popen(
            [sys.executable, str(FAKE_ENGINE), *flags], env=env, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield port
        finally:
            engine.kill()
            engine.wait()

    async def test_it_answers_by_the_plan(self, bench: Bench, port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 10
        while True:
            runner = remote_runner(bench, url, api_key=KEY, check_s=10)
            try:
                await runner.start()
                break
            except LoadError:
                assert time.monotonic() < deadline, "it never came up"
                await asyncio.sleep(0.05)
        config = EngineConfig.model_validate({"kind": "remote", "url": url, "api_key": KEY})
        assert await list_models(bench.session, config) == ("big",)
        plan = runner.plan
        assert plan is not None
        question = {"model": plan.served_model, "messages": [{"role": "user", "content": "hi"}]}
        async with bench.session.post(
            plan.base_url + "/v1/chat/completions",
            json=question,
            headers=plan.headers,
            timeout=aiohttp.ClientTimeout(10),
        ) as answer:
            assert answer.status == 200
            assert (await answer.json())["choices"][0]["message"]["content"] == "Hello there!"
