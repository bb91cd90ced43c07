"""`Pulls`: models on their way from a registry into our library, each once, however many wait for it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from llamarunner.catalog.download import Download, Downloads, Pace, Rate
from llamarunner.catalog.hub import Hub, parse_file
from llamarunner.catalog.library import Library, MissingBlobError
from llamarunner.catalog.manifests import MODEL, Layer, parse_manifest
from llamarunner.catalog.names import ModelName
from llamarunner.catalog.registry import HUB_HOSTS, Origin, Registry, RegistryError, download_session
from llamarunner.errors import LlamaRunnerError, OverloadedError, RequestError, UnsupportedError
from llamarunner.events import PullState

logger = logging.getLogger(__name__)

TICK_S = 0.06  # between two lines of progress
_AT_ONCE = 3
_MOST = 64  # running and waiting
_RECENT = 10  # finished ones that are still told of


class PullCancelledError(LlamaRunnerError):
    code = "pull_cancelled"

    def __init__(self, name: str) -> None:
        super().__init__(f"the download of {name} was cancelled", hint="pull it again: it goes on from here")


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of progress, in Ollama's words. Of a blob, `total` and `completed` are bytes."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0

    def as_record(self) -> dict[str, Any]:
        """As Ollama writes it: what is zero is left out."""
        record = {"digest": self.digest, "total": self.total, "completed": self.completed}
        return {"status": self.status} | {key: value for key, value in record.items() if value}


class Pull:
    """One model's way into the library. It reads like a log: a blob's line changes until the next one begins."""

    def __init__(self, name: ModelName) -> None:
        self.name = name
        self.state = PullState.WAITING
        self.error: LlamaRunnerError | None = None
        self.total = 0  # bytes of all blobs, 0 while unknown
        self.ended_at: float | None = None  # unix time
        self.watchers = 0
        self.is_kept = False  # goes on without watchers
        self.rate = Rate()
        self._lines: list[Progress] = []
        self._changed = asyncio.Event()

    @property
    def status(self) -> str:
        return self._lines[-1].status if self._lines else ""

    @property
    def completed(self) -> int:
        return sum(line.completed for line in self._lines)

    @property
    def bytes_per_s(self) -> float | None:
        return self.rate.bytes_per_s if self.state is PullState.RUNNING else None

    def say(self, line: Progress) -> None:
        last = self._lines[-1] if self._lines else None
        if line == last:
            return
        if last is not None and line.digest and line.digest == last.digest:
            self._lines[-1] = line
        else:
            self._lines.append(line)
        self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def progress(self) -> AsyncIterator[Progress]:
        """Everything from the beginning, a blob's line as far as it is each time. Raises what the pull failed with."""
        number, shown = 0, None
        while True:
            changed, is_over = self._changed, self.ended_at is not None
            while number < len(self._lines):
                if (line := self._lines[number]) != shown:
                    shown = line
                    yield line
                    continue  # it may have moved meanwhile
                if number == len(self._lines) - 1:
                    break
                number, shown = number + 1, None
            if is_over:
                if self.error is not None:
                    raise self.error
                return
            await changed.wait()


