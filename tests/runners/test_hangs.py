"""Engines that fall silent while they owe an answer: reported, and ended where the model says so."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import ListLog, ScriptedEngine, soon

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.config.schema import ModelSettings, SchedulerConfig
from llamarunner.engines.engine import LaunchPlan
from llamarunner.errors import EngineGoneError
from llamarunner.events import EventBus, RequestTrace, RunnerState
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.upstream import read_all, read_block, upstream_session
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.manager import RunnerManager

TIMEOUT_S = 0.5
_CHAT = "/v1/chat/completions"


class NoLlama(ScriptedEngine):
    """The same as a program that has none of llama.cpp's own routes."""

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        return replace(super().plan(model, port=port, api_key=api_key), is_llama_cpp=False)


class Stage:
    def __init__(self, guardian: Guardian, session: aiohttp.ClientSession) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        bus = EventBus()
        self.manager = RunnerManager(
            self.engines, SchedulerConfig(), bus=bus, guardian=guardian, session=session, log_for=lambda _: ListLog()
        )
        self.relay = Relay(self.manager, Catalog, bus=bus, session=session)

    def model(self, *, restart: bool = False, timeout_s: float = TIMEOUT_S, llama: bool = True, **script: Any) -> Model:
        self.engines["a"] = (ScriptedEngine if llama else NoLlama)(script, 20, None, None)
        settings = ModelSettings(engine="a", hang_timeout=timeout_s, restart_hung=restart, parallel=2)
        return Model("a", Path("/models/a.gguf"), settings)

    def use_script(self, file: Path) -> None:
        engine = self.engines["a"]
        engine.argv = (*engine.argv[:-1], str(file))

    @property
    def hung_s(self) -> float | None:
        residence = self.manager.residence("a")
        return residence.hung_s if residence is not None else None

    @asynccontextmanager
    async def answer(self, model: Model, *, stream: bool = True) -> AsyncIterator[aiohttp.ClientResponse]:
        trace = RequestTrace("ollama", _CHAT, "", stream=stream)
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": stream}).encode()
        async with self.relay.ask(model, _CHAT, body, trace) as (upstream, _):
            yield upstream

    async def whole(self, model: Model, *, stream: bool = True) -> bytes:
        async with self.answer(model, stream=stream) as upstream:
            return await read_all(upstream)


@pytest.fixture
async def stage(guardian: Guardian) -> AsyncIterator[Stage]:
    async with upstream_session() as session:
        made = Stage(guardian, session)
        yield made
        await made.manager.close(0)


async def ended(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize(
    ("hang", "stream", "llama"), [("token:2", True, True), ("prompt", False, True), ("token:2", True, False)]
)
async def test_silence_is_reported_once_and_cuts_nobody(
    stage: Stage, caplog: pytest.LogCaptureFixture, hang: str, stream: bool, llama: bool
) -> None:
    model = stage.model(hang=hang, llama=llama)
    request = asyncio.create_task(stage.whole(model, stream=stream))
    silence = await soon(lambda: stage.hung_s)
    assert silence >= TIMEOUT_S
    assert await soon(lambda: (stage.hung_s or 0) > silence)
    assert not request.done()
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the engine of a hangs: no sign of life for 500ms"]
    await ended(request)


@pytest.mark.parametrize(
    "script",
    [
        {"prompt_s": 4 * TIMEOUT_S},
        {"tokens": ["x"] * 40, "delay_s": 0.05},
    ],
    ids=["a long prompt", "a long answer"],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_slow_is_not_hung(
    stage: Stage, caplog: pytest.LogCaptureFixture, script: dict[str, Any], stream: bool
) -> None:
    assert b'"finish_reason":"stop"' in await stage.whole(stage.model(**script), stream=stream)
    assert "hangs" not in caplog.text


@pytest.mark.parametrize("script", [{"llama": False}, {"no_slots": True}])
async def test_nobody_can_tell_of_an_answer_in_one_piece(
    stage: Stage, caplog: pytest.LogCaptureFixture, script: dict[str, Any]
) -> None:
    await stage.whole(stage.model(prompt_s=4 * TIMEOUT_S, **script), stream=False)
    assert "hangs" not in caplog.text


async def test_an_answer_that_its_client_does_not_fetch_is_no_hang(
    stage: Stage, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Neither one that is over, nor one that is held up."""
    for size in (10, 20_000_000):
        model = stage.model(llama=False)
        script = tmp_path / f"{size}.json"
        script.write_text(json.dumps({"raw": {"body": "x" * size}}))
        stage.use_script(script)
        async with stage.answer(model) as upstream:
            with pytest.raises(AssertionError, match="never came true"):
                await soon(lambda: stage.hung_s, within_s=4 * TIMEOUT_S)
            while await read_block(upstream):
                pass
        await stage.manager.unload(model)
    assert "hangs" not in caplog.text


async def test_zero_never_looks(stage: Stage) -> None:
    request = asyncio.create_task(stage.whole(stage.model(hang="prompt", timeout_s=0)))
    await soon(lambda: (residence := stage.manager.residence("a")) and residence.in_flight)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("watch for a hang")]
    await ended(request)


async def test_a_hung_engine_is_ended_and_the_next_request_loads_it_again(stage: Stage, tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"hang": "token:2"}))
    model = stage.model(restart=True)
    stage.use_script(script)
    async with stage.answer(model) as upstream:
        first = (await read_block(upstream)).decode()
        assert "data: " in first
        runner = stage.manager.residence("a").runner  # type: ignore[union-attr]  # it answers
        assert runner is not None
        with pytest.raises(EngineGoneError):
            await read_all(upstream)
    script.write_text("{}")
    await runner.wait_ended()
    assert runner.state is RunnerState.STOPPED
    assert runner.reason == "the engine of a hangs: no sign of life for 500ms"
    residence = await soon(lambda: (found := stage.manager.residence("a")) and not found.runner and found)
    assert residence.failure is not None
    assert residence.failure.message == runner.reason
    assert residence.hung_s is None
    assert b"[DONE]" in await stage.whole(model)
    assert stage.manager.residence("a").failure is None  # type: ignore[union-attr]  # it answered
