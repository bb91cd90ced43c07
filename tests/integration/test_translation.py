"""What llama-server streams, byte for byte, and what each dialect's client sees of it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from serving import Serving, scripted_config, serve, soon
from wire import exchange

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = {"model": "think/smol", "messages": [{"role": "user", "content": "?"}]}
TIMINGS = (
    '"timings":{"cache_n":5,"prompt_n":21,"prompt_ms":342.546,"prompt_per_second":61.3,"predicted_n":282,'
    '"predicted_ms":4535.599,"predicted_per_second":62.17}'
)
GONE = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"


def chunk(delta: str, finish: str = "null", more: str = "") -> str:
    choice = f'{{"finish_reason":{finish},"index":0,"delta":{delta}}}'
    return (
        f'data: {{"choices":[{choice}],"created":1795469994,"id":"chatcmpl-x","model":"m","system_fingerprint":"b0",'
        f'"object":"chat.completion.chunk"{more}}}\n\n'
    )


ROLE = chunk('{"role":"assistant","content":null}')
END = chunk("{}", '"stop"', f",{TIMINGS}")
DONE = "data: [DONE]\n\n"
HELLO = chunk('{"content":"Hello"}')


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fake(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("translation")
    config, scripts = scripted_config(folder, {"think/smol": {"keep_alive": -1}})
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


async def lines(fake: Serving, path: str = "/api/chat", **more: Any) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession(fake.ollama) as session, session.post(path, json={**ASK, **more}) as answer:
        assert answer.status == 200
        return [json.loads(line) for line in (await answer.read()).splitlines()]


async def events(fake: Serving, base: str, path: str = "/v1/chat/completions", **more: Any) -> bytes:
    url = fake.url(base)
    async with (
        aiohttp.ClientSession(url) as session,
        session.post(path, json={**ASK, "stream": True, **more}) as answer,
    ):
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        return await answer.read()


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("created_at", "total_duration", "load_duration")}


FINAL = {
    "model": "think/smol",
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "done_reason": "stop",
    "prompt_eval_count": 26,
    "prompt_eval_duration": 342546000,
    "eval_count": 282,
    "eval_duration": 4535599000,
}


def said(**message: Any) -> dict[str, Any]:
    return {"model": "think/smol", "message": {"role": "assistant", "content": "", **message}, "done": False}


# --- /api/chat ------------------------------------------------------------------------------------------------------


async def test_thinking_text_and_tool_calls(fake: Serving) -> None:
    fake.script.replay(
        ": ping\n\n"
        + ROLE
        + chunk('{"reasoning_content":"Okay"}')
        + ": another\n\n"
        + chunk('{"content":"Let me look."}')
        + chunk(
            '{"tool_calls":[{"index":0,"id":"call_a1","type":"function",'
            '"function":{"name":"get_weather","arguments":""}}]}'
        )
        + chunk('{"tool_calls":[{"index":0,"function":{"arguments":"{\\"ci"}}]}')
        + chunk(
            '{"tool_calls":[{"index":1,"id":"call_b2","type":"function","function":{"name":"now","arguments":"{}"}}]}'
        )
        + chunk('{"tool_calls":[{"index":0,"function":{"arguments":"ty\\": \\"Oslo\\"}"}}]}')
        + chunk("{}", '"tool_calls"', f",{TIMINGS}")
        + DONE
    )
    records = await lines(fake)
    calls = [
        {"id": "call_a1", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}},
        {"id": "call_b2", "function": {"index": 1, "name": "now", "arguments": {}}},
    ]
    assert [without_times(record) for record in records] == [
        said(thinking="Okay"), said(content="Let me look."), said(tool_calls=calls), FINAL,
    ]  # fmt: skip
    times = [record["created_at"] for record in records]
    assert times == sorted(times)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", each) for each in times)
    assert records[-1]["total_duration"] >= records[-1]["load_duration"] > 0
    (whole,) = await lines(fake, stream=False)
    message = {"role": "assistant", "content": "Let me look.", "thinking": "Okay", "tool_calls": calls}
    assert without_times(whole) == {**FINAL, "message": message}


async def test_figures_may_come_with_the_usage_chunk(fake: Serving) -> None:
    usage = ',"usage":{"completion_tokens":282,"prompt_tokens":26,"total_tokens":308}'
    trailing = (
        f'data: {{"choices":[],"created":1,"id":"x","model":"m","object":"chat.completion.chunk"{usage},{TIMINGS}}}'
    )
    fake.script.replay(ROLE + HELLO + chunk("{}", '"stop"') + trailing + "\n\n" + DONE)
    assert [without_times(record) for record in await lines(fake)] == [said(content="Hello"), FINAL]


@pytest.mark.parametrize("tail", [DONE, "", END + DONE], ids=["plain", "no DONE", "finished twice"])
async def test_one_end_whatever_the_engine_says(fake: Serving, tail: str) -> None:
    fake.script.replay(ROLE + HELLO + END + tail)
    records = await lines(fake)
    assert [record["done"] for record in records] == [False, True]
    assert without_times(records[-1]) == FINAL


async def test_a_length_is_told(fake: Serving) -> None:
    fake.script.replay(ROLE + HELLO + chunk("{}", '"length"', f",{TIMINGS}") + DONE)
    assert (await lines(fake))[-1]["done_reason"] == "length"


async def test_logprobs_stay_with_their_tokens(fake: Serving) -> None:
    def token(text: str, text_bytes: str) -> str:
        top = '[{"token":"x","logprob":-1.5,"bytes":[120]}]'
        return f'{{"token":"{text}","logprob":-0.5,"bytes":{text_bytes},"top_logprobs":{top}}}'

    def piece(content: str, token: str) -> str:
        choice = (
            f'{{"finish_reason":null,"index":0,"delta":{{"content":"{content}"}},"logprobs":{{"content":[{token}]}}}}'
        )
        return f'data: {{"choices":[{choice}],"object":"chat.completion.chunk"}}\n\n'

    # the two tokens of one character: the first comes without text of its own
    fake.script.replay(piece("", token("\\ufffd", "[195]")) + piece("é", token("é", "[169]")) + END + DONE)
    records = await lines(fake, logprobs=True, top_logprobs=1)
    assert [[entry["bytes"] for entry in record.get("logprobs", [])] for record in records] == [[[195]], [[169]], []]
    assert records[0]["logprobs"][0]["top_logprobs"] == [{"token": "x", "logprob": -1.5, "bytes": [120]}]
    (whole,) = await lines(fake, logprobs=True, top_logprobs=1, stream=False)
    assert [entry["bytes"] for entry in whole["logprobs"]] == [[195], [169]]


@pytest.mark.parametrize("arguments", ['{\\"a\\":', "[1]", '\\"text\\"', "7"], ids=["cut", "array", "string", "number"])
async def test_tool_arguments_that_are_no_object_are_an_error(fake: Serving, arguments: str) -> None:
    call = f'{{"tool_calls":[{{"index":0,"id":"c","function":{{"name":"f","arguments":"{arguments}"}}}}]}}'
    fake.script.replay(ROLE + HELLO + chunk(call) + chunk("{}", '"tool_calls"') + DONE)
    records = await lines(fake)
    assert records[-1] == {"error": "the model called a tool with arguments that are not a JSON object"}


# --- /api/generate --------------------------------------------------------------------------------------------------


async def test_generate_has_its_own_shape_and_a_context(fake: Serving) -> None:
    fake.script.replay(ROLE + chunk('{"reasoning_content":"Hm"}') + HELLO + END + DONE)
    records = await lines(fake, "/api/generate", prompt="Hi", system="Be brief")
    head = {"model": "think/smol", "done": False}
    assert [without_times(record) for record in records[:-1]] == [
        {**head, "response": "", "thinking": "Hm"}, {**head, "response": "Hello"},
    ]  # fmt: skip
    assert records[-1]["response"] == ""
    rendered = b"<|system|>Be brief\n<|user|>Hi\n<|assistant|>Hello"  # as the scripted engine renders and counts
    assert bytes(records[-1]["context"]) == rendered
    sent = fake.script.asked("/v1/chat/completions")
    assert sent["messages"] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert sent["chat_template_kwargs"] == {"enable_thinking": True}


async def test_raw_generation_uses_completion(fake: Serving) -> None:
    body = '{"index":0,"content":"Hel","tokens":[],"stop":false}', '{"index":0,"content":"lo","tokens":[],"stop":false}'
    last = f'{{"index":0,"content":"","tokens":[],"stop":true,"stop_type":"limit",{TIMINGS}}}'
    fake.script.replay("".join(f"data: {event}\n\n" for event in (*body, last)))
    records = await lines(fake, "/api/generate", prompt="A raw", raw=True, options={"num_predict": 5})
    assert [record["response"] for record in records] == ["Hel", "lo", ""]
    assert records[-1]["done_reason"] == "length"
    assert "context" not in records[-1]
    sent = fake.script.asked("/completion")
    assert (sent["prompt"], sent["n_predict"]) == ("A raw", 5)


async def test_a_context_is_put_before_the_prompt_under_one_lease(fake: Serving) -> None:
    fake.script.set(tokens=["ok"])
    records = await lines(fake, "/api/generate", prompt="Hi", context=list(b"earlier "))
    assert fake.script.asked("/completion")["prompt"] == "earlier <|user|>Hi\n<|assistant|>"
    assert records[-1]["done"]
    assert bytes(records[-1]["context"]).startswith(b"earlier ")
    assert records[-1]["total_duration"] >= records[-1]["load_duration"]


# --- what the engine is sent ----------------------------------------------------------------------------------------


async def test_every_sampler_is_sent(fake: Serving) -> None:
    fake.script.set()
    await lines(fake, options={"temperature": 1, "top_k": 12.9, "seed": 10**30, "repeat_last_n": -1, "mirostat": 2,
                               "stop": ["a"], "num_predict": -2, "unheard_of": {}, "min_p": None})  # fmt: skip
    sent = fake.script.asked()
    assert sent["temperature"] == 1.0
    assert (sent["top_k"], sent["top_p"], sent["min_p"], sent["typical_p"]) == (12, 0.9, 0.0, 1.0)
    assert 0 <= sent["seed"] < 2**32
    assert sent["repeat_last_n"] > 0
    assert sent["max_tokens"] > 0
    assert sent["stop"] == ["a"]
    assert sent["stream"] is True
    assert "unheard_of" not in sent


async def test_history_is_put_into_openai_shape(fake: Serving) -> None:
    fake.script.set()
    call = {"function": {"name": "get_weather", "arguments": {"city": "Łódź"}}}
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "Assistant", "content": None, "thinking": "look", "tool_calls": [call, call]},
        {"role": "tool", "content": "rain", "tool_name": "get_weather"},
        {"role": "tool", "content": "sun", "tool_call_id": "call_2"},
    ]
    tool = {"function": {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}}
    await lines(fake, messages=history, tools=[tool], think=False, format={"type": "object"}, unknown=1)
    sent = fake.script.asked()
    wanted = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Łódź"}'}}
    assert sent["messages"][1] == {
        "role": "assistant", "content": "", "reasoning_content": "look",
        "tool_calls": [{"id": "call_1", **wanted}, {"id": "call_2", **wanted}],
    }  # fmt: skip
    assert sent["messages"][2] == {"role": "tool", "content": "rain", "name": "get_weather", "tool_call_id": "call_1"}
    assert sent["messages"][3]["tool_call_id"] == "call_2"
    assert sent["tools"] == [{"type": "function", **tool}]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "unknown" not in sent


async def test_openai_bodies_pass_untouched(fake: Serving) -> None:
    fake.script.set()
    raw = b'{ "model":"think/smol", "messages":[{"role":"user","content":"\\u00e9"}], "n" : 1 }'
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{fake.lmstudio}/v1/chat/completions", data=raw) as answer:
            assert answer.status == 200
        assert fake.script.requests()[-1]["body"] == raw.decode()
        async with session.post(f"{fake.ollama}/v1/chat/completions", data=raw) as answer:
            assert answer.status == 200
    assert fake.script.asked() == {**json.loads(raw), "temperature": 1.0, "top_p": 1.0}, "Ollama's defaults here"


# --- errors ---------------------------------------------------------------------------------------------------------

ERROR_EVENT = 'data: {"error":{"code":500,"message":"Compute error.","type":"server_error"}}\n\n'


async def test_an_error_in_the_midst_is_a_line(fake: Serving) -> None:
    fake.script.replay(ROLE + HELLO + ERROR_EVENT)
    records = await lines(fake)
    assert without_times(records[0]) == said(content="Hello")
    assert records[1:] == [{"error": "Compute error."}]
    assert fake.finished[-1].phase == "failed"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_an_error_before_the_first_token_has_its_status(fake: Serving, path: str) -> None:
    error = {"error": {"code": 400, "message": "no such thing", "type": "invalid_request_error"}}
    fake.script.set(http_error={"status": 400, "body": error})
    for base, flat in ((fake.ollama, path.startswith("/api")), *([(fake.lmstudio, False)] * path.startswith("/v1"))):
        async with aiohttp.ClientSession(base) as session, session.post(path, json={**ASK, "stream": True}) as answer:
            assert answer.status == 400
            assert answer.content_type == "application/json"
            told = (await answer.json())["error"]
        assert told == "no such thing" if flat else told["message"] == "no such thing"


async def test_an_engine_that_speaks_no_json_is_told_so(fake: Serving) -> None:
    fake.script.set(http_error={"status": 502, "body": "<html>bad gateway</html>"})
    async with aiohttp.ClientSession(fake.ollama) as session, session.post("/api/chat", json=ASK) as answer:
        assert (answer.status, await answer.json()) == (502, {"error": "<html>bad gateway</html>"})
    for garbage in ("data: nonsense\n\n", "data: 7\n\n", "data: [1]\n\n"):
        fake.script.replay(garbage)
        async with aiohttp.ClientSession(fake.ollama) as session, session.post("/api/chat", json=ASK) as answer:
            assert answer.status == 500
            assert "the engine sent an event" in (await answer.json())["error"]
    fake.script.replay("[1]", content_type="application/json")
    async with aiohttp.ClientSession(fake.lmstudio) as session, session.post("/api/v0/chat/completions", json=ASK) as r:
        assert r.status == 500
        assert "not a JSON object" in (await r.json())["error"]["message"]


async def mended(fake: Serving) -> None:
    """The engine behaves again, and the next request finds it, or the one that takes its place."""
    if fake.script.ends_the_engine:
        await soon(lambda: not fake.service.manager.pids)
    fake.script.set()
    assert (await lines(fake))[-1]["done"]


@pytest.mark.parametrize(
    "script", [{"drop": "token:1"}, {"exit": {"at": "token:1", "signal": 9}}], ids=["drop", "kill"]
)
async def test_an_engine_that_ends_in_the_midst(fake: Serving, script: dict[str, Any]) -> None:
    fake.script.set(tokens=["Hello", "!"], **script)
    records = await lines(fake)
    assert records[0]["message"]["content"] == "Hello"
    assert len(records) == 2
    assert records[1]["error"].startswith(f"an error was encountered while running the model: {GONE}")
    for base, path in (
        ("ollama", "/v1/chat/completions"), ("lmstudio", "/v1/chat/completions"),
        ("lmstudio", "/api/v0/chat/completions"),
    ):  # fmt: skip
        await mended(fake)
        fake.script.set(tokens=["Hello", "!"], **script)
        raw = await events(fake, base, path)
        assert b"Hello" in raw
        assert b"[DONE]" not in raw
        error = json.loads(raw.strip().splitlines()[-1].removeprefix(b"data: "))
        assert GONE in error["error"]["message"]
        if base == "lmstudio":
            assert error["message"] == error["error"]["message"]
    await mended(fake)


@pytest.mark.parametrize("script", [{"drop": "prompt"}, {"exit": {"at": "prompt", "signal": 9}}], ids=["drop", "kill"])
async def test_an_engine_that_ends_before_its_first_token(fake: Serving, script: dict[str, Any]) -> None:
    for base, path in (
        ("ollama", "/api/chat"),
        ("ollama", "/v1/completions"),
        ("lmstudio", "/api/v0/chat/completions"),
    ):
        fake.script.set(**script)
        body = {**ASK, "prompt": "x", "stream": True}
        async with aiohttp.ClientSession(fake.url(base)) as session, session.post(path, json=body) as answer:
            assert answer.status == 500
            error = (await answer.json())["error"]
            assert GONE in (error if path == "/api/chat" else error["message"])
        await mended(fake)


async def test_a_half_event_never_reaches_the_client(fake: Serving) -> None:
    """The engine breaks off inside an event: what came before and our error are whole."""
    half = ROLE + HELLO + 'data: {"choices":[{"delta":{"content":"wor'
    fake.script.replay(half + " " * 70_000, chunk_bytes=len(half))
    for base, path in (("ollama", "/v1/chat/completions"), ("lmstudio", "/api/v0/chat/completions")):
        raw = await events(fake, base, path)
        for line in filter(None, raw.split(b"\n")):
            json.loads(line.removeprefix(b"data: "))
        assert b"wor" not in raw


# --- framing --------------------------------------------------------------------------------------------------------

POLYGLOT = "é中🎉\u2028\\n\x7f"


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64, 1000])
async def test_each_write_is_whole_lines_however_the_engine_cuts(fake: Serving, chunk_bytes: int) -> None:
    stream = ROLE + "".join(chunk(json.dumps({"content": each}, ensure_ascii=False)) for each in POLYGLOT) + END + DONE
    fake.script.replay(stream, chunk_bytes=chunk_bytes)
    answer = await exchange(fake.port("ollama"), "/api/chat", ASK)
    assert answer.headers["transfer-encoding"] == "chunked"
    for block in answer.chunks:
        assert block.endswith(b"\n")
        for line in block.splitlines():
            json.loads(line)
    text = "".join(json.loads(line)["message"]["content"] for line in b"".join(answer.chunks).split(b"\n")[:-1])
    assert text == POLYGLOT
    passed = await exchange(fake.port("lmstudio"), "/v1/chat/completions", {**ASK, "stream": True})
    assert b"".join(passed.chunks) == stream.encode(), "byte for byte"
    assert all(block.endswith(b"\n") for block in passed.chunks)


async def test_thoughts_have_both_names_on_ollamas_port(fake: Serving) -> None:
    thought = chunk('{"reasoning_content":"Hm"}')
    fake.script.replay(ROLE + thought + HELLO + END + DONE, chunk_bytes=50)
    raw = (await events(fake, "ollama")).decode()
    before, amended, after = raw.partition(
        json.dumps({"reasoning_content": "Hm", "reasoning": "Hm"}, separators=(",", ":"))
    )
    assert amended
    assert before.startswith(ROLE)
    assert after.endswith(HELLO + END + DONE), "the rest is passed on byte for byte"
    assert (await events(fake, "lmstudio")).decode() == ROLE + thought + HELLO + END + DONE
    fake.script.set(reasoning=["H", "m"], tokens=["x"])
    async with aiohttp.ClientSession(fake.ollama) as session, session.post("/v1/chat/completions", json=ASK) as answer:
        message = (await answer.json())["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Hm"


async def test_a_large_event_arrives_whole(fake: Serving) -> None:
    text = "x" * 3_000_000
    fake.script.replay(ROLE + chunk(json.dumps({"content": text})) + END + DONE)
    assert (await lines(fake))[0]["message"]["content"] == text
    assert len(await events(fake, "lmstudio", "/api/v0/chat/completions")) > len(text)


async def test_v0_adds_its_figures_to_the_last_event(fake: Serving) -> None:
    fake.script.replay(ROLE + HELLO + END + DONE)
    raw = await events(fake, "lmstudio", "/api/v0/chat/completions")
    *before, last, done = [line for line in raw.decode().split("\n\n") if line]
    assert [f"{event}\n\n" for event in before] == [ROLE, HELLO]
    assert done == "data: [DONE]"
    tail = json.loads(last.removeprefix("data: "))
    assert tail["stats"] == {
        "tokens_per_second": 62.17, "time_to_first_token": tail["stats"]["time_to_first_token"],
        "generation_time": 4.535599, "stop_reason": "eosFound",
    }  # fmt: skip
    fake.script.replay(ROLE + HELLO + ERROR_EVENT)
    raw = await events(fake, "lmstudio", "/api/v0/chat/completions")
    error = json.loads(raw.strip().splitlines()[-1].removeprefix(b"data: "))
    assert error["message"] == error["error"]["message"] == "Compute error."
    passed = await events(fake, "lmstudio")
    assert passed.startswith((ROLE + HELLO).encode())
    assert json.loads(passed.strip().splitlines()[-1].removeprefix(b"data: ")) == error


async def test_traces_tell_what_happened(fake: Serving) -> None:
    fake.script.replay(ROLE + HELLO + END + DONE)
    await lines(fake)
    trace = fake.finished[-1]
    assert (trace.status, trace.phase, trace.model, trace.stream) == (200, "done", "think/smol", True)
    assert (trace.prompt_tokens, trace.cached_tokens, trace.output_tokens) == (26, 5, 282)
    assert trace.bytes_out > 100
    assert re.fullmatch(r"127\.0\.0\.1:\d+", trace.client)
    await asyncio.sleep(0)
