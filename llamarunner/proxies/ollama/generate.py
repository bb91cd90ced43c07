"""POST /api/generate, in whichever of llama-server's ways does what it asks for. Pure.

A plain prompt goes to /v1/chat/completions, so that thinking comes apart from the answer; a raw one, one with a
template of its own and one that continues a `context` to /completion; one with a `suffix` to /infill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.ollama.go_template import render
from llamarunner.proxies.ollama.messages import to_openai
from llamarunner.proxies.ollama.parameters import common_body

CHAT, COMPLETION, INFILL = "/v1/chat/completions", "/completion", "/infill"
_PICTURE_FIELDS = ("width", "height", "steps")
_MOST_TOKENS = 2**31  # llama.cpp counts them in 32 bits
NOT_TOKENS = "context holds numbers that are no tokens of this model"


def plan(request: Mapping[str, Any], model: Model) -> tuple[str, dict[str, Any]]:
    """The path to ask and the body to send. For a request with a `context` the body's prompt is for the caller to add:
    it is text that only the engine can render. Raises RequestError for what contradicts itself or cannot be done."""
    if model.is_embedding_only:
        raise UnsupportedError(f'"{request["model"]}" does not support generate')
    if request.get("suffix") and Capability.INSERT not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support insert")
    if request.get("raw"):
        if any(request.get(name) for name in ("template", "system", "context")):
            raise RequestError("raw mode does not support template, system, or context")
        _refuse_images(request, "raw mode")
        return COMPLETION, completion_body(request, model, request["prompt"])
    if request.get("suffix"):
        _refuse_images(request, "a prompt with a suffix")
        return _filling(request, model)
    if not all(0 <= token < _MOST_TOKENS for token in request.get("context", ())):
        raise RequestError(NOT_TOKENS)
    if prompt := own_template(request, model):
        _refuse_images(request, "a template in Go's language")
        return COMPLETION, completion_body(request, model, prompt)
    if request.get("context"):
        _refuse_images(request, "a prompt with a context")
        return COMPLETION, completion_body(request, model, "")
    return CHAT, {**common_body(request, model), "messages": messages(request, model)}


def own_template(request: Mapping[str, Any], model: Model) -> str:
    """The prompt by the request's own template, or by the model's where that is all it has; "" where neither is."""
    template = request.get("template") or (model.preset.template if model.lacks_chat_template else "")
    return render(template, request.get("system") or model.preset.system, request["prompt"]) if template else ""


def refuse_picture_making(request: Mapping[str, Any]) -> None:
    if any(request.get(name) for name in _PICTURE_FIELDS):
        raise RequestError("image generation models are not currently supported")


def messages(request: Mapping[str, Any], model: Model) -> list[dict[str, Any]]:
    """The conversation of one turn that a prompt is. One that goes on from a `context` had the model's own before."""
    turns: list[Mapping[str, Any]] = []
    if system := request.get("system") or model.preset.system:
        turns.append({"role": "system", "content": system})
    if not request.get("context"):
        turns += model.preset.messages
    turns.append({"role": "user", "content": request["prompt"], "images": request.get("images")})
    return to_openai(turns, model)


def completion_body(request: Mapping[str, Any], model: Model, prompt: str | Sequence[int]) -> dict[str, Any]:
    """POST /completion of `prompt` as it stands."""
    body = common_body(request, model)
    body.pop("chat_template_kwargs", None)
    body["prompt"] = prompt
    body["n_predict"] = body.pop("max_tokens")
    if shape := body.pop("response_format", None):
        body["json_schema"] = shape["json_schema"]["schema"] if "json_schema" in shape else {}
    if body.pop("logprobs", False):
        body["n_probs"] = max(body.pop("top_logprobs", 1), 1)
    return body


def _filling(request: Mapping[str, Any], model: Model) -> tuple[str, dict[str, Any]]:
    """What goes between `prompt` and `suffix`: by the template that the model has for it, or the engine's own way."""
    prompt, suffix, template = request["prompt"], request["suffix"], model.preset.template
    if ".Suffix" in template:
        return COMPLETION, completion_body(request, model, render(template, "", prompt, suffix))
    return INFILL, {**completion_body(request, model, ""), "input_prefix": prompt, "input_suffix": suffix}


def _refuse_images(request: Mapping[str, Any], what: str) -> None:
    if request.get("images"):
        raise RequestError(f"{what} does not support images")
