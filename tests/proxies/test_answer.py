"""llama-server's events as Ollama's records, without any network."""

from __future__ import annotations

import contextlib
import itertools
import json
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.errors import EngineError, EngineGoneError, EngineRefusalError, LlamaRunnerError
from llamarunner.events import RequestTrace
from llamarunner.proxies.figures import note_figures
from llamarunner.proxies.ollama.answer import Answer, bare_reply, timestamp
from llamarunner.proxies.sse import EventSplitter

WORDS = ["é", "中文", "🎉", "a\u2028b", "\n", '"\\']


def new_answer(*, chat: bool = True) -> Answer:
    return Answer(
        "m:tag", chat=chat, started_ns=5, load_ns=0, now_ns=itertools.count(10**18).__next__, clock_ns=lambda: 5
    )


def delta(**fields: object) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


END = orjson.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


def test_timestamps_are_rfc_3339_with_nanoseconds() -> None:
    assert timestamp(1_787_338_102_123_456_789) == "2026-08-21T18:48:22.123456789Z"
    assert timestamp(1) == "1970-01-01T00:00:00.000000001Z"


def test_durations_are_never_zero_and_unknown_figures_are_left_out() -> None:
    answer = new_answer()
    answer.feed(END)
    final = answer.final()
    assert (final["total_duration"], final["load_duration"]) == (1, 1)
    assert not {"eval_count", "eval_duration", "prompt_eval_count", "prompt_eval_duration", "context"} & set(final)


def test_usage_stands_in_for_timings() -> None:
    answer = new_answer()
    answer.feed(orjson.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}))
    assert (answer.final()["prompt_eval_count"], answer.final()["eval_count"]) == (3, 4)


@pytest.mark.parametrize(
    "payload", [b"[DONE]", delta(role="assistant", content=None), delta(content=""), b"{}", b'{"choices":[]}']
)
def test_what_says_nothing_becomes_no_line(payload: bytes) -> None:
    assert new_answer().feed(payload) == b""


@pytest.mark.parametrize("payload", [b"", b"nonsense", b"7", b"[]", b'{"cut":'])
def test_what_is_no_event_is_the_engines_fault(payload: bytes) -> None:
    with pytest.raises(EngineGoneError):
        new_answer().feed(payload)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ({"code": 400, "message": "bad", "type": "x"}, 400, "bad"), ({"message": "bad"}, 500, "bad"),
        ({"code": "x"}, 500, "the engine reported an error"), ("bad", 500, "bad"), (None, 500, "None"),
    ],
)  # fmt: skip
def test_error_events(error: object, status: int, message: str) -> None:
    with pytest.raises(EngineRefusalError) as refused:
        new_answer().feed(orjson.dumps({"error": error}))
    assert (refused.value.status, refused.value.message) == (status, message)


def test_what_came_before_an_error_is_kept() -> None:
    answer = new_answer()
    lines, error = answer.feed_all([delta(content="a"), delta(content="b"), b"nonsense", delta(content="c")])
    assert [json.loads(line)["message"]["content"] for line in lines.splitlines()] == ["a", "b"]
    assert isinstance(error, EngineGoneError)


@pytest.mark.parametrize("chat", [True, False])
def test_the_whole_is_the_sum_of_its_lines(chat: bool) -> None:
    answer = new_answer(chat=chat)
    events = [delta(reasoning_content="Hm"), *(delta(content=word) for word in WORDS), END]
    lines, error = answer.feed_all(events)
    assert error is None
    records = [json.loads(line) for line in lines.split(b"\n")[:-1]]
    texts = [record["message"]["content"] if chat else record["response"] for record in records]
    assert texts == ["", *WORDS]
    whole = answer.whole([1, 2])
    part = whole["message"] if chat else whole
    assert part["content" if chat else "response"] == "".join(WORDS)
    assert part["thinking"] == "Hm"
    assert whole["context"] == [1, 2]


