"""Our errors in Ollama's words. Clients match on some of them, so they are kept to the letter."""

from __future__ import annotations

import signal

from llamarunner.errors import (
    EngineGoneError,
    EngineRefusalError,
    LlamaRunnerError,
    LoadError,
    ModelNotFoundError,
    OverloadedError,
    UnsupportedError,
)
from llamarunner.proxies.proxy import UnknownRouteError
from llamarunner.proxies.v1_errors import v1_error, v1_stream_error

_EMBED_PATHS = ("/api/embed", "/api/embeddings")
_TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
    "context length in settings, or use a model with a longer context length"
)


class OptionError(LlamaRunnerError):
    """An entry of `options` has the wrong type: Ollama answers 500 to it."""

    code = "invalid_option"


def error_body(error: LlamaRunnerError, path: str) -> object:
    if isinstance(error, UnknownRouteError):
        return _plain(error)
    message = error_message(error, path)
    return v1_error(error, message, path) if path.startswith("/v1/") else {"error": message}


def stream_error(error: LlamaRunnerError, path: str) -> object:
    message = error_message(error, path)
    return v1_stream_error(error, message, path) if path.startswith("/v1/") else {"error": message}


def _plain(error: UnknownRouteError) -> str:
    match error.status:
        case 404:
            return "404 page not found"
        case 405:
            return "405 method not allowed"
        case _:
            return error.message


def error_message(error: LlamaRunnerError, path: str) -> str:
    match error:
        case ModelNotFoundError(name=name, hint=hint):
            nearest = f", {hint}" if hint else ""
            if name and path.rstrip("/") in _EMBED_PATHS:
                return f'model "{name}" not found, try pulling it first{nearest}'
            return f"model '{name}' not found{nearest}"
        case OverloadedError(message=message) if message.startswith("too many requests are waiting"):
            return "server busy, please try again.  maximum pending requests exceeded"
        case EngineRefusalError(kind="exceed_context_size_error"):
            return _TOO_LONG
        case UnsupportedError(message=message) if not path.startswith("/v1/"):
            return message  # the hint is in the request's record
        case LoadError():
            return _load_message(error)
        case EngineGoneError():
            return f"{error.message}, check the llamarunner log for details: {error.hint or 'the connection broke'}"
        case _:
            return str(error)


def _load_message(error: LoadError) -> str:
    if error.cause == "stalled":
        return f"timed out waiting for llama-server to start - {error}"
    if error.exit_code is None:
        return str(error)
    return f"llama-server process has terminated: {_exit_status(error.exit_code)}: {error}"


def _exit_status(code: int) -> str:
    """As Go's os/exec writes it."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal: {signal.strsignal(-code) or -code}".lower()
    except ValueError:
        return f"signal: {-code}"
