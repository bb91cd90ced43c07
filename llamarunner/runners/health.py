"""Questions to an engine over HTTP: is it ready, is it really ours, what did it make of its settings, and of one that
is no process of ours: is it still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import aiohttp
import orjson
import psutil

from llamarunner.engines import remote
from llamarunner.engines.engine import LaunchPlan
from llamarunner.runners.process import EngineProcess
from llamarunner.runners.watchdog import SlotsLook

_TIMEOUT_S = 5.0
_PROPS_BYTES = 4 * 1024**2  # they hold the chat template
_SLOTS_S = 2.0
_REFUSED = (401, 403)
_MISSES = 3


class StrangerError(Exception):
    """Another program answers on the port."""


class KeyRefusedError(Exception):
    """Our own engine does not accept the key it was given, or wants one."""


class _Listener(Enum):
    OURS = auto()
    STRANGER = auto()
    UNKNOWN = auto()  # of a process we cannot see into, such as a container's


@dataclass(frozen=True, slots=True)
class Props:
    context: int | None = None  # tokens for each request
    slots: int | None = None


async def ask_health(
    session: aiohttp.ClientSession, plan: LaunchPlan, process: EngineProcess, timeout_s: float
) -> int | None:
    """The status of the answer; None where there was none. Raises StrangerError or KeyRefusedError when our key is
    refused."""
    try:
        status, _ = await _get(session, plan.base_url + plan.health_path, plan.headers, timeout_s)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
    if status in _REFUSED:
        raise await _refusal(plan, process)
    return status


async def _refusal(plan: LaunchPlan, process: EngineProcess) -> StrangerError | KeyRefusedError:
    listener = await asyncio.to_thread(_listener, plan.port, process)
    # whose it is may not show; that it refuses a key which ours was told then speaks against it
    is_stranger = listener is _Listener.STRANGER or (listener is _Listener.UNKNOWN and plan.api_key)
    return StrangerError() if is_stranger else KeyRefusedError()


async def read_props(session: aiohttp.ClientSession, plan: LaunchPlan, process: EngineProcess) -> Props:
    """What a ready engine says of itself, as far as it says anything. Raises StrangerError when it is not ours."""
    if not plan.is_llama_cpp:  # it says nothing, and its key protects this or that or is not there at all
        await _refuse_stranger(plan, process)
        return Props()
    url = f"{plan.base_url}/props"
    try:
        status, body = await _get(session, url, plan.headers, _TIMEOUT_S)
        keyless, _ = await _get(session, url, {}, _TIMEOUT_S)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return Props()
    if status in _REFUSED:
        raise StrangerError
    # one that lets our key in and no key out knows a secret that only our engine was told; others show it otherwise
    if keyless not in _REFUSED:
        await _refuse_stranger(plan, process)
    return _parse(body) if status == 200 else Props()


async def until_lost(
    session: aiohttp.ClientSession, plan: LaunchPlan, every_s: float, note: Callable[[str], None]
) -> remote.UnreachableError:
    """Ask a server elsewhere whether it is still there, until it has failed to answer thrice in a row; the last reason.
    `note` is told each of them."""
    misses = 0
    while True:
        await asyncio.sleep(every_s)
        try:
            await remote.check(session, plan.base_url, plan.headers, _TIMEOUT_S)
        except remote.UnreachableError as error:
            misses += 1
            note(f"{error.message} ({misses} of {_MISSES})")
            if misses == _MISSES:
                return error
        else:
            misses = 0


async def ask_slots(session: aiohttp.ClientSession, plan: LaunchPlan) -> SlotsLook:
    """What a llama.cpp says its slots do."""
    try:
        status, body = await _get(session, f"{plan.base_url}/slots", plan.headers, _SLOTS_S)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return SlotsLook()
    return SlotsLook(has_slots=status == 200, fingerprint=hash(body))


async def _get(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], timeout_s: float
) -> tuple[int, bytes]:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
        body = bytearray()
        async for block in response.content.iter_chunked(64 * 1024):
            body += block
            if len(body) > _PROPS_BYTES:
                break
        return response.status, bytes(body)


async def _refuse_stranger(plan: LaunchPlan, process: EngineProcess) -> None:
    if await asyncio.to_thread(_listener, plan.port, process) is _Listener.STRANGER:
        raise StrangerError


def _listener(port: int, process: EngineProcess) -> _Listener:
    """Whose process listens on the port."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return _Listener.UNKNOWN
    listeners = {c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port}
    if not listeners.isdisjoint(process.family_pids()):
        return _Listener.OURS
    return _Listener.UNKNOWN if not listeners or None in listeners else _Listener.STRANGER


def _parse(body: bytes) -> Props:
    try:
        props = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Props()
    if not isinstance(props, dict):
        return Props()
    settings = props.get("default_generation_settings")
    return Props(
        context=_positive(settings.get("n_ctx")) if isinstance(settings, dict) else None,
        slots=_positive(props.get("total_slots")),
    )


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
