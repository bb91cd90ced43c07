"""`Download`: one blob on its way into the library, in parts side by side, resumed where an earlier one left off, and
verified before it counts. `Downloads` lets all who want the same blob share one.

    blobs/sha256-<hex>-partial        the bytes, each at its place
    blobs/sha256-<hex>-partial.json   how much there is of each part
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from llamarunner.catalog.library import PARTIAL, Library
from llamarunner.catalog.manifests import Layer, ManifestError, blob_path
from llamarunner.catalog.registry import Origin, RegistryError
from llamarunner.errors import LlamaRunnerError

logger = logging.getLogger(__name__)

_HASH_BLOCK = 4 * 1024**2
_SAVE_S = 1.0  # between notes of how far the parts are


@dataclass(frozen=True, slots=True)
class Pace:
    """The defaults are Ollama's."""

    part_min: int = 100 * 1000**2  # bytes
    part_max: int = 1000**3
    parallel: int = 16
    stall_s: float = 30.0  # a part that gets nothing for so long is asked for again
    retries: int = 6  # without a byte between them
    backoff_s: float = 1.0  # doubles from attempt to attempt
    write_bytes: int = 1024**2  # put on the disk at once
    write_s: float = 0.25  # or what came in so long


class DownloadError(LlamaRunnerError):
    code = "download"


class _MismatchError(DownloadError):
    """What came is not what was promised."""


class _NoRangesError(Exception):
    """The other side gives whole files only."""


@dataclass(slots=True)
class _Part:
    start: int
    size: int
    completed: int = 0

    @property
    def left(self) -> int:
        return self.size - self.completed

    @property
    def position(self) -> int:
        return self.start + self.completed


