"""What the control center shows and does, with a scripted backend."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot

from llamarunner.control.backend import Outcome
from llamarunner.control.snapshot import RunnerState
from tests.fakes.fake_backend import FakeBackend, model, scene
from tests.tui.conftest import RunApp
from tui.app import ControlCenter, ControlCenterSettings
from tui.lines import LineView
from tui.screens.choice import Choice
from tui.screens.detail import Detail
from tui.screens.main import MainScreen


async def until(pilot: Pilot[None], condition: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await pilot.pause(0.01)


def shown(app: ControlCenter) -> str:
    """All text of the current screen."""
    return "\n".join(view.shown_text for view in app.screen.query(LineView) if view.display)


def toasts(app: ControlCenter) -> list[str]:
    return [notification.message for notification in app._notifications]


async def test_everything_is_on_the_first_screen(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, _):
        text = shown(app)
        for part in (
            "● Ollama:11434 up", "● LM Studio:1234 up", "6 in flight (2 waiting)", "252 tok/s", "18.2/24.0G", "312W",
            "● busy", "◐ loading 43%", "✗ failed", "3/4", "12.2G", "3m07s", "通义千问 7b 🦙/chat", "out of GPU memory",
            "set a smaller context", "127.0.0.1:52101", "310ms", "1840→402", "✗ 500", "found 6 models",
        ):  # fmt: skip
            assert part in text, part


async def test_digits_and_tab_go_to_panes(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy"), size=(80, 24)) as (app, pilot):
        assert app.main.active == "models"
        assert app.focused is app.main.models
        assert not app.main.logs.display
        for keys, active in ((["4"], "logs"), (["tab"], "hardware"), (["shift+tab"], "logs"), (["3"], "requests")):
            await pilot.press(*keys)
            assert app.main.active == active
            assert app.focused is app.main.panes[active]
            assert app.main.panes[active].display
        assert not app.main.logs.display


async def test_zoom_gives_one_pane_the_screen_and_back(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.press("3", "z")
        assert [name for name, pane in app.main.panes.items() if pane.display] == ["requests"]
        assert app.main.requests.size.height == 38
        await pilot.press("4")
        assert [name for name, pane in app.main.panes.items() if pane.display] == ["logs"]
        await pilot.press("escape")
        assert all(pane.display for pane in app.main.panes.values())


@pytest.mark.parametrize(
    ("size", "panes"),
    [
        ((20, 5), []),
        ((31, 40), []),
        ((40, 12), ["models"]),
        ((80, 24), ["hardware", "models", "requests"]),
        ((120, 40), ["hardware", "models", "requests", "logs"]),
        ((200, 60), ["hardware", "models", "requests", "logs"]),
        ((1, 1), []),
    ],
)
async def test_each_size_has_its_layout(run_app: RunApp, size: tuple[int, int], panes: list[str]) -> None:
    async with run_app(FakeBackend.of("trouble"), size=size) as (app, _):
        assert [name for name, pane in app.main.panes.items() if pane.display] == panes
        if not panes:
            assert app.main.too_small.display
        for view in app.main.query(LineView):
            assert view.region.right <= size[0] or not view.display


async def test_the_cursor_stays_on_its_model_when_rows_move(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("j", "j")
        assert app.main.models.cursor == "nomic-embed-text"
        backend.current = replace(backend.current, models=backend.current.models[::-1])
        app.pull()
        assert app.main.models.cursor == "nomic-embed-text"
        await pilot.press("s")
        assert app.main.models.cursor == "nomic-embed-text"
        backend.current = replace(
            backend.current, models=tuple(m for m in backend.current.models if m.name != "nomic-embed-text")
        )
        app.pull()
        assert app.main.models.cursor in [m.name for m in backend.current.models]


async def test_movement_keys(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        names = [m.name for m in app.snapshot.models]
        for key, name in (("j", names[1]), ("down", names[2]), ("k", names[1]), ("G", names[-1]), ("j", names[-1]),
                          ("g", names[0]), ("up", names[0]), ("pagedown", names[-1])):  # fmt: skip
            await pilot.press(key)
            assert app.main.models.cursor == name, key


async def test_sort_cycles_through_the_columns_and_reverses(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        pane = app.main.models
        await pilot.press("s")
        assert [row.key for row in pane.rows] == sorted((m.name for m in app.snapshot.models), key=str.casefold)
        assert "NAME▲" in pane.shown_text
        await pilot.press("S")
        assert "NAME▼" in pane.shown_text
        assert pane.rows[0].key == "通义千问 7b 🦙/chat"
        await pilot.press("s", "s")
        assert "MEM▼" in pane.shown_text
        assert pane.rows[0].key == "qwen3-14b"


async def test_filter_is_live_and_shown_in_the_title(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.press("slash", *"gem")
        await until(pilot, lambda: [row.key for row in app.main.models.rows] == ["gemma-3-27b-it"], "filter as typed")
        await pilot.press(*"x/y")
        await until(pilot, lambda: "Nothing matches" in app.main.models.shown_text, "empty filter result")
        await pilot.press("backspace", "backspace", "backspace", "enter")
        assert "filter: gem" in app.main.models.shown_text
        assert app.focused is app.main.models
        await pilot.press("escape")
        assert len(app.main.models.rows) == 6


async def test_letters_in_the_filter_are_not_commands(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("slash", *"qULT3")
        await until(pilot, lambda: app.main.models.needle == "qULT3", "the filter")
        assert isinstance(app.screen, MainScreen)
        assert app.main.active == "models"
        assert backend.commands == []
        await pilot.press("escape")
        assert app.main.models.needle == ""


async def test_enter_opens_a_model_and_esc_comes_back(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("enter")
        assert isinstance(app.screen, Detail)
        text = shown(app)
        for part in ("/home/ada/models/qwen3-14b.gguf", "--cache-type-k", "pid 41822, port 40213", "6.8s", "tools"):
            assert part in text
        backend.change("qwen3-14b", in_flight=1)
        app.pull()
        assert "1 of 4 slots" in shown(app)
        backend.current = replace(backend.current, models=())
        app.pull()
        assert "1 of 4 slots" in shown(app), "what was known last stays"
        await pilot.press("escape")
        assert isinstance(app.screen, MainScreen)


async def test_a_load_goes_on_in_the_table_and_in_the_details(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("j", "j", "j")
        for share, shown_as in ((0.07, "◐ loading 7%"), (0.99, "◐ loading 99%"), (None, "◐ loading  ")):
            backend.change("gemma-3-27b-it", progress=share)
            app.pull()
            assert shown_as in app.main.models.shown_text
        await pilot.press("enter")
        assert "loaded so far" not in shown(app)
        backend.change("gemma-3-27b-it", progress=0.5)
        app.pull()
        assert ["loaded", "so", "far", "50%"] in [line.split() for line in shown(app).splitlines()]
        backend.change("gemma-3-27b-it", state=RunnerState.READY, progress=None, activity=("slot 0: prompt 7 %",))
        app.pull()
        assert "loaded so far" not in shown(app)
        assert "slot 0: prompt 7 %" in shown(app)


async def test_enter_opens_a_request(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.press("3", "G", "enter")
        text = shown(app)
        assert "Request 990" in text
        assert "the engine ran out of GPU memory while loading" in text
        assert "OpenAI/Python 2.8.0" in text


async def test_load_is_done_and_confirmed_from_the_snapshot(run_app: RunApp) -> None:
    backend = FakeBackend(replace(scene("empty"), models=(model("small"),)))
    backend.gate = asyncio.Event()
    async with run_app(backend) as (app, pilot):
        await pilot.press("L")
        await until(pilot, lambda: backend.commands == [("load", "small")], "the command")
        await pilot.press("L")
        await until(pilot, lambda: any("already being" in text for text in toasts(app)), "the second is refused")
        await pilot.press("4", "2")  # the screen is alive meanwhile
        assert app.main.active == "models"
        backend.gate.set()
        await until(pilot, lambda: any("small is loaded" in text for text in toasts(app)), "the toast")
        assert "● ready" in app.main.models.shown_text
        assert backend.commands == [("load", "small")]


async def test_load_with_answers_in_flight_elsewhere_asks(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("G", "L")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        assert "3 answers of qwen3-14b, 1 answer of llama-3.2-3b-instruct" in " ".join(shown(app).split())
        await pilot.press("enter")  # No has the focus
        assert backend.commands == []
        await pilot.press("L")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question again")
        await pilot.press("y")
        await until(pilot, lambda: backend.commands == [("load", "通义千问 7b 🦙/chat")], "the command")


async def test_a_load_that_fails_says_why(run_app: RunApp) -> None:
    backend = FakeBackend(replace(scene("empty"), models=(model("[bold]small[/]"),)))
    backend.answer = Outcome(False, "the file [is] cut short", "fetch it again")
    async with run_app(backend) as (app, pilot):
        await pilot.press("L")
        await until(pilot, lambda: bool(toasts(app)), "the toast")
        assert toasts(app) == ["[bold]small[/] could not be loaded: the file [is] cut short. fetch it again"]


async def test_a_command_that_raises_is_told_and_the_screen_stays(
    run_app: RunApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend(replace(scene("empty"), models=(model("small"),)))

    async def broken(name: str) -> Outcome:
        raise KeyError(name)

    monkeypatch.setattr(backend, "load", broken)
    async with run_app(backend) as (app, pilot):
        await pilot.press("L")
        await until(
            pilot, lambda: toasts(app) == ["small could not be loaded: KeyError: 'small'. see the log"], "toast"
        )
        assert "small could not be loaded" in caplog.text
        assert app.is_running


async def test_two_thousand_models_are_shown_within_the_loops_patience(run_app: RunApp) -> None:
    backend = FakeBackend(replace(scene("busy"), models=tuple(model(f"model-{n:04}") for n in range(2000))))
    async with run_app(backend) as (app, pilot):
        backend.current = replace(backend.current, models=tuple(replace(m) for m in backend.current.models))
        gc.collect()  # what the tests before this one left: a tenth of a second, wherever it falls
        began = time.perf_counter()
        app.pull()
        assert time.perf_counter() - began < 0.1  # 5 ms where nothing else runs
        await pilot.press("G")
        assert app.main.models.cursor == "model-1999"
        assert "of 2000" in app.main.models.shown_text


async def test_a_load_that_is_not_seen_in_the_snapshot_is_doubted(
    run_app: RunApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tui.commands._CONFIRM_S", 0.2)
    backend = FakeBackend(replace(scene("empty"), models=(model("small"),)))
    backend.answer = Outcome(True, "loaded")
    async with run_app(backend) as (app, pilot):
        await pilot.press("L")
        await until(pilot, lambda: toasts(app) == ["small was loaded, but is now stopped."], "the doubt")


@pytest.mark.parametrize(("key", "command"), [("y", "unload"), ("enter", "unload"), ("k", "unload now")])
async def test_unload_names_what_is_in_flight(run_app: RunApp, key: str, command: str) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("U")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        text = shown(app)
        assert "Unload qwen3-14b?" in text
        assert "3 answers of qwen3-14b" in text
        assert "▸ y  Unload once the answers in flight are finished" in text
        await pilot.press(key)
        await until(pilot, lambda: backend.commands == [(command, "qwen3-14b")], "the command")
        await until(pilot, lambda: any("is unloaded" in text for text in toasts(app)), "the toast")


async def test_unload_of_one_that_loads_says_who_is_refused(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        app.main.models.cursor = "gemma-3-27b-it"
        await pilot.press("U")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        assert "2 requests waiting for it will be refused." in shown(app)
        assert "k " not in shown(app), "there is nothing to end"
        await pilot.press("escape")
        app.main.models.cursor = "mistral-small-24b"
        await pilot.press("U")
        await until(pilot, lambda: toasts(app) == ["mistral-small-24b is not loaded."], "the toast")


async def test_models_that_share_a_runner_are_loaded_and_unloaded_by_any_name(run_app: RunApp) -> None:
    backend = FakeBackend.of("empty")
    first, second = model("first", RunnerState.READY, slots=1), model("second", runs_as="first")
    backend.current = replace(backend.current, models=(second, first))
    async with run_app(backend) as (app, pilot):
        await pilot.press("L")
        await until(pilot, lambda: toasts(app) == ["second is already loaded as first."], "the toast")
        await pilot.press("U")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        assert "Unload first?" in shown(app)
        await pilot.press("y")
        await until(pilot, lambda: backend.commands == [("unload", "first")], "the command")
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "the main screen")
        await pilot.press("enter")
        await until(pilot, lambda: "first: both are started alike" in shown(app), "the detail")


@pytest.mark.parametrize(("key", "command"), [("y", "unload"), ("k", "unload now")])
async def test_all_models_are_unloaded(run_app: RunApp, key: str, command: str) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        (unload,) = [each for each in app.get_system_commands(app.screen) if each.title == "Unload all models"]
        unload.callback()
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        text = " ".join(shown(app).split())
        assert "Loaded: qwen3-14b, llama-3.2-3b-instruct, nomic-embed-text, gemma-3-27b-it." in text
        assert "3 answers of qwen3-14b, 1 answer of llama-3.2-3b-instruct." in text
        assert "▸ n No" in text
        await pilot.press(key)
        await until(pilot, lambda: len(backend.commands) == 4, "the commands")
        assert {each for each, _ in backend.commands} == {command}
        await until(pilot, lambda: len(toasts(app)) == 4, "the toasts")
        unload.callback()
        await until(pilot, lambda: "No model is loaded." in toasts(app), "nothing to do")


@pytest.mark.parametrize("key", ["n", "escape"])
async def test_no_is_no(run_app: RunApp, key: str) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        await pilot.press("U")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "the main screen")
        assert backend.commands == []


@pytest.mark.parametrize(("key", "outcome"), [("d", "detach"), ("s", "quit")])
async def test_leaving(run_app: RunApp, key: str, outcome: str) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.press("ctrl+c")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        await pilot.press("ctrl+c")
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "the main screen again")
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question again")
        await pilot.press(key)
        await until(pilot, lambda: app._exit, "the end")
        assert app.outcome == outcome


async def test_logs_follow_pause_and_count_what_is_new(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        logs = app.main.logs
        backend.log("llamarunner", "a new line")
        await until(pilot, lambda: "a new line" in logs.shown_text, "following")
        await pilot.press("p")
        for number in range(3):
            backend.log("llamarunner", f"hidden {number}")
        await until(pilot, lambda: "paused · 3 new" in logs.shown_text, "the count")
        assert "hidden" not in logs.shown_text
        await pilot.press("p")
        assert "hidden 2" in logs.shown_text
        assert "new" not in logs.shown_text.splitlines()[0]


async def test_logs_of_another_source_scroll_and_search(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        logs = app.main.logs
        await pilot.press("4", "right_square_bracket")
        assert "qwen3-14b [2/4]" in logs.shown_text
        assert "task 1239" in logs.shown_text
        await pilot.press("g")
        assert "task 1200" in logs.shown_text
        assert "scrolled" in logs.shown_text
        await pilot.press("G")
        assert "task 1239" in logs.shown_text
        await pilot.press("slash", *"task 1205", "enter")
        await until(pilot, lambda: "task 1205" in logs.shown_text, "the match")
        assert "1 match" in logs.shown_text
        await pilot.press("f", "left_square_bracket")
        assert "llamarunner [1/4]" in logs.shown_text


async def test_search_goes_round_with_n(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, pilot):
        logs = app.main.logs
        await pilot.press("4", "slash", *"READY", "enter")
        found = [logs._found]
        for _ in range(3):
            await pilot.press("n")
            found.append(logs._found)
        assert found == [8, 5, 4, 8]
        await pilot.press("N")
        assert logs._found == 4


async def test_wrapping_shows_long_lines_whole(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    backend.log("llamarunner", "x" * 150 + "END")
    async with run_app(backend) as (app, pilot):
        assert "END" not in app.main.logs.shown_text
        await pilot.press("w")
        assert "END" in app.main.logs.shown_text


async def test_a_flood_of_lines_is_held_within_bounds(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend) as (app, _):
        for number in range(3000):
            backend.log("llamarunner", f"flood {number}")
        app.main.logs.pull()
        assert "flood 2999" in app.main.logs.shown_text
        assert "2500 skipped" in app.main.logs.shown_text


async def test_text_from_outside_is_shown_literally(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    backend.log("llamarunner", "[red]not markup[/red] \x1b[31mnor colour\x1b[0m \x07bell \x9b1m c1 \u202eturned")
    backend.change("mistral-small-24b", problem="[/] \x1b]0;title\x07 evil [bold]")
    async with run_app(backend) as (app, _):
        text = shown(app)
        assert "[red]not markup[/red] nor colour bell 1m c1 turned" in text
        assert "[/]  evil [bold]" in text
        assert "\x1b" not in app.export_screenshot()


async def test_empty_states_say_what_to_do(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("empty"), size=(80, 24)) as (app, _):
        text = shown(app)
        assert "llamarunner init" in text
        assert "OLLAMA_HOST=127.0.0.1:11434 ollama run MODEL" in text
        assert "http://127.0.0.1:1234/v1/chat/completions" in text
        assert all(len(line) <= 80 for line in app.main.requests.shown_text.splitlines())


async def test_the_lines_to_paste_have_the_ports_of_now(run_app: RunApp) -> None:
    base = scene("cpu")
    moved = (replace(base.proxies[0], port=11500), replace(base.proxies[1], running=False))
    async with run_app(FakeBackend(replace(base, proxies=moved))) as (app, _):
        text = app.main.requests.shown_text
        assert "OLLAMA_HOST=127.0.0.1:11500 ollama run smollm2-135m" in text
        assert "http://127.0.0.1:11500/v1/chat/completions" in text


async def test_a_port_that_is_taken_is_told_at_the_top(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("trouble")) as (app, _):
        text = shown(app)
        assert "✗ Ollama:11434 down" in text
        assert "127.0.0.1:11434 is taken by ollama (pid 812)   → stop it, or set another port" in text


async def test_a_pane_that_says_the_same_is_not_painted_again(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.pause()
        painted: list[str] = []
        for view in app.main.query(LineView):
            monkeypatch.setattr(view, "refresh", lambda *regions, _id=view.id, **_: painted.append(str(_id)))
        app.pull()
        app.pull()
        assert set(painted) <= {"hardware"}, "only the histories move"


async def test_help_and_palette_have_every_key(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy"), size=(120, 50)) as (app, pilot):
        await pilot.press("question_mark")
        text = shown(app)
        for word in ("unload it", "choose a theme", "ctrl+p", "follow the newest", "sort by the next column"):
            assert word in text
        await pilot.press("escape")
        titles = [command.title for command in app.get_system_commands(app.screen)]
        for title in ("Load qwen3-14b", "Unload qwen3-14b", "Theme", "Leave", "Go to logs", "Zoom", "Keys"):
            assert title in titles


async def test_a_theme_is_chosen_from_a_list(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.press("T")
        await until(pilot, lambda: type(app.screen).__name__ == "CommandPalette", "the list")
        await pilot.press(*"high-contrast")
        await pilot.pause(0.3)
        await pilot.press("down", "enter")
        await until(pilot, lambda: app.theme == "high-contrast", "the theme")
        await until(pilot, lambda: isinstance(app.screen, MainScreen), "the main screen")
        assert "● busy" in shown(app)


async def test_a_bad_theme_is_a_warning(run_app: RunApp, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('name = "bad"\n[colours]\nbackground = "puce-ish"\n')
    async with run_app(FakeBackend.of("busy"), theme="none-such", theme_folders=(tmp_path,)) as (app, _):
        assert app.theme == "llamarunner"
        assert any("bad.toml" in text and "puce-ish" in text for text in toasts(app))
        assert any("no theme 'none-such'" in text for text in toasts(app))


async def test_ascii_mode_draws_ascii_alone(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy"), ascii=True) as (app, pilot):
        await pilot.press("U")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question")
        svg = app.export_screenshot()
        drawn = [line for line in svg.splitlines() if "<text" in line]
        assert drawn
        assert "".join(drawn).replace("&#160;", " ").isascii()


async def test_a_crash_is_an_outcome(caplog: pytest.LogCaptureFixture) -> None:

    def broken(snapshot: object, step: int) -> object:
        secret = "sk-hidden"
        if step > 1:
            raise RuntimeError(f"broken after {len(secret)}")
        return snapshot

    app = ControlCenter(FakeBackend(scene("busy"), script=broken), ControlCenterSettings())  # type: ignore[arg-type]
    await app.run_async(headless=True, size=(80, 24))
    assert app.outcome == "crashed"
    assert "RuntimeError: broken after 9" in app.crash
    assert "sk-hidden" not in app.crash
    assert "the control center crashed" in caplog.text


@pytest.mark.parametrize("where", ["render", "key"])
async def test_a_crash_anywhere_is_an_outcome(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = ControlCenter(FakeBackend.of("busy"), ControlCenterSettings())

    def broken(*_: object) -> None:
        raise ZeroDivisionError(where)

    async def act(pilot: Pilot[None]) -> None:
        if where == "render":
            monkeypatch.setattr(app.main.header, "render_line", broken)
            app.main.header.refresh()
        else:
            monkeypatch.setattr(app.main, "action_zoom", broken)
            await pilot.press("z")

    async with asyncio.timeout(10):
        await app.run_async(headless=True, size=(80, 24), auto_pilot=act)
    assert app.outcome == "crashed"
    assert f"ZeroDivisionError: {where}" in app.crash


async def test_the_loop_keeps_its_task_factory() -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    app = ControlCenter(FakeBackend.of("busy"), settings=ControlCenterSettings())
    during: list[object] = []

    async def look(pilot: Pilot[None]) -> None:
        during.append(loop.get_task_factory())
        app.leave("detach")

    async with asyncio.timeout(10):
        await app.run_async(headless=True, size=(80, 24), auto_pilot=look)
    assert during == [before]
    assert loop.get_task_factory() is before
    assert app.outcome == "detach"


async def test_a_state_that_failed_is_shown_with_its_hint(run_app: RunApp) -> None:
    backend = FakeBackend.of("idle")
    async with run_app(backend, size=(80, 24)) as (app, pilot):
        assert "✗" not in app.main.models.shown_text
        backend.change("qwen3-14b", state=RunnerState.FAILED, problem="exit code 1", hint="see its log")
        app.pull()
        await pilot.pause()  # the pane grows by the two lines
        text = app.main.models.shown_text
        assert "✗ failed" in text
        assert "qwen3-14b: exit code 1" in text
        assert "→ see its log" in text


async def test_replicas_are_marked_and_each_is_told_of(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy"), size=(80, 24)) as (app, pilot):
        row = next(line for line in app.main.models.shown_text.splitlines() if "llama-3.2-3b" in line)
        assert "llama-3.2-3b-instruct ×2/3" in row
        assert "6.6G" in row
        assert "1/8" in row
        await pilot.press("j", "enter")
        text = " ".join(shown(app).split())
        for part in (
            "● busy #1 on default: pid 41901, port 40377, 1 of 4 slots, 3.1G on GPU, 205M in RAM", "● ready #2 on",
            "sits out for 26s", "✗ failed #3 on attic: http://192.168.1.9:8080", "cannot reach http://192.168.1.9:8080",
            "5m00s; requests may ask no less than 1m00s and no more than 1h00m", "for 3.0s yet",
        ):  # fmt: skip
            assert part in text, part


async def test_a_long_name_does_not_push_its_marks_out(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    long = model("a-name-that-is-far-too-long-for-its-column-at-this-size", replica_count=2, pinned=True)
    backend.current = replace(backend.current, models=(long,))
    async with run_app(backend, size=(80, 24)) as (app, _):
        assert "… ×2 •" in app.main.models.shown_text


async def test_the_detail_says_why_a_model_is_where_it_is(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, pilot):
        await pilot.press("enter")
        text = shown(app)
        for part in (
            "context 32768: as a request asked, not as configured", "yes, by its tag 'chat'", "+2", "chat, large",
            "GPU 0: 38 layers, 11.3G (estimated 11.0G, -3%)", "RAM: 3 layers", "in all, -3%",
        ):  # fmt: skip
            assert part in text, part


async def test_a_model_left_alone_says_for_how_long_and_what_ends_it(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    async with run_app(backend, size=(80, 24)) as (app, pilot):
        app.open_model("mistral-small-24b")
        await pilot.pause()
        assert "left alone for 4m00s after 6 failures: press L to try now" in shown(app)
        backend.change("mistral-small-24b", left_alone=False, failures=2, retry_s=1.4)
        app.pull()
        assert "in 1.0s at the soonest, after 2 failures" in shown(app)
        backend.change("mistral-small-24b", retry_s=0.0)
        app.pull()
        assert "with the next request, or press L" in shown(app)
        await pilot.press("L")
        await until(pilot, lambda: isinstance(app.screen, Choice), "the question, for others answer")
        await pilot.press("y")
        await until(pilot, lambda: backend.commands == [("load", "mistral-small-24b")], "the command")
        await until(pilot, lambda: "next try" not in shown(app), "its new state")


async def test_a_refusal_names_who_holds_the_memory_within_80_columns(run_app: RunApp) -> None:
    refused = "huge needs 45.2 GiB of GPU 0 (NVIDIA GeForce RTX 4090), which has 5.3 GiB free of 24.0 GiB"
    held = "(17.4 GiB loaded models, 819.2 MiB other programs, 512.0 MiB the reserve)"
    backend = FakeBackend.of("busy")
    huge = model("huge", RunnerState.FAILED, problem=f"{refused} {held}", hint="a smaller context takes less")
    backend.current = replace(backend.current, models=(huge, *(model(f"m{number}") for number in range(3))))
    async with run_app(backend, size=(80, 24)) as (app, _):
        text = " ".join(app.main.models.shown_text.split())
        assert f"✗ huge: {refused.removeprefix('huge ')} {held} → a smaller context takes less" in text


async def test_whoever_asks_is_shown_by_name_with_its_priority(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy"), size=(200, 60)) as (app, pilot):
        await pilot.press("3", "z")
        text = app.main.requests.shown_text
        assert "ada +5 192.168.1.44:50233" in text
        assert "✓ 200 !" in text
        await pilot.press("slash", *"batch", "enter")
        assert [row.key for row in app.main.requests.rows] == ["994"]
        await pilot.press("enter")
        text = shown(app)
        for part in ("batch 192.168.1.50:41022", "number 2, about 11s yet", "loading gemma-3-27b-it", "-5"):
            assert part in text, part
    async with run_app(FakeBackend.of("busy"), size=(80, 24)) as (app, _):
        text = app.main.requests.shown_text
        assert "ada +5" in text
        assert "192.168.1.44:50233" not in text, "the name has the room"


async def test_what_a_request_was_not_given_is_told(run_app: RunApp) -> None:
    backend = FakeBackend.of("busy")
    first = replace(
        backend.current.requests[7], ignored="num_cxt", stripped="tools", truncated="the oldest 4 of 9 messages"
    )
    backend.current = replace(backend.current, requests=(first,))
    async with run_app(backend) as (app, pilot):
        await pilot.press("3", "enter")
        text = shown(app)
        for part in (
            "tools: the engine cannot",
            "the oldest 4 of 9 messages: the prompt was",
            "unknown options: num_cxt",
        ):
            assert part in text, part


async def test_who_holds_a_devices_memory(run_app: RunApp) -> None:
    async with run_app(FakeBackend.of("busy")) as (app, _):
        text = app.main.hardware.shown_text
        assert "ours 17.4G others 819M reserve 512M" in text
        assert "▆░" in text
    async with run_app(FakeBackend.of("busy"), size=(200, 60)) as (app, _):
        assert "ours 3.1G others 6.3G reserve 512M free 14.1G" in app.main.hardware.shown_text
