"""Ollama's requests, their fields checked (see `fields`), as bodies for llama-server. Pure."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.ollama.options import response_format, sampling, template_kwargs
from llamarunner.proxies.openai_body import check_tools

_IMAGE_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}


def chat_body(request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """POST /api/chat as POST /v1/chat/completions, always streamed."""
    asked = str(request.get("model", ""))
    if model.is_embedding_only:
        raise UnsupportedError(f'"{asked}" does not support chat')
    body = _common(request, model)
    body["messages"] = _messages(request["messages"], model)
    if tools := request.get("tools"):
        if Capability.TOOLS not in model.capabilities:
            raise UnsupportedError(f"{model.name} does not support tools")
        body["tools"] = [{"type": "function", **tool} for tool in tools]
        check_tools(body["tools"])
    return body


def generate_body(request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """POST /api/generate as POST /v1/chat/completions, so that thinking comes apart from the answer."""
    body = _common(request, model)
    body["messages"] = generate_messages(request, model)
    return body


def generate_messages(request: Mapping[str, Any], model: Model) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if system := request.get("system"):
        messages.append({"role": "system", "content": system})
    messages.append(_message({"role": "user", "content": request["prompt"], "images": request.get("images")}, model))
    return messages


def completion_body(request: Mapping[str, Any], model: Model, prompt: str) -> dict[str, Any]:
    """POST /completion of `prompt` as it stands: raw prompts and those that continue a context."""
    body = _common(request, model)
    body.pop("chat_template_kwargs", None)
    body["prompt"] = prompt
    body["n_predict"] = body.pop("max_tokens")
    if shape := body.pop("response_format", None):
        body["json_schema"] = shape["json_schema"]["schema"] if "json_schema" in shape else {}
    if body.pop("logprobs", False):
        body["n_probs"] = max(body.pop("top_logprobs", 1), 1)
    return body


def infill_body(request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """POST /infill: what goes between `prompt` and `suffix`."""
    if Capability.INSERT not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support insert")
    body = completion_body(request, model, "")
    return {**body, "input_prefix": request["prompt"], "input_suffix": request["suffix"]}


def _common(request: Mapping[str, Any], model: Model) -> dict[str, Any]:
    options = sampling(request.get("options") or {}, model.context)
    body: dict[str, Any] = {"stream": True, "cache_prompt": True, **options}
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


def _messages(messages: Sequence[Mapping[str, Any]], model: Model) -> list[dict[str, Any]]:
    converted: list[dict[str, Any]] = []
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


def _message(message: Mapping[str, Any], model: Model) -> dict[str, Any]:
    content = message.get("content") or ""
    result: dict[str, Any] = {"role": message["role"].lower(), "content": content}
    if thinking := message.get("thinking"):
        result["reasoning_content"] = thinking
    if images := message.get("images"):
        result["content"] = [{"type": "text", "text": content}, *_images(images, model)]
    return result


def _images(images: Sequence[str], model: Model) -> list[dict[str, Any]]:
    if Capability.VISION not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support vision")
    return [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images]


def _data_uri(image: str) -> str:
    if image.startswith("data:"):
        return image
    try:
        head = base64.b64decode(image[:16] + "=" * (-len(image[:16]) % 4))
    except ValueError:  # binascii.Error for a wrong length, its parent for what is not ASCII
        raise RequestError("illegal base64 data in field images") from None
    kind = next((kind for magic, kind in _IMAGE_TYPES.items() if head.startswith(magic)), "")
    if not kind:
        raise RequestError("unknown image format: expected PNG, JPEG, GIF, BMP or WebP")
    return f"data:{kind};base64,{image}"


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
