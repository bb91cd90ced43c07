"""Requests and engines that come, wait, leave and die: over real HTTP, on scripted engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from serving import Serving, soon
from wire import connection, read_chunk, read_head, request_bytes, reset

from llamarunner.service import NothingServedError

RunService = Callable[..., Any]
HI = [{"role": "user", "content": "Hi"}]
SLOW = {"tokens": ["a"] * 1000, "delay_s": 0.02}


async def chat(serving: Serving, model: str = "smol", **more: Any) -> tuple[int, dict[str, Any]]:
    ask = {"model": model, "messages": HI, "stream": False, **more}
    async with aiohttp.ClientSession(serving.ollama) as session, session.post("/api/chat", json=ask) as answer:
        return answer.status, await answer.json()


async def running(serving: Serving) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession(serving.ollama) as session, session.get("/api/ps") as answer:
        listed: list[dict[str, Any]] = (await answer.json())["models"]
        return listed


@asynccontextmanager
async def streaming(serving: Serving, model: str = "smol") -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer whose first line has come."""
    async with (
        aiohttp.ClientSession(serving.ollama) as session,
        session.post("/api/chat", json={"model": model, "messages": HI}) as answer,
    ):
        await answer.content.readline()
        yield answer


# --- clients that leave ---------------------------------------------------------------------------------------------


def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize("leave", [close, reset], ids=["FIN", "RST"])
@pytest.mark.parametrize(
    ("path", "port"), [("/api/chat", "ollama"), ("/v1/chat/completions", "ollama"),
                       ("/api/v0/chat/completions", "lmstudio")],
)  # fmt: skip
async def test_a_client_that_leaves_frees_the_engine(
    run_service: RunService, leave: Callable[[asyncio.StreamWriter], None], path: str, port: str
) -> None:
    async with run_service() as serving:
        await chat(serving)
        for moment, script in (("prompt", {"prompt_s": 30}), ("stream", SLOW)):
            for stream in (True, False):
                serving.script.set(**script)
                async with connection(serving.port(port)) as (reader, writer):
                    writer.write(request_bytes(path, {"model": "smol", "messages": HI, "stream": stream}))
                    if moment == "stream" and stream:
                        assert (await read_head(reader)).status == 200
                        await read_chunk(reader)
                    else:
                        await soon(lambda: serving.script.requests(), 3)
                    left = time.monotonic()
                    leave(writer)
                    await soon(lambda: serving.script.disconnects == 1, 1)
                    await serving.idle()
                    assert time.monotonic() - left < 1
                trace = serving.finished[-1]
                assert (trace.phase, trace.status) == ("cancelled", 499), (moment, stream)


@pytest.mark.parametrize("leave", [close, reset], ids=["FIN", "RST"])
async def test_a_client_that_leaves_while_its_model_loads(
    run_service: RunService, leave: Callable[[asyncio.StreamWriter], None]
) -> None:
    async with run_service({"a": {}, "b": {}}, scheduler={"max_loaded": 1}) as serving:
        serving.scripts["a"].set(load_s=0.5)
        async with (
            connection(serving.port("ollama")) as (_, loading),
            connection(serving.port("ollama")) as (_, queued),
        ):
            loading.write(request_bytes("/api/chat", {"model": "a", "messages": HI}))
            await soon(lambda: serving.starts == ["a"])
            queued.write(request_bytes("/api/chat", {"model": "b", "messages": HI}))
            await soon(lambda: serving.service.in_flight == 2)
            leave(queued)
            await soon(lambda: serving.service.in_flight == 1, 1)
            leave(loading)
            await soon(lambda: serving.service.in_flight == 0, 1)
        assert [trace.phase for trace in serving.finished] == ["cancelled", "cancelled"]
        assert not serving.scripts["a"].requests()
        assert (await chat(serving, "a"))[0] == 200
        assert "b" not in serving.starts, "nobody waits for it"


# --- queueing and swapping ------------------------------------------------------------------------------------------


async def test_a_hundred_first_requests_start_one_engine(run_service: RunService) -> None:
    async with run_service() as serving:
        answers = await asyncio.gather(*(chat(serving) for _ in range(100)))
        assert {status for status, _ in answers} == {200}
        assert {answer["message"]["content"] for _, answer in answers} == {"Hello there!"}
        assert serving.starts == ["smol"]
        await serving.idle()


