"""What a model brings along, laid under a chat of OpenAI's API: parameters, system prompt, conversation. Pure."""

from __future__ import annotations

from typing import Any

from llamarunner.catalog.catalog import Model, Preset
from llamarunner.proxies.ollama.messages import to_openai, with_preset
from llamarunner.proxies.ollama.options import effective, request_fields

_LIMITS = ("max_tokens", "max_completion_tokens")


def lay_under(body: dict[str, Any], model: Model) -> bool:
    """`body` of a chat, whose own fields win. True where it was changed."""
    preset = model.preset
    if preset == Preset():
        return False
    fields = request_fields(effective({}, preset.parameters), model.context)
    if any(body.get(name) is not None for name in _LIMITS):
        fields.pop("max_tokens", None)
    missing = {name: value for name, value in fields.items() if body.get(name) is None}
    body.update(missing)
    if preset.system or preset.messages:
        begin, own = with_preset([], model), body["messages"]
        if own and own[0].get("role") in ("system", "developer"):
            begin = list(preset.messages)
        body["messages"] = [*to_openai(begin, model), *own]
    return bool(missing or preset.system or preset.messages)
