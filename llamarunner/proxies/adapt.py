"""A request's body as its engine takes it: under the name the engine knows the model by, and without what it cannot do.
Pure. llama-server takes any name and all our fields, so that for it nothing is decoded."""

from __future__ import annotations

from typing import Any

import orjson

from llamarunner.engines.engine import LaunchPlan
from llamarunner.errors import UnsupportedError

_TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
_LLAMA_CPP_FIELDS = ("cache_prompt", "n_keep", "repeat_last_n", "typical_p", "embd_normalize", "speculative.n_max")
"""Ours to llama-server; servers that check their fields refuse them."""
_WITH_STREAM_OPTIONS = ("/v1/chat/completions", "/v1/completions")


def adapt(body: bytes, path: str, plan: LaunchPlan) -> tuple[bytes, str]:
    """The body to send, and what was taken out of it that the client asked for ("tools", or "").

    Raises UnsupportedError for a path only llama.cpp has."""
    if plan.is_llama_cpp and plan.supports_tools and not plan.served_model:
        return body, ""
    if not plan.is_llama_cpp and not path.startswith("/v1/"):
        raise UnsupportedError("the model's engine takes no raw prompts and no infill", hint="use a chat")
    fields: dict[str, Any] = orjson.loads(body)
    stripped = "" if plan.supports_tools else _without_tools(fields)
    if plan.served_model:
        fields["model"] = plan.served_model
    if not plan.is_llama_cpp:
        _plain(fields, path)
    return orjson.dumps(fields), stripped


def _without_tools(fields: dict[str, Any]) -> str:
    found = [name for name in _TOOL_FIELDS if fields.pop(name, None)]
    return "tools" if found else ""


def _plain(fields: dict[str, Any], path: str) -> None:
    for name in _LLAMA_CPP_FIELDS:
        fields.pop(name, None)
    if path == "/v1/responses":
        fields.pop("response_format", None)  # its `text.format` again
    if fields.get("seed") == -1:  # llama.cpp's word for a random one
        del fields["seed"]
    if fields.get("stream") is True and path in _WITH_STREAM_OPTIONS:
        fields.setdefault("stream_options", {"include_usage": True})  # there are no timings to tell the tokens
