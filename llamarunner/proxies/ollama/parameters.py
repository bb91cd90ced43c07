"""What chats and generations have in common beside their options: `keep_alive`, `format`, `think`, `logprobs`. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.body import QuotingError
from llamarunner.proxies.ollama.options import effective, sampling
from llamarunner.units import parse_duration

_THINK_LEVELS = ("high", "medium", "low", "max")


def common_body(request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The fields for llama-server that do not depend on the prompt. Always streamed: so a client that leaves is noticed
    while the answer is made."""
    if request.get("shift") is False and model.settings.flags.get("context-shift") is True:
        raise UnsupportedError(f"{model.name} always shifts its context: shift cannot be false")
    options = effective(request.get("options") or {}, model.preset.parameters)
    body: dict[str, Any] = {"stream": True, "cache_prompt": True, **sampling(options, model.context)}
    if shape := response_format(request.get("format")):
        body["response_format"] = shape
    if arguments := template_kwargs(request.get("think"), model, str(request.get("model", ""))):
        body["chat_template_kwargs"] = arguments
    top = request.get("top_logprobs") or 0
    if not 0 <= top <= 20:
        raise RequestError("top_logprobs must be between 0 and 20")
    if request.get("logprobs"):
        body |= {"logprobs": True, "top_logprobs": max(top, 1)}
    return body


def keep_alive_s(value: Any) -> float | None:
    """Seconds; inf for any negative one, None where it was not given."""
    match value:
        case None:
            return None
        case bool():
            raise RequestError("Unsupported type: 'bool'")
        case int() | float():
            seconds = float(value)
        case str():
            try:
                seconds = parse_duration(value)
            except ValueError as error:
                raise QuotingError(str(error), summary="keep_alive is no duration") from None
        case _:
            kind = "[]interface {}" if isinstance(value, list) else "map[string]interface {}"
            raise RequestError(f"Unsupported type: '{kind}'")
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
