from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from registry import FakeRegistry, serve_registry

from llamarunner.catalog import pull as pull_module
from llamarunner.catalog.download import Pace
from llamarunner.catalog.library import Library
from llamarunner.catalog.manifests import ManifestError
from llamarunner.catalog.names import InvalidNameError, ModelName
from llamarunner.catalog.pull import Progress, Pull, Pulls
from llamarunner.errors import LlamaRunnerError, OverloadedError, RequestError
from llamarunner.events import PullState

BIG = bytes(range(256)) * 1024  # 256 KiB
PACE = Pace(
    part_min=64 * 1024, part_max=64 * 1024, parallel=4, stall_s=0.3, retries=3, backoff_s=0.01, write_bytes=8192
)


@pytest_asyncio.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with serve_registry() as registry:
        registry.add("big", model=BIG, params=b'{"seed":1}')
        yield registry


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest_asyncio.fixture
async def pulls(library: Library) -> AsyncIterator[Pulls]:
    pulls = Pulls(library, nothing, pace=PACE)
    yield pulls
    await pulls.close()


async def nothing() -> None:
    pass


async def soon(condition: Callable[[], Any], within_s: float = 5.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)
    return value


async def lines_of(pulls: Pulls, name: str) -> list[dict[str, Any]]:
    async with aclosing(pulls.pull(name, insecure=True)) as lines:
        return [line.as_record() async for line in lines]


def model_digest(registry: FakeRegistry, name: str = "big") -> str:
    digest: str = json.loads(registry.manifests[f"library/{name}/latest"])["layers"][0]["digest"]
    return digest


def partial(library: Library) -> list[str]:
    folder = library.root / "blobs"
    return sorted(path.name for path in folder.iterdir() if "-partial" in path.name) if folder.exists() else []


def check_whole(library: Library, registry: FakeRegistry, name: str = "big") -> None:
    manifest = library.find(ModelName.parse(f"{registry.host}/library/{name}"))
    assert manifest is not None
    assert manifest.path is not None
    assert manifest.path.read_bytes() == registry.manifests[f"library/{name}/latest"]  # verbatim
    for layer in manifest.blobs:
        path = library.blob(layer.digest)
        assert path is not None
        assert path.read_bytes() == registry.blobs[layer.digest]
    assert partial(library) == []


# --- what goes well --------------------------------------------------------------------------------------------------


