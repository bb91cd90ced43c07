"""Ollama's requests through the whole service, on scripted engines: loads that they cause, routes, what is told of
options and of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from serving import Serving, soon

RunService = Callable[..., Any]

MESSAGES = [{"role": "user", "content": "?"}]


async def call(serving: Serving, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with aiohttp.ClientSession(serving.ollama) as session, session.request(method, path, json=body) as answer:
        is_json = answer.content_type == "application/json"
        return answer.status, await answer.json() if is_json else await answer.text()


async def chat(serving: Serving, **more: Any) -> Any:
    body = {"model": "smol", "messages": MESSAGES, "stream": False, **more}
    status, answer = await call(serving, "POST", "/api/chat", body)
    assert status == 200, answer
    return answer


async def running(serving: Serving) -> dict[str, Any]:
    (entry,) = (await call(serving, "GET", "/api/ps"))[1]["models"]
    assert isinstance(entry, dict)
    return entry


# --- num_ctx --------------------------------------------------------------------------------------------------------

BIG = {"smol": {"context": 2048, "metadata": {"llama.context_length": 32768}}}


@pytest.mark.parametrize(
    ("policy", "contexts", "loads"),
    [
        ("grow-only", [2048, 8192, 8192, 8192], 2), ("honour", [2048, 8192, 1024, 1024], 3),
        ("ignore", [2048, 2048, 2048, 2048], 1),
    ],
)  # fmt: skip
async def test_what_a_clients_num_ctx_does(
    run_service: RunService, policy: str, contexts: list[int], loads: int
) -> None:
    async with run_service(BIG, proxies={"ollama": {"client_num_ctx": policy}}) as serving:
        seen = []
        for options in ({}, {"num_ctx": 8192}, {"num_ctx": 1024}, {}):
            await chat(serving, options=options)
            seen.append((await running(serving))["context_length"])
        assert seen == contexts, "what runs is what is told"
        assert len(serving.starts) == loads


async def test_an_empty_prompt_loads_with_what_it_asks_for(run_service: RunService) -> None:
    async with run_service(BIG) as serving:
        body = {"model": "smol", "options": {"num_ctx": 4096}, "keep_alive": 60}
        assert (await call(serving, "POST", "/api/generate", body))[1]["done_reason"] == "load"
        entry = await running(serving)
        assert entry["context_length"] == 4096
        left = datetime.fromisoformat(entry["expires_at"]) - datetime.now(UTC)
        assert 59 < left.total_seconds() <= 60


# --- what is told ---------------------------------------------------------------------------------------------------


async def test_unknown_options_are_told_once_in_the_log_and_with_each_request(run_service: RunService) -> None:
    async with run_service(log_files=True) as serving:
        for _ in range(3):
            await chat(serving, options={"num_cxt": 5, "foo": "secret", "tfs_z": 1.0})
        assert [trace.ignored for trace in serving.finished] == ["foo, num_cxt"] * 3
        await asyncio.sleep(0)
        text = (serving.home / "logs" / "llamarunner.log").read_text()
        assert text.count("num_cxt") == 1
        assert "secret" not in text
        assert "tfs_z" not in text


async def test_the_time_left_is_true_to_a_second(run_service: RunService) -> None:
    async with run_service() as serving:
        await chat(serving, keep_alive="90s")
        first = datetime.fromisoformat((await running(serving))["expires_at"])
        assert abs((first - datetime.now(UTC)).total_seconds() - 90) < 1
        await asyncio.sleep(0.3)
        assert abs((datetime.fromisoformat((await running(serving))["expires_at"]) - first).total_seconds()) < 0.2


async def test_an_ordinary_chat_is_one_question_to_the_engine(run_service: RunService) -> None:
    async with run_service() as serving:
        await chat(serving)
        await chat(serving, messages=[{"role": "user", "content": "word " * 50_000}])
        assert [each["path"] for each in serving.script.requests()] == ["/v1/chat/completions"] * 2


# --- routes ---------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def any_service(run_service: RunService) -> AsyncIterator[Serving]:
    async with run_service() as serving:
        yield serving


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/api/status", 200, {"cloud": {"disabled": True, "source": "env"}}),
        ("GET", "/api/status/", 200, {"cloud": {"disabled": True, "source": "env"}}),
        ("POST", "/api/me", 503, {"error": "account unavailable"}),
        ("POST", "/api/signout", 403, {"error": "ollama cloud is disabled: signing out is unavailable"}),
        ("DELETE", "/api/user/keys/abc", 403, {"error": "ollama cloud is disabled: keys is unavailable"}),
        ("POST", "/api/experimental/web_search", 403, {"error": "ollama cloud is disabled: web search is unavailable"}),
        ("POST", "/api/experimental/web_fetch", 403, {"error": "ollama cloud is disabled: web fetch is unavailable"}),
        ("GET", "/api/nothing", 404, "404 page not found"), ("GET", "/api/embed", 405, "405 method not allowed"),
        ("PUT", "/api/status", 405, "405 method not allowed"), ("HEAD", "/", 200, ""), ("HEAD", "/api/tags", 200, None),
        ("HEAD", "/api/version", 200, None), ("GET", "/api/version/", 200, {"version": "0.30.1"}),
    ],
)  # fmt: skip
async def test_routes(any_service: Serving, method: str, path: str, status: int, body: Any) -> None:
    async with aiohttp.ClientSession(any_service.ollama) as session, session.request(method, path) as answer:
        assert answer.status == status
        if method == "HEAD":
            assert await answer.read() == b""
        else:
            found = await answer.json() if answer.content_type == "application/json" else await answer.text()
            assert found == body


async def test_what_the_engine_has_not_is_told_in_ollamas_words(run_service: RunService) -> None:
    fim = {"metadata": {"tokenizer.ggml.fim_pre_token_id": 1}}
    error = {"error": {"code": 501, "message": "Infill is not supported by this model", "type": "not_supported_error"}}
    async with run_service({"smol": fim}) as serving:
        serving.script.set(http_error={"status": 501, "body": error})
        body = {"model": "smol", "prompt": "def f(", "suffix": ")"}
        answer = await call(serving, "POST", "/api/generate", body)
        assert answer == (400, {"error": "smol does not support insert"})
        assert serving.script.asked("/infill")["input_suffix"] == ")"


async def test_a_queue_that_is_full_says_so_in_ollamas_words(run_service: RunService) -> None:
    async with run_service(scheduler={"max_queue": 1}) as serving:
        serving.script.set(prompt_s=5)
        held = [asyncio.create_task(chat(serving)) for _ in range(2)]
        try:
            await soon(lambda: (r := serving.service.manager.residence("smol")) is not None and r.queued == 1)
            answer = await call(serving, "POST", "/api/chat", {"model": "smol", "messages": MESSAGES})
            words = "server busy, please try again.  maximum pending requests exceeded"
            assert answer == (503, {"error": words})
        finally:
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)


async def test_a_load_that_fails_is_told_as_ollama_does(run_service: RunService) -> None:
    async with run_service() as serving:
        serving.script.set(log=["error: no such tensor"], exit={"at": "load", "code": 3})
        status, answer = await call(serving, "POST", "/api/generate", {"model": "smol", "prompt": "?"})
        assert status == 500
        assert answer["error"].startswith("llama-server process has terminated: exit status 3: ")
