"""/v1/responses: OpenAI's second API. llama-server speaks it, but leaves out what OpenAI's own client reads: the number
of each event, and to which part of the answer it belongs. These are put in; an event of text is not decoded for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from llamarunner.catalog.catalog import Model
from llamarunner.errors import RequestError
from llamarunner.proxies.openai_body import check_function, check_media, expect
from llamarunner.proxies.v1_errors import responses_error

_TYPE = re.compile(rb'"type":"(response\.[a-z_.]+)"')
_ITEM_ID = re.compile(rb'"item_id":"([^"\\]+)"')
_WHOLE = (b"response.created", b"response.in_progress", b"response.completed")
_ITEMS = (b"response.output_item.added", b"response.output_item.done")
_PARTS = (b"response.content_part.", b"response.output_text.", b"response.reasoning_text.", b"response.refusal.")
_CONSTANT: tuple[tuple[bytes | tuple[bytes, ...], bytes], ...] = (
    (_PARTS, b'"content_index":0,'),
    (b"response.reasoning_summary_", b'"summary_index":0,'),
    (b"response.output_text.", b'"logprobs":[],'),
)
"""Which events want which fields that are always the same."""

_LEFT_OUT: Mapping[str, Any] = {
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "output": [],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "usage": None,
}
"""Fields of a response that OpenAI's schema demands."""


def check_responses_body(body: dict[str, Any], model: Model) -> bool:
    """Raise RequestError for what the engine must not see; True where `body` was changed."""
    if body.get("previous_response_id") is not None:
        raise RequestError("previous_response_id is not supported: no answers are kept", hint="send the whole `input`")
    is_changed = _set_format(body) | _set_tools(body)
    if isinstance(body.get("input"), str):
        return is_changed
    items = expect(body.get("input"), list, "input", "a string or an array")
    for index, item in enumerate(items):
        place = f"input[{index}]"
        expect(item, dict, place)
        for name in ("content", "output"):  # of a message; of a tool
            _check_content(item.get(name), f"{place}.{name}", model)
    # thoughts of a server that keeps them to itself: there is nothing in them to read
    readable = [item for item in items if item.get("type") != "reasoning" or isinstance(item.get("content"), list)]
    body["input"] = readable
    return is_changed or len(readable) < len(items)


def _set_format(body: dict[str, Any]) -> bool:
    """`text.format` as the older API has it, which llama-server heeds alone. True where there is one."""
    text = body.get("text")
    wanted = text.get("format") if isinstance(text, dict) else None
    if wanted is None or expect(wanted, dict, "text.format").get("type") == "text":
        return False
    schema = {name: value for name, value in wanted.items() if name != "type"}
    is_schema = wanted.get("type") == "json_schema"
    body["response_format"] = {"type": "json_schema", "json_schema": schema} if is_schema else wanted
    return True


def _set_tools(body: dict[str, Any]) -> bool:
    """Only functions: what OpenAI's servers run themselves (a search, a shell) the engine would leave out, and log by
    its name. True where there was anything else."""
    tools = expect(body.get("tools") or [], list, "tools")
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if expect(expect(tool, dict, place).get("type"), str, f"{place}.type") == "function":
            check_function(tool, place)
    functions = [tool for tool in tools if tool["type"] == "function"]
    if len(functions) == len(tools):
        return False
    body["tools"] = functions
    return True


def _check_content(content: object, place: str, model: Model) -> None:
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"{place}[{number}]", model)
    elif content is not None:
        expect(content, str, place, "a string or an array")


def _check_part(part: object, place: str, model: Model) -> None:
    fields = expect(part, dict, place)
    match expect(fields.get("type"), str, f"{place}.type"):
        case "input_text" | "output_text" | "reasoning_text" | "summary_text":
            expect(fields.get("text"), str, f"{place}.text")
        case "refusal":
            expect(fields.get("refusal"), str, f"{place}.refusal")
        case "input_image":
            check_media("image_url", fields.get("image_url"), f"{place}.image_url", model)
        case _:
            raise RequestError(f'{place}.type must be "input_text", "output_text" or "input_image"')


class ResponseEvents:
    """The events of one answer, or the whole of it, with what is left out."""

    def __init__(self) -> None:
        self._count = 0
        self._is_complete = False  # the engine is a newer one
        self._index_of: dict[str, int] = {}
        self._response: dict[str, Any] = {}

    def __call__(self, data: bytes) -> bytes:
        if data.startswith(b"{"):
            return self._amend_whole(data)
        return b"\n".join(self._amend_line(line) for line in data.split(b"\n"))

    def _amend_whole(self, data: bytes) -> bytes:
        answer = _decoded(data)
        if answer.get("object") != "response":
            return data
        return orjson.dumps(_completed(answer))

    def _amend_line(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        found = _TYPE.search(line)
        if found is None:
            return self._amend_error(line)
        kind = found[1]
        if kind in _WHOLE:
            return self._amend_response(line)
        if self._is_complete:
            return line
        numbers = b'data: {"sequence_number":%d,"output_index":%d,' % (self._next(), self._index(line, kind))
        return numbers + _constant(kind) + line[7:]

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    def _index(self, line: bytes, kind: bytes) -> int:
        """Of the item an event belongs to."""
        if kind in _ITEMS:
            item = _decoded(line[6:]).get("item") or {}
            name = str(item.get("id") or item.get("call_id"))
            return self._index_of.setdefault(name, len(self._index_of))
        found = _ITEM_ID.search(line)
        return self._index_of.get(found[1].decode("utf-8", "replace"), 0) if found else 0

    def _amend_response(self, line: bytes) -> bytes:
        event = _decoded(line[6:])
        self._is_complete = "sequence_number" in event
        if isinstance(event.get("response"), dict):
            event["response"] = self._response = _completed({**self._response, **event["response"]})
            if not self._is_complete:
                event["sequence_number"] = self._next()
        return b"data: " + orjson.dumps(event)

    def _amend_error(self, line: bytes) -> bytes:
        error = _decoded(line[6:]).get("error")
        if not isinstance(error, dict):
            return line
        status = error.get("code")
        event = responses_error(
            status if isinstance(status, int) else 500, str(error.get("message", "the engine reported an error"))
        )
        return b"event: error\ndata: " + orjson.dumps({**event, "sequence_number": self._next()})


@lru_cache(maxsize=64)
def _constant(kind: bytes) -> bytes:
    return b"".join(field for kinds, field in _CONSTANT if kind.startswith(kinds))


def _completed(response: dict[str, Any]) -> dict[str, Any]:
    return {"created_at": int(time.time()), "model": "", **_LEFT_OUT, **response}


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