class Pulls:
    """`changed` is awaited whenever the library has another model. `close` ends everything that runs."""

    def __init__(
        self,
        library: Library,
        changed: Callable[[], Awaitable[None]],
        *,
        pace: Pace | None = None,
    ) -> None:
        self._library = library
        self._on_change = changed
        self._downloads = Downloads(library, pace or Pace())
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._running: dict[str, tuple[Pull, asyncio.Task[None]]] = {}
        self._recent: deque[Pull] = deque(maxlen=_RECENT)
        self._session: aiohttp.ClientSession | None = None
        self._is_closing = False
        self._revisions = itertools.count(1)
        self.revision = 0

    @property
    def all(self) -> list[Pull]:
        """Those that run, then those that ended, newest first."""
        return [*(pull for pull, _ in self._running.values()), *reversed(self._recent)]

    @asynccontextmanager
    async def join(self, text: str, *, insecure: bool = False) -> AsyncIterator[Pull]:
        """Take part in the pull of this model, which begins with whoever comes first and ends with the last who
        leaves. Raises InvalidNameError, or OverloadedError."""
        pull = self._begin(text, insecure=insecure)
        pull.watchers += 1
        try:
            yield pull
        finally:
            pull.watchers -= 1
            if not pull.watchers and not pull.is_kept:
                await self._end(pull)

    async def pull(self, text: str, *, insecure: bool = False) -> AsyncGenerator[Progress, None]:
        """The progress of this model's pull, as `join` has it."""
        async with self.join(text, insecure=insecure) as pull:
            async for line in pull.progress():
                yield line

    def start(self, text: str, *, insecure: bool = False) -> Pull:
        """Pull it, whether anybody watches or not. Raises as `join` does."""
        pull = self._begin(text, insecure=insecure)
        pull.is_kept = True
        return pull

    async def cancel(self, text: str) -> Pull | None:
        """End the pull of this model for all who wait for it; what there is of it stays. None where there is none."""
        found = self._running.get(_target(text).name.key)
        if found is None:
            return None
        await self._end(found[0])
        return found[0]

    async def close(self) -> None:
        self._is_closing = True
        await asyncio.gather(*(self._end(pull) for pull, _ in list(self._running.values())))
        if self._session is not None:
            await self._session.close()

    def _begin(self, text: str, *, insecure: bool) -> Pull:
        target = _target(text)
        if target.is_plain and not insecure:
            raise RequestError("insecure protocol http")
        name = target.name
        if found := self._running.get(name.key):
            return found[0]
        if self._is_closing or len(self._running) >= _MOST:
            raise OverloadedError("the server is shutting down" if self._is_closing else "too many downloads at once")
        pull = Pull(name)
        task = asyncio.create_task(self._run(pull, target, insecure=insecure), name=f"pull {name.short}")
        self._running[name.key] = pull, task
        task.add_done_callback(lambda task: self._note_end(pull, task))
        self._note()
        return pull

    def _note_end(self, pull: Pull, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            pull.error, pull.state = PullCancelledError(pull.name.short), PullState.CANCELLED
        del self._running[pull.name.key]
        self._recent.append(pull)
        pull.ended_at = time.time()
        self._note()
        pull.wake()

    async def _end(self, pull: Pull) -> None:
        found = self._running.get(pull.name.key)
        if found is not None and found[0] is pull:
            found[1].cancel()
            await asyncio.gather(found[1], return_exceptions=True)

    def _note(self) -> None:
        self.revision = next(self._revisions)

    async def _run(self, pull: Pull, target: _Target, *, insecure: bool) -> None:
        try:
            pull.say(Progress("pulling manifest"))
            async with self._slots:
                pull.state = PullState.RUNNING
                await self._fetch(pull, *await self._find(target, insecure=insecure))
            await self._on_change()
            pull.say(Progress("success"))
            pull.state = PullState.DONE
        except LlamaRunnerError as error:
            pull.error, pull.state = error, PullState.FAILED
            logger.warning("%s is not pulled: %s", pull.name.short, error)
        except Exception:
            logger.exception("the pull of %s failed in an unforeseen way", pull.name.short)
            pull.error = LlamaRunnerError("internal error", hint="the log has the details")
            pull.state = PullState.FAILED

    async def _find(self, target: _Target, *, insecure: bool) -> tuple[Origin, bytes]:
        """Where it comes from, and its manifest. Raises RegistryError."""
        if self._session is None:
            self._session = download_session()
        origin: Origin = Registry(self._session, target.name, insecure=insecure)
        if target.file:
            origin = Hub(self._session, self._library, target.name, target.file)
        try:
            return origin, await origin.manifest()
        except RegistryError as error:
            if target.file or target.name.host.lower() not in HUB_HOSTS or "sharded" not in error.message:
                raise
        origin = Hub(self._session, self._library, target.name, target.name.tag)  # its protocol has no split models
        return origin, await origin.manifest()

    async def _fetch(self, pull: Pull, origin: Origin, data: bytes) -> None:
        manifest = parse_manifest(pull.name, data)
        if not manifest.of_type(MODEL):
            raise UnsupportedError(
                f"{pull.name.short} has no GGUF file: it runs in the cloud, or is for another kind of engine"
            )
        blobs = tuple({layer.digest: layer for layer in manifest.blobs}.values())
        pull.total = sum(layer.size for layer in blobs)
        with self._library.hold(layer.digest for layer in blobs):
            for is_last_attempt in (False, True):
                await self._fetch_blobs(pull, origin, blobs)
                pull.say(Progress("writing manifest"))
                try:
                    await asyncio.to_thread(self._library.write_manifest, pull.name, data)
                    return
                except MissingBlobError:  # another program took one away
                    if is_last_attempt:
                        raise

    async def _fetch_blobs(self, pull: Pull, origin: Origin, blobs: tuple[Layer, ...]) -> None:
        missing = [layer for layer in blobs if not await self._downloads.is_here(layer)]
        await asyncio.to_thread(self._check_space, pull.name, missing)
        async with AsyncExitStack() as stack:
            tasks: list[asyncio.Task[None]] = []
            for layer in blobs:
                line = Progress(f"pulling {layer.digest[7:19]}", layer.digest, layer.size, layer.size)
                if layer in missing:
                    download, task = await stack.enter_async_context(self._downloads.join(origin, layer))
                    tasks.append(task)
                    await self._follow(pull, line, download, task)
                pull.say(line)
            pull.say(Progress("verifying sha256 digest"))
            for task in tasks:
                await asyncio.shield(task)

    async def _follow(self, pull: Pull, line: Progress, download: Download, task: asyncio.Task[None]) -> None:
        """Tell of the download until its bytes are here. Raises what it failed with."""
        await _until(download.opened, task)
        pull.say(replace(line, completed=download.completed))
        while not await _until(download.fetched, task, TICK_S):
            pull.say(replace(line, completed=download.completed))
            pull.rate.note(pull.completed)

    def _check_space(self, name: ModelName, missing: list[Layer]) -> None:
        wanted = sum(max(layer.size - self._downloads.held_bytes(layer), 0) for layer in missing)
        self._library.check_space(wanted, name.short)


async def _until(event: asyncio.Event, task: asyncio.Task[None], timeout_s: float | None = None) -> bool:
    """Whether `event` came within the time. Raises what `task` failed with."""
    waiting = asyncio.create_task(event.wait(), name="until")
    try:
        await asyncio.wait([task, waiting], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await asyncio.shield(task)
        return event.is_set()
    finally:
        waiting.cancel()


@dataclass(frozen=True, slots=True)
class _Target:
    name: ModelName
    file: str = ""  # of Hugging Face, by its path in the repository
    is_plain: bool = False  # its registry is to be asked without encryption


def _target(text: str) -> _Target:
    """Raises InvalidNameError."""
    scheme, mark, rest = text.strip().partition("://")
    is_web = bool(mark) and scheme.lower() in ("http", "https")
    named = rest if is_web else text.strip()
    if found := parse_file(named):
        return _Target(*found)
    return _Target(ModelName.parse(named), is_plain=is_web and scheme.lower() == "http")
