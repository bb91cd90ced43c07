"""Questions asked of the program, of its engine directly, or of nginx before it, on one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import uvloop

CHAT = "/v1/chat/completions"
OLLAMA_CHAT = "/api/chat"
QUESTION: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}

T = TypeVar("T")


@asynccontextmanager
async def client(key: str = "") -> AsyncIterator[aiohttp.ClientSession]:
    """With the engine's key, which the engine itself wants and the program does not mind."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield session


async def ask(session: aiohttp.ClientSession, port: int, path: str = CHAT, **fields: object) -> float:
    """Seconds from the question to the end of its answer."""
    started = time.perf_counter()
    body = {**QUESTION, "stream": False, **fields}
    async with session.post(f"http://127.0.0.1:{port}{path}", json=body) as response:
        await response.read()
        response.raise_for_status()
    return time.perf_counter() - started


async def ask_once(port: int, **fields: object) -> float:
    """The same on a connection of its own."""
    async with client() as session:
        return await ask(session, port, **fields)  # type: ignore[arg-type]  # none of them is `path`


async def alternate(session: aiohttp.ClientSession, ports: tuple[int, int], rounds: int) -> list[list[float]]:
    """The same question to both in turn, so that whatever else the machine does meets both alike."""
    took: list[list[float]] = [[], []]
    for number in range(rounds + rounds // 10):
        for port, series in zip(ports, took, strict=True):
            seconds = await ask(session, port)
            if number >= rounds // 10:  # what comes before warms up
                series.append(seconds)
    return took


async def stream(session: aiohttp.ClientSession, port: int, path: str, streams: int) -> tuple[int, float]:
    """Ask `streams` times at once: the lines that came, and the seconds it took."""

    async def one() -> int:
        body = {**QUESTION, "stream": True}
        count = 0
        async with session.post(f"http://127.0.0.1:{port}{path}", json=body) as response:
            response.raise_for_status()
            async for block in response.content.iter_any():
                count += block.count(b"\n")
        return count

    started = time.perf_counter()
    counts = await asyncio.gather(*(one() for _ in range(streams)))
    return sum(counts), time.perf_counter() - started


async def knock(session: aiohttp.ClientSession, port: int, busy: asyncio.Task[object]) -> list[float]:
    """How long the program itself takes to answer while `busy` runs: what holds its loop up shows here."""
    took: list[float] = []
    while not busy.done():
        started = time.perf_counter()
        async with session.get(f"http://127.0.0.1:{port}/api/version") as response:
            await response.read()
        took.append(time.perf_counter() - started)
        await asyncio.sleep(0.002)
    return took


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def run(work: Callable[[], Awaitable[T]]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def main() -> T:
            return await work()

        return runner.run(main())
