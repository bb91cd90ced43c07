"""OpenAI's responses and Anthropic's messages with their official clients, on both ports, against the built-in engine
and a real model. (OpenAI's older APIs are in test_clients.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel
from serving import Serving, serve, soon

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "smollm2:135m"
QUESTION = "What is the capital of France? Answer in one word."
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
SHORT: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "messages": ASKED, "extra_body": {"temperature": 0}}
LONG: list[Any] = [{"role": "user", "content": "word " * 900}]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> AsyncIterator[Serving]:
    model = {"path": str(smollm2_path), "context": 512, "flags": {"threads": 1, "threads-batch": 1}}
    config = {"models": {MODEL: model}, "engines": {"default": {"kind": "builtin"}}}
    async with serve(tmp_path_factory.mktemp("real"), config) as serving:
        yield serving


@pytest.fixture(params=["ollama", "lmstudio"])
def base(request: pytest.FixtureRequest, real: Serving) -> str:
    return real.url(request.param)


@pytest_asyncio.fixture(loop_scope="module")
async def responses(base: str) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=base + "/v1", api_key="unused", max_retries=0) as client:
        yield client.responses


@pytest_asyncio.fixture(loop_scope="module")
async def messages(base: str) -> AsyncIterator[Any]:
    async with anthropic.AsyncAnthropic(base_url=base, api_key="unused", max_retries=0) as client:
        yield client.messages


# --- OpenAI --------------------------------------------------------------------------------------------------------


async def test_responses_streamed_and_whole(responses: Any, real: Serving) -> None:
    ask = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    whole = await responses.create(**ask)
    assert "Paris" in whole.output_text
    assert whole.usage.output_tokens <= 8
    events = [event async for event in await responses.create(**ask, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == whole.output_text
    trace = (await soon(lambda: [t for t in real.finished if t.stream]))[-1]
    assert (trace.prompt_tokens, trace.output_tokens) == (whole.usage.input_tokens, whole.usage.output_tokens)
    async with responses.stream(**ask) as stream:  # the helper keeps account of all that comes
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == whole.output_text


class City(BaseModel):
    name: Literal["Oslo", "Rome"]


async def test_responses_parsed(responses: Any) -> None:
    answer = await responses.parse(
        model=MODEL, input="Name a city as JSON.", text_format=City, max_output_tokens=60, temperature=0
    )
    assert answer.output_parsed.name in ("Oslo", "Rome")


async def test_responses_of_a_conversation(responses: Any) -> None:
    first = await responses.create(model=MODEL, input=QUESTION, max_output_tokens=8, temperature=0)
    turns = [{"role": "user", "content": QUESTION}, *(item.model_dump() for item in first.output),
             {"role": "user", "content": "And of Italy?"}]  # fmt: skip
    second = await responses.create(
        model=MODEL, instructions="You know all capitals.", input=turns, max_output_tokens=12, temperature=0
    )
    assert "Rome" in second.output_text
    with pytest.raises(openai.BadRequestError) as kept:
        await responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    assert "previous_response_id is not supported" in kept.value.response.text
    with pytest.raises(openai.NotFoundError):
        await responses.create(model="nobody", input="Hi")
    with pytest.raises(openai.BadRequestError, match="context"):
        await responses.create(model=MODEL, input=LONG[0]["content"], stream=True)


# --- Anthropic -----------------------------------------------------------------------------------------------------


async def test_messages_streamed_and_whole(messages: Any, real: Serving) -> None:
    whole = await messages.create(**SHORT)
    assert "Paris" in whole.content[0].text
    assert (whole.role, whole.model, whole.type) == ("assistant", MODEL, "message")
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert 0 < whole.usage.output_tokens <= 8
    async with messages.stream(**SHORT) as stream:
        text = [part async for part in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(text) == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason
    prompt = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    trace = (await soon(lambda: [t for t in real.finished if t.stream and "messages" in t.endpoint]))[-1]
    assert (trace.prompt_tokens, trace.output_tokens) == (prompt, final.usage.output_tokens)
    events = [event.type async for event in await messages.create(**SHORT, stream=True)]
    assert (events[0], events[-1]) == ("message_start", "message_stop")


async def test_messages_with_system_stop_and_tools_results(messages: Any) -> None:
    stopped = await messages.create(
        model=MODEL, max_tokens=40, system=[{"type": "text", "text": "You count aloud."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Count: one, two, three, four,"}]}],
        stop_sequences=["six"],
    )  # fmt: skip
    assert stopped.usage.output_tokens > 0
    turns: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {"of": "France"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "Paris"}]},
    ]
    tools: list[Any] = [{"name": "look", "description": "Looks it up.", "input_schema": {"type": "object"}}]
    answer = await messages.create(model=MODEL, max_tokens=8, messages=turns, tools=tools)
    assert answer.content
    counted = await messages.count_tokens(model=MODEL, messages=turns)
    assert counted.input_tokens > (await messages.count_tokens(model=MODEL, messages=ASKED)).input_tokens > 10


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, "nobody"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens is required and must be positive"),
        ({"messages": []}, anthropic.BadRequestError, "messages is required"),
        ({"messages": LONG}, anthropic.BadRequestError, "context"),
        ({"messages": LONG, "stream": True}, anthropic.BadRequestError, "context"),
    ],
)
async def test_messages_that_fail(
    messages: Any, more: dict[str, Any], error: type[anthropic.APIStatusError], words: str
) -> None:
    with pytest.raises(error) as caught:
        await messages.create(**{**SHORT, **more})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert words in body["error"]["message"]


async def test_anthropic_sync(base: str) -> None:
    def talk() -> tuple[str, str]:
        with anthropic.Anthropic(base_url=base, api_key="unused") as client:
            with client.messages.stream(**SHORT) as stream:
                streamed = "".join(stream.text_stream)
            part: Any = client.messages.create(**SHORT).content[0]
            return streamed, part.text

    streamed, whole = await asyncio.to_thread(talk)
    assert streamed == whole
