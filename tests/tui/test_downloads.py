"""Downloads below the header, as they run and as they fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from llamarunner.control.snapshot import PullState, PullView, Snapshot
from tests.fakes.fake_backend import GIB, NOW, FakeBackend
from tests.tui.conftest import RunApp
from tui.panes.downloads import download_lines

RUNNING = PullView("llama3.2:1b", PullState.RUNNING, "pulling 74701a8c35f6", GIB, 4 * GIB, 12 * 1024**2, 256.0)
FAILED = PullView(
    "big",
    PullState.FAILED,
    "pulling manifest",
    ended_at=NOW - 5,
    problem="not enough disk space",
    hint="remove a model",
)


def texts(*pulls: PullView, width: int = 120) -> list[str]:
    return [line.text for line in download_lines(Snapshot(NOW, "1", NOW - 60, pulls=pulls), width)]


def test_how_far_it_is_and_how_long_it_takes() -> None:
    (line,) = texts(RUNNING)
    for part in (" ↓ llama3.2:1b", "▆▆▆▆▆···", "25%", "1.0G of 4.0G", "12.0M/s", "4m16s left"):
        assert part in line
    assert texts(replace(RUNNING, total=0, status="pulling manifest")) == [" ↓ llama3.2:1b  pulling manifest"]


@pytest.mark.parametrize("width", [10, 20, 32, 50, 80, 200])
def test_narrow_terminals_keep_what_matters(width: int) -> None:
    for pull in (RUNNING, FAILED, replace(RUNNING, name="x\x1b[31m\n" * 30)):
        (line,) = texts(pull, width=width)
        assert cell_len(line) <= width
        assert "\x1b" not in line
    assert "25%" in texts(RUNNING, width=width)[0]


def test_what_ended_is_told_only_if_it_failed_and_not_for_ever() -> None:
    done = PullView("done", PullState.DONE, "success", 5, 5, ended_at=NOW - 1)
    assert texts(done, replace(done, state=PullState.CANCELLED)) == []
    assert texts(FAILED) == [" ✗ big: not enough disk space   → remove a model"]
    assert texts(replace(FAILED, ended_at=NOW - 31)) == []


def test_many_take_three_lines() -> None:
    lines = texts(*(replace(RUNNING, name=f"m{number}") for number in range(5)))
    assert len(lines) == 3
    assert lines[-1] == "   and 3 more downloads"


async def test_they_come_and_go_on_the_screen(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        assert not app.main.downloads.display
        await backend.start_pull("llama3.2:1b")
        app.pull()
        await pilot.pause()
        assert app.main.downloads.display
        assert "llama3.2:1b" in app.main.downloads.shown_text
        (cancel,) = [
            each for each in app.get_system_commands(app.screen) if each.title.startswith("Cancel the download")
        ]
        cancel.callback()
        await pilot.pause()
        await app.workers.wait_for_complete()
        assert ("cancel pull", "llama3.2:1b") in backend.commands
        assert not app.main.downloads.display
