"""The clock of the machine jumps while the program runs: nothing that it decides may notice."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from running_program import Home, engines_of, eventually, smollm2

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
HOUR, DAY = 3600, 86400
# time.time() as the file says it is off, for machines without libfaketime
PATCHED = """
import runpy, sys, time
real = time.time
time.time = lambda: real() + float(open({path!r}).read())
runpy.run_module("llamarunner", run_name="__main__", alter_sys=True)
"""


class Patched(Home):
    """A program whose idea of the time of day is off by what a file says."""

    clock: Path

    def command(self, *arguments: str) -> list[str]:
        code = PATCHED.format(path=str(self.clock))
        return [sys.executable, "-c", code, "--config", str(self.config), *arguments]


@pytest.fixture
def jumping(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Home, Callable[[float], None]]:
    """A home, and what sets the clock of its program off by so many seconds."""
    clock = tmp_path / "clock"
    if request.param == "patched":
        home = Patched(tmp_path)
        home.clock = clock
    elif FAKETIME is None:
        pytest.skip("libfaketime is not installed")
    else:
        home = Home(tmp_path)
        home.env |= {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    def set_off(seconds: float) -> None:
        written = clock.with_suffix(".new")
        written.write_text(f"{seconds:+.0f}")
        written.replace(clock)

    set_off(0)
    return home, set_off


def model(name: str, keep_alive: str) -> str:
    return f"[models.{name}]\npath = {str(smollm2())!r}\nengine = 'fake'\nkeep_alive = '{keep_alive}'\n"


@pytest.mark.parametrize(
    ("jumping", "jump"), [("patched", -HOUR), ("patched", DAY), ("libfaketime", -HOUR)], indirect=["jumping"]
)
def test_nothing_is_unloaded_early_or_late_and_nothing_is_cut(
    jumping: tuple[Home, Callable[[float], None]], jump: float
) -> None:
    home, set_off = jumping
    home.configure(model("brief", "1500ms") + model("long", "30m"), tokens=["w"] * 10, delay_s=0.05)

    def loaded() -> set[str]:
        names = set[str]()
        for engine in engines_of(process):
            with contextlib.suppress(psutil.Error):  # it has just ended
                words = engine.cmdline()
                names |= {words[words.index("--alias") + 1]} if "--alias" in words else set()
        return names

    with home.daemon() as process:
        assert home.chat("long").status_code == 200
        assert home.chat("brief").status_code == 200
        answered = time.monotonic()
        set_off(jump)
        assert home.chat("long").json()["message"]["content"] == "w" * 10
        eventually(lambda: loaded() == {"long"}, 8)
        assert time.monotonic() - answered > 1.2, "it was unloaded early"
        assert home.chat("brief").status_code == 200  # loads again
        set_off(0)
        assert home.chat("brief").status_code == 200
        eventually(lambda: loaded() == {"long"}, 8)
        assert "Traceback" not in home.stderr()
