"""Ollama's options, durations, formats and field types."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Capability, Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import RequestError
from llamarunner.proxies.ollama.chat import chat_body
from llamarunner.proxies.ollama.errors import OptionError
from llamarunner.proxies.ollama.fields import check_request
from llamarunner.proxies.ollama.options import DEFAULTS, effective, sampling
from llamarunner.proxies.ollama.parameters import keep_alive_s, response_format, template_kwargs


def model(*capabilities: Capability) -> Model:
    return Model("m", Path("/m.gguf"), ModelSettings(), ModelDetails(capabilities=frozenset(capabilities)))


def test_every_sampler_has_its_default() -> None:
    sent = sampling({}, 1000)
    assert sent.items() >= DEFAULTS.items()
    assert (sent["max_tokens"], sent["n_keep"]) == (10_000, 4)
    assert "stop" not in sent


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"temperature": 1}, {"temperature": 1.0}), ({"top_k": 3.9}, {"top_k": 3}),
        ({"top_k": 1e300}, {"top_k": 2**31 - 1}),
        ({"repeat_last_n": -1}, {"repeat_last_n": 1000}), ({"num_predict": -2}, {"max_tokens": 10_000}),
        ({"num_predict": 0}, {"max_tokens": 0}), ({"num_predict": 7}, {"max_tokens": 7}),
        ({"num_keep": -7}, {"n_keep": -1}), ({"seed": -5}, {"seed": -5}), ({"seed": 2**32 + 3}, {"seed": 3}),
        ({"seed": -1e300}, {"seed": -(2**31) + 1}), ({"stop": ["a"]}, {"stop": ["a"]}),
        ({"draft_num_predict": 3}, {"speculative.n_max": 3}),
        ({"temperature": None, "stop": None}, {"temperature": 0.8}), ({"penalize_newline": "x", "num_ctx": 5}, {}),
    ],
)  # fmt: skip
def test_options_are_put_into_the_engines_words(options: dict[str, Any], sent: dict[str, Any]) -> None:
    body = sampling(effective(options, {}), 1000)
    assert body.items() >= sent.items()
    assert orjson.dumps(body)


@given(
    st.dictionaries(
        st.sampled_from([*DEFAULTS, "num_predict", "num_keep", "stop", "num_ctx", "use_mmap", "other"]),
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=3)
        | st.lists(st.integers() | st.text(max_size=3), max_size=3),
    )
)
def test_any_options_are_sent_or_refused(options: dict[str, Any]) -> None:
    with contextlib.suppress(OptionError):
        assert orjson.dumps(sampling(effective(options, {}), 512))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), (0, 0), (5, 5), (0.5, 0.5), (-1, math.inf), ("5m", 300), ("1h30m", 5400), ("500ms", 0.5),
     ("-1m", math.inf), ("0", 0), (1e300, 1e300)],
)  # fmt: skip
def test_keep_alive(value: object, seconds: float | None) -> None:
    assert keep_alive_s(value) == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [("10", 'time: missing unit in duration "10"'), ("abc", 'time: invalid duration "abc"'),
     (True, "Unsupported type: 'bool'"),
     ([], "Unsupported type: '[]interface {}'"), ({}, "Unsupported type: 'map[string]interface {}'"),
     ("", 'time: invalid duration ""')],
)  # fmt: skip
def test_what_is_no_keep_alive(value: object, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        keep_alive_s(value)
    assert refused.value.message == message


def test_formats() -> None:
    assert response_format(None) is None
    assert response_format("") is None
    assert response_format("json") == {"type": "json_object"}
    shape = response_format({"type": "object"})
    assert shape == {"type": "json_schema", "json_schema": {"name": "schema", "schema": {"type": "object"}}}
    for wrong in ("xml", 5, True, []):
        with pytest.raises(RequestError):
            response_format(wrong)


def test_thinking() -> None:
    capable, other = model(Capability.THINKING), model()
    assert template_kwargs(None, capable, "m") == {"enable_thinking": True}, "on unless it is told otherwise"
    assert template_kwargs(False, capable, "m") == {"enable_thinking": False}
    assert template_kwargs("low", capable, "m") == {"enable_thinking": True, "reasoning_effort": "low"}
    assert template_kwargs(None, other, "m") is None
    assert template_kwargs(False, other, "m") is None
    for think in (True, "high"):
        with pytest.raises(RequestError, match='"m" does not support thinking'):
            template_kwargs(think, other, "m")
    for wrong in ("", "x", 1, [], {}):
        with pytest.raises(RequestError, match="invalid think value"):
            template_kwargs(wrong, capable, "m")


def test_nulls_are_nothing() -> None:
    assert check_request({"model": None, "stream": None, "messages": [{"role": "user", "images": None}]}, "R") == {
        "messages": [{"role": "user"}]
    }


def test_images_become_data_uris() -> None:
    png = "iVBORw0KGgoAAAANSUhEUg=="
    seeing = model(Capability.COMPLETION, Capability.VISION)
    request = {"model": "m", "messages": [{"role": "user", "content": "?", "images": [png, "data:image/x;base64,AA"]}]}
    request["messages"][0]["images"][1] = f"data:image/x;base64,{png}"
    parts = chat_body(request, seeing)["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url"]
    assert parts[1]["image_url"]["url"] == f"data:image/png;base64,{png}"
    for wrong in ("AAAA", "é", "!!!!", ""):
        with pytest.raises(RequestError):
            chat_body({"model": "m", "messages": [{"role": "user", "images": [wrong]}]}, seeing)
