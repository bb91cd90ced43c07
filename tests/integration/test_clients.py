"""The official clients, unmodified, against the built-in engine and a real model."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import ollama
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel
from serving import Serving, serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "smollm2:135m"
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
GREEDY = {"temperature": 0, "num_predict": 8, "seed": 7}
ONE_THREAD = {"threads": 1, "threads-batch": 1}  # two that wait for each other crawl on a busy machine


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> AsyncIterator[Serving]:
    model = {"path": str(smollm2_path), "context": 512, "flags": ONE_THREAD}
    models = {MODEL: {**model, "embeddings": True, "aliases": ["smol"]}, "other/chat-only": model}
    async with serve(
        tmp_path_factory.mktemp("real"), {"models": models, "engines": {"default": {"kind": "builtin"}}}
    ) as s:
        yield s  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module")
async def client(real: Serving) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(real.ollama) as client:
        yield client


@pytest.fixture
def file_size(smollm2_path: Path) -> int:
    return smollm2_path.stat().st_size


@pytest.fixture(params=["ollama", "lmstudio"])
def v1(request: pytest.FixtureRequest, real: Serving) -> str:
    """The base of OpenAI's API, on each port."""
    return real.url(request.param) + "/v1"


# --- the ollama client ----------------------------------------------------------------------------------------------


async def test_ollama_sync_chat_streams_and_does_not(real: Serving) -> None:
    def talk() -> tuple[ollama.ChatResponse, list[ollama.ChatResponse]]:
        with ollama.Client(real.ollama) as client:
            whole = client.chat(MODEL, CAPITAL, options=GREEDY)
            return whole, list(client.chat(MODEL, CAPITAL, options=GREEDY, stream=True))

    whole, chunks = await asyncio.to_thread(talk)
    assert "Paris" in (whole.message.content or "")
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert len(chunks) > 2
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for end in (whole, chunks[-1]):
        assert end.model == MODEL
        assert end.done_reason in ("stop", "length")
        for figure in (end.total_duration, end.load_duration, end.prompt_eval_duration, end.eval_duration):
            assert isinstance(figure, int)
            assert figure > 0
        assert end.total_duration
        assert end.eval_duration
        assert end.total_duration >= end.eval_duration
        assert end.prompt_eval_count
        assert end.prompt_eval_count > 20
        assert end.eval_count
        assert 0 < end.eval_count <= 8
    times = [datetime.fromisoformat(chunk.created_at or "") for chunk in chunks]
    assert times == sorted(times)
    assert abs(times[0] - datetime.now(UTC)) < timedelta(minutes=2)


async def test_ollama_async_generate_streams_and_does_not(client: ollama.AsyncClient) -> None:
    whole = await client.generate("smol", "Say yes.", options=GREEDY)
    chunks = [chunk async for chunk in await client.generate("smol", "Say yes.", options=GREEDY, stream=True)]
    assert whole.response
    assert "".join(chunk.response for chunk in chunks) == whole.response
    assert whole.context
    assert chunks[-1].context == whole.context
    assert whole.model == "smol"


async def test_a_context_goes_there_and_back(client: ollama.AsyncClient) -> None:
    first = await client.generate(MODEL, "My name is Zebulon. Greet me.", options=GREEDY)
    assert first.context
    second = await client.generate(MODEL, "What is my name?", context=first.context, options=GREEDY)
    assert second.context
    assert list(second.context)[: len(first.context)] == list(first.context)
    assert len(second.context) > len(first.context) + 5
    assert second.prompt_eval_count
    assert first.prompt_eval_count
    assert second.prompt_eval_count > first.prompt_eval_count + 10, "the first turn is part of the prompt"


async def test_raw_prompts_are_not_templated(client: ollama.AsyncClient) -> None:
    answer = await client.generate(MODEL, "One, two, three, four,", raw=True, options=GREEDY)
    assert "five" in answer.response
    assert answer.context is None
    assert answer.prompt_eval_count
    assert answer.prompt_eval_count < 15


async def test_options_are_heeded(client: ollama.AsyncClient) -> None:
    short = await client.chat(MODEL, CAPITAL, options={"temperature": 0, "num_predict": 2})
    assert short.eval_count == 2
    assert short.done_reason == "length"
    stopped = await client.generate(
        MODEL, "One, two, three, four,", raw=True, options={"temperature": 0, "num_predict": 20, "stop": ["seven"]}
    )
    assert "six" in stopped.response
    assert "seven" not in stopped.response
    assert stopped.done_reason == "stop"


class City(BaseModel):
    name: str
    inhabitants: int


async def test_formats_bind_the_answer(client: ollama.AsyncClient) -> None:
    question = [{"role": "user", "content": "Tell me of Oslo as JSON with name and inhabitants."}]
    limits = {"temperature": 0, "num_predict": 40}
    by_schema = await client.chat(MODEL, question, format=City.model_json_schema(), options=limits)
    assert City.model_validate_json(by_schema.message.content or "").name
    free = await client.generate(MODEL, "List two colours as JSON.", format="json", options={**limits, "stop": ["}"]})
    assert free.response.lstrip().startswith("{")


