"""What the user has done to models and downloads: asked first where something could be lost, then carried out by the
backend, and told how it went. All of it runs in workers of the app."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llamarunner.control.backend import Outcome
from llamarunner.control.snapshot import ModelView, RunnerState
from tui import words
from tui.screens.choice import Option
from tui.screens.prompt import Prompt

if TYPE_CHECKING:
    from tui.app import ControlCenter

logger = logging.getLogger(__name__)

_CONFIRM_S = 3.0  # how long a done command's effect may take to be seen in a snapshot
_CONFIRM_POLL_S = 0.1
_EXAMPLES = "llama3.2:1b, or hf.co/ORG/REPO:Q4_K_M"


class Commands:
    def __init__(self, app: ControlCenter) -> None:
        self._app = app
        self._running: dict[str, str] = {}  # model -> what is being done to it

    def under_way(self, name: str) -> str:
        """What is being done to this model: "loaded"; "" for nothing."""
        return self._running.get(name, "")

    async def load(self, model: ModelView) -> None:
        name, serving = model.name, self._serving(model)
        if serving is not None and serving.state is RunnerState.READY:
            self._app.tell(f"{name} is already loaded{_as(serving, name)}.")
            return
        flight = in_flight(other for other in self._app.snapshot.models if other.name != name)
        if flight:
            answer = await self._app.ask(
                f"Load {name}?",
                [
                    f"In flight: {flight}.",
                    "Where there is no room, it waits for those answers and takes a model's place.",
                ],
                [Option("y", "Load it", "load"), Option("n", "No", "")],
            )
            if answer != "load":
                return
        await self._carry_out(name, "loaded", self._app.backend.load(name), frozenset({RunnerState.READY}))

    async def unload(self, model: ModelView) -> None:
        model = self._serving(model) or model
        name = model.name
        if not _has_runner(model):
            self._app.tell(f"{name} is not loaded.")
            return
        flight = in_flight([model])
        text = [f"In flight: {flight}."] if flight else ["No answer is in flight."]
        if model.queued:
            waiting = f"{words.plural(model.queued, 'request')} waiting for it"
            is_loading = model.state in (RunnerState.STARTING, RunnerState.LOADING)
            text.append(f"{waiting} will be refused." if is_loading else f"{waiting} will load it again.")
        answer = await self._app.ask(f"Unload {name}?", text, _ways_to_unload(flight), chosen=0)
        if answer:
            await self._end([name], force=answer == "now")

    def _serving(self, model: ModelView | None) -> ModelView | None:
        """Of those that share a runner, the one that has it; else the model itself."""
        if model is None:
            return None
        group = model.runs_as or model.name
        sharing = (each for each in self._app.snapshot.models if (each.runs_as or each.name) == group)
        return next((each for each in sharing if _has_runner(each)), model)

    async def unload_all(self) -> None:
        self._app.pull()
        models = [
            model for model in self._app.snapshot.models if _has_runner(model) and model.name not in self._running
        ]
        if not models:
            self._app.tell("No model is loaded.")
            return
        flight = in_flight(models)
        text = [f"Loaded: {', '.join(model.name for model in models)}."]
        text.append(f"In flight: {flight}." if flight else "No answer is in flight.")
        answer = await self._app.ask("Unload all models?", text, _ways_to_unload(flight))
        if answer:
            await self._end([model.name for model in models], force=answer == "now")

    async def _end(self, names: list[str], *, force: bool) -> None:
        gone = frozenset({RunnerState.STOPPED, RunnerState.FAILED})
        commands = [(name, self._app.backend.unload(name, force=force)) for name in names]
        await asyncio.gather(*(self._carry_out(name, "unloaded", command, gone) for name, command in commands))

    async def pull(self) -> None:
        text = ["Its name in Ollama's registry, or on Hugging Face: hf.co/ORG/REPO."]
        ascii_only = self._app.ascii_only
        prompt = Prompt("Download a model", text, self._start_pull, placeholder=_EXAMPLES, ascii_only=ascii_only)
        if message := await self._app.push_screen_wait(prompt):
            self._app.tell(f"{message}.")
            self._app.pull()

    async def _start_pull(self, name: str) -> Outcome:
        if not name:
            return Outcome(False, "a name is needed", f"such as {_EXAMPLES}")
        outcome = await self._try(f"the download of {name} could not begin", self._app.backend.start_pull(name))
        return outcome if outcome.ok or outcome.hint else replace(outcome, hint=f"a name is such as {_EXAMPLES}")

    async def cancel_pull(self) -> None:
        self._app.pull()
        names = [pull.name for pull in self._app.snapshot.pulls if pull.ended_at is None]
        if not names:
            self._app.tell("Nothing is being downloaded.")
            return
        options = [Option(str(index), f"Cancel {name}", name, "bad") for index, name in enumerate(names[:9], 1)]
        text = ["What there is of it stays for the next time. Whoever waits for it is told."]
        name = await self._app.ask("Cancel a download?", text, [*options, Option("n", "No", "")])
        if name:
            outcome = await self._try(f"the download of {name} could not be ended", self._app.backend.cancel_pull(name))
            self._app.pull()
            self._app.tell(f"{outcome.message}.", severity="information" if outcome.ok else "error")

    async def _try(self, failure: str, command: Coroutine[Any, Any, Outcome]) -> Outcome:
        """The boundary to the service: its fault is told, the screen stays."""
        try:
            return await command
        except Exception as error:
            logger.exception("%s", failure)
            return Outcome(False, f"{type(error).__name__}: {error}", "see the log")

    async def _carry_out(
        self, name: str, done: str, command: Coroutine[Any, Any, Outcome], wanted: frozenset[RunnerState]
    ) -> None:
        """Await a command, then tell how it went and whether the snapshot agrees."""
        self._running[name] = done
        began = time.monotonic()
        try:
            outcome = await self._try(f"{name} could not be {done}", command)
        finally:
            del self._running[name]
        if not outcome.ok:
            hint = f" {outcome.hint}" if outcome.hint else ""
            self._app.tell(f"{name} could not be {done}: {outcome.message}.{hint}", severity="error")
            self._app.pull()
            return
        state = await self._await_state(name, wanted)
        took = words.duration(time.monotonic() - began)
        if state in wanted:
            self._app.tell(f"{name} is {done} ({took}).")
        else:
            self._app.tell(f"{name} was {done}, but is now {state or 'gone'}.", severity="warning")

    async def _await_state(self, name: str, wanted: frozenset[RunnerState]) -> RunnerState | None:
        deadline = time.monotonic() + _CONFIRM_S
        while True:
            self._app.pull()
            model = self._serving(self._app.model(name))
            if model is None or model.state in wanted or time.monotonic() > deadline:
                return model.state if model else None
            await asyncio.sleep(_CONFIRM_POLL_S)


def _as(serving: ModelView, name: str) -> str:
    return f" as {serving.name}" if serving.name != name else ""


def _has_runner(model: ModelView) -> bool:
    return model.state not in (RunnerState.STOPPED, RunnerState.FAILED)


def _ways_to_unload(flight: str) -> list[Option]:
    """The first loses nothing."""
    if not flight:
        return [Option("y", "Unload", "drain"), Option("n", "No", "")]
    return [
        Option("y", "Unload once the answers in flight are finished", "drain"),
        Option("k", "Unload now, and end those answers", "now", "bad"),
        Option("n", "No", ""),
    ]


def in_flight(models: Iterable[ModelView]) -> str:
    """ "2 answers of qwen, 1 answer of llama", or nothing."""
    return ", ".join(f"{words.plural(m.in_flight, 'answer')} of {m.name}" for m in models if m.in_flight)
