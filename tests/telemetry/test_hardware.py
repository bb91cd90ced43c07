"""The sampler in a process of its own, with the real NVML bindings on a library that plays the driver."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvml
import psutil
import pytest
from nvml import GIB, UNSUPPORTED, FakeGpu

from llamarunner.telemetry.hardware import HardwareReader, HardwareSampler

# Answers each line of stdin with the newest sample; "end" leaves without stopping the sampler, "stop" stops it first.
PROBE = """
import dataclasses, json, sys, time
from llamarunner.telemetry.hardware import HardwareSampler

sampler = HardwareSampler(lambda: (), interval_s=0.05, gpu_retry_s=float(sys.argv[1]))
sampler.start()
for line in sys.stdin:
    match line.strip():
        case "end":
            break
        case "stop":
            before = time.monotonic()
            sampler.stop()
            print(time.monotonic() - before, flush=True)
            break
        case _:
            before = time.monotonic()
            sample = dataclasses.asdict(sampler.latest)
            version = sampler.version
            took = time.monotonic() - before
            print(json.dumps(sample | {"version": version, "took": took}), flush=True)
"""


class Probe:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, word: str = "sample") -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def until(self, wanted: Callable[[Any], bool], seconds: float = 10.0) -> Any:
        deadline = time.monotonic() + seconds
        while not wanted(sample := self.ask()):
            assert time.monotonic() < deadline, f"never came: last {sample}"
        return sample


@contextlib.contextmanager
def probe(environment: dict[str, str], retry_s: float = 60.0) -> Iterator[Probe]:
    command = [sys.executable, "-c", PROBE, str(retry_s)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield Probe(process)
        finally:
            process.kill()


def has_gpus(count: int) -> Callable[[Any], bool]:
    return lambda sample: len(sample["gpus"]) == count


def notes(words: str) -> Callable[[Any], bool]:
    return lambda sample: words in sample["gpu_note"]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_two_gpus_and_every_figure(nvml_library: Path, state: Path) -> None:
    foreign = (("c", 4242, 6 * GIB), ("g", 4243, GIB), ("g", 4242, 5 * GIB))
    gpus = [
        FakeGpu(24 * GIB, 7 * GIB, "RTX 4090", load=93, temperature=71, milliwatts=312_500, processes=foreign),
        FakeGpu(8 * GIB, 1 * GIB, "RTX 2080"),
    ]
    nvml.write_state(state, gpus)
    with probe(nvml.environment(nvml_library, state)) as child:
        first, second = child.until(has_gpus(2))["gpus"]
    assert first == {
        "index": 0,
        "name": "RTX 4090",
        "uuid": "GPU-00000000",
        "used_bytes": 7 * GIB,
        "total_bytes": 24 * GIB,
        "utilization": 0.93,
        "temperature_c": 71.0,
        "power_w": 312.5,
        "power_limit_w": 300.0,
        "processes": {"4242": 6 * GIB, "4243": GIB},  # in both lists, counted once
        "stale": False,
        "problem": "",
    }
    assert (second["name"], second["total_bytes"], second["processes"]) == ("RTX 2080", 8 * GIB, {})


@pytest.mark.parametrize("count", [1, 8])
def test_unequal_gpus(nvml_library: Path, state: Path, count: int) -> None:
    nvml.write_state(state, [FakeGpu((index + 1) * 6 * GIB, index * GIB) for index in range(count)])
    with probe(nvml.environment(nvml_library, state)) as child:
        sample = child.until(has_gpus(count))
    assert [gpu["total_bytes"] // GIB for gpu in sample["gpus"]] == [6 * (index + 1) for index in range(count)]
    assert [gpu["used_bytes"] // GIB for gpu in sample["gpus"]] == list(range(count))
    assert sample["gpu_note"] == ""


def test_a_figure_the_card_does_not_give_is_none(nvml_library: Path, state: Path) -> None:
    none = UNSUPPORTED
    nvml.write_state(state, [FakeGpu(none, none, load=none, temperature=none, milliwatts=none, limit=none)])
    with probe(nvml.environment(nvml_library, state)) as child:
        (gpu,) = child.until(has_gpus(1))["gpus"]
    for figure in ("used_bytes", "total_bytes", "utilization", "temperature_c", "power_w", "power_limit_w"):
        assert gpu[figure] is None
    assert not gpu["stale"]
    assert gpu["problem"] == ""


def test_another_program_takes_memory(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [FakeGpu(24 * GIB, GIB)])
    with probe(nvml.environment(nvml_library, state)) as child:
        before = child.until(has_gpus(1))
        nvml.write_state(state, [FakeGpu(24 * GIB, 20 * GIB, processes=(("c", 99, 19 * GIB),))])
        after = child.until(lambda sample: sample["gpus"][0]["used_bytes"] == 20 * GIB)
    assert after["gpus"][0]["processes"] == {"99": 19 * GIB}
    assert after["version"] > before["version"]


def test_a_nonsense_process_entry_is_left_out(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [FakeGpu(8 * GIB, GIB, processes=(("c", 7, GIB), ("c", 0, GIB), ("c", 8, 2**50)))])
    with probe(nvml.environment(nvml_library, state)) as child:
        assert child.until(has_gpus(1))["gpus"][0]["processes"] == {"7": GIB}


def test_a_driver_with_the_older_process_list(tmp_path: Path, state: Path) -> None:
    library = nvml.build(tmp_path / "old", old_processes=True)
    nvml.write_state(state, [FakeGpu(8 * GIB, GIB, processes=(("c", 7, GIB),))])
    with probe(nvml.environment(library, state)) as child:
        assert child.until(has_gpus(1))["gpus"][0]["processes"] == {"7": GIB}


def test_a_gpu_that_falls_off_the_bus_and_comes_back(nvml_library: Path, state: Path) -> None:
    well = [FakeGpu(24 * GIB, 5 * GIB), FakeGpu(16 * GIB, 3 * GIB)]
    nvml.write_state(state, well)
    with probe(nvml.environment(nvml_library, state)) as child:
        before = child.until(has_gpus(2))
        nvml.write_state(state, [well[0], FakeGpu(16 * GIB, 3 * GIB, code=nvml.GPU_IS_LOST)])
        lost = child.until(lambda sample: sample["gpus"][1]["stale"])
        assert "fallen off the bus" in lost["gpus"][1]["problem"]
        assert lost["gpus"][1]["used_bytes"] == 3 * GIB  # the last it gave
        assert not lost["gpus"][0]["stale"]
        assert lost["version"] > before["version"]
        nvml.write_state(state, well)
        child.until(lambda sample: not sample["gpus"][1]["stale"])


def test_a_gpu_lost_from_the_start_is_listed(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [FakeGpu(GIB, code=nvml.GPU_IS_LOST), FakeGpu(2 * GIB)])
    with probe(nvml.environment(nvml_library, state), retry_s=0.1) as child:
        lost, well = child.until(has_gpus(2))["gpus"]
        assert (lost["name"], lost["stale"], lost["total_bytes"]) == ("GPU 0", True, None)
        assert well["total_bytes"] == 2 * GIB
        nvml.write_state(state, [FakeGpu(GIB, name="Revived"), FakeGpu(2 * GIB)])  # a reset needs a new start of NVML
        child.until(lambda sample: sample["gpus"][0]["name"] == "Revived")


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (nvml.DRIVER_NOT_LOADED, "installed but not loaded"),
        (nvml.VERSION_MISMATCH, "restart the machine"),
        (nvml.UNKNOWN, "Unknown Error"),
    ],
)
def test_a_driver_that_does_not_start_is_tried_again(nvml_library: Path, state: Path, init: int, words: str) -> None:
    nvml.write_state(state, [FakeGpu(GIB)], init=init)
    with probe(nvml.environment(nvml_library, state), retry_s=0.1) as child:
        assert child.until(notes(words))["gpus"] == []
        nvml.write_state(state, [FakeGpu(GIB)])
        assert child.until(has_gpus(1))["gpu_note"] == ""


def test_no_card_in_the_machine(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [])
    with probe(nvml.environment(nvml_library, state)) as child:
        assert child.until(notes("sees no GPU"))["gpus"] == []


def test_a_driver_too_old(tmp_path: Path, state: Path) -> None:
    library = nvml.build(tmp_path / "old", old_init=True)
    nvml.write_state(state, [FakeGpu(GIB)])
    with probe(nvml.environment(library, state)) as child:
        child.until(notes("too old"))


def test_no_driver_at_all(tmp_path: Path) -> None:
    broken = tmp_path / "libnvidia-ml.so.1"  # hides a real one, if this machine has it
    broken.write_bytes(b"not a library")
    with probe(nvml.environment(tmp_path, tmp_path / "none")) as child:
        sample = child.until(notes("no NVIDIA driver was found"))
        measured = child.until(lambda sample: sample["host"]["cpu"] is not None)
    assert sample["gpus"] == []
    assert 0 <= measured["host"]["cpu"] <= 1
    assert 0 < measured["host"]["memory_used_bytes"] < measured["host"]["memory_total_bytes"]
    assert measured["host"]["own_memory_bytes"] > 2**20
    assert measured["host"]["cores"] >= 1


def test_a_hanging_driver_makes_figures_stale_and_blocks_nobody(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [FakeGpu(24 * GIB, 5 * GIB)])
    with probe(nvml.environment(nvml_library, state)) as child:
        before = child.until(has_gpus(1))
        nvml.write_state(state, [FakeGpu(24 * GIB, 5 * GIB)], hang_ms=60_000)
        hung = child.until(lambda sample: sample["stale"])
        assert hung["gpus"][0]["stale"]
        assert hung["gpus"][0]["used_bytes"] == 5 * GIB
        assert hung["version"] > before["version"]
        assert hung["took"] < 0.1
        stopping = child.ask("stop")
        assert stopping < 3
        assert child.process.wait(10) == 0  # the hanging thread does not keep it


def test_figures_are_fresh_again_after_a_hang(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [FakeGpu(24 * GIB)], hang_ms=400)
    with probe(nvml.environment(nvml_library, state)) as child:
        hung = child.until(lambda sample: sample["stale"])
        assert hung["host"]["memory_total_bytes"] > 0  # the host did not wait for the driver
        nvml.write_state(state, [FakeGpu(24 * GIB)])
        fresh = child.until(lambda sample: len(sample["gpus"]) == 1 and not sample["stale"], seconds=20)
        assert fresh["version"] > hung["version"]


def test_ending_without_stop_is_not_held_up(nvml_library: Path, state: Path) -> None:
    nvml.write_state(state, [FakeGpu(GIB)], hang_ms=60_000)
    with probe(nvml.environment(nvml_library, state)) as child:
        child.until(lambda sample: sample["stale"])
        assert child.process.stdin is not None
        child.process.stdin.write("end\n")
        child.process.stdin.flush()
        assert child.process.wait(10) == 0


def test_importing_loads_no_nvml_bindings() -> None:
    code = "import sys, llamarunner.telemetry.hardware; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """A process with a child that holds 64 MiB: their pids."""
    child = "import sys; held = bytearray(64 << 20); print('up', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        (grandchild,) = psutil.Process(process.pid).children()
        yield process.pid, grandchild.pid
        assert process.stdin is not None
        process.stdin.close()


def test_an_engine_counts_with_its_children(family: tuple[int, int]) -> None:
    parent, child = family
    with contextlib.closing(HardwareReader()) as reader:
        both = reader.read([parent]).processes
        split = reader.read([parent, child]).processes
    assert both.keys() == {parent}
    assert both[parent].memory_bytes > 64 << 20
    assert split[child].memory_bytes > 64 << 20
    assert split[parent].memory_bytes < 64 << 20  # the nearest engine has it
    assert both[parent].gpu_bytes is None


def test_the_gpu_memory_of_an_engine_is_that_of_its_tree(nvml_library: Path, state: Path) -> None:
    script = """
