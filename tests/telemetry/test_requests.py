from __future__ import annotations

import pytest

from llamarunner.events import EventBus, RequestFinished, RequestPhase, RequestStarted, RequestTrace
from llamarunner.telemetry.requests import OTHER, RequestLog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def log(bus: EventBus, clock: Clock) -> RequestLog:
    return RequestLog(bus, 5, clock=clock)


def begin(bus: EventBus, model: str = "qwen", *, stream: bool = True, dialect: str = "ollama") -> RequestTrace:
    trace = RequestTrace(dialect, "/api/chat", "127.0.0.1:5", model=model, stream=stream)
    bus.publish(RequestStarted(trace))
    return trace


def end(bus: EventBus, trace: RequestTrace, phase: RequestPhase = RequestPhase.DONE) -> None:
    trace.phase = phase
    bus.publish(RequestFinished(trace))


def test_a_request_is_live_and_then_finished(bus: EventBus, log: RequestLog) -> None:
    first, second = begin(bus), begin(bus)
    assert list(log.live.values()) == [first, second]
    end(bus, first)
    end(bus, second)
    assert not log.live
    assert list(log.finished) == [second, first]


def test_finished_ones_are_bounded_newest_first(bus: EventBus, log: RequestLog) -> None:
    traces = [begin(bus) for _ in range(20)]
    for trace in traces:
        end(bus, trace)
    assert list(log.finished) == traces[:-6:-1]


def test_requests_that_never_finish_are_bounded(bus: EventBus, log: RequestLog) -> None:
    traces = [begin(bus) for _ in range(5000)]
    assert len(log.live) == 4096
    assert traces[-1].request_id in log.live
    end(bus, traces[0])  # long forgotten, and yet recorded
    assert list(log.finished) == [traces[0]]


def test_the_version_moves_with_what_can_be_seen_and_only_then(bus: EventBus, log: RequestLog) -> None:
    seen = [log.version]

    def moved() -> bool:
        seen.append(log.version)
        return seen[-1] > seen[-2]

    assert not moved()
    trace = begin(bus)
    assert moved()
    assert not moved()
    trace.phase = RequestPhase.STREAMING
    assert moved()
    trace.output_tokens = 1
    assert moved()
    assert not moved()
    end(bus, trace)
    assert moved()
    assert not moved()
    log.close()
    begin(bus)
    assert not moved()


def test_tokens_per_second_of_two_streams(bus: EventBus, log: RequestLog, clock: Clock) -> None:
    assert log.tokens_per_s() == 0
    one, two = begin(bus), begin(bus)
    one.output_tokens = two.output_tokens = 0
    for _ in range(10):
        clock.now += 1
        one.output_tokens += 30
        two.output_tokens += 12
        rate = log.tokens_per_s()
    assert rate == pytest.approx(42)
    end(bus, two)
    for _ in range(4):
        clock.now += 1
        one.output_tokens += 30
        rate = log.tokens_per_s()
    assert rate == pytest.approx(30)
    end(bus, one)
    for _ in range(4):
        clock.now += 1
        rate = log.tokens_per_s()
    assert rate == 0


def test_a_stream_shorter_than_a_look_still_counts(bus: EventBus, log: RequestLog, clock: Clock) -> None:
    log.tokens_per_s()
    trace = begin(bus)
    trace.output_tokens = 60
    end(bus, trace)
    clock.now += 2
    assert log.tokens_per_s() == pytest.approx(30)


def test_an_answer_in_one_piece_makes_no_spike(bus: EventBus, log: RequestLog, clock: Clock) -> None:
    log.tokens_per_s()
    trace = begin(bus, stream=False)
    trace.output_tokens = 5000
    clock.now += 1
    assert log.tokens_per_s() == 0
    end(bus, trace)
    clock.now += 1
    assert log.tokens_per_s() == 0


def test_the_engine_may_correct_a_count(bus: EventBus, log: RequestLog, clock: Clock) -> None:
    log.tokens_per_s()
    trace = begin(bus)
    trace.output_tokens = 40
    clock.now += 1
    assert log.tokens_per_s() == pytest.approx(40)
    trace.output_tokens = 38
    end(bus, trace)
    clock.now += 1
    assert log.tokens_per_s() == pytest.approx(20)


def test_asking_often_changes_nothing_and_keeps_little(bus: EventBus, log: RequestLog, clock: Clock) -> None:
    trace = begin(bus)
    trace.output_tokens = 0
    rate = log.tokens_per_s()
    for _ in range(10_000):
        clock.now += 0.001
        trace.output_tokens += 1
        rate = log.tokens_per_s()
    assert rate == pytest.approx(1000)
    assert len(log._stream_rate._marks) <= 32
    assert log.tokens_per_s() == log.tokens_per_s()


def test_tallies_by_model_and_dialect(bus: EventBus, log: RequestLog) -> None:
    done = begin(bus)
    done.prompt_tokens, done.output_tokens = 10, 20
    end(bus, done)
    end(bus, begin(bus), RequestPhase.FAILED)
    end(bus, begin(bus, dialect="lmstudio"), RequestPhase.CANCELLED)
    ollama, lmstudio = log.tallies[("qwen", "ollama")], log.tallies[("qwen", "lmstudio")]
    assert (ollama.done, ollama.failed, ollama.cancelled) == (1, 1, 0)
    assert (ollama.prompt_tokens, ollama.output_tokens) == (10, 20)
    assert (lmstudio.done, lmstudio.cancelled) == (0, 1)


def test_the_last_rate_of_a_model(bus: EventBus, log: RequestLog) -> None:
    assert log.last_rate("qwen") is None
    for rate in (50.0, 80.0, None):
        trace = begin(bus)
        trace.output_tokens_per_s = rate
        end(bus, trace)
    assert log.last_rate("qwen") == 80.0
    assert log.last_rate("other") is None


def test_names_that_clients_invent_are_bounded(bus: EventBus, log: RequestLog) -> None:
    for number in range(1500):
        end(bus, begin(bus, f"model {number}"), RequestPhase.FAILED)
    assert len(log.tallies) <= 1001
    assert log.tallies[(OTHER, "ollama")].failed == 500
    huge = begin(bus, "x" * 10**6)
    huge.error = "y" * 10**6
    end(bus, huge, RequestPhase.FAILED)
    kept = next(iter(log.finished))
    assert kept.request_id == huge.request_id
    assert len(kept.model) + len(kept.error) < 1000
