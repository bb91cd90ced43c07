"""Which keys the schema knows, and what each takes: for "did you mean", environment variables and explaining."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from llamarunner.config.positions import KeyPath
from llamarunner.config.schema import Config, ModelConfig, Section

_MOST_LISTED = 15
_SECRET_ENDINGS = ("api-key", "token", "password", "secret")

NAME = "NAME"  # stands for a table's free name in the paths of `every_key`

# Read by the loader itself, before the schema sees the rest.
_LOADER_KEYS: dict[type[Section], dict[str, Any]] = {
    Config: {"profiles": dict[str, Config]},
    ModelConfig: {"inherits": str},
}


def type_at(path: KeyPath) -> Any:
    """What the schema wants at a path: a Section, a dict or list type, an annotated scalar; None for no such key."""
    wanted: Any = Config
    for part in path:
        wanted = _child(wanted, part)
        if wanted is None:
            return None
    return wanted


def keys_at(path: KeyPath) -> list[str]:
    """The keys of the section at a path; empty where it is none."""
    wanted = type_at(path)
    return _known(wanted) if is_section(wanted) else []


def is_section(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, Section)


def is_free_table(wanted: Any) -> bool:
    """A table whose keys are names the user chooses."""
    return typing.get_origin(_plain(wanted)) is dict


def takes_text_only(wanted: Any) -> bool:
    return _scalar_types(wanted) <= {str, SecretStr, Path, types.NoneType}


def is_secret(path: KeyPath) -> bool:
    """Values that are never shown: keys and tokens, and whole environments, where such things are handed over."""
    names = [part for part in path if isinstance(part, str)]
    return "env" in names or any(name.replace("_", "-").endswith(_SECRET_ENDINGS) for name in names[-1:])


def every_key() -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Each key of the schema that takes a value, with NAME for the names of engines and models."""
    yield from _keys_below(Config, ())


def nearest_hint(name: str, known: list[str]) -> str:
    """ "did you mean ...", or what there is to choose from."""
    alike = {_comparable(key): key for key in known}
    if near := difflib.get_close_matches(_comparable(name), alike, n=1, cutoff=0.6):
        return f'did you mean "{alike[near[0]]}"?'
    if homes := _homes().get(name):
        return f"it belongs in {' or '.join(homes)}"
    if not known:
        return "this section has no keys yet"
    more = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
    return f"known are {', '.join(known[:_MOST_LISTED])}{more}"


def _comparable(name: str) -> str:
    return name.casefold().replace("-", "_")


def _keys_below(section: type[Section], path: KeyPath) -> Iterator[tuple[KeyPath, FieldInfo]]:
    for key, field in section.model_fields.items():
        inner = field.annotation
        if is_section(inner):
            yield from _keys_below(typing.cast(type[Section], inner), (*path, key))
        elif is_free_table(inner) and is_section(typing.get_args(inner)[1]):
            yield from _keys_below(typing.get_args(inner)[1], (*path, key, NAME))
        else:
            yield (*path, key), field


@cache
def _homes() -> dict[str, list[str]]:
    homes: dict[str, list[str]] = {}
    for path, _ in every_key():
        homes.setdefault(str(path[-1]), []).append(f"[{'.'.join(map(str, path[:-1]))}]")
    return homes


def _known(section: type[Section]) -> list[str]:
    return [*section.model_fields, *_LOADER_KEYS.get(section, ())]


def _child(wanted: Any, part: str | int) -> Any:
    if is_section(wanted):
        loaders = _LOADER_KEYS.get(wanted, {})
        if part in loaders:
            return loaders[str(part)]
        field = wanted.model_fields.get(part)
        return _field_type(field) if field else None
    plain = _plain(wanted)
    match typing.get_origin(plain), part:
        case (origin, str()) if origin is dict:
            return typing.get_args(plain)[1]
        case (origin, int()) if origin is list:
            return typing.get_args(plain)[0]
    return None


def _field_type(field: FieldInfo) -> Any:
    """The annotation, with what pydantic took off it put back."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _plain(wanted: Any) -> Any:
    return _plain(typing.get_args(wanted)[0]) if typing.get_origin(wanted) is Annotated else wanted


def _scalar_types(wanted: Any) -> set[Any]:
    plain = _plain(wanted)
    match typing.get_origin(plain):
        case origin if origin in (Union, types.UnionType):
            return set().union(*(_scalar_types(part) for part in typing.get_args(plain)))
        case origin if origin is Literal:
            return {type(value) for value in typing.get_args(plain)}
        case None:
            return {plain}
        case origin:
            return {origin}
