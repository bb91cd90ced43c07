"""Runners on engines of kind "command": real processes that are good servers, strange ones and none at all."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from running import FAKE_ENGINE, Bench, ListLog, children, is_alive, pid_in, soon

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines.command import CommandEngine
from llamarunner.errors import LoadError
from llamarunner.events import RunnerState
from llamarunner.runners import runner as runner_module
from llamarunner.runners.runner import KEY_REFUSED, STALLED, Runner

LIFE = ["starting", "loading", "ready"]
FLAGS = ["--port", "${port}", "--model", "${model}", "--alias", "${name}", "--ctx-size", "${context}"]
# a wrapper that starts the engine and waits for it; and one that leaves it behind in a session of its own
WAITS = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
LEAVES = (
    "import pathlib, subprocess, sys; child = subprocess.Popen(sys.argv[2:], start_new_session=True);"
    "pathlib.Path(sys.argv[1]).write_text(str(child.pid))"
)


def command_runner(
    bench: Bench,
    *,
    args: list[str] | None = None,
    load_timeout: float = 10.0,
    script: dict[str, Any] | None = None,
    **config: Any,
) -> Runner:
    arguments = args if args is not None else [str(FAKE_ENGINE), "--script", json.dumps(script or {}), *FLAGS]
    engine = CommandEngine("v", EngineConfig(kind="command", command=sys.executable, args=arguments, **config))
    bench.log = ListLog()
    runner = Runner(
        Model("qwen", Path("Qwen/Qwen3-8B"), ModelSettings(engine="v", load_timeout=load_timeout)),
        engine,
        log=bench.log,
        bus=bench.bus,
        guardian=bench.guardian,
        session=bench.session,
        stop_grace_s=2.0,
    )
    bench.runners.append(runner)
    return runner


async def failed(runner: Runner) -> LoadError:
    with pytest.raises(LoadError) as caught:
        await asyncio.wait_for(runner.start(), 20)
    assert runner.state is RunnerState.FAILED
    assert runner.pid is None
    return caught.value


async def answer_of(bench: Bench, runner: Runner, **headers: str) -> int:
    assert runner.plan is not None
    question = {"model": runner.plan.served_model, "messages": [{"role": "user", "content": "hi"}]}
    url = runner.plan.base_url + "/v1/chat/completions"
    async with bench.session.post(url, json=question, headers=headers or runner.plan.headers) as response:
        return response.status


async def test_from_start_to_stop_without_a_key(bench: Bench) -> None:
    runner = command_runner(bench, script={"load_s": 0.2})
    await runner.start()
    assert bench.states() == LIFE
    assert runner.plan is not None
    assert (runner.plan.headers, runner.plan.served_model) == ({}, "qwen")
    assert await answer_of(bench, runner) == 200
    assert b"loading model 'Qwen/Qwen3-8B'" in bench.log.data
    pid = runner.pid
    await runner.stop("done")
    assert bench.states() == [*LIFE, "stopping", "stopped"]
    assert pid is not None
    assert pid not in children()


async def test_with_a_key_it_was_told(bench: Bench) -> None:
    runner = command_runner(bench, env={"LLAMA_API_KEY": "${api_key}"})
    await runner.start()
    assert runner.plan is not None
    assert await answer_of(bench, runner) == 200
    assert await answer_of(bench, runner, Authorization="Bearer wrong") == 401
    assert runner.plan.api_key not in bench.log.data.decode() + " ".join(runner.plan.argv)


@pytest.mark.parametrize("status", [200, 201, 204, 299])
async def test_any_success_is_ready(bench: Bench, status: int) -> None:
    runner = command_runner(bench, script={"health": {"status": status, "body": ""}})
    await runner.start()
    assert runner.state is RunnerState.READY


async def test_its_own_health_path(bench: Bench) -> None:
    await command_runner(bench, health="/v1/models", script={"health": {"status": 500}}).start()


@pytest.mark.parametrize(
    ("config", "words"), [({}, "wants a key"), ({"env": {"K": "${api_key}"}}, "does not accept the key")]
)
async def test_one_that_keeps_its_door_shut(bench: Bench, config: dict[str, Any], words: str) -> None:
    error = await failed(command_runner(bench, script={"health": {"status": 401}}, **config))
    assert words in error.message
    assert error.cause == KEY_REFUSED
    assert bench.states() == ["starting", "loading", "failed"]  # no other port would help


async def test_one_that_never_listens(bench: Bench) -> None:
    error = await failed(command_runner(bench, load_timeout=0.5, script={"hang": "start"}))
    assert error.cause == STALLED


async def test_one_that_listens_elsewhere(bench: Bench) -> None:
    error = await failed(command_runner(bench, load_timeout=1.0, args=[str(FAKE_ENGINE), "--port", "0", "${port}"]))
    assert error.cause == STALLED


async def test_one_that_exits_at_once(bench: Bench) -> None:
    error = await failed(command_runner(bench, args=["-c", "print('no such option'); raise SystemExit(3)", "${port}"]))
    assert error.exit_code == 3
    assert "no such option" in error.log_tail


async def test_one_that_is_not_its_own_listener(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port was taken by another program of this machine between its choice and the start."""

    async def handle(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    stranger = web.AppRunner(app, access_log=None)
    await stranger.setup()
    await web.TCPSite(stranger, "127.0.0.1", 0).start()
    monkeypatch.setattr(runner_module, "_free_port", lambda: stranger.addresses[0][1])
    try:
        error = await failed(command_runner(bench, args=["-c", "import time; time.sleep(60)", "${port}"]))
    finally:
        await stranger.cleanup()
    assert error.cause == "port_taken"


async def test_a_wrapper_that_waits_for_its_engine(bench: Bench, tmp_path: Path) -> None:
    script = {"grandchild": "setsid", "grandchild_pid_file": str(tmp_path / "pid"), "ignore_sigterm": False}
    args = ["-c", WAITS, sys.executable, str(FAKE_ENGINE), "--script", json.dumps(script), *FLAGS]
    runner = command_runner(bench, args=args)
    await runner.start()
    grandchild = await soon(lambda: pid_in(tmp_path / "pid"))
    assert await answer_of(bench, runner) == 200
    await runner.stop("done")
    assert not is_alive(grandchild)


async def test_a_wrapper_that_leaves_its_engine_behind(bench: Bench, tmp_path: Path) -> None:
    engine = [sys.executable, str(FAKE_ENGINE), "--script", json.dumps({"load_s": 30}), *FLAGS]
    error = await failed(command_runner(bench, args=["-c", LEAVES, str(tmp_path / "pid"), *engine]))
    assert error.exit_code == 0
    left = pid_in(tmp_path / "pid")
    assert left is not None
    assert not is_alive(left)


async def test_it_dies_later(bench: Bench) -> None:
    runner = command_runner(bench, script={"exit": {"at": "prompt", "code": 9}})
    ended: list[Runner] = []
    runner.on_ended = ended.append
    await runner.start()
    with pytest.raises(aiohttp.ClientError):
        await answer_of(bench, runner)
    await soon(lambda: ended)
    assert runner.state is RunnerState.FAILED
    assert runner.error is not None