async def test_a_full_queue_says_so(run_service: RunService) -> None:
    async with run_service(scheduler={"max_queue": 1}) as serving:
        serving.script.set(load_s=0.6)
        first = asyncio.create_task(chat(serving))
        await soon(lambda: serving.starts)
        ask = {"model": "smol", "messages": HI}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{serving.ollama}/api/chat", json=ask) as answer:
                assert answer.status == 503
                assert await answer.json() == {
                    "error": "server busy, please try again.  maximum pending requests exceeded"
                }
                assert int(answer.headers["Retry-After"]) > 0
            for base in (serving.ollama, serving.lmstudio):
                async with session.post(f"{base}/v1/chat/completions", json=ask) as answer:
                    assert answer.status == 503
                    assert int(answer.headers["Retry-After"]) > 0
                    assert (await answer.json())["error"]["type"] == "api_error"
        assert (await first)[0] == 200


async def test_swapping_loses_no_answer(run_service: RunService) -> None:
    async with run_service({"a": {}, "b": {}}, scheduler={"max_loaded": 1}) as serving:
        for name, script in serving.scripts.items():
            script.set(tokens=[name])
        answers = await asyncio.gather(*(chat(serving, name) for name in "abababab"))
        assert [(status, answer["message"]["content"]) for status, answer in answers] == [
            (200, name) for name in "abababab"
        ]
        assert sorted(serving.starts) == ["a", "b"], "A B A B is served A A B B"
        async with streaming(serving, "a") as under_way:
            waiting = asyncio.create_task(chat(serving, "b"))
            assert b'"done":true' in (await under_way.read()).splitlines()[-1]
        assert (await waiting)[1]["message"]["content"] == "b"


async def test_a_context_request_survives_a_swap(run_service: RunService) -> None:
    """It asks its engine several times; a model that must leave meanwhile waits for it."""
    async with run_service({"a": {}, "b": {}}, scheduler={"max_loaded": 1, "max_wait": "10ms"}) as serving:
        serving.scripts["a"].set(**SLOW | {"tokens": ["a"] * 20})
        ask = {"model": "a", "prompt": "go on", "context": [65], "stream": False}
        async with aiohttp.ClientSession(serving.ollama) as session:
            first = asyncio.create_task(session.post("/api/generate", json=ask).__aenter__())
            await soon(lambda: serving.scripts["a"].requests("/completion"))
            other = asyncio.create_task(chat(serving, "b"))
            answer = await first
            assert answer.status == 200
            assert (await answer.json())["response"] == "a" * 20
        assert (await other)[0] == 200


# --- keep_alive -----------------------------------------------------------------------------------------------------


async def test_keep_alive(run_service: RunService) -> None:
    async with run_service({"smol": {"keep_alive": "10m"}}) as serving:
        for given, wanted_s in ((None, 600), (90, 90), ("2m", 120), (0.5e2, 50), (None, 50), (1e300, 292 * 365 * 86400),
                                (-1, 292 * 365 * 86400)):  # fmt: skip
            await chat(serving, **({"keep_alive": given} if given is not None else {}))
            (listed,) = await running(serving)
            left = (datetime.fromisoformat(listed["expires_at"]) - datetime.now(UTC)).total_seconds()
            assert abs(left - wanted_s) < 1.0, given
        async with aiohttp.ClientSession(serving.lmstudio) as session:
            ask = {"model": "smol", "messages": HI, "ttl": 33}
            async with session.post("/api/v0/chat/completions", json=ask) as answer:
                assert answer.status == 200
        (listed,) = await running(serving)
        left = (datetime.fromisoformat(listed["expires_at"]) - datetime.now(UTC)).total_seconds()
        assert abs(left - 33) < 1.0
        await chat(serving, keep_alive=0)
        await soon(lambda: not serving.service.manager.pids)
        assert await running(serving) == []


