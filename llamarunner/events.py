"""What happened, as plain data, and the bus that tells whoever listens.

Publishing is a plain call on the event loop: listeners only take a note (append to a bounded ring, count), they never
wait. A listener that raises is logged and the rest still hear.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

logger = logging.getLogger(__name__)

_request_numbers = itertools.count(1)


class RunnerState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class RequestPhase(StrEnum):
    QUEUED = "queued"  # waiting for another model to leave
    LOADING = "loading"  # its model is being loaded
    PROMPT = "prompt"  # sent to the engine, nothing came back yet
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"  # the client left


class PullState(StrEnum):
    WAITING = "waiting"  # for others to end
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class RequestTrace:
    """One request's life, written only by the handler that serves it and read by telemetry.

    Times are `time.monotonic()` seconds, None where the request has not come so far; `started_at` is wall-clock time.
    It never holds prompt or answer text.
    """

    dialect: str  # "ollama" or "lmstudio"
    endpoint: str  # "/api/chat"
    client: str  # "127.0.0.1:51234"
    user_agent: str = ""
    client_name: str = ""  # of the [clients.NAME] it was recognised as
    priority: int = 0  # of that client
    model: str = ""
    stream: bool = False
    request_id: int = field(default_factory=lambda: next(_request_numbers))
    phase: RequestPhase = RequestPhase.QUEUED
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)
    load_started: float | None = None  # began to wait for a load
    granted: float | None = None  # got its lease
    first_byte: float | None = None  # of the answer's content
    finished: float | None = None
    status: int | None = None  # HTTP status sent to the client
    error: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None  # as the engine reported at the end; counts chunks until then
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    bytes_out: int = 0
    stripped: str = ""  # what was taken out of the request because its engine cannot do it: "tools"
    truncated: str = ""  # what was left out because the prompt was too long: "the oldest 4 of 9 messages"
    ignored: str = ""  # options nobody knows, by name: "num_cxt, foo"


@dataclass(frozen=True, slots=True)
class RunnerChanged:
    model: str
    runner_id: int
    old: RunnerState
    new: RunnerState
    reason: str  # for a person: "evicted for qwen3-32b: one model at a time"
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class RequestStarted:
    trace: RequestTrace


@dataclass(frozen=True, slots=True)
class RequestFinished:
    trace: RequestTrace


@dataclass(frozen=True, slots=True)
class ProxyChanged:
    """`problem` is empty when the proxy serves or was stopped on purpose."""

    name: str
    running: bool
    problem: str = ""


Event = RunnerChanged | RequestStarted | RequestFinished | ProxyChanged
Listener = Callable[[Event], None]


class EventBus:
    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each event from now on; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def publish(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                logger.exception("a listener failed on %s", type(event).__name__)
