"""Ollama's messages, their fields checked (see `fields`), as llama-server takes them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from llamarunner.catalog.catalog import Model
from llamarunner.errors import RequestError
from llamarunner.proxies.ollama.media import media_parts

Message = dict[str, Any]


def to_openai(messages: Iterable[Mapping[str, Any]], model: Model) -> list[Message]:
    converted: list[Message] = []
    pending_calls: list[str] = []  # ids of the calls that tool messages without one answer, in order
    numbers = itertools.count(1)
    for message in messages:
        result = _message(message, model)
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [_tool_call(call, f"call_{next(numbers)}") for call in calls]
            pending_calls = [call["id"] for call in result["tool_calls"]]
        if result["role"] == "tool":
            if message.get("tool_name"):
                result["name"] = message["tool_name"]
            call_id = message.get("tool_call_id") or (pending_calls.pop(0) if pending_calls else "")
            result["tool_call_id"] = call_id
            if call_id in pending_calls:
                pending_calls.remove(call_id)
        converted.append(result)
    return converted


def with_preset(messages: Sequence[Mapping[str, Any]], model: Model) -> list[Mapping[str, Any]]:
    """What the model brings along comes first: its own system prompt, unless the request begins with one, and the
    conversation it always has had."""
    preset = model.preset
    has_own = bool(messages) and str(messages[0].get("role", "")).lower() == "system"
    system = [{"role": "system", "content": preset.system}] if preset.system and not has_own else []
    return [*system, *preset.messages, *messages]


def text_only(messages: Iterable[Message]) -> tuple[list[Message], int]:
    """The messages without their pictures and sounds, and how many of those there were."""
    plain: list[Message] = []
    files = 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [part for part in content if part["type"] == "text"]
            files += len(content) - len(texts)
            message = {**message, "content": "".join(part["text"] for part in texts)}
        plain.append(message)
    return plain, files


def _message(message: Mapping[str, Any], model: Model) -> Message:
    content = message.get("content") or ""
    result: Message = {"role": message["role"].lower(), "content": content}
    if thinking := message.get("thinking"):
        result["reasoning_content"] = thinking
    if images := message.get("images"):
        result["content"] = [{"type": "text", "text": content}, *media_parts(images, model)]
    return result


def _tool_call(call: Mapping[str, Any], fallback_id: str) -> dict[str, Any]:
    """Ollama's arguments are an object, llama-server's a string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("json: a tool call needs a function with a name")
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    call_id = call.get("id") or fallback_id
    if not isinstance(call_id, str):
        raise RequestError("json: the id of a tool call must be a string")
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": text}}
