"""The log of the program and of each engine: the newest lines in memory for whoever looks, all of them in files.

Logging never waits: lines go into a ring at once and to the files through a thread. Prompts and answers are never
logged.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llamarunner.telemetry.lines import LineSplitter, clean, guess_level
from llamarunner.telemetry.logfiles import BackgroundWriter, LogFiles
from llamarunner.telemetry.quotes import QuoteFilter

PROGRAM = "llamarunner"  # the source of the program's own log

_RING_LINES = 5000
_RING_CHARS = 4_000_000  # so that a ring full of the longest lines stays small
_MAX_SOURCES = 64
_MAX_RECORD_LINES = 200


@dataclass(frozen=True, slots=True)
class StoredLine:
    number: int  # rises by one within a source, never reused
    at: float
    text: str
    level: str  # debug, info, warning, error


class LogRing:
    """The newest lines of one source. Any thread may write and read."""

    def __init__(self, capacity: int = _RING_LINES) -> None:
        # Numbers are not stored: the last line is `_newest`, the one before it `_newest - 1`, and so on.
        self._lines: deque[tuple[float, str, str]] = deque()
        self._capacity = capacity
        self._chars = 0
        self._newest = 0
        # re-entrant: the garbage collector may log in the midst of anything
        self._lock = threading.RLock()

    @property
    def newest(self) -> int:
        """The number of the last line; 0 before the first."""
        return self._newest

    def extend(self, at: float, lines: Iterable[tuple[str, str]]) -> None:
        """Add (level, text) pairs."""
        entries = [(at, level, text) for level, text in lines]
        with self._lock:
            for entry in entries:
                self._lines.append(entry)
                self._newest += 1
                self._chars += len(entry[2])
            while len(self._lines) > self._capacity or self._chars > _RING_CHARS:
                self._chars -= len(self._lines.popleft()[2])

    def page(self, after: int, limit: int) -> tuple[tuple[StoredLine, ...], int]:
        """The newest `limit` lines numbered above `after`, oldest first, and how many above `after` are not among
        them: pushed out before they were asked for, or beyond the limit."""
        with self._lock:
            newest = self._newest
            count = max(0, min(newest - after, limit, len(self._lines)))
            entries = list(itertools.islice(reversed(self._lines), count))
        first = newest - count + 1
        lines = tuple(
            StoredLine(number, at, text, level) for number, (at, level, text) in enumerate(reversed(entries), first)
        )
        return lines, max(0, newest - max(after, 0) - count)

    def tail(self, count: int) -> tuple[StoredLine, ...]:
        return self.page(0, count)[0]


class EngineLog:
    """Takes one engine's output as it comes, in blocks of any size. What it quotes of requests goes nowhere."""

    def __init__(self, ring: LogRing, write: Callable[[float, list[str]], None], closed: Callable[[], None]) -> None:
        self._ring = ring
        self._write = write
        self._closed: Callable[[], None] | None = closed
        self._splitter = LineSplitter()
        self._quotes = QuoteFilter()
        self.on_line: Callable[[str], None] | None = None
        """Called with each line once it has ended, and with a row of dots, drawn while a model loads, as it grows."""

    def feed(self, block: bytes) -> None:
        self._keep(self._quotes.feed(self._splitter.feed(block)))
        if self.on_line is not None and self._splitter.begins_with(b".."):
            self.on_line(self._splitter.unfinished)

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines, one that is not finished yet included."""
        unfinished = self._quotes.peek(self._splitter.unfinished)
        texts = [line.text for line in self._ring.tail(lines)]
        return tuple([*texts, unfinished] if unfinished else texts)[-lines:] if lines > 0 else ()

    def close(self) -> None:
        self._keep(self._quotes.feed(self._splitter.flush()) + self._quotes.flush())
        closed, self._closed = self._closed, None
        if closed is not None:
            closed()

    def _keep(self, lines: list[str]) -> None:
        if lines:
            at = time.time()
            self._ring.extend(at, [(guess_level(line), line) for line in lines])
            self._write(at, lines)
            if self.on_line is not None:
                for line in lines:
                    self.on_line(line)


class LogBook:
    """Every source's ring and file. `directory` None keeps no files. Any thread may log; `open` and what reads belong
    to the event loop."""

    def __init__(
        self, directory: Path | None, *, max_size: int = 10 * 1024**2, keep: int = 5, capacity: int = _RING_LINES
    ) -> None:
        self._capacity = capacity
        self._program = LogRing(capacity)
        self._rings: dict[str, LogRing] = {PROGRAM: self._program}  # the longest unopened first, after the program
        self._in_use: Counter[str] = Counter()
        self._forgotten = 0  # keeps `version` rising when a ring goes
        self._files = None if directory is None else LogFiles(directory, max_size, keep)
        self._writer = None if self._files is None else BackgroundWriter("log files", self._files.write)

    def open(self, source: str) -> EngineLog:
        """The log of an engine that starts; its lines follow those of the source's former engines."""
        ring = self._rings.pop(source, None) if source != PROGRAM else self._program
        if ring is None:
            ring = LogRing(self._capacity)
            self._make_room()
        self._rings[source] = ring
        self._in_use[source] += 1
        self._forgotten += 1

        def write(at: float, lines: list[str]) -> None:
            stamp = _stamp(at)
            self._to_file(source, "".join(f"{stamp} {line}\n" for line in lines))

        def closed() -> None:
            self._in_use[source] -= 1

        return EngineLog(ring, write, closed)

    def record(self, at: float, level: str, lines: list[str], logger_name: str) -> str:
        """Add a record of the program's own log; returns it as the file has it. Any thread."""
        name = logger_name.removeprefix(f"{PROGRAM}.")
        first, *further = lines or [""]
        self._program.extend(at, [(level, f"{name}: {first}"), *((level, f"    {line}") for line in further)])
        # what follows is indented, so that no message can pass for a record
        text = f"{_stamp(at)} {level.upper():7} {name}: {first}\n" + "".join(f"    {line}\n" for line in further)
        self._to_file(PROGRAM, text)
        return text

    def sources(self) -> tuple[str, ...]:
        """The program, then the engines by name."""
        return (PROGRAM, *sorted(source for source in self._rings if source != PROGRAM))

    def page(self, source: str, after: int = 0, limit: int = 500) -> tuple[tuple[StoredLine, ...], int]:
        """See `LogRing.page`; an unknown source has no lines."""
        ring = self._rings.get(source)
        return ring.page(after, limit) if ring is not None else ((), 0)

    @property
    def version(self) -> int:
        """Rises with every line and source."""
        return self._forgotten + sum(ring.newest for ring in self._rings.values())

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is pending, for `timeout_s` at most; the rings stay readable."""
        if self._writer is not None and self._files is not None and self._writer.close(timeout_s):
            self._files.close()

    def _make_room(self) -> None:
        if len(self._rings) < _MAX_SOURCES:
            return
        idle = (source for source in self._rings if source != PROGRAM and self._in_use[source] <= 0)
        oldest = next(idle, None)
        if oldest is not None:
            self._forgotten += self._rings.pop(oldest).newest
            del self._in_use[oldest]

    def _to_file(self, source: str, text: str) -> None:
        if self._writer is not None:
            self._writer.put(source, text.encode("utf-8", errors="replace"))


def install(book: LogBook, level: str = "info", *, to_stderr: bool = False) -> Callable[[], None]:
    """Send all of Python's logging and warnings to `book` alone, and to stderr as well `to_stderr`; never otherwise,
    since the screen may be there. The returned function puts everything back."""
    root, server, access = logging.getLogger(), logging.getLogger("aiohttp.server"), logging.getLogger("aiohttp.access")
    before = root.handlers[:], root.level, access.level, logging.raiseExceptions
    stderr = BackgroundWriter("stderr", _write_stderr) if to_stderr else None
    root.handlers[:] = [_BookHandler(book, stderr)]
    root.setLevel(level.upper())
    access.setLevel(logging.WARNING)  # requests are in the request log
    server.addFilter(_quieten_bad_requests)
    logging.raiseExceptions = False  # would print to stderr
    logging.captureWarnings(True)

    def uninstall() -> None:
        logging.captureWarnings(False)
        server.removeFilter(_quieten_bad_requests)
        root.handlers[:], level_before, access_before, logging.raiseExceptions = before
        root.setLevel(level_before)
        access.setLevel(access_before)
        if stderr is not None:
            stderr.close()

    return uninstall


class _BookHandler(logging.Handler):
    def __init__(self, book: LogBook, stderr: BackgroundWriter | None) -> None:
        super().__init__()
        self._book = book
        self._stderr = stderr

    def emit(self, record: logging.LogRecord) -> None:
        text = self._book.record(record.created, _level(record.levelno), _record_lines(record), record.name)
        if self._stderr is not None:
            self._stderr.put("", text.encode("utf-8", errors="replace"))


def _record_lines(record: logging.LogRecord) -> list[str]:
    try:
        text = record.getMessage()
    except Exception as error:  # noqa: BLE001 any object may be logged, and fail to say what it is
        text = f"{record.msg!r} (could not be formatted: {error!r})"
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    if record.stack_info:
        text += "\n" + record.stack_info
    splitter = LineSplitter()
    lines = splitter.feed(text.encode("utf-8", errors="replace")) + splitter.flush()
    if len(lines) <= _MAX_RECORD_LINES:
        return lines
    half = _MAX_RECORD_LINES // 2
    return [*lines[:half], f"… {len(lines) - 2 * half} lines left out", *lines[-half:]]


def _quieten_bad_requests(record: logging.LogRecord) -> bool:
    """aiohttp logs a traceback for each request that is not proper HTTP: anybody could flood the log. One debug line
    is enough; errors of ours pass unchanged."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    from aiohttp.http_exceptions import HttpProcessingError  # loaded already: the record comes from aiohttp

    if not isinstance(error, HttpProcessingError):
        return True
    reason = clean(str(error.message).partition("\n")[0])
    record.msg, record.args = f"refused a malformed request: {record.getMessage()}: {reason}", ()
    record.exc_info = record.exc_text = None
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def _level(number: int) -> str:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


def _stamp(at: float) -> str:
    local = time.localtime(at)
    return time.strftime("%Y-%m-%dT%H:%M:%S", local) + f".{int(at % 1 * 1000):03}" + time.strftime("%z", local)


def _write_stderr(_: str, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        return  # nobody reads it any more, and there is nowhere else to say so