class Download:
    def __init__(self, library: Library, origin: Origin, layer: Layer, pace: Pace) -> None:
        self.layer = layer
        self.opened = asyncio.Event()  # it is known what an earlier one left
        self.fetched = asyncio.Event()  # all bytes are here, not yet verified
        self._library = library
        self._origin = origin
        self._pace = pace
        self._parts: list[_Part] = []
        self._resumed = False
        self._has_ranges = True
        self._file = -1
        self._writes: set[asyncio.Future[None]] = set()
        self._partial = Path()

    @property
    def completed(self) -> int:
        return sum(part.completed for part in self._parts)

    async def run(self) -> None:
        """Return once the blob is in the library. Raises RegistryError or DownloadError. Where it fails or is
        cancelled, what there is stays for the next one."""
        try:
            await self._open()
            self.opened.set()
            await self._fetch_and_verify()
        except OSError as error:
            raise DownloadError(f"the download cannot be kept: {error.strerror or error}") from error
        finally:
            if self._writes:
                await asyncio.gather(*self._writes, return_exceptions=True)
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    async def _fetch_and_verify(self) -> None:
        while True:
            await self._fetch()
            self.fetched.set()
            if await self._is_true():
                await asyncio.to_thread(self._finish)
                return
            await asyncio.to_thread(self._begin_again)
            if not self._resumed:
                raise _MismatchError(f"digest mismatch, file must be downloaded again: want {self.layer.digest}")
            logger.warning("what was left of %s is damaged: it is downloaded again", self.layer.digest)
            self._resumed = False
            self.fetched.clear()

    # -- the file ----------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        opening = asyncio.ensure_future(asyncio.to_thread(self._open_file))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            with suppress(OSError, LlamaRunnerError):
                await opening  # so that the file is known, and closed
            raise

    def _open_file(self) -> None:
        place = blob_path(self._library.root, self.layer.digest)
        self._library.blobs  # noqa: B018 makes the folder
        self._partial = place.with_name(place.name + PARTIAL)
        while True:
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadError("another program is downloading this", hint="wait for it, or end it") from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self._partial.stat()):
                    break
            os.close(self._file)  # another program finished it between our two steps
        self._parts = self._saved_parts()
        self._resumed = self.completed > 0
        os.truncate(self._file, self.layer.size)

    @property
    def _state(self) -> Path:
        return self._partial.with_name(self._partial.name + ".json")

    def _saved_parts(self) -> list[_Part]:
        with suppress(OSError, orjson.JSONDecodeError, TypeError, ValueError):
            if os.fstat(self._file).st_size == self.layer.size:
                parts = [_Part(*map(int, each)) for each in orjson.loads(self._state.read_bytes())]
                if _cover(parts, self.layer.size):
                    return parts
        size = min(max(self.layer.size // 16, self._pace.part_min), self._pace.part_max)
        return [_Part(start, min(size, self.layer.size - start)) for start in range(0, self.layer.size, size)]

    def _save(self) -> None:
        draft = self._state.with_name(f".{self._state.name}")
        draft.write_bytes(orjson.dumps([[part.start, part.size, part.completed] for part in self._parts]))
        draft.replace(self._state)

    def _begin_again(self) -> None:
        self._state.unlink(missing_ok=True)
        os.truncate(self._file, 0)
        os.truncate(self._file, self.layer.size)
        self._parts = self._saved_parts()

    def _finish(self) -> None:
        os.fsync(self._file)
        self._partial.replace(blob_path(self._library.root, self.layer.digest))
        self._state.unlink(missing_ok=True)

    async def _is_true(self) -> bool:
        stop = threading.Event()
        hashing = asyncio.ensure_future(asyncio.to_thread(_hash_file, self._file, stop))
        try:
            return f"sha256:{await asyncio.shield(hashing)}" == self.layer.digest
        finally:
            stop.set()
            await asyncio.gather(hashing, return_exceptions=True)

    # -- the parts ---------------------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        saving = asyncio.create_task(self._save_now_and_then(), name=f"save {self.layer.digest[7:19]}")
        try:
            try:
                await self._fetch_parts()
            except _NoRangesError:
                self._has_ranges = False
                self._parts = [_Part(0, self.layer.size)]
                await self._fetch_parts()
        finally:
            saving.cancel()
            await asyncio.gather(saving, *self._writes, return_exceptions=True)
            await asyncio.to_thread(self._save)

    async def _save_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_S)
            try:
                await asyncio.to_thread(self._save)
            except OSError as error:
                logger.warning("how far a download is cannot be noted: %s", error)

    async def _fetch_parts(self) -> None:
        slots = asyncio.Semaphore(self._pace.parallel)
        try:
            async with asyncio.TaskGroup() as group:
                for part in self._parts:
                    if part.left:
                        group.create_task(self._fetch_part(part, slots), name=f"part {part.start}")
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _fetch_part(self, part: _Part, slots: asyncio.Semaphore) -> None:
        failures = 0
        async with slots:
            while part.left:
                if not self._has_ranges:
                    part.completed = 0
                before = part.completed
                try:
                    await self._transfer(part)
                except (aiohttp.ClientError, TimeoutError, RegistryError) as error:
                    if isinstance(error, RegistryError) and error.is_final:
                        raise
                    failures = 1 if self._has_ranges and part.completed > before else failures + 1
                    if failures > self._pace.retries:
                        raise DownloadError(_told(error), hint="pull it again: it goes on from here") from error
                    wait = self._pace.backoff_s * 2 ** (failures - 1)
                    asked = error.retry_after_s if isinstance(error, RegistryError) else None
                    await asyncio.sleep(wait if asked is None else asked)

    async def _transfer(self, part: _Part) -> None:
        """As much of the part as comes. Raises what aiohttp does, and TimeoutError for a stall."""
        stall, end = self._pace.stall_s, part.start + part.size
        asked = self._origin.blob(self.layer.digest, part.position, end)
        async with asyncio.timeout(stall) as patience, asked as response:
            self._check(response, part, end)
            loop, waiting, size = asyncio.get_running_loop(), list[bytes](), 0
            written = loop.time()
            try:
                while part.left > size:
                    block = await response.content.readany()
                    patience.reschedule(loop.time() + stall)
                    if not block:
                        raise aiohttp.ClientPayloadError("the connection ended too soon")
                    waiting.append(block[: part.left - size])
                    size += len(waiting[-1])
                    if size >= self._pace.write_bytes or loop.time() - written >= self._pace.write_s:
                        blocks, waiting, size = waiting, [], 0
                        patience.reschedule(None)  # a slow disk is no stall
                        await self._put(part, blocks)
                        written = loop.time()
                        patience.reschedule(written + stall)
            finally:
                if waiting:
                    await self._put(part, waiting)

    def _check(self, response: aiohttp.ClientResponse, part: _Part, end: int) -> None:
        if response.status == 200:
            if part.position or end < self.layer.size:
                raise _NoRangesError
            length = response.content_length
            if length is not None and length != self.layer.size:
                raise _MismatchError(f"{length} bytes are offered in place of the {self.layer.size} promised")
            return
        given, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if total not in ("*", str(self.layer.size)):
            raise _MismatchError(f"{total or 'no'} bytes are offered in place of the {self.layer.size} promised")
        if given != f"{part.position}-{end - 1}":
            raise _MismatchError(f"bytes {given} came in place of {part.position}-{end - 1}")

    async def _put(self, part: _Part, blocks: list[bytes]) -> None:
        """Write behind what the part has. A thread cannot be stopped: where we are cancelled, it is waited for."""
        writing = asyncio.ensure_future(asyncio.to_thread(self._write, part, blocks))
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            raise

    def _write(self, part: _Part, blocks: list[bytes]) -> None:
        data = b"".join(blocks)
        view, position = memoryview(data), part.position
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written
        part.completed += len(data)


def _cover(parts: list[_Part], size: int) -> bool:
    """Whether these are all of a file's parts, in order."""
    position = 0
    for part in parts:
        if part.start != position or part.size <= 0 or not 0 <= part.completed <= part.size:
            return False
        position += part.size
    return position == size


def _hash_file(file: int, stop: threading.Event) -> str:
    digest, position = hashlib.sha256(), 0
    while not stop.is_set() and (block := os.pread(file, _HASH_BLOCK, position)):
        digest.update(block)
        position += len(block)
    return digest.hexdigest()


def _told(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the download stalls"
    return error.message if isinstance(error, LlamaRunnerError) else f"the connection breaks: {error}"


class _Shared:
    def __init__(self, download: Download) -> None:
        self.download = download
        self.task = asyncio.create_task(download.run(), name=f"download {download.layer.digest[7:19]}")
        self.users = 0


class Downloads:
    def __init__(self, library: Library, pace: Pace) -> None:
        self._library = library
        self._pace = pace
        self._shared: dict[str, _Shared] = {}

    async def is_here(self, layer: Layer) -> bool:
        """Whether the blob need not be fetched. One of another size cannot be what was promised."""
        return await asyncio.to_thread(self._is_here, layer)

    def _is_here(self, layer: Layer) -> bool:
        try:
            path = self._library.blob(layer.digest)
            if path is not None and path.stat().st_size == layer.size:
                return True
        except (OSError, ManifestError):
            return False
        return self._library.take_from_others(layer)

    def held_bytes(self, layer: Layer) -> int:
        """What an unfinished download has on the disk. Blocks."""
        place = blob_path(self._library.root, layer.digest)
        with suppress(OSError):
            return place.with_name(place.name + PARTIAL).stat().st_blocks * 512
        return 0

    @asynccontextmanager
    async def join(self, origin: Origin, layer: Layer) -> AsyncIterator[tuple[Download, asyncio.Task[None]]]:
        """The blob's download, begun by whoever comes first. It ends when it is done or the last one leaves."""
        shared = self._shared.get(layer.digest)
        if shared is None or shared.task.done():
            shared = self._shared[layer.digest] = _Shared(Download(self._library, origin, layer, self._pace))
        shared.users += 1
        try:
            yield shared.download, shared.task
        finally:
            shared.users -= 1
            if not shared.users:
                if self._shared.get(layer.digest) is shared:
                    del self._shared[layer.digest]
                shared.task.cancel()
                await asyncio.gather(shared.task, return_exceptions=True)


class Rate:
    """Bytes a second over the last moments."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._points: list[tuple[float, int]] = []

    def note(self, completed: int) -> None:
        now = time.monotonic()
        if not self._points or now - self._points[-1][0] >= 0.2:
            self._points.append((now, completed))
            while now - self._points[0][0] > self._window_s:
                self._points.pop(0)

    @property
    def bytes_per_s(self) -> float | None:
        if len(self._points) < 2:
            return None
        (begun, before), (ended, after) = self._points[0], self._points[-1]
        return max(after - before, 0) / (ended - begun)