WORDS_OF_EVENTS = [
    "choices", "delta", "message", "content", "reasoning_content", "tool_calls", "index", "id", "function", "name",
    "arguments", "finish_reason", "logprobs", "token", "top_logprobs", "timings", "usage", "predicted_n", "prompt_ms",
    "cache_n", "prompt_tokens", "stop", "stop_type", "completion_probabilities",
]  # fmt: skip
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS_OF_EVENTS), inner, max_size=5),
    max_leaves=20,
)
CHOICE = st.fixed_dictionaries({"delta": ANYTHING, "message": ANYTHING, "logprobs": ANYTHING})
EVENTS = st.fixed_dictionaries(
    {"choices": st.lists(CHOICE, max_size=2) | ANYTHING},
    optional={"timings": ANYTHING, "usage": ANYTHING, "content": ANYTHING, "completion_probabilities": ANYTHING},
)


@given(st.lists(EVENTS, max_size=4), st.booleans(), st.booleans())
def test_whatever_an_engine_sends_is_a_line_or_its_fault(events: list[dict[str, Any]], chat: bool, whole: bool) -> None:
    answer = new_answer(chat=chat)
    with contextlib.suppress(LlamaRunnerError):
        for event in [*events, orjson.loads(END)]:
            lines = answer.feed_whole(event) if whole else answer.feed(orjson.dumps(event))
            for record in map(json.loads, lines.split(b"\n")[:-1]):
                assert isinstance(record["message"]["content"] if chat else record["response"], str)
        final, trace = answer.final(), RequestTrace("ollama", "/api/chat", "")
        answer.whole()
        note_figures(trace, {"timings": answer.timings, "usage": answer.usage, "response": events})
        figures = ("prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration")
        assert all(isinstance(final.get(name, 0), int | float) and final.get(name, 0) >= 0 for name in figures)


STREAM = b": ping\r\n\r\n" + b"".join(
    b"data: " + event + b"\n\n"
    for event in [
        delta(role="assistant", content=None), *(delta(content=word) for word in WORDS),
        delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '":"é"}'}}]), END, b"[DONE]",
    ]
)  # fmt: skip


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_however_the_network_cuts_lines_are_whole_and_the_same(cuts: list[int]) -> None:
    splitter, answer, written = EventSplitter(), new_answer(), []
    for start, end in pairwise([0, *sorted(cuts), len(STREAM)]):
        lines, error = answer.feed_all(splitter.feed(STREAM[start:end]))
        assert error is None
        assert not lines or lines.endswith(b"\n")
        written += [json.loads(line) for line in lines.split(b"\n")[:-1]]
    assert [record["message"]["content"] for record in written] == [*WORDS, ""]
    assert written[-1]["message"]["tool_calls"] == [
        {"id": "c", "function": {"index": 0, "name": "f", "arguments": {"a": "é"}}}
    ]
    assert [record["created_at"] for record in written] == sorted(record["created_at"] for record in written)


@pytest.mark.parametrize(("given_", "meant"), [("", {}), ("{}", {}), ("null", {}), ('{"a":[1]}', {"a": [1]})])
def test_tool_arguments(given_: str, meant: object) -> None:
    answer = new_answer()
    answer.feed(delta(tool_calls=[{"function": {"name": "f", "arguments": given_}}]))
    answer.feed(END)
    assert answer.tool_calls == [{"function": {"index": 0, "name": "f", "arguments": meant}}]


@pytest.mark.parametrize("given_", ["[1]", '"x"', "7", "{", "true"])
def test_tool_arguments_that_are_no_object(given_: str) -> None:
    answer = new_answer()
    answer.feed(delta(tool_calls=[{"function": {"name": "f", "arguments": given_}}]))
    with pytest.raises(EngineError):
        answer.feed(END)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["choices", "error", "content", "stop", "usage", "x"]), inner, max_size=4)
        ),
        max_leaves=10,
    )
)
def test_a_strange_engine_is_told_apart_from_our_own_faults(event: object) -> None:
    """Only what llama-server's events are made of is relied on at the top; the rest is an engine error."""
    if isinstance(event, dict) and ({"choices", "timings", "usage"} & set(event)):
        return
    try:
        payload = orjson.dumps(event)
        assert isinstance(new_answer().feed(payload), bytes)
    except LlamaRunnerError:
        pass


def test_bare_replies() -> None:
    assert bare_reply("m", "load", chat=False).items() >= {"response": "", "done": True, "done_reason": "load"}.items()
    assert bare_reply("m", "unload", chat=True)["message"] == {"role": "assistant", "content": ""}
