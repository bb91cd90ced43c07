"""How states, sizes and times are said: a glyph and a word for each state, and a style to show both in."""

from __future__ import annotations

import math
import time

from llamarunner.control.snapshot import ModelView, PullState, PullView, RequestPhase, RequestView, RunnerState
from llamarunner.units import format_duration, format_size

NOTHING = "–"

_STATES = {
    RunnerState.STOPPED: ("○", "muted"),
    RunnerState.STARTING: ("◔", "warn"),
    RunnerState.LOADING: ("◐", "warn"),
    RunnerState.READY: ("●", "good"),
    RunnerState.DRAINING: ("◕", "warn"),
    RunnerState.STOPPING: ("◌", "warn"),
    RunnerState.FAILED: ("✗", "bad"),
}
_PHASES = {
    RequestPhase.QUEUED: ("◌", "queued", "warn"),
    RequestPhase.LOADING: ("◐", "loading", "warn"),
    RequestPhase.PROMPT: ("◔", "prompt", "accent"),
    RequestPhase.STREAMING: ("●", "stream", "good"),
    RequestPhase.DONE: ("✓", "done", "muted"),
    RequestPhase.FAILED: ("✗", "failed", "bad"),
    RequestPhase.CANCELLED: ("○", "cancelled", "muted"),
}
_PULLS = {
    PullState.WAITING: ("◌", "warn"),
    PullState.RUNNING: ("↓", "accent-strong"),
    PullState.DONE: ("✓", "good"),
    PullState.FAILED: ("✗", "bad-strong"),
    PullState.CANCELLED: ("○", "muted"),
}
LIVE_PHASES = frozenset({RequestPhase.QUEUED, RequestPhase.LOADING, RequestPhase.PROMPT, RequestPhase.STREAMING})


def model_state(model: ModelView) -> tuple[str, str]:
    return runner_state(model.state, in_flight=model.in_flight, hung=model.hung_s is not None)


def runner_state(state: RunnerState, *, in_flight: int = 0, hung: bool = False) -> tuple[str, str]:
    if hung:
        return "✗ hung", "bad"
    glyph, style = _STATES[state]
    busy = state is RunnerState.READY and in_flight
    return (f"{glyph} busy", "accent") if busy else (f"{glyph} {state}", style)


def client(request: RequestView) -> str:
    """By the name the configuration has for it, with its address."""
    return f"{request.client_name} {request.client}" if request.client_name else request.client


def is_marked(request: RequestView) -> bool:
    """It was not answered quite as it was asked; its detail says how."""
    return bool(request.truncated or request.stripped or request.ignored)


def request_state(request: RequestView) -> tuple[str, str]:
    """The phase, or the HTTP status it ended with."""
    glyph, word, style = _PHASES[request.phase]
    if request.phase in (RequestPhase.DONE, RequestPhase.FAILED) and request.status is not None:
        failed = request.status >= 400 or request.phase is RequestPhase.FAILED
        return f"{'✗' if failed else glyph} {request.status}", "bad" if failed else "good"
    return f"{glyph} {word}", style


def is_live(request: RequestView) -> bool:
    return request.phase in LIVE_PHASES


def pull_state(pull: PullView) -> tuple[str, str]:
    """A glyph and its style."""
    return _PULLS[pull.state]


def pull_status(pull: PullView) -> str:
    match pull.state:
        case PullState.WAITING:
            return "waits its turn"
        case PullState.RUNNING:
            return pull.status
        case PullState.DONE:
            return f"is here ({size(pull.total)})" if pull.total else "is here"
        case PullState.CANCELLED:
            return "was cancelled; what there is of it stays for the next time"
        case _:
            return pull.problem or "failed"


def size(size_bytes: float | None) -> str:
    """ "18.2G": narrow enough for a table."""
    if size_bytes is None:
        return NOTHING
    number, unit = format_size(size_bytes).split()
    return f"{float(number):.0f}{unit[0]}" if len(number) > 4 else f"{number}{unit[0]}"


def tokens(count: int | None) -> str:
    """ "32768" as "32k"; other numbers as they are up to 9999."""
    if count is None:
        return NOTHING
    if count >= 10_000_000:
        return f"{count / 1e6:.0f}M"
    if count >= 1024 and count % 1024 == 0:
        return f"{count // 1024}k"
    return f"{count / 1000:.0f}k" if count >= 10_000 else str(count)


def rate(per_second: float | None) -> str:
    if per_second is None or not math.isfinite(per_second):
        return NOTHING
    return f"{per_second:.0f}" if per_second >= 99.95 else f"{per_second:.1f}"


def duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else format_duration(seconds)


def countdown(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return "never" if math.isinf(seconds) else format_duration(max(0, math.ceil(seconds)))


def percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{fraction * 100:.0f}%"


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