async def test_the_lines_are_ollamas(registry: FakeRegistry, pulls: Pulls, library: Library) -> None:
    lines = await lines_of(pulls, f"{registry.host}/library/big")
    digest = model_digest(registry)
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[1] == {"status": f"pulling {digest[7:19]}", "digest": digest, "total": len(BIG)}
    statuses = list(dict.fromkeys(line["status"] for line in lines))
    assert [status.split()[0] for status in statuses] == ["pulling"] * 4 + ["verifying", "writing", "success"]
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    for status in statuses[1:4]:
        blob = [line for line in lines if line["status"] == status]
        counts = [line.get("completed", 0) for line in blob]
        assert counts == sorted(counts)
        assert counts[-1] == blob[-1]["total"]
    check_whole(library, registry)
    manifest_request = registry.asked[0]
    assert manifest_request.headers["accept"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest_request.headers["user-agent"].startswith("ollama/0.")
    again = await lines_of(pulls, f"{registry.host}/library/big")
    assert [line.get("completed") for line in again] == [None, len(BIG), 10, 23, None, None, None]
    assert len(registry.blob_requests(digest)) == 4  # of 64 KiB each, and not again


async def test_the_registry_and_its_bytes_may_be_on_one_host(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    registry.redirects = False
    await lines_of(pulls, f"http://{registry.host}/library/big:latest")
    check_whole(library, registry)


async def test_ranges_are_asked_for_side_by_side(registry: FakeRegistry, pulls: Pulls) -> None:
    registry.gate = asyncio.Event()
    digest = model_digest(registry)
    async with asyncio.TaskGroup() as group:
        group.create_task(lines_of(pulls, f"{registry.host}/library/big"))
        await soon(lambda: len(registry.blob_requests(digest)) == 4)
        registry.gate.set()
    ranges = {each.range for each in registry.blob_requests(digest)}
    assert ranges == {f"bytes={start}-{start + 65535}" for start in range(0, len(BIG), 65536)}


async def test_an_empty_blob_and_one_twice_in_a_manifest(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    registry.add("odd", model=b"x", system=b"", template=b"", license=b"x")
    await lines_of(pulls, f"{registry.host}/library/odd")
    check_whole(library, registry, "odd")


async def test_a_token_for_anyone_is_fetched_and_stays_with_its_host(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    registry.token = "t0ken"
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)
    assert {each.authorization for each in registry.asked if each.port == registry.bytes_port} == {""}
    assert [each.path for each in registry.asked].count("/token") == 1


async def test_what_ollama_has_already_is_not_fetched_again(registry: FakeRegistry, tmp_path: Path) -> None:
    digest, other = model_digest(registry), tmp_path / "ollama/blobs"
    other.mkdir(parents=True)
    (other / digest.replace(":", "-")).write_bytes(BIG)
    library = Library(tmp_path / "library", others=["/nonexistent", str(tmp_path / "ollama")])
    pulls = Pulls(library, nothing, pace=PACE)
    lines = await lines_of(pulls, f"{registry.host}/library/big")
    assert {"status": f"pulling {digest[7:19]}", "digest": digest, "total": len(BIG), "completed": len(BIG)} in lines
    assert registry.blob_requests(digest) == []
    check_whole(library, registry)
    library.delete(ModelName.parse(f"{registry.host}/library/big"))
    assert (other / digest.replace(":", "-")).read_bytes() == BIG
    (other / digest.replace(":", "-")).write_bytes(BIG[:-1])  # not what was promised
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)
    await pulls.close()


async def test_the_proxy_of_the_environment_is_asked(
    registry: FakeRegistry, pulls: Pulls, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.redirects = False
    monkeypatch.setenv("http_proxy", f"http://{registry.host}")
    monkeypatch.delenv("no_proxy", raising=False)
    await lines_of(pulls, "models.invalid/library/big")
    assert {each.headers["host"] for each in registry.asked} == {"models.invalid"}
    assert library.find(ModelName.parse("models.invalid/library/big")) is not None


# --- sharing, leaving, coming back -----------------------------------------------------------------------------------


async def test_two_who_want_one_model_share_its_pull(registry: FakeRegistry, pulls: Pulls) -> None:
    registry.gate = asyncio.Event()
    name = f"{registry.host}/library/big"
    async with asyncio.TaskGroup() as group:
        first = group.create_task(lines_of(pulls, name))
        await soon(lambda: registry.blob_requests())
        second = group.create_task(lines_of(pulls, name.upper()))
        await asyncio.sleep(0.05)
        registry.gate.set()
    assert first.result()[-1] == second.result()[-1] == {"status": "success"}
    assert second.result()[0] == {"status": "pulling manifest"}
    assert len(registry.blob_requests(model_digest(registry))) == 4


async def test_two_models_share_the_blob_they_have_in_common(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    registry.add("other", model=BIG, system=b"Be brief.")
    registry.gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(lines_of(pulls, f"{registry.host}/library/big"))
        group.create_task(lines_of(pulls, f"{registry.host}/library/other"))
        await soon(lambda: len(registry.blob_requests()) == 4)
        await soon(lambda: len([each for each in registry.asked if "manifests" in each.path]) == 2)
        await asyncio.sleep(0.05)
        registry.gate.set()
    check_whole(library, registry)
    check_whole(library, registry, "other")
    assert len(registry.blob_requests(model_digest(registry))) == 4


async def test_who_leaves_does_not_end_it_for_the_other_and_the_last_keeps_the_parts(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    registry.always = "slow"
    name, digest = f"{registry.host}/library/big", model_digest(registry)
    tasks = [asyncio.create_task(lines_of(pulls, name)) for _ in range(2)]
    await soon(lambda: pulls.all and pulls.all[0].completed > 20_000)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    before = pulls.all[0].completed
    await soon(lambda: pulls.all[0].completed > before)
    assert pulls.all[0].state is PullState.RUNNING
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert [pull.state for pull in pulls.all] == [PullState.CANCELLED]
    assert partial(library) == [f"sha256-{digest[7:]}-partial", f"sha256-{digest[7:]}-partial.json"]
    registry.always = ""
    registry.asked.clear()
    lines = await lines_of(pulls, name)
    check_whole(library, registry)
    assert lines[1].get("completed", 0) >= 20_000  # it goes on from there
    starts = [int(each.range.removeprefix("bytes=").split("-")[0]) for each in registry.blob_requests(digest)]
    assert any(start % 65536 for start in starts)


async def test_a_pull_that_nobody_watches_is_ended_by_name(registry: FakeRegistry, pulls: Pulls) -> None:
    registry.always = "slow"
    name = f"http://{registry.host}/library/big"
    pull = pulls.start(name, insecure=True)
    assert pulls.start(name, insecure=True) is pull
    await soon(lambda: pull.completed and pull.bytes_per_s)
    assert pull.total == len(BIG) + 10 + 23
    assert pull.status.startswith("pulling ")
    watching = asyncio.create_task(lines_of(pulls, name))
    await asyncio.sleep(0)
    assert await pulls.cancel(name) is pull
    with pytest.raises(LlamaRunnerError, match="was cancelled"):
        await watching
    assert pull.state is PullState.CANCELLED
    assert await pulls.cancel(name) is None


async def test_closing_ends_every_pull(registry: FakeRegistry, library: Library) -> None:
    registry.gate = asyncio.Event()
    pulls = Pulls(library, nothing, pace=PACE)
    for name in ("big", "other", "third", "fourth"):
        registry.add(name, model=name.encode() * 1000)
        pulls.start(f"{registry.host}/library/{name}", insecure=True)
    await soon(lambda: sum(pull.state is PullState.RUNNING for pull in pulls.all) == 3)  # the others wait
    assert sum(pull.state is PullState.WAITING for pull in pulls.all) == 1
    await pulls.close()
    assert {pull.state for pull in pulls.all} == {PullState.CANCELLED}
    with pytest.raises(OverloadedError):
        pulls.start("x")
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(("pull", "download"))] == []


async def test_too_many_pulls(registry: FakeRegistry, pulls: Pulls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "_MOST", 2)
    pulls.start("a")
    pulls.start("b")
    with pytest.raises(OverloadedError, match="too many downloads"):
        pulls.start("c")


KILLED = """
import asyncio, sys
from pathlib import Path
from llamarunner.catalog.download import Pace
from llamarunner.catalog.library import Library
from llamarunner.catalog.pull import Pulls
async def main():
    async def changed(): pass
    pulls = Pulls(Library(Path(sys.argv[1])), changed, pace=Pace(part_min=65536, part_max=65536, write_bytes=4096))
    async for line in pulls.pull(sys.argv[2], insecure=True):
        print(line.completed, flush=True)
asyncio.run(main())
"""


async def test_a_program_that_was_killed_is_taken_up_by_the_next(
    registry: FakeRegistry, pulls: Pulls, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("long", model=BIG * 16)  # 4 MiB, slow enough to be noted a second later
    registry.always = "slow"
    name = f"{registry.host}/library/long"
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(library.root), name, stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    while f"sha256-{model_digest(registry, 'long')[7:]}-partial.json" not in partial(library):
        await program.stdout.readline()
    busy = asyncio.create_task(lines_of(pulls, name))  # two programs do not write one file
    with pytest.raises(LlamaRunnerError, match="another program is downloading this"):
        await busy
    program.send_signal(signal.SIGKILL)
    await program.wait()
    registry.always = ""
    lines = await lines_of(pulls, name)
    assert lines[1].get("completed", 0) > 0
    check_whole(library, registry, "long")


async def test_parts_that_a_crash_damaged_are_fetched_again(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    digest = model_digest(registry)
    path = library.blobs / f"sha256-{digest[7:]}-partial"
    path.write_bytes(bytes(len(BIG)))
    path.with_name(path.name + ".json").write_text(json.dumps([[0, len(BIG), len(BIG) - 5]]))
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)


@pytest.mark.parametrize(
    "note", ["", "{", "[]", "[[0,5]]", "[[5,9,0]]", '[["a",1,2]]', f"[[0,{len(BIG)},{len(BIG) + 1}]]"]
)
async def test_notes_of_parts_that_make_no_sense(
    registry: FakeRegistry, pulls: Pulls, library: Library, note: str
) -> None:
    path = library.blobs / f"sha256-{model_digest(registry)[7:]}-partial"
    path.write_bytes(bytes(len(BIG)))
    path.with_name(path.name + ".json").write_text(note)
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        ["status:500"], ["status:503", "status:502"], ["retry-after:0"], ["cut:0"], ["cut:20000", "cut:1", "cut:9000"],
        ["stall:0"], ["stall:30000"], ["short"], ["status:403"], ["whole"], ["cut:100", "whole"],
        ["whole"] * 9, ["status:500", "cut:50", "stall:50", "short"],
    ],
)  # fmt: skip
async def test_a_fault_that_passes(registry: FakeRegistry, pulls: Pulls, library: Library, faults: list[str]) -> None:
    registry.faults = list(faults)
    lines = await lines_of(pulls, f"{registry.host}/library/big")
    assert lines[-1] == {"status": "success"}
    check_whole(library, registry)


async def test_a_server_without_ranges_that_breaks_off_starts_over(
    registry: FakeRegistry, pulls: Pulls, library: Library
) -> None:
    registry.always = "whole"
    registry.faults = ["whole", "cut:3000"]
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status:500", "500: it hurts"), ("cut:0", "the connection breaks"), ("stall:0", "the download stalls"),
        ("garbage", "digest mismatch, file must be downloaded again: want sha256:"), ("total", "in place of the"),
        ("shifted", "came in place of"), ("status:404", "file does not exist"), ("short", "the connection breaks"),
    ],
)  # fmt: skip
async def test_a_fault_that_does_not_pass(registry: FakeRegistry, library: Library, fault: str, words: str) -> None:
    pulls = Pulls(library, nothing, pace=replace(PACE, stall_s=0.1, retries=2))
    registry.always = fault
    with pytest.raises(LlamaRunnerError, match=words):
        await lines_of(pulls, f"{registry.host}/library/big")
    assert library.manifests() == []
    assert pulls.all[0].state is PullState.FAILED
    assert library.blob(model_digest(registry)) is None
    registry.always = ""
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)
    await pulls.close()


