"""What a model brings along, laid under requests of OpenAI's and Anthropic's APIs: parameters, system prompt,
conversation. It is in Ollama's words, and counts on both ports. What a request says for itself wins. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner.catalog.catalog import Model, Preset
from llamarunner.proxies.ollama.messages import to_openai, with_preset
from llamarunner.proxies.ollama.options import effective, request_fields

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_SYSTEM = ("system", "developer")
_ANTHROPICS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "stop": "stop_sequences"}
"""Fields of llama-server's own that its /v1/messages heeds, and how they are called there."""


def lay_under_chat(body: dict[str, Any], model: Model) -> bool:
    """`body` of /v1/chat/completions. True where it was changed."""
    preset = model.preset
    if preset == Preset():
        return False
    is_changed = _lay_parameters(body, model)
    if preset.system or preset.messages:
        begin, own = with_preset([], model), body["messages"]
        if _begins_with_system(own):
            begin = list(preset.messages)
        body["messages"] = [*to_openai(begin, model), *own]
        is_changed = True
    return is_changed


def lay_under_completion(body: dict[str, Any], model: Model) -> bool:
    """`body` of /v1/completions, whose prompt stays as it is. True where it was changed."""
    return model.preset != Preset() and _lay_parameters(body, model)


def lay_under_response(body: dict[str, Any], model: Model) -> bool:
    """`body` of /v1/responses. True where it was changed."""
    preset = model.preset
    if preset == Preset():
        return False
    is_changed = _lay_parameters(body, model)
    own = body["input"]
    if preset.system and not body.get("instructions") and not _begins_with_system(own):
        body["instructions"] = preset.system
        is_changed = True
    if preset.messages:
        items = [{"role": "user", "content": own}] if isinstance(own, str) else own
        body["input"] = [*(_item(message) for message in preset.messages), *items]
        is_changed = True
    return is_changed


def lay_under_messages(body: dict[str, Any], model: Model) -> bool:
    """`body` of /v1/messages, or of its count_tokens. True where it was changed."""
    preset = model.preset
    if preset == Preset():
        return False
    fields = _parameters(model)
    is_changed = _fill_in(body, {theirs: fields[name] for name, theirs in _ANTHROPICS.items() if name in fields})
    if preset.system and not body.get("system") and not _begins_with_system(body["messages"]):
        body["system"] = preset.system
        is_changed = True
    if preset.messages:
        body["messages"] = [*(_plain(message) for message in preset.messages), *body["messages"]]
        is_changed = True
    return is_changed


def _parameters(model: Model) -> dict[str, Any]:
    return request_fields(effective({}, model.preset.parameters), model.context)


def _lay_parameters(body: dict[str, Any], model: Model) -> bool:
    fields = _parameters(model)
    if any(body.get(name) is not None for name in _LIMITS):
        fields.pop("max_tokens", None)
    return _fill_in(body, fields)


def _fill_in(body: dict[str, Any], fields: Mapping[str, Any]) -> bool:
    missing = {name: value for name, value in fields.items() if body.get(name) is None}
    body.update(missing)
    return bool(missing)


def _begins_with_system(messages: object) -> bool:
    return isinstance(messages, list) and bool(messages) and messages[0].get("role") in _SYSTEM


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": str(message.get("role", "")).lower(), "content": message.get("content") or ""}


def _item(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(message)
    if plain["role"] != "assistant":
        return plain
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": plain["content"]}]}
