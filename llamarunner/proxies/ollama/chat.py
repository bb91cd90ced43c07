"""POST /api/chat as llama-server's POST /v1/chat/completions. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import UnsupportedError
from llamarunner.proxies.ollama.messages import to_openai, with_preset
from llamarunner.proxies.ollama.parameters import common_body
from llamarunner.proxies.openai_body import check_tools, require_chat


def chat_body(request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    asked = str(request.get("model", ""))
    require_chat(model, asked)
    body = common_body(request, model)
    body["messages"] = to_openai(with_preset(request["messages"], model), model)
    if tools := request.get("tools"):
        if Capability.TOOLS not in model.capabilities:
            raise UnsupportedError(f"{model.name} does not support tools")
        body["tools"] = [{"type": "function", **tool} for tool in tools]
        check_tools(body["tools"])
        if body.get("logprobs"):
            body["stream"] = False  # llama-server refuses logprobs for a stream with tools
    return body


def template_question(body: Mapping[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What asks llama-server's /apply-template for the prompt that `body` makes with these messages."""
    parts = {name: body[name] for name in ("tools", "chat_template_kwargs") if name in body}
    return {**parts, "messages": messages, "add_generation_prompt": True}