async def test_a_blob_that_is_not_there(registry: FakeRegistry, pulls: Pulls, library: Library) -> None:
    del registry.blobs[model_digest(registry)]
    with pytest.raises(LlamaRunnerError, match="file does not exist"):
        await lines_of(pulls, f"{registry.host}/library/big")


async def test_manifests_that_are_none(registry: FakeRegistry, pulls: Pulls, library: Library) -> None:
    host = registry.host
    with pytest.raises(LlamaRunnerError) as caught:
        await lines_of(pulls, f"{host}/library/nothing")
    assert str(caught.value) == "pull model manifest: file does not exist"
    registry.manifests["library/broken/latest"] = b"{"
    with pytest.raises(ManifestError, match="is no JSON"):
        await lines_of(pulls, f"{host}/library/broken")
    registry.manifests["library/huge/latest"] = b" " * (5 * 1024**2)
    with pytest.raises(LlamaRunnerError, match="too large"):
        await lines_of(pulls, f"{host}/library/huge")
    registry.add("cloud")
    with pytest.raises(LlamaRunnerError, match="has no GGUF file"):
        await lines_of(pulls, f"{host}/library/cloud")
    registry.manifest_faults = ["status:500", "retry-after:0", "retry-after:0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamarunner.catalog.registry._RETRIES", 1)
        registry.manifest_faults = ["retry-after:0", "retry-after:0"]
        with pytest.raises(LlamaRunnerError, match="pull model manifest: the registry answered with status 429"):
            await lines_of(pulls, f"{host}/library/big")
    registry.manifest_faults = ["retry-after:0"]
    await lines_of(pulls, f"{host}/library/big")
    assert len(library.manifests()) == 1