async def test_logprobs(client: ollama.AsyncClient) -> None:
    stream = await client.chat(MODEL, CAPITAL, options=GREEDY, logprobs=True, top_logprobs=3, stream=True)
    chunks = [chunk async for chunk in stream]
    tokens = [logprob for chunk in chunks for logprob in chunk.logprobs or ()]
    assert "".join(token.token for token in tokens).startswith("".join(c.message.content or "" for c in chunks))
    assert all(token.logprob <= 0 and len(token.top_logprobs or ()) == 3 for token in tokens)


async def test_what_there_is(client: ollama.AsyncClient, file_size: int) -> None:
    await client.chat(MODEL, CAPITAL, options=GREEDY, keep_alive=600)
    listed = (await client.list()).models
    assert [model.model for model in listed] == [MODEL, "other/chat-only:latest"]
    shown = listed[0]
    assert shown.size == file_size
    assert re.fullmatch("[0-9a-f]{64}", shown.digest or "")
    assert shown.details
    assert shown.details.family == "llama"
    assert shown.details.parameter_size == "135M"
    assert shown.details.quantization_level == "Q4_1"
    (running,) = (await client.ps()).models
    assert (running.model, running.digest, running.context_length) == (MODEL, shown.digest, 512)
    assert running.expires_at is not None
    left = running.expires_at - datetime.now(UTC)
    assert timedelta(seconds=595) < left <= timedelta(seconds=600)
    described = await client.show(MODEL)
    assert described.capabilities is not None
    assert set(described.capabilities) == {"completion", "embedding"}
    assert described.modelinfo
    assert described.modelinfo["general.architecture"] == "llama"
    assert described.modelinfo["llama.context_length"] == 8192
    assert list(described.modelinfo) == sorted(described.modelinfo)
    assert described.template
    assert "im_start" in described.template
    assert "num_ctx" in (described.parameters or "")


@pytest.mark.parametrize(
    ("keep_alive", "least_s", "most_s"),
    [("5m", 295, 300), (600, 595, 600), (-1, 100 * 365 * 86400, math.inf), ("24h", 86395, 86400)],
)
async def test_keep_alive_shows_in_ps(
    client: ollama.AsyncClient, keep_alive: Any, least_s: float, most_s: float
) -> None:
    await client.generate(MODEL, "", keep_alive=keep_alive)
    (running,) = (await client.ps()).models
    assert running.expires_at is not None
    assert least_s < (running.expires_at - datetime.now(UTC)).total_seconds() <= most_s


async def test_keep_alive_zero_unloads_after_use(client: ollama.AsyncClient) -> None:
    answer = await client.chat(MODEL, CAPITAL, options=GREEDY, keep_alive=0)
    assert answer.message.content
    async with asyncio.timeout(5):
        while (await client.ps()).models:  # noqa: ASYNC110  # another program's state cannot set an event of ours
            await asyncio.sleep(0.02)
    loaded = await client.generate(MODEL, "")
    assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
    assert [model.model for model in (await client.ps()).models] == [MODEL]


async def test_ollama_errors(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError) as unknown:
        await client.chat("smollm3:135m", CAPITAL)
    assert unknown.value.status_code == 404
    assert unknown.value.error == f"model 'smollm3:135m' not found, did you mean '{MODEL}'?"
    with pytest.raises(ollama.ResponseError) as thinking:
        await client.chat(MODEL, CAPITAL, think=True)
    assert (thinking.value.status_code, thinking.value.error) == (400, f'"{MODEL}" does not support thinking')
    with pytest.raises(ollama.ResponseError) as tools:
        await client.chat(MODEL, CAPITAL, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert (tools.value.status_code, tools.value.error) == (400, f"{MODEL} does not support tools")
    with pytest.raises(ollama.ResponseError) as embed:
        await client.embed("other/chat-only", "text")
    assert (embed.value.status_code, embed.value.error) == (400, "other/chat-only does not support embeddings")
    with pytest.raises(ollama.ResponseError) as long:
        async for _ in await client.chat(MODEL, [{"role": "user", "content": "word " * 900}], stream=True):
            pass
    assert long.value.status_code == 400
    assert long.value.error.startswith("the prompt is longer than the context length currently available")


# --- the openai client, on both ports -------------------------------------------------------------------------------


async def test_openai_sync_chat_streams_and_does_not(v1: str) -> None:
    def talk() -> tuple[Any, list[Any]]:
        with openai.OpenAI(base_url=v1, api_key="unused") as client:
            ask = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 8}
            whole = client.chat.completions.create(**ask)
            with client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}) as stream:
                return whole, list(stream)

    whole, chunks = await asyncio.to_thread(talk)
    assert "Paris" in whole.choices[0].message.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {MODEL}
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [f for f in finishes if f] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


