"""The guardian: a tiny process beside ours that stops the engines when we can no longer do it ourselves.

It holds the read end of a pipe from us. However we end (SIGKILL, a crash, the OOM killer), the pipe closes, and it
stops every engine's process group. A parent-death signal alone would miss the grandchildren of a wrapper script.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("guardian_worker.py")
_CLOSE_S = 3.0  # its own grace is well below


class Guardian:
    """Used from the event loop alone; no call but `close` waits for anything."""

    def __init__(self) -> None:
        self._groups: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self.on_change: Callable[[], None] | None = None
        """Called when another group is guarded, or one less."""
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it now rather than with the first engine."""
        if self._process is None:
            self._spawn()

    @property
    def guarded(self) -> list[tuple[int, str, str]]:
        """Group, tag and name of each."""
        return [(pgid, tag, self._names[pgid]) for pgid, tag in self._groups.items()]

    def add(self, pgid: int, tag: str = "", name: str = "") -> None:
        """Guard a process group from now on, and any process with `tag` in its environment, whatever its group."""
        self._groups[pgid] = tag
        self._names[pgid] = name
        self._send(f"add {pgid} {tag}")
        self._tell()

    def remove(self, pgid: int) -> None:
        if self._groups.pop(pgid, None) is None:
            return
        del self._names[pgid]
        if self._process is not None:
            self._send(f"del {pgid}")
        self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    async def close(self) -> None:
        """End it. Groups that were not removed are stopped, as if we had died."""
        process, self._process = self._process, None
        if process is None:
            return
        self._close_pipe()
        try:
            await asyncio.to_thread(process.wait, _CLOSE_S)
        except subprocess.TimeoutExpired:
            logger.warning("the guardian (pid %d) does not end; killing it", process.pid)
            process.kill()
            await asyncio.to_thread(process.wait)

    def _send(self, line: str) -> None:
        if self._process is None:
            self._spawn()
        elif not self._write(line):
            logger.warning("the guardian (pid %d) is gone or stuck; starting another", self._process.pid)
            self._discard()
            self._spawn()

    def _write(self, line: str) -> bool:
        try:
            # a short write to a pipe is atomic, and this one never blocks: a guardian that hangs must not hang us
            os.write(self._pipe, f"{line}\n".encode())
        except (BrokenPipeError, BlockingIOError):
            return False
        return True

    def _spawn(self) -> None:
        """Start it and tell it of all groups."""
        read_end, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER)],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        except OSError:
            self._close_pipe()
            logger.exception("no guardian: engines could outlive a crash of this program")
        finally:
            os.close(read_end)
        if self._process is not None and not all(self._write(f"add {g} {tag}") for g, tag in self._groups.items()):
            logger.error("the guardian ended at once: engines could outlive a crash of this program")
            self._discard()

    def _discard(self) -> None:
        """Without letting it act: our engines are alive and well."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()  # after SIGKILL; it holds nothing that could delay its end
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
