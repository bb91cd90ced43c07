"""Who holds a TCP port of this machine, and which one is free. Everything here may block: call it in a thread.

Names of other users' programs are hidden from an ordinary user; well-known servers are then recognised by asking them.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import time
from pathlib import PurePath
from typing import Any

import psutil

_ASK_TIMEOUT_S = 0.5
_NEARBY = 100  # ports tried above a taken one
_MAX_GREETING_BYTES = 4096
_WILDCARDS = ("0.0.0.0", "::", "")
_INTERPRETERS = ("python", "node", "ruby", "perl", "java", "bun", "deno")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. False as well where the address is not this machine's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(_can_bind(family, address) for family, _, _, _, address in found)


def _can_bind(family: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does: TIME_WAIT does not count
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def free_port_near(host: str, port: int, *, avoid: tuple[int, ...] = ()) -> int:
    """`port` itself if it is free, else the next free one above; any free one where all of those are taken."""
    for candidate in range(port, min(port + _NEARBY, 65536)):
        if candidate not in avoid and is_free(host, candidate):
            return candidate
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def holder_of(host: str, port: int) -> str:
    """The program that listens there: "ollama (pid 812)", or a name alone where its process is hidden from us; "" where
    nothing can be told."""
    pids = _listening_pids(host, port)
    for pid in pids:
        if name := _program_name(pid):
            return f"{name} (pid {pid})"
    return recognise(host, port)


def recognise(host: str, port: int) -> str:
    """ "Ollama" or "LM Studio" by what the server there says of itself; "" for any other, or none."""
    address = _reachable(host)
    if "Ollama is running" in _get(address, port, "/"):
        return "Ollama"
    return "LM Studio" if '"lmstudio":true' in _get(address, port, "/lmstudio-greeting").replace(" ", "") else ""


def _get(host: str, port: int, path: str) -> str:
    """The start of the answer, within one bound for the whole exchange; "" where there is none."""
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_TIMEOUT_S)
    deadline = time.monotonic() + 2 * _ASK_TIMEOUT_S
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        text = b""
        while len(text) < _MAX_GREETING_BYTES and time.monotonic() < deadline:
            if not (part := response.read1(_MAX_GREETING_BYTES)):
                break
            text += part
        return text.decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def _listening_pids(host: str, port: int) -> list[int]:
    wanted = _addresses(host)
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return []
    listening = [found for found in connections if found.status == psutil.CONN_LISTEN and found.pid]
    return [found.pid or 0 for found in listening if _is_at(found.laddr, port, wanted)]


def _is_at(address: tuple[Any, ...], port: int, wanted: set[str]) -> bool:
    if not address or address[1] != port:
        return False
    return address[0] in _WILDCARDS or address[0] in wanted or bool(wanted & set(_WILDCARDS))


def _addresses(host: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return {host}


def _reachable(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "::1" if address.version == 6 else "127.0.0.1"


def _program_name(pid: int) -> str:
    """The process's name; of an interpreter, that of the program it runs."""
    try:
        process = psutil.Process(pid)
        name = process.name()
        words = process.cmdline()[1:] if name.lower().startswith(_INTERPRETERS) else []
    except (psutil.Error, OSError):
        return ""
    if words[:1] == ["-m"]:
        words = words[1:]
    script = next(iter(words), "")
    return name if not script or script.startswith("-") else PurePath(script).name.removesuffix(".py")
