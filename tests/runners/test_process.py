from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from running import FAKE_ENGINE, LOOPS, children, eventually, is_alive, open_files, pid_in, soon

from llamarunner.runners import process as process_module
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.process import EngineProcess

AsyncTest = Callable[..., Coroutine[None, None, None]]


@pytest.fixture(params=LOOPS)
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return LOOPS[request.param]


def on_every_loop(test: AsyncTest) -> Callable[..., None]:
    """Run a test, which is given a guardian, on each kind of loop."""

    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], **given: object) -> None:
        async def main() -> None:
            guardian = Guardian()
            try:
                await test(guardian, **given)
            finally:
                await guardian.close()

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())

    own = [p for p in inspect.signature(test).parameters.values() if p.name != "guardian"]
    first = inspect.Parameter("loop_factory", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([first, *own])  # type: ignore[attr-defined]  # what pytest reads
    run.__name__ = test.__name__
    return run


class Output:
    def __init__(self) -> None:
        self.data = bytearray()
        self.largest = 0

    def __call__(self, block: bytes) -> None:
        self.data += block
        self.largest = max(self.largest, len(block))


async def run(code: str, guardian: Guardian, output: object = None) -> EngineProcess:
    argv = [sys.executable, "-I", "-S", "-c", code]
    return await EngineProcess.spawn(argv, {"A": "b"}, on_output=output or Output(), guardian=guardian)  # type: ignore[arg-type]  # a callable


FOREVER = "import time; print('up', flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


@on_every_loop
async def test_output_exit_code_and_surroundings(guardian: Guardian) -> None:
    output = Output()
    code = (
        "import os, sys, resource; print(os.getpid() == os.getsid(0) == os.getpgid(0), sys.stdin.read(),"
        "resource.getrlimit(resource.RLIMIT_CORE), sorted(set(os.environ) - {'LC_CTYPE'}),"
        "os.listdir('/proc/self/fd')); print('bad', file=sys.stderr); sys.exit(7)"
    )
    process = await run(code, guardian, output)
    assert await process.wait() == 7
    assert process.returncode == 7
    # file 3 is the directory being listed
    assert output.data.decode().split("\n")[1] == "True  (0, 0) ['A', 'LLAMARUNNER_ENGINE'] ['0', '1', '2', '3']"
    assert output.data.startswith(b"bad\n")  # stderr is not buffered
    await process.stop(1)
    assert children() == {guardian.pid}


@on_every_loop
async def test_signal_is_a_negative_exit_code(guardian: Guardian) -> None:
    process = await run("import os; os.kill(os.getpid(), 11)", guardian)
    assert await process.wait() == -signal.SIGSEGV
    await process.stop(1)


@on_every_loop
async def test_no_line_is_too_long(guardian: Guardian) -> None:
    output = Output()
    size = 64 * 1024**2
    process = await run(f"import os\nfor _ in range({size // 65536}): os.write(1, b'x' * 65536)", guardian, output)
    assert await process.wait() == 0
    assert len(output.data) == size
    assert output.largest <= 65536
    await process.stop(1)


@on_every_loop
async def test_a_failing_listener_does_not_stop_the_draining(
    guardian: Guardian, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(block: bytes) -> None:
        raise ValueError("no room")

    process = await run("import os\nfor _ in range(100): os.write(1, b'x' * 65536)\nos._exit(3)", guardian, fail)
    assert await asyncio.wait_for(process.wait(), 10) == 3
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    await process.stop(1)


@on_every_loop
async def test_stop_is_polite_first(guardian: Guardian) -> None:
    output = Output()
    code = (
        "import os, signal, sys, time\n"  # no print: the signal may come in the midst of another
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'bye\\n'), sys.exit(5)))\n" + FOREVER
    )
    process = await run(code, guardian, output)
    await soon(lambda: b"up" in output.data)
    await process.stop(10)
    assert process.returncode == 5
    assert output.data == b"up\nbye\n"
    await process.stop(10)  # again: nothing to do
    assert await process.wait() == 5


@on_every_loop
async def test_the_deaf_are_killed_after_the_grace(guardian: Guardian) -> None:
    output = Output()
    process = await run(DEAF, guardian, output)
    await soon(lambda: b"up" in output.data)
    begun = time.monotonic()
    await asyncio.gather(process.stop(0.3), process.stop(60), process.stop(60))
    assert 0.3 <= time.monotonic() - begun < 2
    assert process.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)


