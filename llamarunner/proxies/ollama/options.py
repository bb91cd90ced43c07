"""Ollama's `options`, `keep_alive`, `format` and `think`, checked and put into llama-server's fields. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.body import QuotingError, json_kind
from llamarunner.proxies.ollama.errors import OptionError
from llamarunner.units import parse_duration

DEFAULTS: Mapping[str, int | float] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": -1,
}
"""Ollama's samplers. All are always sent: llama-server's own defaults are others."""

_FLOATS = {
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
}
_INTEGERS = {"top_k", "repeat_last_n", "seed", "num_predict", "num_keep"}
_LAUNCH_INTEGERS = {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"}
"""Decided when the model is loaded, by its configuration; checked here, so that a mistake is still told."""
_MOST = 2**31 - 1  # llama.cpp counts in 32 bits
_THINK_LEVELS = ("high", "medium", "low", "max")


def sampling(options: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Request fields of llama-server. Unknown options are ignored, as Ollama does; null ones are not there."""
    given = {name: _checked(name, value) for name, value in options.items() if value is not None}
    body: dict[str, Any] = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    if body["repeat_last_n"] < 0:
        body["repeat_last_n"] = context  # llama-server refuses -1
    wanted = given.get("num_predict", -1)
    body["max_tokens"] = wanted if 0 <= wanted <= 10 * context else 10 * context
    body["n_keep"] = max(given.get("num_keep", 4), -1)
    if given.get("stop"):
        body["stop"] = given["stop"]
    return body


def _checked(name: str, value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _FLOATS:
        if not is_number:
            raise OptionError(f'option "{name}" must be of type float32')
        return float(value)
    if name in _INTEGERS or name in _LAUNCH_INTEGERS:
        if not is_number:
            raise OptionError(f'option "{name}" must be of type integer')
        if name == "seed" and value >= 0:
            return int(value) % 2**32
        return max(-_MOST, min(int(value), _MOST))
    if name == "use_mmap" and not isinstance(value, bool):
        raise OptionError(f'option "{name}" must be of type boolean')
    if name == "stop":
        if not isinstance(value, list):
            raise OptionError(f'option "{name}" must be of type array')
        if not all(isinstance(each, str) for each in value):
            raise OptionError(f'option "{name}" must be of an array of strings')
    return value


def keep_alive_s(value: Any) -> float | None:
    """Seconds; inf for any negative one, None where it was not given."""
    match value:
        case None:
            return None
        case bool() | list() | dict():
            raise RequestError(f"Unsupported type: '{json_kind(value)}'")
        case int() | float():
            seconds = float(value)
        case str():
            try:
                seconds = parse_duration(value)
            except ValueError as error:
                raise QuotingError(str(error), summary="keep_alive is no duration") from None
        case _:
            raise RequestError(f"Unsupported type: '{json_kind(value)}'")
    return math.inf if seconds < 0 else seconds


def response_format(value: Any) -> dict[str, Any] | None:
    """`format` as OpenAI's `response_format`."""
    match value:
        case None | "":
            return None
        case "json":
            return {"type": "json_object"}
        case dict():
            return {"type": "json_schema", "json_schema": {"name": "schema", "schema": value}}
        case _:
            shown = orjson.dumps(value).decode()
            message = f'invalid format: {shown}; expected "json" or a valid JSON Schema object'
            raise QuotingError(message, summary="invalid format")


def template_kwargs(think: Any, model: Model, asked_name: str) -> dict[str, Any] | None:
    """`think` as arguments of the chat template. A capable model thinks unless told not to."""
    capable = Capability.THINKING in model.capabilities
    if think is None:
        return {"enable_thinking": True} if capable else None
    if isinstance(think, bool):
        if think and not capable:
            raise UnsupportedError(f'"{asked_name}" does not support thinking')
        return {"enable_thinking": think} if capable else None
    if think in _THINK_LEVELS:
        if not capable:
            raise UnsupportedError(f'"{asked_name}" does not support thinking')
        return {"enable_thinking": True, "reasoning_effort": think}
    shown = orjson.dumps(think).decode()
    message = f'invalid think value: {shown} (must be "high", "medium", "low", "max", true, or false)'
    raise QuotingError(message, summary="invalid think value")
