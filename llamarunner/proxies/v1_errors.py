"""Our errors in the shapes of the APIs under /v1: OpenAI's, and Anthropic's for its messages."""

from __future__ import annotations

import os
from typing import Any

from llamarunner.errors import LlamaRunnerError

_MESSAGES = "/v1/messages"
_RESPONSES = "/v1/responses"

_OPENAI_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    return path == _MESSAGES or path.startswith(f"{_MESSAGES}/")


def openai_error(error: LlamaRunnerError, message: str, *, code: str | None = None) -> dict[str, Any]:
    kind = _OPENAI_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": f"req_{os.urandom(12).hex()}"}


def responses_error(status: int, message: str) -> dict[str, Any]:
    """The event that ends a stream of /v1/responses."""
    code = "invalid_request_error" if status < 500 else "server_error"
    return {"type": "error", "code": code, "message": message, "param": None}


def v1_error(error: LlamaRunnerError, message: str, path: str) -> dict[str, Any]:
    """The body of an answer that never began."""
    return anthropic_error(error.status, message) if is_anthropic(path) else openai_error(error, message)


def v1_stream_error(error: LlamaRunnerError, message: str, path: str) -> dict[str, Any]:
    """The event that ends an answer which had begun; one with a `type` is an event of that name."""
    if is_anthropic(path):
        return anthropic_error(error.status, message)
    if path.rstrip("/") == _RESPONSES:
        return responses_error(error.status, message)
    return openai_error(error, message)
