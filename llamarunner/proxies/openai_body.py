"""What an engine must not get to see in a body of OpenAI's API. Pure.

llama-server answers 500 to messages and tools that are not as they should be, quotes them in its log, and fetches
pictures from any address it is given. So they are looked at before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.body import json_kind

_TEXTS = ("name", "reasoning_content", "tool_call_id")
_MEDIA: Mapping[str, Capability] = {"image_url": Capability.VISION, "input_audio": Capability.AUDIO}


def require_chat(model: Model, asked_name: str = "") -> None:
    asked_name = asked_name or model.name
    if model.is_embedding_only:
        raise UnsupportedError(f'"{asked_name}" does not support chat')
    if model.lacks_chat_template:
        raise UnsupportedError(f'"{asked_name}" does not support chat: {model.hint or "it has no chat template"}')


def check_messages(messages: object, model: Model) -> None:
    for index, message in enumerate(expect(messages, list, "messages")):
        place = f"messages[{index}]"
        expect(message, dict, place)
        expect(message.get("role"), str, f"{place}.role")
        for name in _TEXTS:
            if message.get(name) is not None:
                expect(message[name], str, f"{place}.{name}")
        content = message.get("content")
        if isinstance(content, list):
            for number, part in enumerate(content):
                _check_part(part, f"{place}.content[{number}]", model)
        elif content is not None:
            expect(content, str, f"{place}.content", "a string or an array")
        for number, call in enumerate(expect(message.get("tool_calls") or [], list, f"{place}.tool_calls")):
            _check_call(call, f"{place}.tool_calls[{number}]")


def check_tools(tools: object) -> None:
    for index, tool in enumerate(expect(tools, list, "tools")):
        place = f"tools[{index}]"
        if expect(tool, dict, place).get("type") != "function":
            raise RequestError(f'{place}.type must be "function"')
        check_function(expect(tool.get("function"), dict, f"{place}.function"), f"{place}.function")


def check_function(function: dict[str, Any], place: str) -> None:
    expect(function.get("name"), str, f"{place}.name")
    if function.get("description") is not None:
        expect(function["description"], str, f"{place}.description")
    if function.get("parameters") is not None:
        expect(function["parameters"], dict, f"{place}.parameters")


def _check_part(part: object, place: str, model: Model) -> None:
    fields = expect(part, dict, place)
    kind = expect(fields.get("type"), str, f"{place}.type")
    if kind == "text":
        expect(fields.get("text"), str, f"{place}.text")
    elif kind in _MEDIA:
        media = expect(fields.get(kind), dict, f"{place}.{kind}")
        check_media(kind, media.get("url"), f"{place}.{kind}.url", model)
    else:
        raise RequestError(f'{place}.type must be "text", "image_url" or "input_audio"')


def check_media(kind: str, url: object, place: str, model: Model) -> None:
    """`url` counts for pictures alone."""
    if _MEDIA[kind] not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support {_MEDIA[kind]}")
    if kind == "image_url" and not expect(url, str, place).startswith("data:"):
        raise RequestError("image URLs are not currently supported, please use base64 encoded data instead")


def _check_call(call: object, place: str) -> None:
    fields = expect(call, dict, place)
    if fields.get("type") != "function":
        raise RequestError(f'{place}.type must be "function"')
    function = expect(fields.get("function"), dict, f"{place}.function")
    expect(function.get("name"), str, f"{place}.function.name")
    expect(function.get("arguments"), str, f"{place}.function.arguments")
    if fields.get("id") is not None:
        expect(fields["id"], str, f"{place}.id")


_NAMES: Mapping[type, str] = {str: "a string", list: "an array", dict: "an object"}


def expect(value: Any, wanted: type, place: str, words: str = "") -> Any:
    """`value`, if it is of the type wanted. Raises RequestError."""
    if not isinstance(value, wanted):
        raise RequestError(f"{place} must be {words or _NAMES[wanted]}, not {json_kind(value)}")
    return value
