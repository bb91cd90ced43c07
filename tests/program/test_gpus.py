"""The whole program on a machine with GPUs, through the real NVML bindings: where models are put and what is shown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from running_program import Home, eventually, smollm2

from tests.fakes.nvml import FakeGpu, build, write_state

GIB = 1024**3


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
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return f"[models.{name}]\npath = {str(smollm2())!r}\nengine = 'fake'\n{keys}"


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


def test_a_gpu_that_is_lost_is_used_no_more(home: Home, state: Path) -> None:
    write_state(state, [FakeGpu(8 * GIB, name="Lost"), FakeGpu(8 * GIB, name="Well")])
    home.configure(model("a"))
    with home.daemon() as process:
        write_state(state, [FakeGpu(8 * GIB, name="Lost", code=15), FakeGpu(8 * GIB, name="Well")])
        eventually(lambda: "GPU 0 (Lost)" in home.stderr())
        assert home.chat("a").status_code == 200
        assert environment_of_engines(process) == {"a": "GPU-00000001"}


def test_a_driver_that_is_too_old_leaves_everything_else_working(home: Home, state: Path) -> None:
    write_state(state, [FakeGpu(8 * GIB)], init=18)
    home.configure(model("a"))
    with home.daemon():
        assert home.chat("a").status_code == 200
