"""Every error a user may see.

    LlamaRunnerError            message, hint, status, code
    ├── ConfigError             the configuration cannot be used; carries each problem
    ├── PortTakenError          a proxy's port is held by another program
    ├── RequestError            400  the request itself is wrong
    │   ├── BodyTooLargeError   413
    │   ├── UnsupportedError    400  the model or its engine cannot do this
    │   └── ModelNotFoundError  404
    ├── OverloadedError         503  the queue is full, or we are stopping
    ├── EngineRefusalError      the status and words with which the engine itself refused a request
    └── EngineError             500  the engine could not serve
        ├── EngineMissingError  503  there is no program to run this model with
        ├── ModelFileError      500  the model's file is missing, cut short or not a GGUF
        ├── DoesNotFitError     500  there is no memory for the model, and nothing that may leave would make any
        ├── LoadError           500  the engine ended, or made no progress, before it was ready
        └── EngineGoneError     500  the engine ended while it was answering

`message` is one sentence without a final full stop; `hint` says what would help. The dialects put them in their own
words and shapes; nothing here knows of one. `status` is the HTTP status an API answers with.
"""

from __future__ import annotations

from collections.abc import Sequence


class LlamaRunnerError(Exception):
    status: int = 500
    code: str = "internal_error"
    retry_after_s: float | None = None
    """When it is worth trying again, where that is known."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(LlamaRunnerError):
    """`problems` are lines of the form `file:line: key: what, and what would be right`."""

    code = "invalid_config"

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class PortTakenError(LlamaRunnerError):
    code = "port_taken"

    def __init__(self, host: str, port: int, holder: str = "") -> None:
        """`holder` names the program that has the port, as far as it could be told."""
        by = f" by {holder}" if holder else ""
        super().__init__(f"{host}:{port} is taken{by}", hint="stop it, or set another port")
        self.port = port
        self.holder = holder


class RequestError(LlamaRunnerError):
    status = 400
    code = "invalid_request"


class BodyTooLargeError(RequestError):
    status = 413
    code = "body_too_large"


class UnsupportedError(RequestError):
    code = "unsupported"


class ModelNotFoundError(RequestError):
    status = 404
    code = "model_not_found"

    def __init__(self, name: str, nearest: str = "") -> None:
        super().__init__(f"model '{name}' not found", hint=f"did you mean '{nearest}'?" if nearest else "")
        self.name = name
        self.nearest = nearest


class OverloadedError(LlamaRunnerError):
    status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class EngineRefusalError(LlamaRunnerError):
    """`kind` is the engine's own word for it ("exceed_context_size_error"); `context` how many tokens it has for
    a prompt and its answer, and `prompt_tokens` how many the prompt has, where that is the matter."""

    code = "engine_refusal"

    def __init__(self, status: int, message: str, *, kind: str = "", context: int = 0, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.context = context
        self.prompt_tokens = prompt_tokens


class EngineError(LlamaRunnerError):
    code = "engine_error"


class EngineMissingError(EngineError):
    status = 503
    code = "engine_missing"


class ModelFileError(EngineError):
    code = "model_file"


class DoesNotFitError(EngineError):
    code = "does_not_fit"

    def __init__(self, message: str) -> None:
        """`message` has the numbers and who holds the memory."""
        super().__init__(message, hint="a smaller context, fewer `parallel`, or a smaller quantisation takes less")


class LoadError(EngineError):
    """`cause` is the classified reason (see `runners.crash`), `exit_code` negative for a signal, `log_tail` the last
    lines the engine wrote."""

    code = "load_failed"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        cause: str = "unknown",
        exit_code: int | None = None,
        log_tail: Sequence[str] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.cause = cause
        self.exit_code = exit_code
        self.log_tail = tuple(log_tail)


class EngineGoneError(EngineError):
    code = "engine_gone"