async def test_an_empty_request_loads_and_unloads(run_service: RunService) -> None:
    async with run_service() as serving, aiohttp.ClientSession(serving.ollama) as session:

        async def post(path: str, **body: Any) -> dict[str, Any]:
            async with session.post(path, json={"model": "smol", **body}) as answer:
                assert answer.status == 200
                assert answer.content_type == "application/json", "one object, even when streaming"
                record: dict[str, Any] = await answer.json()
                return {key: value for key, value in record.items() if key != "created_at"}

        generated = {"model": "smol", "response": "", "done": True}
        chatted = {"model": "smol", "message": {"role": "assistant", "content": ""}, "done": True}
        assert await post("/api/generate", keep_alive=0) == {**generated, "done_reason": "unload"}
        assert serving.starts == [], "nothing to unload, and nothing loaded for it"
        assert await post("/api/generate") == {**generated, "done_reason": "load"}
        assert await post("/api/chat", messages=[]) == {**chatted, "done_reason": "load"}
        assert len(await running(serving)) == 1
        async with streaming(serving) as answer:
            assert await post("/api/chat", keep_alive="0s") == {**chatted, "done_reason": "unload"}
            assert b'"done":true' in await answer.read(), "what is under way is answered first"
        await soon(lambda: not serving.service.manager.pids)


# --- stopping -------------------------------------------------------------------------------------------------------


async def test_stop_lets_answers_end(run_service: RunService) -> None:
    async with run_service() as serving:
        serving.script.set(tokens=["a"] * 20, delay_s=0.02)
        async with streaming(serving) as answer:
            stopping = asyncio.create_task(serving.service.stop(10))
            await asyncio.sleep(0)
            status, refused = await chat(serving)
            assert (status, refused["error"]) == (503, "the server is shutting down")
            last = json.loads((await answer.read()).splitlines()[-1])
            assert last["done"]
            await stopping
        assert not serving.service.manager.pids


async def test_stop_ends_what_will_not_end(run_service: RunService) -> None:
    async with run_service() as serving:
        serving.script.set(hang="token:1")
        async with streaming(serving) as answer:
            begun = time.monotonic()
            await serving.service.stop(0.1)
            assert time.monotonic() - begun < 8
            rest = await answer.read()
        assert json.loads(rest.splitlines()[-1])["error"]
        assert not serving.service.manager.pids


# --- proxies --------------------------------------------------------------------------------------------------------


