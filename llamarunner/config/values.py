"""The values that config.toml is written with (durations, sizes, paths, flags): how each is checked and read."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, WithJsonSchema

from llamarunner.units import parse_duration, parse_size

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_HOST = re.compile(r"[0-9A-Za-z_.:%-]+")

PLACEHOLDERS = ("port", "model", "name", "context", "parallel", "api_key")
"""What an engine of kind "command" finds filled in, written ${port}."""


def _duration(value: object) -> object:
    """Seconds; a bare number is seconds already."""
    wanted = 'a duration such as "30s" or "5m" is wanted'
    seconds = _seconds(value, wanted)
    if seconds < 0:
        raise ValueError("a duration cannot be negative here")
    return seconds


def _keep_alive(value: object) -> object:
    """As a duration, and any negative one is for ever."""
    seconds = _seconds(value, 'a duration such as "5m", 0 (unload at once) or -1 (never unload) is wanted')
    return math.inf if seconds < 0 else seconds


def _seconds(value: object, wanted: str) -> float:
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except ValueError:
            raise ValueError(wanted) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(wanted)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(wanted) from None


def _size(value: object) -> object:
    if isinstance(value, str):
        value = parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError('a size such as "64MiB" is wanted')
    return value


def expand_variables(text: str, environ: Mapping[str, str] = os.environ, kept: Container[str] = ()) -> str:
    """`${VAR}` and `${VAR:-default}` from the environment, but for the names `kept`. Raises ValueError for a variable
    that is not set."""

    def replace(match: re.Match[str]) -> str:
        name: str = match[1]
        default: str | None = match[2]
        if default is None and name in kept:
            return match[0]
        found = environ.get(name, default)
        if found is None:
            near = difflib.get_close_matches(name.lower(), [each for each in PLACEHOLDERS if each in kept], n=1)
            meant = f"; did you mean ${{{near[0]}}}?" if near else ""
            wanted = f"set it, or write ${{{name}:-a default}}"
            raise ValueError(f"the environment variable {name} is not set; {wanted}{meant}")
        return found

    return _VARIABLE.sub(replace, text)


def _expanded(value: object, info: ValidationInfo, kept: Container[str] = ()) -> object:
    """`${VAR}`, by the environment of the validation context ("environ") or our own."""
    if not isinstance(value, str):
        return value
    expanded = expand_variables(value, (info.context or {}).get("environ", os.environ), kept)
    if "\0" in expanded:
        raise ValueError("a NUL character cannot be handed to a program")
    return expanded


def _template(value: object, info: ValidationInfo) -> object:
    return _expanded(value, info, PLACEHOLDERS)


def _path(value: object, info: ValidationInfo) -> object:
    """`~`, `${VAR}`; a relative path counts from the configuration file's folder (validation context "base")."""
    path, base = _named_path(value, info), base_folder(info)
    return path if base is None else base / path


def _model_path(value: object, info: ValidationInfo) -> object:
    """As `_path`, but a relative one stays so: `Config` knows whether the model's engine takes it for a path at all.
    What begins with "./" or "../" is one."""
    is_path = str(value).startswith(("./", "../"))
    return _path(value, info) if is_path else _named_path(value, info)


def base_folder(info: ValidationInfo) -> Path | None:
    base = (info.context or {}).get("base")
    return None if base is None else Path(base)


def _named_path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("a path is wanted")
    text = str(_expanded(str(value), info))
    if not text.strip():
        raise ValueError("the path is empty")
    return Path(os.path.expanduser(text))  # pathlib's own raises where there is no home to be found


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError('an address or name to listen on is wanted, such as "127.0.0.1", "::1" or "0.0.0.0"')
    return value


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError('an address or a network is wanted, such as "192.168.1.20" or "10.0.0.0/8"') from None
    return value


def _variable_name(value: str) -> str:
    if not value or "=" in value or "\0" in value:
        raise ValueError("this cannot be the name of an environment variable")
    return value


def _flag(value: object) -> object:
    parts = value if isinstance(value, list) else [value]
    is_list_of_flags = isinstance(value, list) and any(isinstance(part, bool) for part in value)
    if is_list_of_flags or not all(isinstance(part, bool | int | float | str) for part in parts):
        raise ValueError("true, false, a number, a string, or an array of numbers and strings is wanted")
    if any("\0" in str(part) for part in parts):
        raise ValueError("a NUL character cannot be handed to a program")
    return value


_AS_WRITTEN = WithJsonSchema({"type": ["string", "number"]})

Duration = Annotated[float, BeforeValidator(_duration), _AS_WRITTEN]
KeepAlive = Annotated[float, BeforeValidator(_keep_alive), _AS_WRITTEN]
Size = Annotated[int, BeforeValidator(_size), WithJsonSchema({"type": ["string", "integer"]})]
ConfigPath = Annotated[Path, BeforeValidator(_path)]
ModelPath = Annotated[Path, BeforeValidator(_model_path)]
Expanded = Annotated[str, BeforeValidator(_expanded)]
Template = Annotated[str, BeforeValidator(_template)]
Secret = Annotated[SecretStr, BeforeValidator(_expanded)]
Host = Annotated[str, AfterValidator(_host)]
Network = Annotated[str, AfterValidator(_network)]
Port = Annotated[int, Field(ge=0, le=65535)]
Environment = dict[Annotated[str, AfterValidator(_variable_name)], Expanded]
TemplateEnvironment = dict[Annotated[str, AfterValidator(_variable_name)], Template]
FlagValue = Annotated[bool | int | float | str | list[str | int | float], BeforeValidator(_flag)]
