"""The terminal, in a way that can never hold up the event loop it shares with the servers.

Textual's own driver waits for a terminal that has stopped reading, spins on one that is gone, and lets job control
stop the whole process. This one drops frames and paints once everything anew, reports the loss, and is never suspended.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import sys
import termios
import threading
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from textual._parser import ParseError
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message

from tui.paste import PasteLimit
from tui.text import to_ascii

if TYPE_CHECKING:
    from textual.app import App

_MAX_QUEUED_WRITES = 64
_MAX_QUEUED_CHARACTERS = 256 * 1024  # ten full screens of 200x60
_MAX_PENDING_INPUT = 100  # keys and mouse moves on their way to the app; more are a paste gone wrong
_LAST_WORDS_S = 0.2  # what a terminal gets to take the final sequences
_INPUT_END_S = 0.5
_ESCAPE_POLL_S = 0.1  # a lone escape byte is known to be the key only after a moment
_JOB_CONTROL = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class TerminalWriter:
    """Writes to a terminal from a thread of its own. `write` never waits: what does not fit is dropped until all that
    was queued has been taken, and `on_drained` then says that the screen must be painted anew."""

    def __init__(self, fileno: int, on_drained: Callable[[], None], *, ascii_only: bool = False) -> None:
        self._fileno = fileno
        self._on_drained = on_drained
        self._ascii_only = ascii_only
        self._queue: deque[str] = deque()
        self._queued = 0
        self._dropping = False
        self._stopping = False
        self._dead = False
        self._changed = threading.Condition()
        # a daemon: a write that the terminal never takes must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="terminal-output", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def write(self, text: str) -> None:
        with self._changed:
            if self._dead or self._stopping or self._dropping:
                return
            if len(self._queue) >= _MAX_QUEUED_WRITES or self._queued + len(text) > _MAX_QUEUED_CHARACTERS:
                self._dropping = True
                return
            self._append(text)

    def stop(self, last_words: str = "") -> None:
        """Give `last_words` a short while; where the terminal takes nothing, they go before what is queued."""
        with self._changed:
            if self._stopping:
                return
            if self._dropping:
                self._queue.clear()
            self._append(last_words)
            self._stopping = True
        if self._thread.is_alive():
            self._thread.join(_LAST_WORDS_S)

    def abandon(self) -> None:
        """Nobody is there any more: write nothing further."""
        with self._changed:
            self._dead = True
            self._queue.clear()
            self._changed.notify()

    def _append(self, text: str) -> None:
        self._queue.append(text)
        self._queued += len(text)
        self._changed.notify()

    def _run(self) -> None:
        while (text := self._next()) is not None:
            data = to_ascii(text).encode("ascii", "replace") if self._ascii_only else text.encode("utf-8", "replace")
            try:
                while data:
                    data = data[self._write(data) :]
            except OSError:  # hung up; the reader of the same terminal reports it
                self.abandon()

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fileno, data)
        except BlockingIOError:  # another program on this terminal made it non-blocking
            select.select([], [self._fileno], [], 1.0)
            return 0

    def _next(self) -> str | None:
        with self._changed:
            if not self._queue and self._dropping and not self._stopping and not self._dead:
                self._dropping = False
                self._on_drained()
            while not self._queue and not self._stopping and not self._dead:
                self._changed.wait()
            if self._dead or not self._queue:
                return None
            text = "".join(self._queue)
            self._queue.clear()
            self._queued = 0
            return text


def _terminal_fd() -> int:
    """Of standard output, unless only another stream is a terminal. (Textual writes to standard error, which people
    send to a file.)"""
    streams = [stream for stream in (sys.__stdout__, sys.__stderr__, sys.__stdin__) if stream is not None]
    for stream in streams:
        if stream.isatty():
            return stream.fileno()
    raise OSError("there is no terminal")


class TerminalDriver(LinuxDriver):
    """`app` may have `ascii_only` and `drop_screen`, as `ControlCenter` has."""

    def __init__(
        self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        self._handlers_before = {number: signal.getsignal(number) for number in (*_JOB_CONTROL, signal.SIGCONT)}
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        self._fd = _terminal_fd()
        self._output = TerminalWriter(
            self._fd,
            lambda: self._post(app.refresh),
            ascii_only=bool(getattr(app, "ascii_only", False)),
        )
        self._wake_reader, self._wake_writer = os.pipe()
        self._pending = 0
        self._gone = False
        self._input_ended = False

    # Output

    def write(self, data: str) -> None:
        self._output.write(data)

    def _post(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the loop, from any thread, unless the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _get_terminal_size(self) -> tuple[int, int]:
        """Of the terminal itself: COLUMNS and LINES of the environment do not change when it is resized."""
        try:
            width, height = os.get_terminal_size(self._fd)
        except OSError:
            return 80, 24
        return (width or 80), (height or 24)

    # Start and end

    def start_application_mode(self) -> None:
        self._output.start()
        super().start_application_mode()  # type: ignore[no-untyped-call]  # its own writer thread is started too, and never given anything
        if self._key_thread is None:
            self._post(self._lost)
        for number in _JOB_CONTROL:
            signal.signal(number, signal.SIG_IGN)

    @property
    def can_suspend(self) -> bool:
        return False

    def _sigtstp_application(self, *_: object) -> None:
        """Stopping the process would stop every answer in flight."""

    def _sigcont_application(self, *_: object) -> None:
        """Stopped from outside and continued: take the terminal back."""
        self._post(self._take_back)

    def _take_back(self) -> None:
        if self._gone or self.attrs_before is None:
            return
        self._make_raw()
        self.write("\x1b[?1049h\x1b[?25l")
        self._enable_mouse_support()
        self._enable_bracketed_paste()
        self._app.refresh()

    def _make_raw(self) -> None:
        try:
            attributes = termios.tcgetattr(self.fileno)
            attributes[3] = self._patch_lflag(attributes[3])
            attributes[0] = self._patch_iflag(attributes[0])
            termios.tcsetattr(self.fileno, termios.TCSANOW, attributes)
        except termios.error:
            self._lost()

    def abandon_if_gone(self) -> None:
        """Where the terminal has hung up, neither read it, nor write to it, nor wait for it."""
        try:
            termios.tcgetattr(self.fileno)
        except termios.error:
            self._abandon()

    def _abandon(self) -> None:
        self._gone = True
        self._output.abandon()
        self.attrs_before = None

    def disable_input(self) -> None:
        if self._input_ended:
            return
        self._input_ended = True
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        self.exit_event.set()
        os.write(self._wake_writer, b"x")
        if self._key_thread is not None:
            self._key_thread.join(_INPUT_END_S)
        if not self._gone:
            try:
                termios.tcflush(self.fileno, termios.TCIFLUSH)
            except termios.error:
                self._gone = True

    def stop_application_mode(self) -> None:
        self.disable_input()
        if self.attrs_before is not None and not self._gone:
            try:
                termios.tcsetattr(self.fileno, termios.TCSANOW, self.attrs_before)
            except termios.error:
                self._gone = True
        mouse = "\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l" if self._mouse else ""
        resize = "\x1b[?2048l" if self._in_band_window_resize else ""
        # paste, wrap, mouse, reports of resizes and focus, keyboard protocol (before the screen), screen, cursor
        self._output.stop(f"\x1b[?2004l\x1b[?7h{mouse}{resize}\x1b[<u\x1b[?1049l\x1b[?25h\x1b[?1004l")

    def close(self) -> None:
        super().close()
        self._output.stop()
        for number, handler in self._handlers_before.items():
            if handler is not None:  # None: not installed from Python, and not ours to restore
                signal.signal(number, handler)
        if self._key_thread is None or not self._key_thread.is_alive():
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    # Input

    def run_input_thread(self) -> None:
        """Read keys until told to end, or until there is nobody to read from."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            parser = XTermParser(self._debug)
            decode, limit = getincrementaldecoder("utf-8")("replace").decode, PasteLimit()
            timeout: float | None = None
            while not self.exit_event.is_set():
                ready = [key.fd for key, _ in selector.select(timeout)]
                if self.exit_event.is_set():
                    break
                if self.fileno in ready:
                    data = self._read()
                    if not data:
                        self._lost()
                        break
                    if text := limit.feed(decode(data)):  # to the parser an empty text is the end of all input
                        for message in parser.feed(text):
                            self.process_message(message)
                for message in parser.tick():
                    self.process_message(message)
                timeout = _ESCAPE_POLL_S if ready else None
            try:
                for _ in parser.feed(""):
                    pass
            except (EOFError, ParseError):
                pass

    def _read(self) -> bytes:
        try:
            return os.read(self.fileno, 4096)
        except OSError:
            return b""

    def _lost(self) -> None:
        self._abandon()
        drop = getattr(self._app, "drop_screen", self._app.exit)
        self._post(drop)

    def send_message(self, message: Message) -> None:
        """Pass a message to the app; while it has not taken earlier ones, new ones are dropped rather than piled up."""
        if self._pending >= _MAX_PENDING_INPUT or self._loop.is_closed():
            return
        self._pending += 1
        self._loop.call_soon_threadsafe(self._deliver, message)

    def _deliver(self, message: Message) -> None:
        self._pending -= 1
        if self._app.message_queue_size < _MAX_PENDING_INPUT:
            self._app.post_message(message)
