"""Questions to a starting engine over HTTP: is it ready, is it really ours, and what did it make of its settings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import psutil

from llamarunner.engines.engine import LaunchPlan
from llamarunner.runners.process import EngineProcess

_TIMEOUT_S = 5.0
_PROPS_BYTES = 4 * 1024**2  # they hold the chat template
_REFUSED = (401, 403)


class StrangerError(Exception):
    """Another program answers on the port."""


@dataclass(frozen=True, slots=True)
class Props:
    context: int | None = None  # tokens for each request
    slots: int | None = None


async def ask_health(session: aiohttp.ClientSession, plan: LaunchPlan, timeout_s: float) -> int | None:
    """The status of the answer; None where there was none. Raises StrangerError when our key is refused."""
    try:
        status, _ = await _get(session, plan.base_url + plan.health_path, plan.headers, timeout_s)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
    if status in _REFUSED:
        raise StrangerError
    return status


async def read_props(session: aiohttp.ClientSession, plan: LaunchPlan, process: EngineProcess) -> Props:
    """What a ready engine says of itself, as far as it says anything. Raises StrangerError when it is not ours."""
    url = f"{plan.base_url}/props"
    try:
        status, body = await _get(session, url, plan.headers, _TIMEOUT_S)
        keyless, _ = await _get(session, url, {}, _TIMEOUT_S)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return Props()
    if status in _REFUSED:
        raise StrangerError
    # one that lets our key in and no key out knows a secret that only our engine was told; others show it otherwise
    if keyless not in _REFUSED and await asyncio.to_thread(_is_held_by_stranger, plan.port, process):
        raise StrangerError
    return _parse(body) if status == 200 else Props()


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


def _is_held_by_stranger(port: int, process: EngineProcess) -> bool:
    """Whether the listener is known to be none of our processes. One we cannot see into may be a container's."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return False
    listeners = {c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port}
    return bool(listeners) and None not in listeners and listeners.isdisjoint(process.family_pids())


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
