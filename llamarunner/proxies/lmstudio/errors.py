"""Our errors in LM Studio's words: an envelope like OpenAI's for most, a bare string for what a body lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from llamarunner.errors import (
    BodyTooLargeError,
    EngineRefusalError,
    LlamaRunnerError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)
from llamarunner.proxies.proxy import UnknownRouteError
from llamarunner.proxies.v1_errors import anthropic_error, is_anthropic, openai_error, v1_stream_error

_LISTED_MODELS = 20
_OVERFLOW = re.compile(r"\((\d+) tokens\).*\((\d+) tokens\)")


class FieldError(RequestError):
    """The body lacks a field, or has one of the wrong type."""


class NoModelError(LlamaRunnerError):
    """The body names no model, and what is loaded does not say which is meant."""

    status = 404
    code = "no_model"


def error_body(error: LlamaRunnerError, names: Iterable[str], path: str = "") -> object:
    """`names` are the models there are, for who asked for another."""
    match error:
        case UnknownRouteError(method=method):
            return {"error": f"Unexpected endpoint or method. ({method} {error.path})"}
        case _ if is_anthropic(path):
            return anthropic_error(error.status, str(error))
        case ModelNotFoundError():
            return _model_not_found(error, names)
        case EngineRefusalError(kind="exceed_context_size_error"):
            return openai_error(error, _overflow(error.message), code="context_length_exceeded")
        case EngineRefusalError() | NoModelError() | BodyTooLargeError() | UnsupportedError():
            return openai_error(error, str(error), code=error.code)
        case RequestError():
            return {"error": str(error)}
        case _:
            return openai_error(error, str(error), code=error.code)


def stream_error(error: LlamaRunnerError, path: str) -> dict[str, Any]:
    if path.rstrip("/").endswith("/completions"):
        return {"error": {"message": str(error)}, "message": str(error)}
    return v1_stream_error(error, str(error), path)


def repeat_message(record: dict[str, Any]) -> None:
    """An error event of the engine as LM Studio has it: its message at the top as well."""
    record["message"] = str(record["error"].get("message", "the engine reported an error"))


def _model_not_found(error: ModelNotFoundError, names: Iterable[str]) -> dict[str, Any]:
    listed = "\n".join(list(names)[:_LISTED_MODELS]) or "(none)"
    nearest = f" {error.hint[:1].upper()}{error.hint[1:]}" if error.hint else ""
    message = f'Model "{error.name}" not found. Please specify a valid model.{nearest}\n\nYour models:\n\n{listed}'
    record = {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    return {"error": {"message": message, **record}}


def _overflow(message: str) -> str:
    """llama-server's "request (120 tokens) exceeds the available context size (64 tokens)" as clients look for it."""
    found = _OVERFLOW.search(message)
    if found is None:
        return message
    asked, available = found.groups()
    return (
        f"Trying to keep the first {asked} tokens when context the overflows. However, the model is loaded with "
        f"context length of only {available} tokens, which is not enough. Try to load the model with a larger context "
        f"length, or provide a shorter input"
    )
