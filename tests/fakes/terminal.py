"""A terminal that a test can hold in its hands: a program in a real pty, read, typed to, resized, stalled and hung up.

    async with ... is not needed: it is synchronous, with its own reading thread, so that the program under test never
    waits for the test.

    with Terminal([sys.executable, "program.py"], columns=80, rows=24) as terminal:
        terminal.wait_for("ready")              # until the text is on the screen (drawn by pyte)
        terminal.send("q")                      # keys; terminal.send(KEY["ctrl+c"])
        terminal.stall(); terminal.resume()     # stop reading, as a dropped SSH connection or ctrl+s does
        terminal.resize(120, 40)
        terminal.hang_up()                      # close our end: SIGHUP, and end of file for the program
        terminal.wait()                         # its exit status

`terminal.bytes_read` counts what the program wrote, `terminal.raw` holds the newest of it, `cpu_seconds()` says what
the process used. Leaving the block kills the process group.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyte

KEY = {
    "enter": "\r",
    "escape": "\x1b",
    "tab": "\t",
    "shift+tab": "\x1b[Z",
    "up": "\x1b[A",
    "down": "\x1b[B",
    "ctrl+c": "\x03",
    "ctrl+p": "\x10",
    "ctrl+q": "\x11",
    "ctrl+z": "\x1a",
}
_RAW_KEPT = 4 * 1024 * 1024
_POLL_S = 0.02


class _Screen(pyte.Screen):
    """pyte's, forgiving what it does not know: private modes and reports that a modern program asks for."""

    def report_device_status(self, mode: int, **kwargs: Any) -> None:
        super().report_device_status(mode)

    def report_device_attributes(self, mode: int = 0, **kwargs: Any) -> None:
        super().report_device_attributes(mode)

    def select_graphic_rendition(self, *attributes: int, **kwargs: Any) -> None:
        if not kwargs.get("private"):
            super().select_graphic_rendition(*attributes)


class Terminal:
    def __init__(
        self,
        argv: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 24,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        """`env` is added to an environment of this process's PATH, HOME and a terminal's usual variables; an empty
        value removes a variable."""
        self.master, slave = os.openpty()
        _set_size(self.master, columns, rows)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
        merged = {**kept, "TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8", **(env or {})}
        self.process = subprocess.Popen(
            list(argv),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={name: value for name, value in merged.items() if value},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_take_terminal,
            close_fds=True,
        )
        os.close(slave)
        self.bytes_read = 0
        self.raw = bytearray()
        self.first_output_s: float | None = None
        self._started = time.monotonic()
        self._screen = _Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._reading = threading.Event()
        self._reading.set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, name="pty-reader", daemon=True)
        self._thread.start()

    # What the program wrote

    @property
    def text(self) -> str:
        """The screen as it is now."""
        with self._lock:
            return "\n".join(line.rstrip() for line in self._screen.display)

    @property
    def written(self) -> str:
        """The newest of all that was written, escape sequences included."""
        with self._lock:
            return self.raw.decode("utf-8", "replace")

    def wait_for(self, text: str, timeout: float = 10.0) -> float:
        """Seconds since the start at which `text` is on the screen."""
        self.wait_until(lambda: text in self.text, f"{text!r} on the screen", timeout)
        return time.monotonic() - self._started

    def wait_until(self, condition: Callable[[], bool], what: str = "the condition", timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {timeout} s; the screen:\n{self.text}")
            time.sleep(_POLL_S)

    # What is done to it

    def send(self, keys: str | bytes) -> None:
        data = keys.encode() if isinstance(keys, str) else keys
        while data:
            data = data[os.write(self.master, data[:1024]) :]

    def resize(self, columns: int, rows: int) -> None:
        with self._lock:
            self._screen.resize(rows, columns)
        _set_size(self.master, columns, rows)

    def stall(self) -> None:
        """Read nothing any more: after a few KiB the program's writes block."""
        self._reading.clear()

    def resume(self) -> None:
        self._reading.set()

    def hang_up(self) -> None:
        """The terminal goes away. Nothing can be read or sent afterwards."""
        self._ended.set()
        self._reading.set()
        self._thread.join(5)
        os.close(self.master)
        self.master = -1

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        return self.process.wait(timeout)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def local_modes(self) -> int:
        """The terminal's local flags (`termios.ECHO`, ...), to see whether it was given back as it was."""
        return int(termios.tcgetattr(self.master)[3])

    def close(self) -> None:
        if self.is_running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        if self.master >= 0:
            self.hang_up()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        while not self._ended.is_set():
            if not self._reading.wait(0.1) or not select.select([self.master], [], [], 0.05)[0]:
                continue
            if not self._reading.is_set():
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError as error:
                if error.errno == errno.EIO:  # the last program has closed its end
                    return
                raise
            with self._lock:
                if self.first_output_s is None:
                    self.first_output_s = time.monotonic() - self._started
                self.bytes_read += len(data)
                self.raw += data
                del self.raw[:-_RAW_KEPT]
                self._stream.feed(_known(data))


def _known(data: bytes) -> bytes:
    """Without the keyboard protocol's sequences, which pyte takes for "restore cursor" and the letter after it."""
    for sequence in (b"\x1b[>25u", b"\x1b[<u"):
        data = data.replace(sequence, b"")
    return data


def _set_size(fd: int, columns: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _take_terminal() -> None:
    """In the child: make the pty its controlling terminal, so that hanging up sends it SIGHUP."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