async def test_a_taken_port_leaves_the_other_proxy(run_service: RunService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        async with run_service(proxies={"ollama": {"port": port}}) as serving:
            taken, other = serving.service.proxies
            assert not taken.is_running
            problem = str(taken.problem)
            assert problem.startswith(f"127.0.0.1:{port} is taken by ")
            assert str(os.getpid()) in problem or "python" in problem or "pytest" in problem
            assert other.is_running
            async with aiohttp.ClientSession(serving.lmstudio) as session, session.get("/v1/models") as answer:
                assert answer.status == 200
            both = {"ollama": {"port": port}, "lmstudio": {"port": port}}
            with pytest.raises(NothingServedError, match="is taken by"):
                async with run_service(proxies=both):
                    pass


async def test_a_disabled_proxy_is_not_bound(run_service: RunService) -> None:
    async with run_service(proxies={"lmstudio": {"enabled": False}}) as serving:
        assert [proxy.is_running for proxy in serving.service.proxies] == [True, False]
        assert serving.service.proxies[1].problem is None
        assert (await chat(serving))[0] == 200


async def test_without_a_name_the_one_loaded_model_is_meant(run_service: RunService) -> None:
    async with run_service({"a": {}, "b": {}}, scheduler={"max_loaded": 2}) as serving:
        async with aiohttp.ClientSession(serving.lmstudio) as session:
            nothing = "No models loaded. Please load a model in the developer page or use the `lms load` command."
            for load, words in (("", nothing), ("a", ""), ("b", "Multiple models are loaded.")):
                if load:
                    assert (await chat(serving, load))[0] == 200
                async with session.post("/v1/chat/completions", json={"messages": HI}) as answer:
                    assert answer.status == (404 if words else 200)
                    if words:
                        assert (await answer.json())["error"]["message"].startswith(words)
        assert len(serving.scripts["a"].requests()) == 2


# --- models and engines that fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"), (b"", ""), (b"GGUF" + bytes(20), ""), (b"<html>404</html>" * 10, "GGUF"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, ""),
    ],
    ids=["missing", "empty", "cut", "html", "absurd"],
)  # fmt: skip
async def test_a_bad_model_file_is_told_in_each_dialect(
    run_service: RunService, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    async with run_service({"bad": {"path": path}, "good": {}}) as serving:
        begun = time.monotonic()
        ask = {"model": "bad", "messages": HI, "stream": True}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{serving.ollama}/api/chat", json=ask) as answer:
                assert answer.status == 500
                message = (await answer.json())["error"]
            assert "bad" in message
            assert words in message
            for base, route in (
                (serving.ollama, "/v1/chat/completions"), (serving.lmstudio, "/v1/chat/completions"),
                (serving.lmstudio, "/api/v0/chat/completions"),
            ):  # fmt: skip
                async with session.post(base + route, json=ask) as answer:
                    assert answer.status == 500
                    error = (await answer.json())["error"]
                    assert error["type"] == "api_error"
                    assert words in error["message"]
            async with session.get(f"{serving.ollama}/api/tags") as answer:
                assert [model["name"] for model in (await answer.json())["models"]] == ["good:latest"]
        assert time.monotonic() - begun < 2
        assert "bad" not in serving.starts or not serving.scripts["bad"].seen


@pytest.mark.parametrize(
    ("script", "starts_with"),
    [
        ({"exit": {"at": "start", "code": 3}, "log": ["error: unknown argument: --frobnicate"]},
         "llama-server process has terminated: exit status 3: smol could not be loaded: "),
        ({"exit": {"at": "load", "signal": 9}},
         "llama-server process has terminated: signal: killed: smol could not be loaded: "),
        ({"hang": "start"}, "timed out waiting for llama-server to start - smol could not be loaded: "),
        ({"hang": "health"}, "timed out waiting for llama-server to start - smol could not be loaded: "),
    ],
    ids=["exits", "killed", "never listens", "never healthy"],
)  # fmt: skip
async def test_an_engine_that_does_not_come_up(
    run_service: RunService, script: dict[str, Any], starts_with: str
) -> None:
    async with run_service({"smol": {"load_timeout": "1s"}}) as serving:
        serving.script.set(**script)
        begun = time.monotonic()
        status, answer = await chat(serving)
        assert status == 500
        assert answer["error"].startswith(starts_with), answer
        async with aiohttp.ClientSession(serving.lmstudio) as session:
            ask = {"model": "smol", "messages": HI}
            async with session.post("/v1/chat/completions", json=ask) as response:
                assert response.status == 500
                assert "smol could not be loaded" in (await response.json())["error"]["message"]
        assert time.monotonic() - begun < 15
        serving.script.set()
        status, answer = await chat(serving)
        assert status == 500
        assert "the next try is in" in answer["error"], "a model that keeps failing is not tried at each request"
        await serving.service.manager.load(serving.service.catalog.find("smol"))
        assert (await chat(serving))[0] == 200, "once it is mended and loaded by hand, it works"


async def test_a_missing_engine_is_told(run_service: RunService) -> None:
    engine = {"kind": "llama-server", "command": "/no/such/llama-server"}
    async with run_service(engines={"e0": engine}) as serving:
        status, answer = await chat(serving)
        assert status == 503
        assert "/no/such/llama-server is not found" in answer["error"]


async def test_a_killed_engine_is_replaced(run_service: RunService) -> None:
    async with run_service() as serving:
        serving.script.set(**SLOW)
        async with streaming(serving) as answer:
            (pid,) = serving.service.manager.pids
            os.kill(pid, signal.SIGKILL)
            rest = (await answer.read()).splitlines()
        assert "an error was encountered while running the model" in json.loads(rest[-1])["error"]
        await soon(lambda: pid not in serving.service.manager.pids)
        serving.script.set()
        for _ in range(3):
            status, whole = await chat(serving)
            assert (status, whole["message"]["content"]) == (200, "Hello there!")
        assert serving.starts == ["smol", "smol"]
        (pid,) = serving.service.manager.pids
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222  # the loop must not hear of it yet
        assert (await chat(serving))[0] == 200, "one that died idle is replaced unseen"
        assert serving.starts == ["smol"] * 3
