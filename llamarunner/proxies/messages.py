"""/v1/messages: Anthropic's API, which llama-server speaks. Only its errors have another shape than Anthropic's."""

from __future__ import annotations

from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.openai_body import expect
from llamarunner.proxies.sse import amend_lines
from llamarunner.proxies.v1_errors import anthropic_error

_ROLES = ("user", "assistant", "system")


def check_messages_body(body: dict[str, Any], model: Model) -> None:
    """Raise RequestError for what the engine must not see or would answer 500 to."""
    limit = body.get("max_tokens")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0:
        raise RequestError("max_tokens is required and must be positive")
    check_counted_body(body, model)


def check_counted_body(body: dict[str, Any], model: Model) -> None:
    """As `check_messages_body`, for a body whose tokens are only counted."""
    if not body.get("messages"):
        raise RequestError("messages is required")
    if body.get("system") is not None:
        _check_content(body["system"], "system", model)
    for index, message in enumerate(expect(body["messages"], list, "messages")):
        place = f"messages[{index}]"
        if expect(expect(message, dict, place).get("role"), str, f"{place}.role") not in _ROLES:
            raise RequestError(f'{place}.role must be "user" or "assistant"')
        _check_content(message.get("content"), f"{place}.content", model)
    for index, tool in enumerate(expect(body.get("tools") or [], list, "tools")):
        place = f"tools[{index}]"
        expect(expect(tool, dict, place).get("name"), str, f"{place}.name")
        if tool.get("input_schema") is not None:
            expect(tool["input_schema"], dict, f"{place}.input_schema")


def _check_content(content: object, place: str, model: Model) -> None:
    if isinstance(content, str):
        return
    for index, block in enumerate(expect(content, list, place, "a string or an array")):
        _check_block(block, f"{place}[{index}]", model)


def _check_block(block: object, place: str, model: Model) -> None:
    """Blocks of kinds that llama-server does not know are passed over by it."""
    fields = expect(block, dict, place)
    match expect(fields.get("type"), str, f"{place}.type"):
        case "text":
            expect(fields.get("text"), str, f"{place}.text")
        case "thinking":
            expect(fields.get("thinking"), str, f"{place}.thinking")
        case "tool_use":
            expect(fields.get("id"), str, f"{place}.id")
            expect(fields.get("name"), str, f"{place}.name")
            expect(fields.get("input"), dict, f"{place}.input")
        case "tool_result":
            expect(fields.get("tool_use_id"), str, f"{place}.tool_use_id")
            if fields.get("content") is not None:
                _check_content(fields["content"], f"{place}.content", model)
        case "image":
            _check_image(fields, place, model)
        case "document":
            raise UnsupportedError(f"{place}: documents are not supported", hint="send their text")
        case _:
            pass


def _check_image(fields: dict[str, Any], place: str, model: Model) -> None:
    if Capability.VISION not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support vision")
    source = expect(fields.get("source"), dict, f"{place}.source")
    if source.get("type") != "base64":
        raise RequestError("image URLs are not currently supported, please use base64 encoded data instead")
    expect(source.get("data"), str, f"{place}.source.data")
    expect(source.get("media_type"), str, f"{place}.source.media_type")


def amend_messages(data: bytes) -> bytes:
    """The engine's answer or events, with errors as Anthropic has them. The quotes of a text are escaped, so that it
    never has the mark."""
    return amend_lines(data, b'"code":', _reshape)


def _reshape(record: dict[str, Any]) -> None:
    error = record.get("error", record)
    code, message = error["code"], error["message"]
    if isinstance(code, int) and isinstance(message, str):
        record.clear()
        record.update(anthropic_error(code, message))
