"""The types of Ollama's request fields, and what Go's decoder says where one is wrong. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner.errors import RequestError
from llamarunner.proxies.body import json_kind

_GO_TYPES: Mapping[type, str] = {str: "string", bool: "bool", int: "int", list: "[]", dict: "map[string]interface {}"}
_REQUEST: Mapping[str, type] = {
    "model": str,
    "name": str,
    "prompt": str,
    "suffix": str,
    "system": str,
    "template": str,
    "context": list,
    "messages": list,
    "images": list,
    "tools": list,
    "options": dict,
    "stream": bool,
    "raw": bool,
    "verbose": bool,
    "truncate": bool,
    "shift": bool,
    "logprobs": bool,
    "top_logprobs": int,
    "dimensions": int,
    "width": int,
    "height": int,
    "steps": int,
    "_debug_render_only": bool,
    "insecure": bool,
    "source": str,
    "destination": str,
    "from": str,
    "files": dict,
    "adapters": dict,
    "parameters": dict,
    "quantize": str,
}
_MESSAGE: Mapping[str, type] = {
    "role": str,
    "content": str,
    "thinking": str,
    "images": list,
    "tool_calls": list,
    "tool_name": str,
    "tool_call_id": str,
}
_ITEMS: Mapping[str, tuple[type, str]] = {
    "messages": (dict, "api.Message"),
    "tools": (dict, "api.Tool"),
    "tool_calls": (dict, "api.ToolCall"),
    "images": (str, "api.ImageData"),
    "context": (int, "int"),
}
_INT_LIMIT = 2**63


def check_request(body: Mapping[str, Any], struct: str) -> dict[str, Any]:
    """`body` without its nulls, which mean the same as nothing; each field that we know has its type.

    `struct` is Go's name for the request ("ChatRequest"). Raises RequestError in Go's words.
    """
    present = {name: value for name, value in body.items() if value is not None}
    _check(present, _REQUEST, struct)
    if "messages" in present:
        present["messages"] = [_message(each, f"{struct}.messages") for each in present["messages"]]
    if "tools" in present:
        present["tools"] = [_with_function(each) for each in present["tools"]]
    return present


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    present = {name.lower(): value for name, value in message.items() if value is not None}
    _check(present, _MESSAGE, place)
    if "role" not in present:
        raise RequestError("a message needs a role")
    if "tool_calls" in present:
        present["tool_calls"] = [_with_function(each) for each in present["tool_calls"]]
    return present


def _with_function(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A tool or a call of one; what lies in its arguments and parameters is nobody's field and keeps its case."""
    lower = {name.lower(): value for name, value in entry.items()}
    function = lower.get("function")
    if isinstance(function, dict):
        lower["function"] = {name.lower(): value for name, value in function.items()}
    return lower


def _check(fields: Mapping[str, Any], types: Mapping[str, type], place: str) -> None:
    for name, wanted in types.items():
        if name not in fields:
            continue
        value = fields[name]
        if not _is(value, wanted):
            raise _wrong(value, f"{place}.{name}", _GO_TYPES[wanted] + _ITEMS.get(name, ("", ""))[1])
        if name in _ITEMS:
            item_type, go_name = _ITEMS[name]
            for item in value:
                if not _is(item, item_type):
                    raise _wrong(item, f"{place}.{name}", go_name)


def _is(value: object, wanted: type) -> bool:
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and -_INT_LIMIT <= value < _INT_LIMIT
    return isinstance(value, wanted)


def _wrong(value: object, field: str, go_type: str) -> RequestError:
    return RequestError(f"json: cannot unmarshal {json_kind(value)} into Go struct field {field} of type {go_type}")
