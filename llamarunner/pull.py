"""`llamarunner pull` and `llamarunner rm`: by the program that runs, which knows of the change at once, or alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Protocol

import aiohttp
import orjson

from llamarunner.ask import reachable_url, request_headers
from llamarunner.catalog.librarian import Librarian
from llamarunner.catalog.library import open_library
from llamarunner.catalog.pull import Progress, Pulls
from llamarunner.catalog.stores import discover, kept_headers
from llamarunner.config.load import LoadedConfig
from llamarunner.errors import LlamaRunnerError, RequestError
from llamarunner.instance import InstanceFile
from llamarunner.units import format_size

if TYPE_CHECKING:
    from rich.progress import TaskID

_MAX_LINE = 64 * 1024  # of progress


class PullFailedError(LlamaRunnerError):
    """In the words of the program that was asked."""

    code = "pull_failed"


class Display(Protocol):
    def show(self, line: Progress) -> None: ...


def pull(loaded: LoadedConfig, name: str, *, insecure: bool = False, as_json: bool = False) -> None:
    """Raises LlamaRunnerError: RequestError where the name is wrong."""
    asyncio.run(_pull(loaded, name, insecure=insecure, as_json=as_json))


def remove(loaded: LoadedConfig, name: str) -> None:
    """Raises LlamaRunnerError: RequestError where there is no such model, or it is not ours."""
    asyncio.run(_remove(loaded, name))


async def _pull(loaded: LoadedConfig, name: str, *, insecure: bool, as_json: bool) -> None:
    running = await _running(loaded)
    with ExitStack() as stack:
        display: Display = _Json() if as_json else _Plain()
        if not as_json and sys.stderr.isatty():
            display = stack.enter_context(_Bars())
        if running is None:
            pulls = Pulls(open_library(loaded.config), _nobody_to_tell)
            try:
                await _show(pulls.pull(name, insecure=insecure), display)
            finally:
                await pulls.close()
        else:
            await _show(_pull_there(*running, {"model": name, "insecure": insecure}), display)


async def _show(lines: AsyncGenerator[Progress, None], display: Display) -> None:
    async with aclosing(lines):
        async for line in lines:
            display.show(line)


async def _remove(loaded: LoadedConfig, name: str) -> None:
    if (running := await _running(loaded)) is not None:
        url, headers = running
        await _ask_there("DELETE", f"{url}/api/delete", headers, {"model": name})
        return
    catalog = await asyncio.to_thread(discover, loaded.config, headers=kept_headers())
    library = open_library(loaded.config)
    pulls = Pulls(library, _nobody_to_tell)
    librarian = Librarian(library, pulls, catalog=lambda: catalog, rescan=_nobody_to_tell)
    await librarian.delete(name)


async def _nobody_to_tell() -> None:
    pass


# -- the program that runs ---------------------------------------------------------------------------------------------


async def _running(loaded: LoadedConfig) -> tuple[str, dict[str, str]] | None:
    """Its address and the headers it wants. Only Ollama's port does what we want."""
    instance = await asyncio.to_thread(InstanceFile().read)
    if instance is None or "ollama" not in instance.proxies:
        return None
    return reachable_url(*instance.proxies["ollama"]), request_headers(loaded.config.proxies.ollama)


async def _pull_there(url: str, headers: dict[str, str], body: dict[str, object]) -> AsyncGenerator[Progress, None]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=_MAX_LINE) as session,
            session.post(f"{url}/api/pull", data=orjson.dumps(body), headers=headers) as response,
        ):
            if response.status != 200:
                raise _refusal(response.status, await response.read())
            async for raw in response.content:
                record = orjson.loads(raw)
                if "error" in record:
                    raise PullFailedError(str(record["error"]))
                yield Progress(**record)
    except aiohttp.ClientError as error:
        raise PullFailedError(f"the connection to {url} broke: {error}") from error


async def _ask_there(method: str, url: str, headers: dict[str, str], body: dict[str, object]) -> None:
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, data=orjson.dumps(body), headers=headers) as response,
        ):
            if response.status != 200:
                raise _refusal(response.status, await response.read())
    except aiohttp.ClientError as error:
        raise PullFailedError(f"{url} cannot be asked: {error}") from error


def _refusal(status: int, raw: bytes) -> LlamaRunnerError:
    try:
        message = str(orjson.loads(raw)["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = f"the program that runs answered with status {status}"
    return RequestError(message) if status < 500 else PullFailedError(message)


# -- progress ----------------------------------------------------------------------------------------------------------


class _Json:
    """A line of JSON for each step, as Ollama's API has them."""

    def show(self, line: Progress) -> None:
        sys.stdout.write(orjson.dumps(line.as_record()).decode() + "\n")
        sys.stdout.flush()


class _Plain:
    """A line for what begins, and each tenth of a blob: for logs."""

    def __init__(self) -> None:
        self._shown: tuple[str, int] = ("", 0)

    def show(self, line: Progress) -> None:
        tenth = line.completed * 10 // line.total if line.total else 0
        if (line.status, tenth) != self._shown:
            self._shown = line.status, tenth
            of = f": {tenth * 10} % of {format_size(line.total)}" if line.total else ""
            sys.stderr.write(f"{line.status}{of}\n")
            sys.stderr.flush()


class _Bars:
    """A bar for each blob, with its rate and what is left."""

    def __init__(self) -> None:
        from rich.console import Console  # only where there is a terminal: it takes a moment to load
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, line: Progress) -> None:
        if not line.total:
            self._bars.console.print(line.status, highlight=False, markup=False)
        elif line.digest in self._tasks:
            self._bars.update(self._tasks[line.digest], completed=line.completed)
        else:
            self._tasks[line.digest] = self._bars.add_task(line.status, total=line.total, completed=line.completed)
