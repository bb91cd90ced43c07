"""Log files, written by a thread of their own: whoever logs never waits for a disk.

Files are readable by their owner alone and rotated by size. A disk that is full or gone costs the lines written
meanwhile and one warning, nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from llamarunner.paths import make_private

logger = logging.getLogger(__name__)

_MAX_OPEN = 32
_RETRY_S = 30.0
_MAX_NAME = 80


class BackgroundWriter:
    """Calls `write(key, data)` in a thread with everything put in, each key's bytes in order and joined. Holds
    `max_pending` bytes at most; what comes beyond is dropped, and the log says so once `write` has caught up."""

    def __init__(self, name: str, write: Callable[[str, bytes], None], *, max_pending: int = 8 * 1024**2) -> None:
        self._name = name
        self._write = write
        self._max_pending = max_pending
        # its lock is re-entrant: the garbage collector may log, and so put, in the midst of a put
        self._wake = threading.Condition()
        self._pending: dict[str, list[bytes]] = {}
        self._pending_bytes = 0
        self._dropped = 0  # lines
        self._closing = False
        self._thread: threading.Thread | None = None

    def put(self, key: str, data: bytes) -> None:
        with self._wake:
            if self._closing:
                return  # whoever closes it has said all that is to be kept
            if self._pending_bytes + len(data) > self._max_pending:
                self._dropped += data.count(b"\n")
                return
            self._pending.setdefault(key, []).append(data)
            self._pending_bytes += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self, timeout_s: float = 2.0) -> bool:
        """Write what is pending; False where that took longer than `timeout_s` and was given up."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._closing:
                    self._wake.wait()
                if not self._pending:
                    return
                batch, self._pending, self._pending_bytes = self._pending, {}, 0
                dropped, self._dropped = self._dropped, 0
            for key, parts in batch.items():
                self._write(key, b"".join(parts))
            if dropped:
                logger.warning("%d log lines were dropped: %s could not keep up", dropped, self._name)


class LogFiles:
    """One rotated file for each source in `directory`. `write` belongs to one thread and never raises OSError."""

    def __init__(self, directory: Path, max_size: int, keep: int, *, retry_s: float = _RETRY_S) -> None:
        self._directory = directory
        self._max_size = max_size
        self._keep = keep
        self._retry_s = retry_s
        self._files: OrderedDict[str, RotatedFile] = OrderedDict()
        self._broken: dict[str, tuple[int | None, float]] = {}  # source -> error number, when to try again

    def write(self, source: str, data: bytes) -> None:
        broken = self._broken.get(source)
        if broken is not None and time.monotonic() < broken[1]:
            return
        try:
            self._file(source).write(data)
        except OSError as error:
            self._give_up(source, error)
        else:
            if source in self._broken:
                self._broken.clear()  # the others say so themselves if they still fail
                logger.info("logs are written to files again")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, source: str) -> RotatedFile:
        file = self._files.pop(source, None)
        if file is None:
            if len(self._files) >= _MAX_OPEN:
                _, oldest = self._files.popitem(last=False)
                oldest.close()
            make_private(self._directory)
            file = RotatedFile(self._directory / f"{safe_name(source)}.log", self._max_size, self._keep)
        self._files[source] = file
        return file

    def _give_up(self, source: str, error: OSError) -> None:
        file = self._files.pop(source, None)
        if file is not None:
            file.close()
        known = {number for number, _ in self._broken.values()}
        self._broken[source] = (error.errno, time.monotonic() + self._retry_s)
        if error.errno not in known:  # a full disk is one event, whatever the number of files
            logger.warning(
                "logs cannot be written to %s: %s; they are kept in memory only", self._directory, error.strerror
            )


class RotatedFile:
    """name.log, and before it name.log.1 (newest) to name.log.`keep`. None grows past `max_size`, except for a single
    line that is longer."""

    def __init__(self, path: Path, max_size: int, keep: int) -> None:
        self._path = path
        self._max_size = max_size
        self._keep = keep
        self._fd: int | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append whole lines."""
        start = 0
        while start < len(data):
            fd = self._open()
            end = self._fitting(data, start)
            if end == start:
                self._rotate()
                continue
            while start < end:
                written = os.write(fd, memoryview(data)[start:end])
                start += written
                self._size += written

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _fitting(self, data: bytes, start: int) -> int:
        """Where the lines end that still fit; `start` if a new file is needed first."""
        room = self._max_size - self._size
        if len(data) - start <= room:
            return len(data)
        end = data.rfind(b"\n", start, start + max(room, 0)) + 1
        if end > start or self._size:
            return max(end, start)
        return data.find(b"\n", start) + 1 or len(data)

    def _open(self) -> int:
        if self._fd is None:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self._fd = fd
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
                os.fchmod(fd, 0o600)  # it was there before us
            self._size = status.st_size
        return self._fd

    def _rotate(self) -> None:
        self.close()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._keep + 1))]
        names[-1].unlink(missing_ok=True)
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)


def safe_name(source: str) -> str:
    """A file name that any model name may become: letters and digits of any script stay; where something else had to
    go, a few digits of a hash keep two models apart."""
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in source)
    kept = kept.encode("utf-8", errors="replace")[:_MAX_NAME].decode("utf-8", errors="ignore")
    if kept and kept == source and not kept.startswith("."):
        return kept
    digest = hashlib.blake2b(source.encode("utf-8", errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{kept.lstrip('.')}-{digest}"
