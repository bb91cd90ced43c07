"""`llamarunner ask`: one question, its answer streamed to stdout, from the program that runs or from one of our own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from llamarunner.config.load import LoadedConfig
from llamarunner.config.schema import ProxyConfig
from llamarunner.errors import EngineError, EngineGoneError, LlamaRunnerError, RequestError
from llamarunner.instance import InstanceFile
from llamarunner.proxies.sse import DONE, event_batches
from llamarunner.service import Service
from llamarunner.telemetry.logs import LogBook, install
from llamarunner.units import format_duration

_TICK_S = 0.5  # between updates of the progress line


@dataclass(slots=True)
class _Answer:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # the last event's model, usage and timings


def ask(loaded: LoadedConfig, model: str, prompt: str, *, system: str = "", as_json: bool = False) -> int:
    """Exit code 0. Raises LlamaRunnerError: RequestError where the question was wrong, others where nobody could
    answer it."""
    return asyncio.run(_ask(loaded, model, prompt, system=system, as_json=as_json))


async def _ask(loaded: LoadedConfig, model: str, prompt: str, *, system: str, as_json: bool) -> int:
    messages = [{"role": "system", "content": system}] if system else []
    body = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    progress = asyncio.create_task(_show_progress(model), name="progress")
    try:
        async with _server(loaded) as (url, headers):
            answer = await _stream(f"{url}/v1/chat/completions", headers, body, progress, quiet=as_json)
    finally:
        await _end(progress)
    if as_json:
        sys.stdout.write(orjson.dumps(_as_record(answer), option=orjson.OPT_INDENT_2).decode() + "\n")
    elif answer.text and not answer.text[-1].endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


@asynccontextmanager
async def _server(loaded: LoadedConfig) -> AsyncIterator[tuple[str, dict[str, str]]]:
    """A running program's address and the headers it wants; our own program where there is none."""
    config = loaded.config
    instance = await asyncio.to_thread(InstanceFile().read)
    for name, settings in (("lmstudio", config.proxies.lmstudio), ("ollama", config.proxies.ollama)):
        if instance is not None and name in instance.proxies:
            host, port = instance.proxies[name]
            yield reachable_url(host, port), request_headers(settings)
            return
    async with _own_server(loaded) as url:
        yield url, {}


@asynccontextmanager
async def _own_server(loaded: LoadedConfig) -> AsyncIterator[str]:
    """One proxy on a free port of loopback, for as long as the question takes."""
    config = loaded.config
    ollama = config.proxies.ollama.model_copy(update={"enabled": False})
    lmstudio = config.proxies.lmstudio.model_copy(
        update={"enabled": True, "host": "127.0.0.1", "port": 0, "api_key": None}
    )
    proxies = config.proxies.model_copy(update={"ollama": ollama, "lmstudio": lmstudio})
    logs = LogBook(None)
    uninstall = install(logs, config.logging.level)
    service = Service(LoadedConfig(config.model_copy(update={"proxies": proxies})), logs, is_announced=False)
    try:
        await service.start()
        try:
            yield next(reachable_url(proxy.host, proxy.port) for proxy in service.proxies if proxy.is_running)
        finally:
            await service.stop(0)
    finally:
        uninstall()
        await asyncio.to_thread(logs.close)


async def _stream(
    url: str, headers: dict[str, str], body: dict[str, Any], progress: asyncio.Task[None], *, quiet: bool
) -> _Answer:
    answer = _Answer()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=orjson.dumps(body), headers=headers) as response,
        ):
            if response.status != 200:
                raise _refusal(response.status, await response.read())
            async for events in event_batches(response.content.readany):
                for event in events:
                    await _take(event, answer, progress, quiet=quiet)
    except aiohttp.ClientError as error:
        raise EngineGoneError(f"the connection broke: {error}") from error
    return answer


async def _take(event: bytes, answer: _Answer, progress: asyncio.Task[None], *, quiet: bool) -> None:
    if event == DONE:
        return
    record = orjson.loads(event)
    if "error" in record:
        raise EngineGoneError(str(record["error"].get("message", record["error"])))
    answer.record |= {name: record[name] for name in ("model", "usage", "timings") if record.get(name)}
    for choice in record.get("choices") or ():
        delta = choice.get("delta") or {}
        answer.reasoning.append(delta.get("reasoning_content") or "")
        if text := delta.get("content"):
            await _end(progress)
            answer.text.append(text)
            if not quiet:
                sys.stdout.write(text)
                sys.stdout.flush()


def _as_record(answer: _Answer) -> dict[str, Any]:
    reasoning = "".join(answer.reasoning)
    return {**answer.record, "answer": "".join(answer.text), **({"reasoning": reasoning} if reasoning else {})}


def _refusal(status: int, raw: bytes) -> LlamaRunnerError:
    try:
        error = orjson.loads(raw)["error"]
        message = error["message"] if isinstance(error, dict) else str(error)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = f"the server answered with status {status}"
    return RequestError(message) if status < 500 else EngineError(message)


def request_headers(settings: ProxyConfig) -> dict[str, str]:
    key = settings.api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}


def reachable_url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


async def _show_progress(model: str) -> None:
    """A line on the terminal while nothing comes, gone when the answer does."""
    if not os.isatty(2):
        return
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        while True:
            await asyncio.sleep(_TICK_S)
            sys.stderr.write(f"\r\x1b[Kwaiting for {model} … {format_duration(loop.time() - begun)}")
            sys.stderr.flush()
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
