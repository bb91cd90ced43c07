"""The request log: those under way, the newest finished ones, and what they add up to. It lives on the event loop.

Everything is bounded, also what clients choose: names are shortened and models beyond the first thousand are counted
together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from llamarunner.events import (
    Event,
    EventBus,
    RequestFinished,
    RequestPhase,
    RequestStarted,
    RequestTrace,
)

OTHER = "(others)"  # where requests are counted once there are too many models

_LIVE = 4096
_MODELS = 1000
_MAX_TEXT = 256
_TEXTS = ("endpoint", "client", "user_agent", "model", "error", "ignored")
_WINDOW_S = 3.0
_STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Tally:
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def plus(self, trace: RequestTrace) -> Tally:
        return Tally(
            done=self.done + (trace.phase is RequestPhase.DONE),
            failed=self.failed + (trace.phase is RequestPhase.FAILED),
            cancelled=self.cancelled + (trace.phase is RequestPhase.CANCELLED),
            prompt_tokens=self.prompt_tokens + (trace.prompt_tokens or 0),
            output_tokens=self.output_tokens + (trace.output_tokens or 0),
        )


class TokenRate:
    """Tokens a second over the last three seconds, from what the counters of the running streams have gained. Pure:
    the caller brings the time."""

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: dict[int, int] = {}  # tokens counted so far, by request
        self._total = 0
        self._marks: deque[tuple[float, int]] = deque()  # (time, total then); at most window / step of them

    def gain(self, trace: RequestTrace) -> None:
        tokens = trace.output_tokens or 0
        self._total += max(0, tokens - self._seen.get(trace.request_id, 0))
        self._seen[trace.request_id] = tokens

    def forget(self, trace: RequestTrace) -> None:
        self._seen.pop(trace.request_id, None)

    def rate(self, now: float) -> float:
        """Since the newest mark that is a whole window old, or else the oldest there is."""
        while len(self._marks) > 1 and now - self._marks[1][0] >= self._window_s:
            self._marks.popleft()
        if not self._marks or now - self._marks[-1][0] >= _STEP_S:
            self._marks.append((now, self._total))
        since, before = self._marks[0]
        return (self._total - before) / (now - since) if now > since else 0.0


class RequestLog:
    def __init__(self, bus: EventBus, capacity: int = 1000, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[int, RequestTrace] = {}
        self._finished: deque[RequestTrace] = deque(maxlen=capacity)
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._rates: dict[str, float] = {}
        self._stream_rate = TokenRate()
        self._version = 0
        self._looked_at: tuple[object, ...] = ()
        self._unsubscribe = bus.subscribe(self._take)

    def close(self) -> None:
        self._unsubscribe()

    @property
    def live(self) -> Mapping[int, RequestTrace]:
        """By request id, oldest first. Handlers go on writing the traces."""
        return self._live

    @property
    def finished(self) -> Iterable[RequestTrace]:
        """Newest first."""
        return self._finished

    @property
    def tallies(self) -> Mapping[tuple[str, str], Tally]:
        """Finished requests by (model, dialect)."""
        return self._tallies

    @property
    def version(self) -> int:
        """Rises when a request came, went or got on since the last look."""
        look = tuple((trace.request_id, trace.phase, trace.model, trace.output_tokens) for trace in self._live.values())
        if look != self._looked_at:
            self._looked_at = look
            self._version += 1
        return self._version

    def tokens_per_s(self) -> float:
        """Of all answers being streamed now. Ask about once a second."""
        for trace in self._live.values():
            if trace.stream:
                self._stream_rate.gain(trace)
        return self._stream_rate.rate(self._clock())

    def last_rate(self, model: str) -> float | None:
        """Tokens a second of the model's newest answer, as its engine measured it."""
        return self._rates.get(model)

    def _take(self, event: Event) -> None:
        match event:
            case RequestStarted(trace):
                self._start(trace)
            case RequestFinished(trace):
                self._finish(trace)
            case _:
                pass

    def _start(self, trace: RequestTrace) -> None:
        if len(self._live) >= _LIVE:  # a handler lost its finish; better to forget one than to grow
            self._stream_rate.forget(self._live.pop(next(iter(self._live))))
        self._live[trace.request_id] = trace
        self._version += 1

    def _finish(self, trace: RequestTrace) -> None:
        self._live.pop(trace.request_id, None)
        if trace.stream:  # the tokens of an answer in one piece all arrive at its end: no rate could be told from them
            self._stream_rate.gain(trace)
        self._stream_rate.forget(trace)
        trace = _shortened(trace)
        self._finished.appendleft(trace)
        key = (trace.model, trace.dialect)
        if key not in self._tallies and len(self._tallies) >= _MODELS:
            key = (OTHER, trace.dialect)
        self._tallies[key] = self._tallies.get(key, Tally()).plus(trace)
        if trace.output_tokens_per_s is not None and (trace.model in self._rates or len(self._rates) < _MODELS):
            self._rates[trace.model] = trace.output_tokens_per_s
        self._version += 1


def _shortened(trace: RequestTrace) -> RequestTrace:
    """A client may send a name of megabytes; a thousand of them would stay here."""
    long = {name: text[:_MAX_TEXT] + "…" for name in _TEXTS if len(text := getattr(trace, name)) > _MAX_TEXT}
    return replace(trace, **long) if long else trace