async def test_openai_async_completions_and_embeddings(v1: str) -> None:
    async with openai.AsyncOpenAI(base_url=v1, api_key="unused") as client:
        whole = await client.completions.create(
            model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=8
        )
        assert "five" in whole.choices[0].text
        stream = await client.completions.create(
            model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=8, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == whole.choices[0].text
        both = await client.embeddings.create(model=MODEL, input=["a cat", "a kitten"])
        assert [len(each.embedding) for each in both.data] == [576, 576]
        assert abs(sum(x * x for x in both.data[0].embedding) - 1) < 1e-3


async def test_openai_lists_models(v1: str) -> None:
    async with openai.AsyncOpenAI(base_url=v1, api_key="unused") as client:
        listed = [model async for model in client.models.list()]
        tag = ":latest" if await _is_ollama(v1) else ""
        assert [model.id for model in listed] == [MODEL, f"other/chat-only{tag}"]
        for model in listed:
            assert (await client.models.retrieve(model.id)) == model
        assert listed[0].created > 0
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.models.retrieve("nobody")
        assert "nobody" in str(unknown.value)


async def _is_ollama(v1: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(v1.removesuffix("/v1") + "/api/version") as answer:
        return answer.status == 200


async def test_openai_errors(v1: str) -> None:
    async with openai.AsyncOpenAI(base_url=v1, api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="smollm3", messages=CAPITAL)
        assert "smollm3" in str(unknown.value)
        assert MODEL in str(unknown.value)
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=MODEL, messages=[])
        with pytest.raises(openai.BadRequestError) as no_embeddings:
            await client.embeddings.create(model="other/chat-only", input="x")
        assert "embeddings" in str(no_embeddings.value)
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature="hot")  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "word " * 900}], stream=True
            )
        assert "context" in str(too_long.value)


# --- what the clients do not show -----------------------------------------------------------------------------------


async def test_lmstudio_v0(real: Serving) -> None:
    async with aiohttp.ClientSession(real.lmstudio) as session:
        ask = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": -1, "stop": ["."]}
        async with session.post("/api/v0/chat/completions", json=ask) as answer:
            whole = await answer.json()
        assert set(whole["stats"]) == {"tokens_per_second", "time_to_first_token", "generation_time", "stop_reason"}
        assert whole["stats"]["stop_reason"] == "eosFound"
        assert whole["model_info"] == {"arch": "llama", "quant": "Q4_1", "format": "gguf", "context_length": 512}
        assert whole["runtime"]["supported_formats"] == ["gguf"]
        async with session.post("/api/v0/chat/completions", json={**ask, "stream": True}) as answer:
            assert answer.content_type == "text/event-stream"
            raw = (await answer.read()).decode()
        *events, done, rest = raw.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        records = [json.loads(event.removeprefix("data: ")) for event in events]
        assert all(isinstance(record["system_fingerprint"], str) for record in records)
        assert records[0]["choices"][0]["delta"]["role"] == "assistant"
        text = "".join(r["choices"][0]["delta"].get("content") or "" for r in records if r["choices"])
        assert text == whole["choices"][0]["message"]["content"]
        assert records[-1]["stats"]["stop_reason"] == "eosFound"
        assert records[-1]["stats"]["time_to_first_token"] > 0
        async with session.get("/api/v0/models") as answer:
            listed = (await answer.json())["data"]
        assert [(item["id"], item["state"]) for item in listed] == [
            (MODEL, "loaded"), ("other/chat-only", "not-loaded"),
        ]  # fmt: skip
        assert listed[0]["loaded_context_length"] == 512
        assert listed[0]["max_context_length"] == 8192
        assert "loaded_context_length" not in listed[1]
        assert {item["quantization"] for item in listed} == {"Q4_1"}
        assert listed[1]["publisher"] == "other"


async def test_ollama_framing(real: Serving) -> None:
    async with aiohttp.ClientSession(real.ollama) as session:
        body = json.dumps({"model": MODEL, "messages": CAPITAL, "options": GREEDY})
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d says
        async with session.post("/api/chat", data=body, headers=form) as answer:
            assert answer.headers["Content-Type"] == "application/x-ndjson"
            raw = await answer.read()
        assert raw.endswith(b"\n")
        records = [json.loads(line) for line in raw.splitlines()]
        assert all(list(r)[:3] == ["model", "created_at", "message"] for r in records)
        stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")
        assert all(stamp.fullmatch(record["created_at"]) for record in records)
        assert b"null" not in raw
        assert all(set(record["message"]) == {"role", "content"} for record in records)
        async with session.get("/api/ps") as answer:
            assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        async with session.get("/") as answer:
            assert (await answer.text(), answer.content_type) == ("Ollama is running", "text/plain")
        for path in ("/", "/api/version", "/api/tags", "/api/version/"):
            async with session.head(path) as answer:
                assert answer.status == 200
        async with session.get("/api/version") as answer:
            assert re.fullmatch(r"\d+\.\d+\.\d+", (await answer.json())["version"])
            assert answer.headers["Server"].startswith("LlamaRunner/")
        copilot = {"User-Agent": "GitHubCopilotChat/0.30"}
        async with session.post("/api/show", json={"model": "smol"}, headers=copilot) as answer:
            assert (await answer.json())["model_info"]["general.basename"] == "smol"
