"""The whole program on a machine with GPUs, through the real NVML bindings: where models are put and what is shown."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from running_program import Home, eventually, smollm2

from tests.fakes.nvml import FakeGpu, build, write_state

GIB = 1024**3
HELD = 8 * GIB // 10  # what SmolLM2 is estimated to need on a GPU, and so what a scripted engine takes


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def state(home: Home, library: Path) -> Path:
    """The file that says which GPUs there are; the program started from `home` sees them."""
    path = home.folder / "gpus"
    home.env |= {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_STATE": str(path)}
    return path


def model(name: str, **more: object) -> str:
    more = {"tags": [name], **more}  # or those of one file would share a runner
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return f"[models.{name}]\npath = {str(smollm2())!r}\nengine = 'fake'\n{keys}"


class Machine:
    """GPUs whose memory engines really hold: each takes HELD, and one for which there is no room dies of it."""

    def __init__(self, home: Home, state: Path) -> None:
        self.home, self._state = home, state
        self.holds = home.folder / "holds"
        self.holds.mkdir()

    def set(self, *gpus: FakeGpu, **more: Any) -> None:
        write_state(self._state, gpus, holds=self.holds, **more)

    def configure(self, models: str, **script: Any) -> None:
        scheduler = "[scheduler]\ngpu_reserve = '1KiB'\npartial_offload = false\nmax_wait = '20s'\n"
        self.home.configure(scheduler + models, gpu_bytes=HELD, **script)

    def held(self) -> dict[int, int]:
        """Bytes by GPU, of all engines that live or whose memory is not back yet."""
        held: Counter[int] = Counter()
        for file in self.holds.iterdir():
            with contextlib.suppress(FileNotFoundError):
                for line in file.read_text().splitlines():
                    index, size = map(int, line.split())
                    held[index] += size
        return dict(held)


@pytest.fixture
def machine(home: Home, state: Path) -> Machine:
    return Machine(home, state)


def environment_of_engines(process: subprocess.Popen[bytes]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES by model, read off the running engines."""
    from running_program import engines_of

    found = {}
    for engine in engines_of(process):
        arguments = engine.cmdline()
        if "--alias" in arguments:
            found[arguments[arguments.index("--alias") + 1]] = engine.environ().get("CUDA_VISIBLE_DEVICES", "")
    return found


def test_each_model_goes_where_it_fits_and_is_shown_there(home: Home, state: Path) -> None:
    write_state(state, [FakeGpu(2 * GIB, name="Small"), FakeGpu(24 * GIB, used=1 * GIB, name="Large")])
    home.configure(model("first") + model("pinned", devices=["gpu1"]))
    with home.daemon() as process:
        assert home.chat("first").status_code == 200
        assert home.chat("pinned").status_code == 200
        assert environment_of_engines(process) == {"first": "GPU-00000000", "pinned": "GPU-00000001"}
        doctor = home.run("doctor", "--json")
        assert "Small" in doctor.stdout


def test_a_gpu_full_of_other_programs_is_left_alone(home: Home, state: Path) -> None:
    write_state(state, [FakeGpu(8 * GIB, used=8 * GIB - 1), FakeGpu(8 * GIB)])
    home.configure(model("a"))
    with home.daemon() as process:
        assert home.chat("a").status_code == 200
        assert environment_of_engines(process) == {"a": "GPU-00000001"}


def test_no_room_on_any_gpu_and_none_in_ram_is_told(home: Home, state: Path) -> None:
    write_state(state, [FakeGpu(1 * GIB, used=1 * GIB - 1)])
    home.configure(model("a", gpu_layers="all"))
    with home.daemon():
        refused = home.chat("a")
        assert refused.status_code == 500
        assert "GPU 0 (Fake GPU)" in refused.json()["error"]
        assert "other programs" in refused.json()["error"]


def test_a_driver_that_is_too_old_leaves_everything_else_working(home: Home, state: Path) -> None:
    write_state(state, [FakeGpu(8 * GIB)], init=18)
    home.configure(model("a"))
    with home.daemon():
        assert home.chat("a").status_code == 200