@on_every_loop
async def test_a_frozen_process_is_stopped_too(guardian: Guardian) -> None:
    output = Output()
    process = await run(FOREVER, guardian, output)
    await soon(lambda: b"up" in output.data)
    os.kill(process.pid, signal.SIGSTOP)
    await soon(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    await process.stop(0.2)
    assert process.returncode == -signal.SIGKILL


@on_every_loop
async def test_a_cancelled_stop_still_kills(guardian: Guardian) -> None:
    output = Output()
    process = await run(DEAF, guardian, output)
    await soon(lambda: b"up" in output.data)
    stopping = asyncio.ensure_future(process.stop(0.2))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await asyncio.wait_for(process.wait(), 5) == -signal.SIGKILL
    await process.stop(0)


def test_tearing_down_the_loop_kills(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    pids = []

    async def main() -> None:
        output = Output()
        process = await run(DEAF, guardian, output)
        await soon(lambda: b"up" in output.data)
        pids.append(process.pid)

    guardian = Guardian()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    assert not psutil.pid_exists(pids[0])
    asyncio.run(guardian.close())


@pytest.mark.parametrize("kind", ["group", "setsid"])
@pytest.mark.parametrize("how", ["stop", "by itself", "killed"])
@on_every_loop
async def test_nothing_it_started_is_left(guardian: Guardian, tmp_path: Path, kind: str, how: str) -> None:
    file = tmp_path / "pid"
    script = {"grandchild": kind, "grandchild_pid_file": str(file), "hang": "start", "log": ["up"]}
    if how == "by itself":
        script["exit"] = {"at": "start", "code": 4}
    argv = [sys.executable, "-S", str(FAKE_ENGINE), "--script", json.dumps(script)]
    output = Output()
    process = await EngineProcess.spawn(argv, {}, on_output=output, guardian=guardian)
    grandchild = await soon(lambda: pid_in(file)) if how != "by itself" else None
    if how == "killed":
        os.kill(process.pid, signal.SIGKILL)
    begun = time.monotonic()
    if how != "stop":
        await process.wait()  # though the grandchild holds the pipe
        assert time.monotonic() - begun < 2
    await process.stop(0.3)
    assert time.monotonic() - begun < 3
    assert output.data.startswith(b"up\n")
    if grandchild is not None:
        assert not is_alive(grandchild)
    assert await asyncio.to_thread(process.family_pids) == [process.pid]
    assert not is_alive(process.pid)


@on_every_loop
async def test_the_engine_of_a_wrapper_has_its_grace(
    guardian: Guardian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(process_module, "_signal_process", lambda member, number: told.append(number))
    engine = (
        "import signal, sys, time\n"
        f"def end(*_): open({str(tmp_path / 'done')!r}, 'a').write('x'); time.sleep(0.4); print('bye'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n" + FOREVER
    )
    output = Output()
    wrapper = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {engine!r}])"
    process = await run(wrapper, guardian, output)
    await soon(lambda: b"up" in output.data)
    begun = time.monotonic()
    await process.stop(10)
    assert (tmp_path / "done").read_text() == "x"
    assert told == []  # the signal to the group was enough: a second one would mean "at once"
    assert output.data == b"up\nbye\n"
    assert time.monotonic() - begun < 5


async def test_where_there_is_no_pidfd(monkeypatch: pytest.MonkeyPatch, guardian: Guardian) -> None:
    def refuse(pid: int) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    ends, stopped = await run("raise SystemExit(6)", guardian), await run(FOREVER, guardian)
    assert await asyncio.wait_for(ends.wait(), 5) == 6
    await asyncio.gather(ends.stop(1), stopped.stop(5))
    assert stopped.returncode == -signal.SIGTERM
    assert children() == {guardian.pid}


@on_every_loop
async def test_only_the_main_thread_may_spawn(guardian: Guardian) -> None:
    def elsewhere() -> None:
        asyncio.run(run(FOREVER, guardian))

    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(elsewhere)


@pytest.mark.parametrize("kind", ["missing", "not executable", "no program"])
@on_every_loop
async def test_a_program_that_cannot_run(guardian: Guardian, tmp_path: Path, kind: str) -> None:
    program = tmp_path / "engine"
    if kind != "missing":
        program.write_bytes(b"\x7fELF and no more")
        program.chmod(0o755 if kind == "no program" else 0o644)
    before = open_files()
    with pytest.raises(OSError, match=r"No such file|Permission denied|Exec format error"):
        await EngineProcess.spawn([str(program)], {}, on_output=Output(), guardian=guardian)
    assert open_files() == before
    assert children() == set()


@on_every_loop
async def test_fifty_cycles_leave_nothing(guardian: Guardian) -> None:
    await guardian.start()

    async def cycle() -> None:
        process = await run(FOREVER, guardian)
        await process.stop(5)
        assert process.returncode == -signal.SIGTERM

    await cycle()
    before = open_files(), children(), len(asyncio.all_tasks()), threading.active_count()
    for _ in range(10):
        await asyncio.gather(*(cycle() for _ in range(5)))
    await soon(lambda: threading.active_count() <= before[3] + 8)  # the pool that asyncio.to_thread keeps
    assert (open_files(), children(), len(asyncio.all_tasks())) == before[:3]


PARENT = """
import asyncio, sys
sys.path.insert(0, {root!r})
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.process import EngineProcess

async def main():
    guardian = Guardian()
    for kind in ("group", "setsid"):
        script = '{{"grandchild": "%s", "grandchild_pid_file": "%s", "ignore_sigterm": true, "hang": "start"}}' % (
            kind, {folder!r} + "/" + kind)
        process = await EngineProcess.spawn(
            [sys.executable, {fake!r}, "--script", script], {{}}, on_output=lambda block: None, guardian=guardian)
        print(process.pid, flush=True)
    print(guardian.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@dataclass
class Program:
    """A program with two engines, each with a grandchild."""

    process: subprocess.Popen[str]
    engines: list[int]
    guardian: int
    grandchildren: list[int]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    root = str(Path(__file__).parents[2])
    code = PARENT.format(root=root, folder=str(tmp_path), fake=str(FAKE_ENGINE))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            *engines, guardian = [int(process.stdout.readline()) for _ in range(3)]
            grandchildren = [eventually(lambda kind=kind: pid_in(tmp_path / kind), 10) for kind in ("group", "setsid")]
            yield Program(process, engines, guardian, grandchildren)
        finally:
            process.kill()


def test_sigkill_of_the_program_leaves_no_engine(program: Program) -> None:
    pids = [*program.engines, program.guardian, *program.grandchildren]
    assert all(is_alive(pid) for pid in pids)
    program.process.kill()
    eventually(lambda: not any(is_alive(pid) for pid in pids), 2.0)


def test_without_the_guardian_the_engine_itself_goes(program: Program) -> None:
    os.kill(program.guardian, signal.SIGKILL)
    program.process.kill()
    eventually(lambda: not any(is_alive(pid) for pid in program.engines), 2.0)
    for pid in program.grandchildren:
        os.kill(pid, signal.SIGKILL)


def test_a_service_manager_that_signals_everyone_leaves_nothing(program: Program) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(program.guardian, number)
    assert is_alive(program.guardian)
    program.process.terminate()
    pids = [*program.engines, program.guardian, *program.grandchildren]
    eventually(lambda: not any(is_alive(pid) for pid in pids), 2.0)


# --- the guardian by itself --------------------------------------------------------------------------------------


def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


sleeper = pytest.fixture(sleeping, name="sleeper")
other_sleeper = pytest.fixture(sleeping, name="other_sleeper")


@pytest.fixture
def inheritable_file() -> Iterator[None]:
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        yield


async def test_guardian_stops_groups_that_were_not_removed(
    sleeper: subprocess.Popen[bytes], other_sleeper: subprocess.Popen[bytes]
) -> None:
    guardian = Guardian()
    guardian.add(sleeper.pid)
    guardian.add(other_sleeper.pid)
    guardian.remove(other_sleeper.pid)
    guardian.remove(other_sleeper.pid)
    guardian.remove(1)  # never added
    await guardian.close()
    assert await asyncio.to_thread(sleeper.wait, 2) == -signal.SIGTERM
    assert other_sleeper.poll() is None
    await guardian.close()


async def test_guardian_that_was_killed_is_replaced(
    sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    guardian = Guardian()
    guardian.add(sleeper.pid)
    first = guardian.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await soon(lambda: not is_alive(first))
    assert sleeper.poll() is None
    guardian.add(2**22 + 7)  # no such group
    assert guardian.pid not in (None, first)
    assert "starting another" in caplog.text
    await guardian.close()
    assert await asyncio.to_thread(sleeper.wait, 2) == -signal.SIGTERM


async def test_guardian_that_hangs_does_not_hang_us(caplog: pytest.LogCaptureFixture) -> None:
    guardian = Guardian()
    await guardian.start()
    first = guardian.pid
    assert first is not None
    await soon(lambda: psutil.Process(first).status() == psutil.STATUS_SLEEPING)
    os.kill(first, signal.SIGSTOP)
    begun = time.monotonic()
    for _ in range(10_000):
        guardian.add(2**22 + 7, "0" * 32)
        guardian.remove(2**22 + 7)
    assert time.monotonic() - begun < 5
    assert guardian.pid != first
    assert not psutil.pid_exists(first)
    await guardian.close()


async def test_guardian_inherits_no_files_and_is_small(inheritable_file: None) -> None:
    guardian = Guardian()
    await guardian.start()
    await guardian.start()
    pid = guardian.pid
    await soon(lambda: sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"])
    assert psutil.Process(pid).memory_info().rss < 16 * 1024**2
    assert os.getsid(pid or 0) == pid
    begun = time.monotonic()
    await guardian.close()
    assert time.monotonic() - begun < 1
    assert children() == set()
