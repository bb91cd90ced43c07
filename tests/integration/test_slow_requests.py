"""Clients that dribble: a request has to arrive, an answer may take its time. By hand over sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from serving import Serving
from wire import connection, read_answer, read_head, request_bytes

RunService = Callable[..., Any]
SERVER = {"request_timeout": "500ms"}
CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": False}


async def is_closed(reader: asyncio.StreamReader, within_s: float = 5.0) -> bytes:
    """What still came until the connection was closed."""
    async with asyncio.timeout(within_s):
        return await reader.read()


async def dribble(writer: asyncio.StreamWriter, data: bytes, every_s: float = 0.05) -> None:
    for position in range(len(data)):
        if writer.is_closing():
            return
        writer.write(data[position : position + 1])
        await asyncio.sleep(every_s)


@pytest.mark.parametrize("name", ["ollama", "lmstudio"])
@pytest.mark.parametrize("head", [b"GET /v1/mod", b"GET /", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-A: "])
async def test_headers_that_never_end(run_service: RunService, name: str, head: bytes) -> None:
    async with run_service({"a": {}}, server=SERVER) as serving, connection(serving.port(name)) as (reader, writer):
        started = time.monotonic()
        writer.write(head)
        sending = asyncio.create_task(dribble(writer, b"x" * 1000))
        assert (await is_closed(reader)).startswith(b"HTTP/1.1 408 ")
        assert 0.4 < time.monotonic() - started < 4
        sending.cancel()


async def test_a_connection_on_which_nothing_comes(run_service: RunService) -> None:
    async with run_service({"a": {}}, server=SERVER) as serving, connection(serving.port("ollama")) as (reader, _):
        assert await is_closed(reader) == b""


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("ollama", "/api/chat", lambda body: body["error"]),
        ("ollama", "/v1/chat/completions", lambda body: body["error"]["message"]),
        ("lmstudio", "/api/v0/chat/completions", lambda body: json.dumps(body)),
    ],
)
async def test_a_body_that_never_ends(run_service: RunService, name: str, path: str, words: Any) -> None:
    async with run_service({"a": {}}, server=SERVER) as serving:
        async with connection(serving.port(name)) as (reader, writer):
            raw = request_bytes(path, CHAT)
            writer.write(raw[:-40])
            sending = asyncio.create_task(dribble(writer, raw[-40:], every_s=0.2))
            answer = await read_answer(reader)
            assert answer.status == 408
            assert "did not arrive within 500ms" in words(json.loads(answer.body))
            assert await is_closed(reader) == b""
            sending.cancel()
        assert [trace.status for trace in serving.finished] == [408]
        lines, _ = serving.logs.page("llamarunner", 0, 1000)
        assert not [line for line in lines if line.level in ("warning", "error") or "Traceback" in line.text]


async def test_a_chunked_body_that_stops(run_service: RunService) -> None:
    head = b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n'
    async with run_service({"a": {}}, server=SERVER) as serving, connection(serving.port("ollama")) as (reader, writer):
        writer.write(head)
        assert (await read_answer(reader)).status == 408


async def test_a_body_that_keeps_coming_may_take_long(run_service: RunService) -> None:
    body = {**CHAT, "padding": "x" * 40_000}
    async with run_service({"a": {}}, server=SERVER) as serving, connection(serving.port("ollama")) as (reader, writer):
        raw = request_bytes("/api/chat", body)
        for start in range(0, len(raw), 1000):
            writer.write(raw[start : start + 1000])
            await asyncio.sleep(0.04)  # in all, thrice the timeout
        assert (await read_answer(reader)).status == 200


async def test_answers_are_not_limited(run_service: RunService) -> None:
    async with run_service({"a": {}}, server=SERVER) as serving:
        serving.script.set(prompt_s=1.2, tokens=["w"] * 6, delay_s=0.2)
        for stream in (False, True):
            async with connection(serving.port("ollama")) as (reader, writer):
                writer.write(request_bytes("/api/chat", {**CHAT, "stream": stream}))
                answer = await read_answer(reader)
                assert answer.status == 200
                assert b'"done":true' in answer.body


async def test_the_next_request_on_a_connection(run_service: RunService) -> None:
    """A kept connection may rest; what begins on it must arrive as the first did."""
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with run_service({"a": {}}, server=SERVER) as serving, connection(serving.port("ollama")) as (reader, writer):
        for _ in range(2):
            writer.write(get)
            assert (await read_answer(reader)).status == 200
            await asyncio.sleep(0.8)
        writer.write(get[:20])
        head = await read_head(reader)
        assert head.status == 408
        assert await is_closed(reader) == b""


async def test_many_slow_ones_are_nobodys_trouble(run_service: RunService) -> None:
    async with run_service({"a": {}}, server=SERVER) as serving:
        slow = [await asyncio.open_connection("127.0.0.1", serving.port("ollama")) for _ in range(200)]
        for _, writer in slow:
            writer.write(b"POST /api/chat HTTP/1.1\r\n")
        assert await fast_enough(serving)
        for reader, writer in slow:
            assert (await is_closed(reader)).startswith(b"HTTP/1.1 408 ")
            writer.close()


async def fast_enough(serving: Serving) -> bool:
    started = time.monotonic()
    async with connection(serving.port("ollama")) as (reader, writer):
        writer.write(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return (await read_answer(reader)).status == 200 and time.monotonic() - started < 2