async def test_a_registry_that_is_not_there(pulls: Pulls, unused_tcp_port: int) -> None:
    with pytest.raises(LlamaRunnerError, match=r"pull model manifest: 127\.0\.0\.1:\d+ cannot be asked"):
        await lines_of(pulls, f"127.0.0.1:{unused_tcp_port}/library/m")


async def test_what_is_private_says_so(registry: FakeRegistry, pulls: Pulls) -> None:
    registry.token, registry.token_is_given = "t0ken", False
    with pytest.raises(LlamaRunnerError, match="private models are not supported"):
        await lines_of(pulls, f"{registry.host}/library/big")
    registry.realm, registry.token_is_given = f"http://127.0.0.1:{registry.bytes_port}/token", True
    with pytest.raises(LlamaRunnerError, match="sends us to another host"):
        await lines_of(pulls, f"{registry.host}/library/big")
    assert registry.bytes_port not in {each.port for each in registry.asked}


@pytest.mark.parametrize("name", ["", "a b", "http://", "https://a/b/c/d/e", "file:///etc/passwd", "../x"])
async def test_names_that_are_none(pulls: Pulls, name: str) -> None:
    with pytest.raises(InvalidNameError):
        await lines_of(pulls, name)
    assert pulls.all == []


async def test_http_must_be_meant(pulls: Pulls) -> None:
    with pytest.raises(RequestError, match="insecure protocol http"):
        pulls.start("http://127.0.0.1:1/library/m")


