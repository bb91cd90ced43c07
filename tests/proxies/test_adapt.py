"""What an engine is sent, where it is not plain llama-server."""

from __future__ import annotations

import orjson
import pytest

from llamarunner.engines.engine import LaunchPlan
from llamarunner.errors import UnsupportedError
from llamarunner.proxies.adapt import adapt

CHAT = "/v1/chat/completions"
TOOLS = {"tools": [{"type": "function"}], "tool_choice": "auto", "parallel_tool_calls": True}


def plan(**more: object) -> LaunchPlan:
    return LaunchPlan((), 0, "", **more)  # type: ignore[arg-type]


def test_llama_server_gets_the_very_bytes() -> None:
    body = b'{ "model" : "x",  "tools": [1] }'
    assert adapt(body, CHAT, plan()) == (body, "")


def test_only_openais_older_apis_have_stream_options() -> None:
    asked = orjson.dumps({"model": "x", "stream": True})
    for path in ("/v1/responses", "/v1/messages"):
        assert adapt(asked, path, plan(is_llama_cpp=False)) == (asked, "")
    formatted = orjson.dumps({"model": "x", "response_format": {"type": "json_object"}, "stream": True})
    assert adapt(formatted, "/v1/responses", plan(is_llama_cpp=False)) == (asked, "")


def test_a_fork_without_tools_is_sent_none_and_that_is_told() -> None:
    body, stripped = adapt(orjson.dumps({"model": "x", "n": 1, **TOOLS}), CHAT, plan(supports_tools=False))
    assert orjson.loads(body) == {"model": "x", "n": 1}
    assert stripped == "tools"
    body, stripped = adapt(orjson.dumps({"model": "x", "tools": []}), CHAT, plan(supports_tools=False))
    assert (orjson.loads(body), stripped) == ({"model": "x"}, ""), "nothing that was asked for is missing"


def test_a_server_elsewhere_is_asked_for_the_model_by_its_own_name() -> None:
    there = plan(served_model="Qwen/Qwen3-8B", is_llama_cpp=False)
    asked = {"model": "qwen", "seed": -1, "cache_prompt": True, "n_keep": 4, "stream": True, **TOOLS}
    body, stripped = adapt(orjson.dumps(asked), CHAT, there)
    expected = {"model": "Qwen/Qwen3-8B", "stream": True, "stream_options": {"include_usage": True}, **TOOLS}
    assert (orjson.loads(body), stripped) == (expected, "")


def test_what_only_llama_cpp_has_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        adapt(b"{}", "/completion", plan(is_llama_cpp=False))
