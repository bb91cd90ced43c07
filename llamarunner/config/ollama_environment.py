"""Ollama's environment variables (OLLAMA_HOST, ...) as a layer of our configuration, so that what was set up for Ollama
goes on working. Pure: takes the variables, gives keys and values.

They lie over the defaults and below everything that was written for us: file, profile, LLAMARUNNER__ variables and
command line. OLLAMA_MODELS is the catalogue's matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamarunner.config.origin import Problem
from llamarunner.config.positions import KeyPath
from llamarunner.units import parse_duration

PREFIX = "OLLAMA_"
HOST = "OLLAMA_HOST"
FOR_CLIENTS = "where OLLAMA_HOST is meant for clients alone, proxies.ollama.host says where to listen"
EVERYWHERE = "0.0.0.0"

_LOOPBACK = "127.0.0.1"
_PORT = 11434
_PORTS = {"http": 80, "https": 443}
_TRUE = ("1", "t", "true", "y", "yes", "on")
_FALSE = ("0", "f", "false", "n", "no", "off")

_FLAG_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "flash-attn": ("flash-attn", "flash_attn", "fa"),
    "cache-type-k": ("cache-type-k", "cache_type_k", "ctk"),
    "cache-type-v": ("cache-type-v", "cache_type_v", "ctv"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    path: KeyPath
    value: Any
    variable: str


def ollama_settings(environ: Mapping[str, str], written: Mapping[str, Any]) -> tuple[list[Setting], list[Problem]]:
    """What the variables set, and what is wrong with them. `written` are the tables that lie over them. Where those
    disable Ollama's dialect nothing is set, nor is a flag that they name by another of its spellings, or that not
    every engine of theirs would take."""
    if _table(written, "proxies", "ollama").get("enabled") is False:
        return [], []
    settings: list[Setting] = []
    problems: list[Problem] = []
    for variable, read in _VARIABLES.items():
        text = clean(environ.get(variable, ""))
        if not text:
            continue
        try:
            settings += [Setting(path, value, variable) for path, value in read(text)]
        except ValueError as error:
            problems.append(Problem(variable, "", str(error)))
    return [each for each in settings if not _is_settled(each.path, written)], problems


def clean(text: str) -> str:
    """A variable's value as Ollama reads it: unit files and .env files leave quotes around it."""
    return text.strip().strip("\"'").strip()


def parse_host(text: str) -> tuple[str, int]:
    """OLLAMA_HOST: an address, a name, "host:port", ":port" (every address), or a URL. Raises ValueError."""
    scheme, has_scheme, rest = text.rpartition("://")
    if has_scheme and scheme.lower() not in _PORTS:
        raise ValueError(f'"{text}" is no address: http:// or nothing is wanted before it')
    address = rest.partition("/")[0]
    host, port = _split_port(address)
    if port is None:
        return host or _LOOPBACK, _PORTS[scheme.lower()] if has_scheme else _PORT
    return host or EVERYWHERE, _port(port)


def _split_port(address: str) -> tuple[str, str | None]:
    """The host without brackets, and what stands behind its colon (None without one)."""
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f'"{address}" is no address: an IPv6 one is written [::1]:{_PORT}')
        return host, rest[1:] if rest else None
    if address.count(":") > 1:  # an IPv6 address without brackets
        return address, None
    host, colon, port = address.partition(":")
    return host, port if colon else None


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError(f'"{text}" is no port: a number up to 65535 is wanted')
    return int(text)


Pairs = Iterator[tuple[KeyPath, Any]]


def _host(text: str) -> Pairs:
    host, port = parse_host(text)
    yield ("proxies", "ollama", "host"), host
    yield ("proxies", "ollama", "port"), port


def _origins(text: str) -> Pairs:
    yield ("proxies", "ollama", "cors_origins"), [each for part in text.split(",") if (each := clean(part))]


def _keep_alive(text: str) -> Pairs:
    yield ("defaults", "keep_alive"), _duration(text)


def _load_timeout(text: str) -> Pairs:
    seconds = _duration(text)
    yield ("defaults", "load_timeout"), seconds if seconds > 0 else "never"


def _duration(text: str) -> float:
    """Seconds; a bare number is seconds already."""
    return float(text) if re.fullmatch(r"[+-]?\d{1,9}", text, re.ASCII) else parse_duration(text)


def _number(path: KeyPath, *, zero_is_unset: bool = False) -> Callable[[str], Pairs]:
    def read(text: str) -> Pairs:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise ValueError(f'"{text}" is no whole number')
        if int(text) or not zero_is_unset:
            yield path, int(text)

    return read


def _truth(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f'"{text}" is neither true nor false: 1 or 0 is wanted')
    return text.lower() in _TRUE


def _flash_attention(text: str) -> Pairs:
    yield ("defaults", "flags", "flash-attn"), True if _truth(text) else "off"


def _cache_type(text: str) -> Pairs:
    yield ("defaults", "flags", "cache-type-k"), text.lower()
    yield ("defaults", "flags", "cache-type-v"), text.lower()


def _spread(text: str) -> Pairs:
    yield ("scheduler", "spread"), _truth(text)


def _debug(text: str) -> Pairs:
    """1 is debug, and 2 what Ollama calls trace."""
    if (text.isdigit() and int(text)) or (not text.isdigit() and _truth(text)):
        yield ("logging", "level"), "debug"


_VARIABLES: Mapping[str, Callable[[str], Pairs]] = {
    HOST: _host,
    "OLLAMA_ORIGINS": _origins,
    "OLLAMA_KEEP_ALIVE": _keep_alive,
    "OLLAMA_LOAD_TIMEOUT": _load_timeout,
    "OLLAMA_NUM_PARALLEL": _number(("defaults", "parallel"), zero_is_unset=True),
    "OLLAMA_MAX_LOADED_MODELS": _number(("scheduler", "max_loaded")),
    "OLLAMA_MAX_QUEUE": _number(("scheduler", "max_queue")),
    "OLLAMA_CONTEXT_LENGTH": _number(("defaults", "context"), zero_is_unset=True),
    "OLLAMA_FLASH_ATTENTION": _flash_attention,
    "OLLAMA_KV_CACHE_TYPE": _cache_type,
    "OLLAMA_GPU_OVERHEAD": _number(("scheduler", "gpu_reserve"), zero_is_unset=True),
    "OLLAMA_SCHED_SPREAD": _spread,
    "OLLAMA_DEBUG": _debug,
}


def _is_settled(path: KeyPath, written: Mapping[str, Any]) -> bool:
    """Only of flags: every model inherits them, and an engine that is no llama.cpp ends over one it does not know."""
    if path[:2] != ("defaults", "flags"):
        return False
    engines = _table(written, "engines").values()
    if any(isinstance(engine, dict) and engine.get("kind") == "command" for engine in engines):
        return True
    models = _table(written, "models").values()
    tables = [_table(written, "defaults"), *(model for model in models if isinstance(model, dict))]
    spellings = _FLAG_SPELLINGS[str(path[2])]
    return any(name in spellings and name != path[2] for table in tables for name in _table(table, "flags"))


def _table(tables: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    found: Any = tables
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}