async def test_a_disk_without_room_is_told_before_the_first_byte(registry: FakeRegistry, tmp_path: Path) -> None:
    pulls = Pulls(Library(tmp_path / "library", free_bytes=lambda _: 64 * 1024**2), nothing, pace=PACE)
    with pytest.raises(LlamaRunnerError, match=r"needs 256\.0 KiB more, and 64\.0 MiB are free in .*/library"):
        await lines_of(pulls, f"{registry.host}/library/big")
    assert registry.blob_requests() == []
    await pulls.close()


async def test_a_disk_that_fills_up_meanwhile(
    registry: FakeRegistry, pulls: Pulls, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(LlamaRunnerError, match="cannot be kept: No space left"):
            await lines_of(pulls, f"{registry.host}/library/big")
    await lines_of(pulls, f"{registry.host}/library/big")
    check_whole(library, registry)


async def test_a_failure_behind_the_scenes_ends_the_pull_with_an_error(
    registry: FakeRegistry, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    pulls = Pulls(library, fail, pace=PACE)
    with pytest.raises(LlamaRunnerError, match="internal error"):
        await lines_of(pulls, f"{registry.host}/library/big")
    assert "unforeseen" in caplog.text
    await pulls.close()


# --- the lines as such -----------------------------------------------------------------------------------------------


async def test_who_is_slow_misses_steps_but_no_line() -> None:
    pull = Pull(ModelName.parse("m"))
    pull.say(Progress("pulling manifest"))
    lines = pull.progress()
    assert await anext(lines) == Progress("pulling manifest")
    for completed in range(0, 11, 5):
        pull.say(Progress("pulling a", "a", 10, completed))
    pull.say(Progress("verifying sha256 digest"))
    pull.ended_at = 1.0
    pull.wake()
    assert [line async for line in lines] == [Progress("pulling a", "a", 10, 10), Progress("verifying sha256 digest")]


def test_zeros_are_left_out() -> None:
    assert Progress("pulling a", "sha256:a", 10, 0).as_record() == {
        "status": "pulling a",
        "digest": "sha256:a",
        "total": 10,
    }
