"""Downloads below the header, as they run and as they fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len
from textual.widgets import Input

from llamarunner.control.backend import Outcome
from llamarunner.control.snapshot import PullState, PullView, Snapshot
from tests.fakes.fake_backend import GIB, NOW, FakeBackend
from tests.tui.conftest import RunApp
from tests.tui.test_control_center import shown, toasts, until
from tui.panes.downloads import download_lines
from tui.screens.choice import Choice
from tui.screens.main import MainScreen
from tui.screens.prompt import Prompt

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
        lines = texts(pull, width=width)
        assert len(lines) <= 2
        assert all(cell_len(line) <= width for line in lines)
        assert "\x1b" not in "".join(lines)
    assert "25%" in texts(RUNNING, width=width)[0]


def test_what_ended_is_told_of_and_not_for_ever() -> None:
    done = PullView("done", PullState.DONE, "success", 5 * GIB, 5 * GIB, ended_at=NOW - 1)
    assert texts(done, replace(done, state=PullState.CANCELLED)) == [" ✓ done  is here (5.0G)"]
    assert texts(replace(done, ended_at=NOW - 31)) == []
    assert texts(FAILED) == [" ✗ big: not enough disk space   → remove a model"]
    assert texts(replace(FAILED, problem="big was not found", hint="")) == [" ✗ big: was not found"]
    assert texts(replace(FAILED, ended_at=NOW - 301)) == []


def test_a_long_failure_has_a_second_line_where_there_is_room() -> None:
    long = replace(FAILED, problem="pull model manifest: registry.example.com cannot be asked: no route to host")
    assert texts(long, width=50) == [
        " ✗ big: pull model manifest: registry.example.com",
        "   cannot be asked: no route to host   → remove a…",
    ]
    assert texts(replace(FAILED, hint="remove a model, or set another folder"), width=50) == [
        " ✗ big: not enough disk space",
        "   → remove a model, or set another folder",
    ]
    assert len(texts(long, RUNNING, width=50)) == 3
    assert len(texts(long, RUNNING, RUNNING, width=50)) == 3
    assert texts(long, long, width=50)[2].startswith(" ✗ big:"), "each has a line at least"


def test_several_are_aligned_and_who_waits_says_so() -> None:
    first, second, third = texts(
        RUNNING, replace(RUNNING, name="m"), replace(RUNNING, state=PullState.WAITING, name="w")
    )
    assert first.index("▆") == second.index("▆")
    assert third == " ◌ w  waits its turn"
    (line,) = texts(replace(RUNNING, completed=4 * GIB, status="verifying sha256 digest"))
    assert line.endswith("100%   4.0G of 4.0G  verifying sha256 digest")


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
        await pilot.press("X")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        assert "Cancel llama3.2:1b" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "no")
        assert app.main.downloads.display
        await pilot.press("X", "1")
        await until(pilot, lambda: ("cancel pull", "llama3.2:1b") in backend.commands, "the command")
        await until(pilot, lambda: not app.main.downloads.display, "the strip to go")
        await pilot.press("X")
        await until(pilot, lambda: "Nothing is being downloaded." in toasts(app), "the toast")


async def test_a_model_is_downloaded_by_its_name(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend, size=(80, 24)) as (app, pilot):
        await pilot.press("D")
        await until(pilot, lambda: isinstance(app.screen, Prompt), "the field")
        await pilot.press("enter")
        await until(pilot, lambda: "✗ a name is needed" in shown(app), "what is wrong")
        backend.answer = Outcome(False, "'ll ama' is no name of a model", "write NAME:TAG")
        await pilot.press(*"llUqama", "enter")
        await until(pilot, lambda: "'ll ama' is no name" in shown(app), "what the backend says")
        assert "→ write NAME:TAG" in shown(app)
        assert app.screen.query_one(Input).value == "llUqama", "what was typed is there to be mended"
        backend.answer = None
        await pilot.press("ctrl+u")
        assert "Enter begins" in shown(app)
        await pilot.press(*"gemma3:1b", "enter")
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "the main screen")
        assert backend.commands[-1] == ("pull", "gemma3:1b")
        assert "gemma3:1b is being downloaded." in toasts(app)
        await until(pilot, lambda: "gemma3:1b" in app.main.downloads.shown_text, "its line")


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_no_download_is_begun_by_going_back(run_app: RunApp, key: str) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend, size=(40, 12)) as (app, pilot):
        await pilot.press("D", "x", "D")
        await until(pilot, lambda: isinstance(app.screen, Prompt), "the field")
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "the main screen")
        assert backend.commands == []


async def test_all_downloads_with_their_errors(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("pulls"), size=(80, 24)) as (app, pilot):
        (command,) = [each for each in app.get_system_commands(app.screen) if each.title == "Downloads"]
        command.callback()
        await until(pilot, lambda: "─ Downloads" in shown(app) or "━ Downloads" in shown(app), "the screen")
        text = " ".join(shown(app).split())
        for part in (
            "↓ running llama3.2:1b", "43% of 1.3G, 48.3M/s, 16s left", "◌ waiting hf.co/", "✗ failed gemma3:27b",
            "file does not exist", "✓ done nomic-embed-text is here (274M)",
        ):  # fmt: skip
            assert part in text, part
        app.screen.action_close()
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        app.open_pulls()
        await until(pilot, lambda: "Nothing was downloaded" in shown(app), "the empty state")


async def test_leaving_names_what_is_on_its_way(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("pulls")) as (app, pilot):
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        assert "On their way here: llama3.2:1b" in shown(app)
