"""Engines that outlived the program that started them, and its guardian: recognised at the next start, and ended.

Each instance keeps a file of its own in one folder while it has engines. A process is ended only if it still is the one
that was written down and carries the random tag its engine was given, or was started by such a one and carries it too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llamarunner import paths
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.process import environment_has

logger = logging.getLogger(__name__)

_GRACE_S = 3.0
_KILL_S = 2.0  # SIGKILL cannot be refused, but a driver can keep a process from ending
_POLL_S = 0.05
_MOST_FILES, _MOST_BYTES, _MOST_ENGINES = 100, 1024**2, 1000
_GOOD_TAG = re.compile(r"[0-9a-f]{32}")  # any environment holds an empty one


@dataclass(frozen=True, slots=True)
class _Engine:
    pid: int
    born: str
    tag: str
    model: str


class EngineList:
    """The file of this instance. Used on the loop alone."""

    def __init__(self, folder: Path, guardian: Guardian) -> None:
        self._folder = folder
        self._guardian = guardian
        self._path = folder / f"{os.getpid()}.json"
        self._writing: asyncio.Task[None] | None = None
        self._is_stale = False

    async def start(self) -> None:
        """End what dead instances left, then keep the file up to date. Takes no longer than some seconds."""
        await asyncio.to_thread(end_leftovers, self._folder)
        self._guardian.on_change = self._note

    async def close(self) -> None:
        """The engines have been ended: nothing is left to be written down."""
        self._guardian.on_change = None
        if self._writing is not None:
            await self._writing
        await asyncio.to_thread(self._path.unlink, missing_ok=True)

    def _note(self) -> None:
        self._is_stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="write the list of engines")

    async def _write(self) -> None:
        while self._is_stale:
            self._is_stale = False
            try:
                await asyncio.to_thread(_save, self._path, self._guardian.guarded)
            except OSError as error:
                logger.warning("engines could not be written down, and may outlive a crash: %s", error)


def end_leftovers(folder: Path) -> None:
    """Blocks, some seconds at most. End the engines of each instance that is dead, and remove its file."""
    dead: dict[Path, list[_Engine]] = {}
    for path in _newest(folder):
        try:
            owner, owner_born, engines = _load(path)
        except FileNotFoundError:
            continue  # its instance stopped just now, or another has ended what it left
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("%s is damaged, and ignored: %s", path, error)
            continue
        if owner == os.getpid() or _born(owner) != owner_born:
            dead[path] = engines
    left = _end([engine for engines in dead.values() for engine in engines])
    for path, engines in dead.items():
        if left.isdisjoint(engine.tag for engine in engines):
            with suppress(OSError):
                path.unlink()


def _end(engines: Sequence[_Engine]) -> set[str]:
    """The tags of what does not end."""
    found = _members(engines)
    for process, engine in found.items():
        logger.warning("ending pid %d, which an earlier run left: the engine of %s", process.pid, engine.model)
    for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _KILL_S)):
        for process in found:
            _signal(process, number)
        deadline = time.monotonic() + wait_s
        while (found := {process: engine for process, engine in found.items() if _lives(process)}) and (
            time.monotonic() < deadline
        ):
            time.sleep(_POLL_S)
    for process in found:
        logger.error("pid %d does not end after SIGKILL", process.pid)
    return {engine.tag for engine in found.values()}


def _members(engines: Sequence[_Engine]) -> dict[psutil.Process, _Engine]:
    """Every live process of these engines, whatever its group."""
    by_pid = {engine.pid: engine for engine in engines}
    found = {}
    for pid in psutil.pids() if engines else ():
        for engine in engines if pid != os.getpid() else ():
            if not environment_has(pid, engine.tag):
                continue
            listed = by_pid.get(pid)
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if listed is None or _born(pid) == listed.born:
                    found[process] = engine
            break
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    """To its group where it leads one, as each engine does; psutil sees to it that the number is still its own."""
    with suppress(psutil.Error, OSError):
        if process.is_running() and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _born(pid: int) -> str:
    """When a process began: no other with its number has the same. Empty where there is none.

    Counted from the machine's start where that can be had: wall-clock time is another once the clock has been set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        try:
            return "" if os.path.isdir("/proc/self") else repr(psutil.Process(pid).create_time())
        except psutil.Error:
            return ""


def _newest(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.json"), key=lambda path: path.name)[:_MOST_FILES]
    except OSError as error:
        logger.warning("leftover engines cannot be looked for: %s", error)
        return []


def _load(path: Path) -> tuple[int, str, list[_Engine]]:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    whole = json.loads(data)
    engines = [
        _Engine(int(each["pid"]), str(each["born"]), str(each["tag"]), str(each["model"]))
        for each in whole["engines"][:_MOST_ENGINES]
    ]
    if not all(engine.pid > 1 and engine.born and _GOOD_TAG.fullmatch(engine.tag) for engine in engines):
        raise ValueError("an engine that is none")
    return int(whole["pid"]), str(whole["born"]), engines


def _save(path: Path, guarded: Sequence[tuple[int, str, str]]) -> None:
    """Replaced whole or not at all. Raises OSError."""
    engines = [_Engine(pid, born, tag, name) for pid, tag, name in guarded if tag and (born := _born(pid))]
    paths.make_private(path.parent)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            record = {"pid": os.getpid(), "born": _born(os.getpid()), "engines": [asdict(each) for each in engines]}
            json.dump(record, file, separators=(",", ":"))
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
