"""Runners on the scripted engine, and what is left behind after they are gone."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ModelSettings
from llamarunner.engines.engine import EngineInfo, LaunchPlan
from llamarunner.errors import EngineError
from llamarunner.events import Event, EventBus, RunnerChanged
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.runner import Runner
from llamarunner.telemetry.logs import EngineLog, LogRing

FAKE_ENGINE = Path(__file__).parents[1] / "fakes" / "fake_engine.py"


def eventually(condition: Callable[[], Any], within_s: float = 5.0) -> Any:
    """The first true value of `condition`; for plain code that watches other processes."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return value


async def soon(condition: Callable[[], Any], within_s: float = 5.0) -> Any:
    """The same on the loop."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)
    return value


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children() -> set[int]:
    """Ours, zombies included."""
    return {child.pid for child in psutil.Process().children()}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def pid_in(file: Path) -> int | None:
    text = file.read_text() if file.exists() else ""
    return int(text) if text else None


def new_eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]  # from Python 3.12 on
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
if hasattr(asyncio, "eager_task_factory"):
    LOOPS["eager"] = new_eager_loop


class ListLog(EngineLog):
    """One that keeps everything."""

    def __init__(self) -> None:
        super().__init__(LogRing(), write=lambda at, lines: None, closed=lambda: None)
        self.data = b""
        self.fed_at = 0.0
        self.closed = 0

    def feed(self, block: bytes) -> None:
        assert not self.closed, "output after the log was closed"
        self.data += block
        self.fed_at = time.monotonic()
        super().feed(block)

    def tail(self, lines: int) -> tuple[str, ...]:
        return tuple(self.data.decode(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        super().close()
        self.closed += 1


class ScriptedEngine:
    """The fake engine as an Engine; `argv` puts another program in its place."""

    name = "default"
    kind = "llama-server"
    is_local = True
    is_adjustable = True

    def __init__(
        self, script: dict[str, Any], load_timeout_s: float, argv: tuple[str, ...] | None, error: EngineError | None
    ) -> None:
        self.script = script
        self.load_timeout_s = load_timeout_s
        self.argv = argv or (sys.executable, str(FAKE_ENGINE), "--script", json.dumps(script))
        self.error = error
        self.plans: list[LaunchPlan] = []
        self.models: list[Model] = []  # as they were to be started

    known_version = ""

    def info(self) -> EngineInfo:
        return EngineInfo(self.name, self.kind, self.argv[0])

    def project(self, model: Model) -> None:
        return None

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        self.models.append(model)
        if self.error is not None:
            raise self.error
        flags = ("--port", str(port), "--model", str(model.path), "--ctx-size", "4096", "--parallel", "2")
        env = {"LLAMA_API_KEY": api_key, "FROM_THE_PLAN": "yes"}
        plan = LaunchPlan((*self.argv, *flags), port, api_key, env, load_timeout_s=self.load_timeout_s)
        self.plans.append(plan)
        return plan


class Bench:
    """Makes runners and remembers what they said."""

    def __init__(self, guardian: Guardian, session: aiohttp.ClientSession) -> None:
        self.guardian = guardian
        self.session = session
        self.bus = EventBus()
        self.events: list[Event] = []
        self.bus.subscribe(self.events.append)
        self.runners: list[Runner] = []
        self.log = ListLog()  # of the newest runner
        self.engine = ScriptedEngine({}, 30.0, None, None)  # likewise

    def runner(
        self,
        *,
        load_timeout_s: float = 30.0,
        stop_grace_s: float = 5.0,
        problem: str = "",
        argv: tuple[str, ...] | None = None,
        engine_error: EngineError | None = None,
        **script: Any,
    ) -> Runner:
        self.log = ListLog()
        self.engine = ScriptedEngine(script, load_timeout_s, argv, engine_error)
        model = Model("smol", Path("/models/smol.gguf"), ModelSettings(), problem=problem, hint="mend it")
        runner = Runner(
            model,
            self.engine,
            log=self.log,
            bus=self.bus,
            guardian=self.guardian,
            session=self.session,
            stop_grace_s=stop_grace_s,
        )
        self.runners.append(runner)
        return runner

    def states(self) -> list[str]:
        return [event.new.value for event in self.events if isinstance(event, RunnerChanged)]