def test_an_old_driver_without_the_functions_leaves_everything_else_working(home: Home, tmp_path: Path) -> None:
    library = build(tmp_path / "old", old_init=True, old_processes=True)
    write_state(tmp_path / "gpus", [FakeGpu(8 * GIB)])
    home.env |= {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_STATE": str(tmp_path / "gpus")}
    home.configure(model("a"))
    with home.daemon():
        assert home.chat("a").status_code == 200
        assert "too old" in home.stderr()


def test_two_gpus_of_unequal_size_are_filled_and_never_overfilled(machine: Machine) -> None:
    gpus = [FakeGpu(int(1.2 * GIB), name="Small"), FakeGpu(int(2.0 * GIB), name="Large")]
    machine.set(*gpus)
    names = ["a", "b", "c", "d"]
    machine.configure("".join(model(name) for name in names))
    with machine.home.daemon() as process:
        for name in names[:3]:
            assert machine.home.chat(name).status_code == 200, name
        where = Counter(environment_of_engines(process).values())
        assert where == {"GPU-00000000": 1, "GPU-00000001": 2}
        assert machine.held() == {0: HELD, 1: 2 * HELD}
        for name in ("d", "a", "b"):  # the longest idle makes room, each time
            answer = machine.home.chat(name)
            assert answer.status_code == 200, answer.text
            assert all(size <= gpus[index].total for index, size in machine.held().items())
        assert len(environment_of_engines(process)) == 3


def test_eight_gpus_of_unequal_size(machine: Machine) -> None:
    sizes = (1.0, 3.0, 1.0, 2.0, 1.0, 1.5, 1.0, 1.2)
    machine.set(*(FakeGpu(int(size * GIB)) for size in sizes))
    names = [f"m{number}" for number in range(9)]
    machine.configure("".join(model(name) for name in names))
    with machine.home.daemon() as process:
        for name in names:
            answer = machine.home.chat(name)
            assert answer.status_code == 200, answer.text
        assert len(environment_of_engines(process)) == len(names)
        assert all(size <= sizes[index] * GIB for index, size in machine.held().items())
        where = Counter(environment_of_engines(process).values())
        assert set(where) <= {f"GPU-{index:08x}" for index in range(8)}
        assert len(where) == 8  # the small ones first


def test_a_model_too_large_for_one_gpu_is_split_over_the_fewest(machine: Machine) -> None:
    machine.set(*(FakeGpu(int(1.6 * GIB)) for _ in range(8)))
    machine.configure(model("wide", parallel=8))
    with machine.home.daemon() as process:
        answer = machine.home.chat("wide")
        assert answer.status_code == 200, answer.text
        (visible,) = environment_of_engines(process).values()
        count = len(visible.split(","))
        assert 2 <= count < 8
        assert len(machine.held()) == count


def test_another_program_takes_memory_and_gives_it_back(machine: Machine) -> None:
    total = int(1.2 * GIB)
    machine.set(FakeGpu(total, used=total - GIB // 4))
    machine.configure(model("a") + model("b"))
    with machine.home.daemon():
        started = time.monotonic()
        refused = machine.home.chat("a")
        assert refused.status_code == 500
        assert "other programs" in refused.json()["error"]
        assert time.monotonic() - started < 3
        machine.set(FakeGpu(total))
        eventually(lambda: machine.home.chat("a").status_code == 200)
        machine.set(FakeGpu(total, used=GIB // 5))  # what is loaded stays
        assert machine.home.chat("a").status_code == 200
        assert machine.home.chat("b").status_code == 200  # in the place of a
        assert machine.held() == {0: HELD}


def test_a_gpu_that_is_lost_and_comes_back(machine: Machine) -> None:
    well, lost = FakeGpu(int(1.2 * GIB)), FakeGpu(int(1.2 * GIB), code=15)
    machine.set(well, well)
    machine.configure(model("a") + model("b"))
    with machine.home.daemon() as process:
        machine.set(lost, well)
        eventually(lambda: "GPU 0 (Fake GPU)" in machine.home.stderr())
        for name in ("a", "b"):
            assert machine.home.chat(name).status_code == 200
            assert environment_of_engines(process) == {name: "GPU-00000001"}
        machine.set(well, well)
        eventually(lambda: machine.home.chat("a").status_code == 200 and len(environment_of_engines(process)) == 2)
        assert machine.held() == {0: HELD, 1: HELD}


def test_memory_that_is_given_back_late_is_waited_for_and_not_for_ever(machine: Machine) -> None:
    machine.set(FakeGpu(int(1.2 * GIB)), linger_ms=1500)
    machine.configure(model("a") + model("b"))
    with machine.home.daemon():
        assert machine.home.chat("a").status_code == 200
        started = time.monotonic()
        answer = machine.home.chat("b")
        assert answer.status_code == 200, answer.text
        assert time.monotonic() - started > 1.4
        assert "out of memory" not in machine.home.stderr()
        machine.set(FakeGpu(int(1.2 * GIB)), linger_ms=600_000)
        started = time.monotonic()
        answer = machine.home.chat("a")
        assert answer.status_code == 500
        assert "other programs" in answer.json()["error"]
        assert time.monotonic() - started < 15


def test_a_driver_that_names_no_processes(machine: Machine) -> None:
    """As in WSL and in containers: what ours hold is told from what others do all the same."""
    machine.set(FakeGpu(int(2.1 * GIB)), is_silent=True)
    machine.configure(model("a") + model("b") + model("c"))
    with machine.home.daemon() as process:
        for name in ("a", "b"):
            assert machine.home.chat(name).status_code == 200
        eventually(lambda: set(environment_of_engines(process)) == {"a", "b"})
        assert machine.home.chat("c").status_code == 200
        assert len(environment_of_engines(process)) == 2
