"""Engines that do their worst, and machines that do: what the client, the other models and the machine see of it.

LLAMARUNNER_SOAK=1 has the engine that never ends its line print a gigabyte.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest
from serving import Serving, soon

from llamarunner.events import Event, RunnerChanged, RunnerState
from llamarunner.runners import manager, runner
from tests.fakes.nvml import FakeGpu, build, write_state
from tests.program.running_program import Home, engines_of, eventually, smollm2

RunService = Callable[..., Any]
HI = [{"role": "user", "content": "Hi"}]
GIB, MB = 1024**3, 10**6
IS_LONG = bool(os.environ.get("LLAMARUNNER_SOAK"))


async def chat(serving: Serving, model: str = "smol", **more: Any) -> tuple[int, dict[str, Any]]:
    ask = {"model": model, "messages": HI, "stream": False, **more}
    async with aiohttp.ClientSession(serving.ollama) as session, session.post("/api/chat", json=ask) as answer:
        return answer.status, await answer.json()


async def answered(serving: Serving, model: str = "smol", **more: Any) -> None:
    status, answer = await chat(serving, model, **more)
    assert (status, answer.get("message", {}).get("content")) == (200, "Hello there!"), answer


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pid_in(file: Path) -> int:
    return int(file.read_text()) if file.exists() and file.read_text() else 0


# --- output ---------------------------------------------------------------------------------------------------------


async def test_a_line_that_never_ends_costs_no_memory_and_holds_nobody_up(run_service: RunService) -> None:
    junk = GIB if IS_LONG else 64 * 1024**2
    async with run_service({"loud": {}, "quiet": {}}, log_files=True) as serving:
        await answered(serving, "quiet")
        before = psutil.Process().memory_info().rss
        serving.scripts["loud"].set(junk_bytes=junk)
        loud = asyncio.create_task(answered(serving, "loud"))
        meanwhile = 0
        while not loud.done():
            await answered(serving, "quiet")
            meanwhile += 1
        await loud
        assert meanwhile > 3
        grown = psutil.Process().memory_info().rss - before
        assert grown < 30 * MB, f"{grown / MB:.0f} MB more"
        (log,) = [path for path in (serving.home / "logs").rglob("*loud*") if path.is_file()]
        assert 0 < log.stat().st_size < MB


# --- engines that will not go ---------------------------------------------------------------------------------------


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> float:
    """Of each engine, so that one which ignores SIGTERM is killed soon."""
    monkeypatch.setattr(manager, "Runner", functools.partial(runner.Runner, stop_grace_s=0.4))
    return 0.4


async def test_one_that_ignores_sigterm_is_killed_and_the_next_waits_until_it_is_gone(
    run_service: RunService, short_grace: float
) -> None:
    async with run_service({"deaf": {}, "other": {}}, scheduler={"max_loaded": 1}) as serving:
        serving.scripts["deaf"].set(ignore_sigterm=True)
        await answered(serving, "deaf")
        (pid,) = serving.service.manager.pids
        begun = time.monotonic()
        await answered(serving, "other")
        assert time.monotonic() - begun >= short_grace, "it had its grace"
        assert not is_alive(pid)
        await answered(serving, "deaf")
        (pid,) = serving.service.manager.pids
    assert not is_alive(pid), "the end of the service is its end too"


@pytest.mark.parametrize("kind", ["group", "setsid"])
async def test_a_child_that_outlives_its_engine_does_not(run_service: RunService, tmp_path: Path, kind: str) -> None:
    child = tmp_path / "child"
    async with run_service() as serving:
        serving.script.set(grandchild=kind, grandchild_pid_file=str(child), exit={"at": "prompt", "code": 9})
        status, answer = await chat(serving)
        assert status == 500, answer
        pid = await soon(lambda: pid_in(child))
        await soon(lambda: not is_alive(pid))
        serving.script.set()
        await serving.service.manager.load(serving.service.catalog.find("smol"))
        await answered(serving)


def kill_when_ready(serving: Serving, times: int) -> list[int]:
    """End so many engines between their being ready and their first request, in the very step that makes them ready."""
    killed: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, RunnerChanged) and event.new is RunnerState.READY and len(killed) < times:
            (pid,) = serving.service.manager.pids
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            killed.append(pid)

    serving.service.bus.subscribe(kill)
    return killed


async def test_one_that_dies_before_its_first_request_is_replaced_unseen(run_service: RunService) -> None:
    async with run_service() as serving:
        killed = kill_when_ready(serving, 1)
        await answered(serving)
        assert len(killed) == 1
        assert serving.starts == ["smol", "smol"]


async def test_one_that_always_dies_before_its_first_request_is_told(run_service: RunService) -> None:
    async with run_service() as serving:
        killed = kill_when_ready(serving, 2)
        status, answer = await chat(serving)
        assert status == 500
        assert answer["error"]
        assert len(killed) == 2, "it is not tried for ever"
        await serving.idle()
        await serving.service.manager.load(serving.service.catalog.find("smol"))
        await answered(serving)


# --- the machine ----------------------------------------------------------------------------------------------------


@contextmanager
def stranger() -> Iterator[tuple[int, list[bytes]]]:
    """A program that holds a port and calls itself healthy whatever it is asked: its port, and what it was sent."""
    seen: list[bytes] = []
    body = b'{"status": "ok", "total_slots": 1, "choices": [{"message": {"content": "I am not it"}}]}'
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it was shut down
                return
            with connection:
                seen.append(connection.recv(65536))
                connection.sendall(head.encode() + body)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield int(listener.getsockname()[1]), seen
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_a_stolen_port_gets_no_prompt_and_another_is_taken(
    run_service: RunService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stranger() as (stolen, seen):
        choose, chosen = runner._free_port, [stolen]
        monkeypatch.setattr(runner, "_free_port", lambda: chosen.pop() if chosen else choose())
        async with run_service() as serving:
            await answered(serving)
            assert not chosen
            assert "its port was taken; trying another" in [getattr(event, "reason", "") for event in serving.events]
        assert not [raw for raw in seen if b"Hi" in raw or raw.startswith(b"POST")], "what was asked went to a stranger"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def model(name: str, **flags: object) -> str:
    table = "".join(f"flags.{key} = {value!r}\n" for key, value in flags.items())
    return f"[models.{name}]\npath = {str(smollm2())!r}\nengine = 'fake'\n{table}"


def test_a_signal_in_the_middle_of_a_load_ends_it_and_tells_those_who_wait(home: Home) -> None:
    home.configure(model("slow"), load_s=60)
    with home.daemon() as process:
        answers: list[httpx.Response] = []
        client = threading.Thread(target=lambda: answers.append(home.chat("slow")))
        client.start()
        family = eventually(
            lambda: "loading" in home.stderr() and len(engines_of(process)) >= 2 and engines_of(process)
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0, "it does not wait for a load"
        client.join(5)
        assert [answer.status_code for answer in answers] == [503]
        assert "shutting down" in answers[0].json()["error"]
        eventually(lambda: not any(is_alive(member.pid) for member in family))
        assert "Traceback" not in home.stderr()


def test_a_tensor_split_of_the_wrong_count_is_told_before_the_spawn_and_harms_no_other(
    home: Home, tmp_path: Path
) -> None:
    state = tmp_path / "gpus"
    write_state(state, [FakeGpu(8 * GIB), FakeGpu(8 * GIB)])
    home.env |= {"LD_LIBRARY_PATH": str(build(tmp_path / "nvml")), "FAKE_NVML_STATE": str(state)}
    right, wrong = model("right", **{"tensor-split": "1,1"}), model("wrong", **{"tensor-split": "1,1,1"})
    home.configure(right + wrong + model("other"))
    with home.daemon() as process:
        for _ in range(2):
            refused = home.chat("wrong")
            assert 400 <= refused.status_code < 600
            assert "tensor-split has 3 shares, and the GPUs it may use are 2" in refused.json()["error"]
            assert not [each for each in engines_of(process) if "wrong" in each.cmdline()]
            for name in ("other", "right"):
                assert home.chat(name).status_code == 200
        assert "Traceback" not in home.stderr()
