"""`llamarunner pull` and `rm`, in processes of their own: alone, and beside a program that runs."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from gguf_file import model_bytes, write_model
from registry import FakeRegistry, serve_registry
from serving import serve

from llamarunner.config.load import LoadedConfig
from llamarunner.config.schema import Config
from llamarunner.errors import ModelNotFoundError, RequestError
from llamarunner.instance import InstanceFile
from llamarunner.pull import PullFailedError, pull, remove


@pytest_asyncio.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with serve_registry() as registry:
        registry.add("tiny", model=model_bytes(), system=b"Be brief.")
        yield registry


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMARUNNER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


async def run(*arguments: str, stdout: int = asyncio.subprocess.PIPE) -> tuple[int, str, str]:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llamarunner", *arguments, stdout=stdout, stderr=asyncio.subprocess.PIPE
    )
    out, err = await program.communicate()
    return program.returncode or 0, (out or b"").decode(), err.decode()


async def test_alone(registry: FakeRegistry, home: Path) -> None:
    name = f"{registry.host}/library/tiny"
    code, out, err = await run("pull", name, "--insecure")
    assert (code, out) == (0, "")
    shown = err.splitlines()
    assert shown[0] == "pulling manifest"
    assert shown[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    assert any(": 100 % of " in line for line in shown)
    code, out, err = await run("rm", name)
    assert (code, out, err) == (0, f"removed {name}\n", "")
    assert list((home / "data/models/blobs").iterdir()) == []


async def test_json_is_a_line_for_each_step(registry: FakeRegistry, home: Path) -> None:
    code, out, err = await run("pull", f"{registry.host}/library/tiny", "--insecure", "--json")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert records[0] == {"status": "pulling manifest"}
    assert records[-1] == {"status": "success"}
    assert any(record.get("completed") == record.get("total") != None for record in records)  # noqa: E711


async def test_what_goes_wrong_is_told_with_an_exit_code(registry: FakeRegistry, home: Path) -> None:
    code, out, err = await run("pull", f"{registry.host}/library/nothing", "--insecure")
    assert (code, out) == (4, "")
    assert err.endswith("error: pull model manifest: file does not exist\n")
    loaded = LoadedConfig(Config())
    for name, words in (("a b", "invalid model name"), (f"http://{registry.host}/library/tiny", "insecure protocol")):
        with pytest.raises(RequestError, match=words):
            await asyncio.to_thread(pull, loaded, name)
    with pytest.raises(ModelNotFoundError, match="model 'nothing' not found"):
        await asyncio.to_thread(remove, loaded, "nothing")


async def test_a_person_who_interrupts_it_goes_on_later(registry: FakeRegistry, home: Path) -> None:
    registry.add("long", model=model_bytes() + bytes(2**20))
    registry.always = "slow"
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llamarunner", "pull", f"{registry.host}/library/long", "--insecure", "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert program.stdout is not None
    while not json.loads(await program.stdout.readline()).get("completed"):
        pass
    program.send_signal(signal.SIGINT)
    _, err = await program.communicate()
    assert program.returncode == 130
    assert b"Traceback" not in err
    registry.always = ""
    code, out, _ = await run("pull", f"{registry.host}/library/long", "--insecure", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[1])["completed"] > 0


async def test_a_terminal_shows_bars(registry: FakeRegistry, home: Path) -> None:
    registry.always = "slow"
    registry.add("long", model=model_bytes() + bytes(60_000))
    ours, theirs = pty.openpty()
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llamarunner", "pull", f"{registry.host}/library/long", "--insecure",
        stderr=theirs, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)

    def read() -> bytes:
        seen = b""
        try:
            while block := os.read(ours, 65536):
                seen += block
        except OSError:
            pass  # as a terminal ends
        return seen

    shown = (await asyncio.to_thread(read)).decode()
    assert await program.wait() == 0
    os.close(ours)
    assert "pulling manifest" in shown
    assert "━" in shown
    assert "KiB" in shown
    assert "success" in shown


async def test_beside_a_program_that_runs(
    registry: FakeRegistry, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(home / "folder/plain.gguf")
    async with serve(home, {"discovery": {"folders": [str(home / "folder")]}}) as serving:
        instance, loaded = InstanceFile(), LoadedConfig(Config())
        instance.write(time.time(), {"ollama": ("127.0.0.1", serving.port("ollama"))})
        name = f"{registry.host}/library/tiny"
        await asyncio.to_thread(pull, loaded, name, insecure=True, as_json=True)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"status": "success"}
        assert serving.service.catalog.find(name).preset.system == "Be brief."  # it knows at once
        with pytest.raises(PullFailedError, match="file does not exist"):
            await asyncio.to_thread(pull, loaded, f"{registry.host}/library/nothing", insecure=True)
        with pytest.raises(RequestError, match="only read"):
            await asyncio.to_thread(remove, loaded, "plain")
        await asyncio.to_thread(remove, loaded, name)
        assert serving.service.catalog.get(name) is None
        instance.remove()
