"""The program running: one event loop, the service in it, and over both, where there is a terminal, the screen.

Signals: INT and TERM drain and stop, a second one stops at once; HUP drops the screen and the service goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llamarunner import paths
from llamarunner.config.load import LoadedConfig
from llamarunner.service import NothingServedError, Service
from llamarunner.telemetry.logs import LogBook, install

if TYPE_CHECKING:
    from tui.app import ControlCenter

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_NOTHING_SERVED = 0, 4


def run(loaded: LoadedConfig, *, tui: bool) -> int:
    """Serve until told to stop; the exit code."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(Program(loaded).main(tui=tui))


def new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    eager: Any = getattr(asyncio, "eager_task_factory", None)
    if eager is None:
        return uvloop.new_event_loop()

    class Loop(uvloop.Loop):
        """Does as Python's own eager factory says where that is set. From Python 3.13 on uvloop hands each factory an
        `eager_start`, which that one does not take in early releases, and in later ones takes for a no."""

        def create_task(self, coro: Any, **more: Any) -> asyncio.Task[Any]:
            if self.get_task_factory() is not eager:
                return super().create_task(coro, **more)
            more["eager_start"] = more.get("eager_start") is not False
            return asyncio.Task(coro, loop=self, **more)

    return Loop()


def choose_task_factory(loop: asyncio.AbstractEventLoop) -> None:
    """Textual sets the eager factory where Python has one, and leaves it set. So it is ours from the start, with a
    screen or without: tasks must not behave one way in one mode and another way in the other."""
    eager: Any = getattr(asyncio, "eager_task_factory", None)
    if eager is not None:
        loop.set_task_factory(eager)


class Program:
    def __init__(self, loaded: LoadedConfig) -> None:
        self._loaded = loaded
        settings = loaded.config.logging
        directory = paths.log_dir() if settings.file else None
        self._logs = LogBook(directory, max_size=settings.max_size, keep=settings.keep)
        self._service = Service(loaded, self._logs)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._screen: ControlCenter | None = None
        self._hung_up = False
        self._terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]  # once gone, it says no

    async def main(self, *, tui: bool) -> int:
        loop = asyncio.get_running_loop()
        choose_task_factory(loop)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        uninstall = install(self._logs, self._loaded.config.logging.level, to_stderr=not tui)
        try:
            return await self._serve(tui=tui)
        finally:
            uninstall()
            await asyncio.to_thread(self._logs.close)

    async def _serve(self, *, tui: bool) -> int:
        try:
            await self._service.start()
        except NothingServedError as error:
            say(f"llamarunner: {error}")
            return EXIT_NOTHING_SERVED
        try:
            if not tui:
                self._announce()
            elif not self._stop.is_set():
                await self._show_screen()
            await self._stop.wait()
        finally:
            await self._stop_service()
        return EXIT_OK

    def _announce(self) -> None:
        for proxy in self._service.proxies:
            if proxy.is_running:
                say(f"{proxy.title} API on http://{_shown_host(proxy.host)}:{proxy.port}")
        say(f"{len(self._service.catalog)} models; stop with Ctrl-C or `kill {os.getpid()}`")

    # -- the screen --------------------------------------------------------------------------------------------------

    async def _show_screen(self) -> None:
        """Until it is left. What becomes of the service then is what the screen was left with."""
        settings = self._loaded.config.tui
        from tui.environment import prepare
        from tui.settings import ControlCenterSettings

        folders = (self._loaded.path.parent / "themes",) if self._loaded.path else (paths.config_dir() / "themes",)
        wanted = ControlCenterSettings(
            theme=settings.theme, mouse=settings.mouse, fps=settings.fps, ascii=settings.ascii, theme_folders=folders
        )
        prepare(wanted)
        from tui.app import ControlCenter

        self._screen = screen = ControlCenter(self._service.backend, wanted)
        try:
            await screen.run_async(mouse=wanted.mouse)
        finally:
            self._screen = None
        if self._hung_up:
            _let_go(self._terminals)
        match screen.outcome:
            case "quit":
                self._stop.set()
            case "crashed":
                say(f"the control center ended: {screen.crash}")
                say(f"The service goes on without it (process {os.getpid()}); Ctrl-C stops it.")
            case _:
                say(f"Serving without a screen (process {os.getpid()}); Ctrl-C or `kill {os.getpid()}` stops it.")

    def _on_hangup(self) -> None:
        logger.info("the terminal hung up; serving without a screen")
        self._hung_up = True
        if self._screen is not None:
            self._screen.drop_screen()
        else:
            _let_go(self._terminals)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _on_stop_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()
        if self._screen is not None:
            self._screen.leave("quit")

    async def _stop_service(self) -> None:
        if count := self._service.in_flight:
            say(f"waiting for {count} {'request' if count == 1 else 'requests'} to end; Ctrl-C again ends them now")
        stopping = asyncio.create_task(self._service.stop(), name="stop")
        hurrying = asyncio.create_task(self._hurry.wait(), name="hurry")
        await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await self._service.stop(0)
        hurrying.cancel()
        await asyncio.gather(hurrying, return_exceptions=True)
        await stopping


def say(text: str) -> None:
    """A line for whoever started us; a terminal that is gone is no error."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _let_go(terminals: Iterable[int]) -> None:
    """Point these descriptors nowhere: what still wrote to a terminal that is gone would fail, and Python's last flush
    with it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in terminals:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
