"""The control center: pulls one snapshot a second from a backend, shows it, and passes on what the user decides.

It never stops the program by itself: `outcome` says what the user chose, and whoever started it acts on that.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from textual.app import App, AutopilotCallbackType, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import CommandPalette
from textual.screen import Screen
from textual.widgets import Input
from textual.worker import WorkerFailed

from llamarunner.control.backend import Backend
from llamarunner.control.snapshot import ModelView, RunnerState, Snapshot
from tui.commands import Commands, in_flight
from tui.driver import TerminalDriver
from tui.environment import locale_is_utf8
from tui.screens.choice import Choice, Option
from tui.screens.detail import Detail
from tui.screens.facts import model_facts, pull_facts, request_facts
from tui.screens.help import help_facts
from tui.screens.main import MainScreen
from tui.screens.prompt import Prompt
from tui.settings import ControlCenterSettings
from tui.text import plain
from tui.theme import load_themes, shipped_themes

__all__ = ["ControlCenter", "ControlCenterSettings", "Ending"]

logger = logging.getLogger(__name__)

Ending = Literal["quit", "detach", "crashed"]

_PULL_S = 1.0
_LOGS_S = 0.25
_DEFAULT_THEME = "llamarunner"


class ControlCenter(App[None]):
    CSS_PATH = "app.tcss"
    TITLE = "LlamaRunner"
    ALLOW_SELECT = False
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "Leave", show=False),
        Binding("ctrl+q,ctrl+c", "leave", "Leave", show=False, priority=True),
        Binding("question_mark", "help", "Keys", show=False),
        Binding("L", "load", "Load the model", show=False),
        Binding("U", "unload", "Unload the model", show=False),
        Binding("D", "pull", "Download a model", show=False),
        Binding("X", "cancel_pull", "Cancel a download", show=False),
        Binding("T", "themes", "Theme", show=False),
    ]

    def __init__(self, backend: Backend, settings: ControlCenterSettings) -> None:
        self.ascii_only = settings.ascii or not locale_is_utf8()
        super().__init__(driver_class=TerminalDriver)
        self.backend = backend
        self.settings = settings
        self.outcome: Ending = "quit"
        self.crash = ""
        self.snapshot: Snapshot = backend.snapshot()
        self._task_factory: Any = None
        self._commands = Commands(self)
        self.set_class(self.ascii_only, "-ascii")

    # Life

    async def run_async(
        self,
        *,
        headless: bool = False,
        inline: bool = False,
        inline_no_clear: bool = False,
        mouse: bool = True,
        size: tuple[int, int] | None = None,
        auto_pilot: AutopilotCallbackType | None = None,
    ) -> Any:
        """Run until left, lost or crashed, and never raise for a crash: `outcome` and `crash` tell."""
        loop = asyncio.get_running_loop()
        self._task_factory = loop.get_task_factory()
        try:
            return await super().run_async(
                headless=headless,
                inline=inline,
                inline_no_clear=inline_no_clear,
                mouse=mouse,
                size=size,
                auto_pilot=auto_pilot,
            )
        except Exception as error:  # noqa: BLE001  # the boundary: the servers in the same loop go on
            self._note_crash(error)
            return None
        finally:
            loop.set_task_factory(self._task_factory)

    def on_load(self) -> None:
        # from Python 3.12 on Textual gives the loop eager tasks; it is not Textual's loop alone
        asyncio.get_running_loop().set_task_factory(self._task_factory)
        self._load_themes()

    def get_default_screen(self) -> Screen[None]:
        return MainScreen(self.backend, ascii_only=self.ascii_only)

    def on_mount(self) -> None:
        self.pull()
        self.main.logs.pull()
        self.set_interval(_PULL_S, self.pull)
        self.set_interval(_LOGS_S, self._pull_logs)

    @property
    def main(self) -> MainScreen:
        screen = self.screen_stack[0]
        assert isinstance(screen, MainScreen)
        return screen

    def leave(self, outcome: Ending) -> None:
        """End the app; whoever awaits it reads `outcome`."""
        self.outcome = outcome
        self.exit()

    def drop_screen(self) -> None:
        """SIGHUP: end the app, without another byte to a terminal that is gone, and keep serving."""
        if isinstance(self._driver, TerminalDriver):
            self._driver.abandon_if_gone()
        self.leave("detach")

    def _handle_exception(self, error: Exception) -> None:
        """Textual would print the traceback with all local variables: prompts and keys among them."""
        self._return_code = 1
        if self._exception is None:
            self._note_crash(error.error if isinstance(error, WorkerFailed) else error)
            self._exception = error
            self._exception_event.set()
        self._close_messages_no_wait()

    def panic(self, *renderables: Any) -> None:
        """Called by Textual for what it cannot go on from; what it would print may hold locals."""
        self._note_crash(RuntimeError("the terminal's input ended with an error"))
        self._close_messages_no_wait()

    def _note_crash(self, error: BaseException) -> None:
        self.outcome = "crashed"
        self.crash = "".join(traceback.format_exception(error)).rstrip()
        logger.error("the control center crashed", exc_info=error)

    # Data

    def pull(self) -> None:
        self.snapshot = self.backend.snapshot()
        self._show()

    def _show(self) -> None:
        screen = self.screen
        if isinstance(screen, MainScreen | Detail):
            screen.show(self.snapshot)

    def _pull_logs(self) -> None:
        if isinstance(self.screen, MainScreen):
            self.screen.logs.pull()

    # Themes

    def _load_themes(self) -> None:
        result = load_themes((shipped_themes(), *self.settings.theme_folders))
        for theme in result.loaded:
            self.register_theme(theme)
        wanted = self.settings.theme
        known = wanted in self.available_themes
        self.theme = wanted if known else _DEFAULT_THEME if _DEFAULT_THEME in self.available_themes else "textual-dark"
        problems = [f"Theme {problem}" for problem in result.failed]
        if not known:
            problems.append(f"There is no theme '{wanted}'")
        for problem in problems:
            logger.warning("%s", problem)
            self.tell(problem, severity="warning")

    def action_themes(self) -> None:
        self.search_themes()

    # Talking to the user

    def tell(self, message: str, *, severity: Literal["information", "warning", "error"] = "information") -> None:
        self.notify(plain(message), severity=severity, markup=False, timeout=12 if severity == "error" else 5)

    async def ask(self, title: str, text: list[str], options: list[Option], chosen: int | None = None) -> str:
        """Must be called from a worker. "" is Esc."""
        choice = Choice(title, text, options, chosen=chosen, ascii_only=self.ascii_only)
        return await self.push_screen_wait(choice) or ""

    @property
    def is_asking(self) -> bool:
        return isinstance(self.screen, Choice | Prompt)

    def push_screen(self, screen: Any, *args: Any, **kwargs: Any) -> Any:
        pushed = super().push_screen(screen, *args, **kwargs)
        if isinstance(screen, CommandPalette):
            self.call_after_refresh(_still_cursor, screen)
        return pushed

    def action_help(self) -> None:
        if not self.is_asking:
            self.push_screen(Detail("Keys", help_facts, self.snapshot, ascii_only=self.ascii_only))

    def open_model(self, name: str) -> None:
        self._open(name, model_facts(name), name, (("L", "load"), ("U", "unload")))

    def open_request(self, request_id: int) -> None:
        request = next((item for item in self.snapshot.requests if item.request_id == request_id), None)
        self._open(f"Request {request_id}", request_facts(request_id), request.model if request else "", ())

    def _open(self, title: str, facts: Any, model: str, hints: tuple[tuple[str, str], ...]) -> None:
        self.push_screen(Detail(title, facts, self.snapshot, model=model, hints=hints, ascii_only=self.ascii_only))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every action, so that none is reached by a key alone."""
        main = self.main
        name = self.subject()
        if name:
            yield SystemCommand(f"Load {name}", "Start its engine now (L)", self.action_load)
            yield SystemCommand(f"Unload {name}", "Ask, then stop its engine (U)", self.action_unload)
            yield SystemCommand(f"Details of {name}", "All that is known of it (Enter)", lambda: self.open_model(name))
        yield SystemCommand("Unload all models", "Ask, then stop every engine", self.action_unload_all)
        yield SystemCommand("Download a model", "By its name in a registry (D)", self.action_pull)
        yield SystemCommand("Cancel a download", "Ask, then end it (X)", self.action_cancel_pull)
        yield SystemCommand("Downloads", "Those that run or ended lately, with their errors", self.open_pulls)
        for index, pane in enumerate(main.panes.values(), 1):
            what = pane.TITLE.lower()
            yield SystemCommand(f"Go to {what}", f"The {what} pane ({index})", lambda pane=pane: main.activate(pane.id))
        yield SystemCommand("Zoom", "Give the pane the whole screen, and back (z)", main.action_zoom)
        yield SystemCommand("Filter or search", "The pane in focus (/)", main.action_filter)
        yield SystemCommand("Next log", "Of the program, then of each runner (])", lambda: main.action_source(1))
        yield SystemCommand("Previous log", "The other way round ([)", lambda: main.action_source(-1))
        yield SystemCommand("Pause the log", "Hold it still, or go on (p)", main.action_pause)
        yield SystemCommand("Follow the log", "Go to the newest line (f)", main.action_follow)
        yield SystemCommand("Wrap the log", "Show long lines whole, or cut them (w)", main.action_wrap)
        yield SystemCommand("Theme", "Choose other colours (T)", self.action_themes)
        yield SystemCommand("Keys", "All keys (?)", self.action_help)
        yield SystemCommand("Save a picture", "Of the screen, as SVG", self.deliver_screenshot)
        yield SystemCommand("Leave", "Keep serving without a screen, or stop everything (q)", self.action_leave)

    # Leaving

    def action_leave(self) -> None:
        if isinstance(self.screen, Choice | Prompt):
            self.screen.action_cancel()
        else:
            self.run_worker(self._leave(), group="leave", exclusive=True)

    async def action_quit(self) -> None:
        self.action_leave()

    async def _leave(self) -> None:
        running = [model.name for model in self.snapshot.models if model.state is RunnerState.READY]
        flight = in_flight(self.snapshot.models)
        text = [f"Loaded: {', '.join(running)}."] if running else ["No model is loaded."]
        text += [f"In flight: {flight}."] if flight else []
        coming = [pull.name for pull in self.snapshot.pulls if pull.ended_at is None]
        text += [f"On their way here: {', '.join(coming)}. What there is of them stays."] if coming else []
        answer = await self.ask(
            "Leave the control center",
            text,
            [
                Option("d", "Leave the servers running, without a screen", "detach"),
                Option("s", "Stop everything", "quit", "bad"),
                Option("c", "Cancel", ""),
            ],
        )
        match answer:
            case "quit" | "detach":
                self.leave(answer)
            case _:
                pass

    # Loading and unloading

    def subject(self) -> str:
        """The model that a key is about: of the open detail, of the chosen request, or the chosen model."""
        if isinstance(self.screen, Detail) and self.screen.model:
            return self.screen.model
        main = self.main
        if main.active == "requests" and main.requests.selected is not None:
            wanted = main.requests.selected.key
            return next((r.model for r in self.snapshot.requests if str(r.request_id) == wanted), "")
        return main.models.cursor

    def model(self, name: str) -> ModelView | None:
        return next((model for model in self.snapshot.models if model.name == name), None)

    def action_load(self) -> None:
        self._command(self.subject(), self._commands.load)

    def action_unload(self) -> None:
        self._command(self.subject(), self._commands.unload)

    def action_unload_all(self) -> None:
        self.run_worker(self._commands.unload_all(), group="commands")

    def _command(self, name: str, command: Any) -> None:
        if self.is_asking:
            return
        self.pull()
        model = self.model(name)
        if model is None:
            self.tell("Choose a model first.", severity="warning")
        elif done := self._commands.under_way(name):
            self.tell(f"{name} is already being {done}.", severity="warning")
        else:
            self.run_worker(command(model), group="commands", name=name)

    # Downloads

    def open_pulls(self) -> None:
        hints = (("D", "download"), ("X", "cancel"))
        self.push_screen(Detail("Downloads", pull_facts, self.snapshot, hints=hints, ascii_only=self.ascii_only))

    def action_pull(self) -> None:
        if not self.is_asking:
            self.run_worker(self._commands.pull(), group="downloads", exclusive=True)

    def action_cancel_pull(self) -> None:
        if not self.is_asking:
            self.run_worker(self._commands.cancel_pull(), group="downloads", exclusive=True)


def _still_cursor(palette: CommandPalette) -> None:
    for field in palette.query(Input):
        field.cursor_blink = False
