"""What is wrong with a tree by the schema alone, in words for a person: unknown keys, wrong types, values out of range.

Where something is wrong it is left out and the rest is validated again, so that the rules that need a whole `Config`
(see rules.py) can speak in the same pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llamarunner.config.keys import is_secret, keys_at, nearest_hint
from llamarunner.config.merge import Table
from llamarunner.config.positions import KeyPath
from llamarunner.config.schema import Config

MISSING = "is missing"
_LONGEST_SHOWN = 40
_ROUNDS = 4  # a part left out may bring out one more error; each round leaves out strictly more
_ABSENT = ("missing", "extra_forbidden")

_WANTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def validate(data: Table, context: Mapping[str, Any]) -> tuple[Config, dict[KeyPath, str]]:
    """A Config of all that is right, and what is wrong, by the path of the wrong value."""
    problems: dict[KeyPath, str] = {}
    for _ in range(_ROUNDS):
        try:
            return Config.model_validate(data, context=dict(context)), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
        found = _by_path(details, data)
        problems |= {path: _message(path, errors, data) for path, errors in found.items() if path not in problems}
        data = copy.deepcopy(data)
        for path, errors in found.items():
            _leave_out(data, path, is_missing=errors[0]["type"] == "missing")
    return Config(), problems


def _by_path(details: list[ErrorDetails], data: Table) -> dict[KeyPath, list[ErrorDetails]]:
    """The branches of a union each report on their own: one value, one entry."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for error in details:
        path: KeyPath = ()
        value: Any = data
        for part in error["loc"]:
            is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
            if not is_there:
                if error["type"] in _ABSENT and isinstance(value, dict):
                    path = (*path, part)
                break
            path, value = (*path, part), value[part]
        grouped.setdefault(path, []).append(error)
    return grouped


def _message(path: KeyPath, errors: list[ErrorDetails], data: Table) -> str:
    first = errors[0]
    match first["type"]:
        case "missing":
            return f'{MISSING}; write path = "~/models/some-model.gguf"' if path[-1] == "path" else MISSING
        case "extra_forbidden":
            kind = "section" if len(path) == 1 and isinstance(first["input"], dict) else "key"
            return f"there is no such {kind}; {nearest_hint(str(path[-1]), keys_at(path[:-1]))}"
        case "value_error":
            reason = str(first["ctx"]["error"])
        case _:
            reason = f"{' or '.join(dict.fromkeys(_wanted(error) for error in errors))} is wanted"
    return f"{reason}; found {_found(path, data)}"


def _wanted(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "literal_error":
            return str(context["expected"]).replace("'", '"')
        case "greater_than_equal":
            return f"a number of at least {context['ge']}"
        case "less_than_equal":
            return f"a number of at most {context['le']}"
        case _:
            return _WANTED.get(kind) or error["msg"]


def _found(path: KeyPath, data: Table) -> str:
    value: Any = data
    for part in path:
        value = value[part]
    match value:
        case bool():
            return str(value).lower()
        case str() if is_secret(path):
            return "a string"
        case str():
            shown = value if len(value) <= _LONGEST_SHOWN else value[: _LONGEST_SHOWN - 1] + "…"
            return f'"{shown}"'.replace("\n", " ")
        case int() | float() if is_secret(path) or abs(value) > 1e18:
            return "a number"
        case int() | float():
            return str(value)
        case list():
            return "an array"
        case dict():
            return "a table"
        case datetime() | date() | time():
            return "a date or time"
        case _:
            return type(value).__name__


def _leave_out(data: Table, path: KeyPath, *, is_missing: bool) -> None:
    """An array with a wrong element goes as a whole."""
    keys = list(itertools.takewhile(lambda part: isinstance(part, str), path))
    holder: Any = data
    for part in keys[:-1]:
        holder = holder.get(part)
        if not isinstance(holder, dict):
            return  # an entry around it has been left out already
    if is_missing:
        holder[keys[-1]] = "."  # the schema's one required key is a model's path
    else:
        holder.pop(keys[-1], None)
