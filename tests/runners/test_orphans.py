"""Leftovers are real processes here, and so is whoever left them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import eventually, is_alive, soon

from llamarunner.runners import orphans
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.orphans import EngineList, end_leftovers
from llamarunner.runners.process import TAG, EngineProcess

FOREVER = "import time; print('up', flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"
WITH_CHILD = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    f"start_new_session=True); print(child.pid, file=sys.stderr, flush=True); {FOREVER}"
)

Started = subprocess.Popen[str]


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """A process with a tag, as an engine has it, that is no engine of ours any more."""
    started: list[Started] = []

    def make(tag: str, code: str = FOREVER) -> Started:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            env={TAG: tag},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield make
    for process in started:
        process.kill()
        process.communicate()


def listed(process: Started, tag: str, **changes: Any) -> dict[str, Any]:
    return {"pid": process.pid, "born": orphans._born(process.pid), "tag": tag, "model": "smol"} | changes


def leave(folder: Path, *engines: dict[str, Any], pid: int | None = None, born: str = "long ago") -> Path:
    """The file of an instance; of one that is dead if nothing else is said."""
    folder.mkdir(exist_ok=True)
    pid = pid or 2**22 + 1  # above any that the kernel gives
    path = folder / f"{pid}.json"
    path.write_text(json.dumps({"pid": pid, "born": born, "engines": engines}))
    return path


def new_tag() -> str:
    return secrets.token_hex(16)


def test_what_a_dead_instance_left_is_ended(
    tmp_path: Path, start: Callable[..., Started], caplog: pytest.LogCaptureFixture
) -> None:
    tag, other = new_tag(), new_tag()
    first, second = start(tag), start(other)
    file = leave(tmp_path, listed(first, tag), listed(second, other))
    end_leftovers(tmp_path)
    assert not is_alive(first.pid)
    assert not is_alive(second.pid)
    assert first.wait() == -signal.SIGTERM
    assert not file.exists()
    assert f"ending pid {first.pid}, which an earlier run left: the engine of smol" in caplog.messages


def test_one_that_ignores_sigterm_is_killed(
    tmp_path: Path, start: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_GRACE_S", 0.3)
    tag = new_tag()
    engine = start(tag, DEAF)
    leave(tmp_path, listed(engine, tag))
    end_leftovers(tmp_path)
    assert engine.wait() == -signal.SIGKILL


def test_what_an_engine_started_is_ended_with_it_or_without(tmp_path: Path, start: Callable[..., Started]) -> None:
    tag = new_tag()
    engine = start(tag, WITH_CHILD)
    assert engine.stderr is not None
    child = int(engine.stderr.readline())
    leave(tmp_path, listed(engine, tag))
    engine.kill()
    engine.wait()
    assert is_alive(child)
    end_leftovers(tmp_path)
    assert not is_alive(child)


def test_a_stranger_with_the_same_number_is_not_touched(tmp_path: Path, start: Callable[..., Started]) -> None:
    tag = new_tag()
    without_tag, younger = start(new_tag()), start(tag)
    file = leave(tmp_path, listed(without_tag, new_tag()), listed(younger, tag, born="another time"))
    end_leftovers(tmp_path)
    assert is_alive(without_tag.pid)
    assert is_alive(younger.pid)
    assert not file.exists()


def test_a_living_instance_keeps_its_engines(tmp_path: Path, start: Callable[..., Started]) -> None:
    tag = new_tag()
    engine, instance = start(tag), start(new_tag())
    file = leave(tmp_path, listed(engine, tag), pid=instance.pid, born=orphans._born(instance.pid))
    end_leftovers(tmp_path)
    assert is_alive(engine.pid)
    assert file.exists()
    instance.kill()
    instance.wait()
    end_leftovers(tmp_path)
    assert not is_alive(engine.pid)
    assert not file.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '{"pid": 1}', "[" * 100_000, '{"pid": 5, "born": "x", "engines": [{"pid": "z"}]}'],
)
def test_a_broken_file_is_ignored(
    tmp_path: Path, start: Callable[..., Started], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    tag = new_tag()
    engine = start(tag)
    (tmp_path / "1.json").write_text(text)
    leave(tmp_path, listed(engine, tag))
    end_leftovers(tmp_path)
    assert not is_alive(engine.pid)
    assert "is damaged, and ignored" in caplog.text


@pytest.mark.parametrize("tag", ["", "PATH", "0" * 31])
def test_a_tag_that_others_could_have_ends_nobody(tmp_path: Path, start: Callable[..., Started], tag: str) -> None:
    engine = start(new_tag())
    leave(tmp_path, listed(engine, tag))
    end_leftovers(tmp_path)
    assert is_alive(engine.pid)


def test_no_folder_no_work(tmp_path: Path) -> None:
    end_leftovers(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


async def test_the_file_says_which_engines_there_are(tmp_path: Path, guardian: Guardian) -> None:
    folder = tmp_path / "engines"
    engines = EngineList(folder, guardian)
    await engines.start()
    file = folder / f"{os.getpid()}.json"
    assert not file.exists()

    async def spawn(name: str) -> EngineProcess:
        argv = [sys.executable, "-I", "-S", "-c", FOREVER]
        return await EngineProcess.spawn(argv, {}, on_output=lambda block: None, guardian=guardian, name=name)

    def names() -> list[str]:
        return sorted(each["model"] for each in json.loads(file.read_text())["engines"]) if file.exists() else []

    first, second = await spawn("a"), await spawn("b")
    await soon(lambda: names() == ["a", "b"])
    assert file.stat().st_mode & 0o077 == 0
    assert folder.stat().st_mode & 0o077 == 0
    end_leftovers_of_another(folder)
    assert is_alive(first.pid)
    assert is_alive(second.pid)
    await first.stop(1)
    await soon(lambda: names() == ["b"])
    await second.stop(1)
    await engines.close()
    assert list(folder.iterdir()) == []


def end_leftovers_of_another(folder: Path) -> None:
    """The start of a second instance, in a process of its own."""
    code = (
        "import pathlib, sys; from llamarunner.runners import orphans; orphans.end_leftovers(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=30)


INSTANCE = """
import asyncio, sys
from pathlib import Path
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.orphans import EngineList
from llamarunner.runners.process import EngineProcess

async def main():
    guardian = Guardian()
    await EngineList(Path(sys.argv[1]), guardian).start()
    argv = [sys.executable, "-I", "-S", "-c", sys.argv[2]]
    await EngineProcess.spawn(argv, {}, on_output=lambda block: None, guardian=guardian, name="smol")
    print(guardian.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_after_the_instance_and_its_guardian_were_killed(tmp_path: Path) -> None:
    """The engine dies with its parent; what it started does not."""
    argv = [sys.executable, "-c", INSTANCE, str(tmp_path), WITH_CHILD]
    instance = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert instance.stdout is not None
        guardian = int(instance.stdout.readline())
        file = tmp_path / f"{instance.pid}.json"
        tag = eventually(lambda: file.exists() and json.loads(file.read_text())["engines"])[0]["tag"]
        eventually(lambda: len(tagged(tag)) == 2)
        os.kill(guardian, signal.SIGKILL)
    finally:
        instance.kill()
        instance.communicate()
    left = eventually(lambda: tagged(tag))
    began = time.monotonic()
    end_leftovers(tmp_path)
    assert time.monotonic() - began < 5
    assert not [pid for pid in left if is_alive(pid)]
    assert list(tmp_path.iterdir()) == []


def tagged(tag: str) -> list[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if orphans.environment_has(pid, tag)]
