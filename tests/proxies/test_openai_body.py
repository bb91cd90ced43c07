"""Messages and tools that an engine must not get to see."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Capability, Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import RequestError
from llamarunner.proxies.openai_body import check_messages, check_tools

BLIND = Model("m", Path("/m.gguf"), ModelSettings())
SEEING = Model("m", Path("/m.gguf"), ModelSettings(), ModelDetails(capabilities=frozenset({Capability.VISION})))
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def picture(url: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_what_clients_send_is_let_through() -> None:
    check_messages(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "assistant", "tool_calls": None, "content": "x"},
            {"role": "tool", "content": "x", "tool_call_id": "c"},
        ],
        BLIND,
    )
    check_messages(picture("data:image/png;base64,AA=="), SEEING)
    check_tools([FUNCTION, {"type": "function", "function": {"name": "g"}}])
    check_tools([])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be an array, not null"), ("x", "messages must be an array, not string"),
        (["x"], "messages[0] must be an object, not string"),
        ([{"role": 1}], "messages[0].role must be a string, not number"),
        ([{"role": "tool", "name": {}}], "messages[0].name must be a string, not object"),
        ([{"role": "user", "reasoning_content": []}], "messages[0].reasoning_content must be a string, not array"),
        ([{"content": "x"}], "messages[0].role must be a string, not null"),
        ([{"role": "user", "content": 5}], "messages[0].content must be a string or an array, not number"),
        ([{"role": "user", "content": [{"type": "x"}]}],
         'messages[0].content[0].type must be "text", "image_url" or "input_audio"'),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text must be a string, not null"),
        ([{"role": "a", "tool_calls": [{}]}], 'messages[0].tool_calls[0].type must be "function"'),
        ([{"role": "a", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}],
         "messages[0].tool_calls[0].function.arguments must be a string, not object"),
        ([{"role": "a", "tool_calls": [{**CALL, "id": 7}]}],
         "messages[0].tool_calls[0].id must be a string, not number"),
    ],
)  # fmt: skip
def test_messages_that_are_not(messages: object, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_messages(messages, BLIND)
    assert refused.value.message == message


@pytest.mark.parametrize("url", ["http://localhost/x.png", "https://example.com", "file:///etc/passwd", "ftp://x", ""])
def test_no_engine_is_sent_to_fetch_anything(url: str) -> None:
    with pytest.raises(RequestError, match="image URLs are not currently supported"):
        check_messages(picture(url), SEEING)
    with pytest.raises(RequestError, match="m does not support vision"):
        check_messages(picture(url), BLIND)


@pytest.mark.parametrize(
    "tools",
    [
        None, "x", [1], [{}], [{"type": "x"}], [{"type": "function"}], [{"type": "function", "function": {}}],
        [{"type": "function", "function": {"name": "f", "parameters": "x"}}],
        [{"type": "function", "function": {"name": "f", "description": 5}}],
    ],
)  # fmt: skip
def test_tools_that_are_not(tools: object) -> None:
    with pytest.raises(RequestError, match="tools"):
        check_tools(tools)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name", "arguments"]),
        inner, max_size=4,
    ),
)  # fmt: skip


@given(JSON)
def test_any_json_is_let_through_or_refused(value: object) -> None:
    for check in (check_tools, lambda value: check_messages(value, SEEING)):
        with contextlib.suppress(RequestError):
            check(value)
