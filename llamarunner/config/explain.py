"""The configuration as it came out, each value with where it came from. Secrets are never shown."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BeforeValidator

from llamarunner.config import values
from llamarunner.config.keys import is_secret
from llamarunner.config.load import LoadedConfig
from llamarunner.config.origin import Origin, dotted
from llamarunner.config.positions import KeyPath
from llamarunner.config.schema import Section
from llamarunner.units import format_duration

HIDDEN = "(hidden)"
_DURATIONS = tuple(typing.get_args(kind)[1].func for kind in (values.Duration, values.KeepAlive))
_DEFAULT = Origin()


@dataclass(frozen=True, slots=True)
class Explained:
    """`value` is written as in TOML ("" for a key that is not set)."""

    key: str
    value: str
    origin: Origin


def explain(loaded: LoadedConfig) -> Iterator[Explained]:
    """Every value of the configuration in the order of the schema."""
    yield from _section(loaded.config, (), loaded)


def _section(section: Section, path: KeyPath, loaded: LoadedConfig) -> Iterator[Explained]:
    for key, field in type(section).model_fields.items():
        value, here = getattr(section, key), (*path, key)
        if isinstance(value, Section):
            yield from _section(value, here, loaded)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(inner, Section):
                    yield from _section(inner, (*here, name), loaded)
                else:
                    yield _explained((*here, name), inner, loaded)
        else:
            is_duration = any(isinstance(rule, BeforeValidator) and rule.func in _DURATIONS for rule in field.metadata)
            shown = (-1 if math.isinf(value) else format_duration(value)) if is_duration else value
            yield _explained(here, shown, loaded)


def _explained(path: KeyPath, value: Any, loaded: LoadedConfig) -> Explained:
    shown = "" if value is None else HIDDEN if is_secret(path) else _as_toml(value)
    return Explained(dotted(path), shown, loaded.origins.get(dotted(path), _DEFAULT))


def _as_toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_toml, _without_secrets(value)))}]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _without_secrets(arguments: list[object]) -> list[object]:
    """An engine's arguments may hold a key as "--api-key=..." or as the one after "--api-key"."""
    shown: list[object] = []
    hide_next = False
    for argument in arguments:
        flag, has_value, _ = str(argument).partition("=")
        is_flag = flag.startswith("-") and is_secret((flag,))
        shown.append(HIDDEN if hide_next else f"{flag}={HIDDEN}" if is_flag and has_value else argument)
        hide_next = is_flag and not has_value
    return shown
