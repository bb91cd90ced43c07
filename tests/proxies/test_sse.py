"""Events come out the same however the network cut them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.errors import EngineGoneError
from llamarunner.proxies import sse
from llamarunner.proxies.sse import EventSplitter, WholeLines, amend_lines

STREAM = (
    b': ping\n\ndata: {"a":"\xc3\xa9\xe4\xb8\xad"}\n\nevent: error\r\ndata: {"b":2}\r\n\r\n'
    b'data:{"c":3}\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"a":"\xc3\xa9\xe4\xb8\xad"}', b'{"b":2}', b'{"c":3}', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    splitter = EventSplitter()
    events = [event for start, end in pairwise(edges) for event in splitter.feed(STREAM[start:end])]
    assert events == EVENTS


def test_an_unfinished_event_is_kept_for_later() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b'data: {"half":') == []
    assert splitter.feed(b"1}\n") == [b'{"half":1}']


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    splitter = EventSplitter()
    splitter.feed(b"x" * 1000)
    with pytest.raises(EngineGoneError):
        splitter.feed(b"x")


@given(st.lists(st.binary(max_size=6) | st.sampled_from([b"\n", b"a\nb", b"data: x\n\n"]), max_size=12))
def test_lines_pass_whole(blocks: list[bytes]) -> None:
    lines = WholeLines()
    passed = [lines.feed(block) for block in blocks]
    assert all(not block or block.endswith(b"\n") for block in passed)
    sent = b"".join(blocks)
    assert b"".join(passed) == sent[: sent.rfind(b"\n") + 1]


def test_a_line_without_end_is_not_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    lines = WholeLines()
    assert lines.feed(b"x" * 1000) == b""
    with pytest.raises(EngineGoneError):
        lines.feed(b"x")


def test_only_what_is_marked_is_amended() -> None:
    def amend(record: dict[str, object]) -> None:
        record["more"] = record["mark"]

    data = b': ping "mark"\n\ndata: { "x" : 1 }\n\ndata: {"mark":1}\n\ndata: {"other":"mark"}\n\ndata: [DONE]\n\n'
    assert amend_lines(data, b'"mark"', amend) == data.replace(b'{"mark":1}', b'{"mark":1,"more":1}')
    assert amend_lines(b'{"mark":2}', b'"mark"', amend) == b'{"mark":2,"more":2}'
    assert amend_lines(b'["mark"]', b'"mark"', amend) == b'["mark"]'