import contextlib, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import nvml
from pathlib import Path
from llamarunner.telemetry.hardware import HardwareReader
with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as engine:
    mine = (("c", engine.pid, 3 << 30), ("c", 1, 1 << 30))
    cards = [nvml.FakeGpu(8 << 30, 4 << 30, processes=mine), nvml.FakeGpu(8 << 30, processes=mine[:1])]
    nvml.write_state(Path(sys.argv[2]), cards)
    with contextlib.closing(HardwareReader()) as reader:
        assert reader.read([engine.pid]).processes[engine.pid].gpu_bytes == 6 << 30
    engine.stdin.close()
"""
    fakes = str(Path(nvml.__file__).parent)
    environment = nvml.environment(nvml_library, state)
    command = [sys.executable, "-c", script, fakes, str(state)]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], check=True)


def test_an_engine_that_ends_has_no_memory(family: tuple[int, int]) -> None:
    parent, child = family
    with contextlib.closing(HardwareReader()) as reader:
        assert reader.read([parent]).processes[parent].memory_bytes > 64 << 20
        psutil.Process(child).kill()  # its parent ends with it
        deadline = time.monotonic() + 10
        while (left := reader.read([parent]).processes.get(parent)) is not None and left.memory_bytes > 0:
            assert time.monotonic() < deadline, left


def test_an_unknown_pid_is_left_out() -> None:
    with contextlib.closing(HardwareReader()) as reader:
        assert reader.read([2**22 + 1, os.getpid()]).processes == {}


def test_a_failing_source_of_pids_is_said_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    calls = threading.Semaphore(0)

    def pids() -> tuple[int, ...]:
        calls.release()
        raise RuntimeError("no pids today")

    sampler = HardwareSampler(pids, interval_s=0.01)
    sampler.start()
    try:
        for _ in range(5):
            assert calls.acquire(timeout=10)
    finally:
        sampler.stop()
    assert sum("could not be measured" in record.message for record in caplog.records) == 1


def test_start_and_stop_are_idempotent_and_leave_no_thread() -> None:
    sampler = HardwareSampler(tuple, interval_s=0.01)
    sampler.stop()
    for _ in range(2):
        sampler.start()
        sampler.start()
        assert sum(thread.name == "hardware" for thread in threading.enumerate()) == 1
        deadline = time.monotonic() + 10
        while sampler.latest.host.memory_total_bytes == 0:
            assert time.monotonic() < deadline
        sampler.stop()
        sampler.stop()
        assert not any(thread.name == "hardware" for thread in threading.enumerate())
