"""Ollama's requests as bodies for llama-server: what the model brings along, which way a prompt takes, field names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamarunner.catalog.catalog import Capability, Model, ModelDetails, Preset
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import RequestError
from llamarunner.proxies.ollama import generate
from llamarunner.proxies.ollama.chat import chat_body
from llamarunner.proxies.ollama.errors import OptionError
from llamarunner.proxies.ollama.fields import check_request
from llamarunner.proxies.ollama.messages import text_only
from llamarunner.proxies.ollama.options import effective, unknown
from llamarunner.proxies.ollama.preset import (
    lay_under_chat,
    lay_under_completion,
    lay_under_messages,
    lay_under_response,
)

ALL = frozenset(Capability) - {Capability.EMBEDDING}
MODEL = Model("m", Path("/m.gguf"), ModelSettings(context=1000), ModelDetails(capabilities=ALL))
HISTORY = ({"role": "user", "content": "before"}, {"role": "assistant", "content": "after"})
PRESET = Preset(parameters={"temperature": 0.1, "top_k": 5, "stop": ["x"]}, system="Own", messages=HISTORY)
WITH_PRESET = replace(MODEL, preset=PRESET)
ASK = {"role": "user", "content": "?"}


def chat(model: Model = MODEL, **request: Any) -> dict[str, Any]:
    return chat_body(check_request({"model": "m", "messages": [ASK], **request}, "ChatRequest"), model)


def plan(model: Model = MODEL, **request: Any) -> tuple[str, dict[str, Any]]:
    return generate.plan(check_request({"model": "m", "prompt": "?", **request}, "GenerateRequest"), model)


# --- presets --------------------------------------------------------------------------------------------------------


def test_defaults_then_the_models_own_then_the_requests() -> None:
    body = chat(WITH_PRESET, options={"top_k": 7, "temperature": None})
    assert (body["temperature"], body["top_k"], body["top_p"], body["stop"]) == (0.1, 7, 0.9, ["x"])
    with pytest.raises(OptionError):
        effective({}, {"temperature": "hot"})


def test_the_models_own_system_prompt_and_conversation_come_first() -> None:
    assert chat(WITH_PRESET)["messages"] == [{"role": "system", "content": "Own"}, *HISTORY, ASK]
    system = {"role": "system", "content": "Theirs"}
    assert chat(WITH_PRESET, messages=[system, ASK])["messages"] == [*HISTORY, system, ASK]
    assert chat(messages=[ASK])["messages"] == [ASK]


def test_the_same_for_generations() -> None:
    assert plan(WITH_PRESET)[1]["messages"] == [{"role": "system", "content": "Own"}, *HISTORY, ASK]
    assert plan(WITH_PRESET, system="Theirs")[1]["messages"][0]["content"] == "Theirs"
    continued = generate.messages({"prompt": "?", "context": [1]}, WITH_PRESET)
    assert continued == [{"role": "system", "content": "Own"}, ASK], "the context has the conversation already"


# --- the ways of a prompt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "path", "prompt"),
    [
        ({}, "/v1/chat/completions", None), ({"raw": True}, "/completion", "?"), ({"context": [1]}, "/completion", ""),
        ({"suffix": "s"}, "/infill", ""), ({"template": "<{{ .System }}|{{ .Prompt }}>"}, "/completion", "<|?>"),
        ({"template": "{{ .System }}", "system": "S"}, "/completion", "S"),
        ({"raw": True, "suffix": "s"}, "/completion", "?"),
    ],
)  # fmt: skip
def test_which_way_a_prompt_takes(request_: dict[str, Any], path: str, prompt: str | None) -> None:
    found, body = plan(**request_)
    assert (found, body.get("prompt")) == (path, prompt)
    assert body["stream"] is True
    assert ("max_tokens" in body) is (path == "/v1/chat/completions")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"raw": True, "system": "s"}, "raw mode does not support template, system, or context"),
        ({"raw": True, "template": "t"}, "raw mode does not support template, system, or context"),
        ({"raw": True, "context": [1]}, "raw mode does not support template, system, or context"),
        ({"raw": True, "images": ["AA"]}, "raw mode does not support images"),
        ({"context": [1], "images": ["AA"]}, "a prompt with a context does not support images"),
        ({"context": [-1]}, "context holds numbers that are no tokens of this model"),
        ({"template": "{{ range .Messages }}"}, "this template uses more of Go's language"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
    ],
)  # fmt: skip
def test_what_contradicts_itself(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        plan(**request_)
    assert refused.value.message.startswith(message)


@pytest.mark.parametrize("name", ["width", "height", "steps"])
def test_no_pictures_are_made(name: str) -> None:
    with pytest.raises(RequestError, match="image generation models are not currently supported"):
        generate.refuse_picture_making({name: 5})
    generate.refuse_picture_making({name: 0})


def test_a_model_only_for_embeddings_answers_nothing() -> None:
    embedder = replace(MODEL, details=ModelDetails(capabilities=frozenset({Capability.EMBEDDING})))
    with pytest.raises(RequestError, match='"m" does not support chat'):
        chat(embedder)
    with pytest.raises(RequestError, match='"m" does not support generate'):
        plan(embedder)


def test_raw_prompts_have_their_formats_and_logprobs_too() -> None:
    assert plan(raw=True, format={"type": "object"})[1]["json_schema"] == {"type": "object"}
    assert plan(raw=True, format="json")[1]["json_schema"] == {}
    body = plan(raw=True, logprobs=True, top_logprobs=3)[1]
    assert body["n_probs"] == 3
    assert not {"logprobs", "top_logprobs", "response_format", "chat_template_kwargs"} & set(body)


# --- fields ---------------------------------------------------------------------------------------------------------


def test_field_names_have_any_case() -> None:
    call = {"ID": "c", "Function": {"Name": "f", "Arguments": {"City": "Oslo"}}}
    tool = {"Type": "function", "FUNCTION": {"Name": "f", "Parameters": {"Properties": {"City": {}}}}}
    body = chat(messages=[ASK, {"ROLE": "assistant", "Tool_Calls": [call]}], tools=[tool])
    assert body["messages"][1]["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"City":"Oslo"}'}}
    ]
    assert body["tools"][0]["function"] == {"name": "f", "parameters": {"Properties": {"City": {}}}}


def test_logprobs_with_tools_are_not_streamed() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chat(tools=[tool], logprobs=True)["stream"] is False, "llama-server refuses it"
    assert chat(tools=[tool])["stream"] is True
    assert chat(logprobs=True)["stream"] is True


def test_old_options_are_known_and_new_ones_told() -> None:
    old = [
        "tfs_z",
        "penalize_newline",
        "numa",
        "low_vram",
        "f16_kv",
        "vocab_only",
        "logits_all",
        "use_mlock",
        "num_gpu",
    ]
    assert unknown(dict.fromkeys(old)) == []
    assert unknown({"num_cxt": 1, "b": 2, "not a name": 3, "x" * 99: 4}) == ["b", "num_cxt"]
    assert len(unknown({f"option{n}": 0 for n in range(99)})) == 8
    body = chat(options={"mirostat": 2, "mirostat_tau": 4, "tfs_z": 1})
    assert (body["mirostat"], body["mirostat_tau"]) == (2, 4.0)
    assert "tfs_z" not in body
    assert "mirostat" not in chat()


def test_pictures_are_counted_and_taken_out() -> None:
    png = "iVBORw0KGgoAAAANSUhEUg=="
    messages = chat(messages=[{**ASK, "images": [png, png]}, {"role": "assistant", "content": "A"}, ASK])["messages"]
    assert text_only(messages) == ([ASK, {"role": "assistant", "content": "A"}, ASK], 2)


def test_a_model_with_nothing_but_a_template_in_go() -> None:
    lacking = replace(MODEL, preset=Preset(template="{{ .System }}>{{ .Prompt }}<", system="S"), hint="pull another")
    with pytest.raises(RequestError, match='"m" does not support chat: pull another'):
        chat(lacking)
    assert plan(lacking)[1]["prompt"] == "S>?<"
    too_much = replace(lacking, preset=Preset(template="{{ range .Messages }}{{ end }}"))
    with pytest.raises(RequestError, match="this template uses more of Go's language"):
        plan(too_much)


def test_openais_chats_get_what_the_model_brings_along() -> None:
    body: dict[str, Any] = {"model": "m", "messages": [ASK], "top_k": 9}
    assert lay_under_chat(body, WITH_PRESET)
    assert body["messages"] == [{"role": "system", "content": "Own"}, *HISTORY, ASK]
    assert {name: body[name] for name in body if name not in ("model", "messages")} == {
        "top_k": 9, "temperature": 0.1, "stop": ["x"],
    }  # fmt: skip
    system = {"role": "developer", "content": "Theirs"}
    body = {"model": "m", "messages": [system, ASK]}
    assert lay_under_chat(body, WITH_PRESET)
    assert body["messages"] == [*HISTORY, system, ASK]
    body = {"messages": [ASK], "max_completion_tokens": 3}
    assert lay_under_chat(
        body, replace(MODEL, preset=Preset(parameters={"num_predict": 7, "num_gpu": 3, "min_p": 0.1}))
    )
    assert body == {"messages": [ASK], "max_completion_tokens": 3, "min_p": 0.1}
    untouched: dict[str, Any] = {"messages": [ASK]}
    assert not lay_under_chat(untouched, MODEL)
    assert untouched == {"messages": [ASK]}


def test_openais_responses_get_it_too() -> None:
    body: dict[str, Any] = {"input": "?", "temperature": 1}
    assert lay_under_response(body, WITH_PRESET)
    after = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "after"}]}
    assert body == {
        "instructions": "Own", "input": [HISTORY[0], after, ASK], "temperature": 1, "top_k": 5, "stop": ["x"],
    }  # fmt: skip
    body = {"input": [ASK], "instructions": "Theirs", "max_output_tokens": 3}
    assert lay_under_response(body, replace(MODEL, preset=Preset({"num_predict": 7, "min_p": 0.1}, system="Own")))
    assert body == {"input": [ASK], "instructions": "Theirs", "max_output_tokens": 3, "min_p": 0.1}
    body = {"input": [{"role": "developer", "content": "Theirs"}, ASK]}
    assert not lay_under_response(body, replace(MODEL, preset=Preset(system="Own")))
    assert not lay_under_response(body, MODEL)
    assert "instructions" not in body


def test_anthropics_messages_get_it_too() -> None:
    body: dict[str, Any] = {"messages": [ASK], "top_k": 9, "max_tokens": 3}
    assert lay_under_messages(body, WITH_PRESET)
    assert body == {
        "system": "Own", "messages": [*HISTORY, ASK], "top_k": 9, "max_tokens": 3, "temperature": 0.1,
        "stop_sequences": ["x"],
    }  # fmt: skip
    body = {"messages": [ASK], "system": [{"type": "text", "text": "Theirs"}]}
    assert not lay_under_messages(body, replace(MODEL, preset=Preset(system="Own")))
    assert not lay_under_messages(body, MODEL)
    assert body["system"] == [{"type": "text", "text": "Theirs"}]


def test_a_completion_gets_the_parameters_alone() -> None:
    body: dict[str, Any] = {"prompt": "?", "max_tokens": 3}
    assert lay_under_completion(body, WITH_PRESET)
    assert body == {"prompt": "?", "max_tokens": 3, "temperature": 0.1, "top_k": 5, "stop": ["x"]}
    assert not lay_under_completion(body, MODEL)


def test_a_models_own_template_fills_in() -> None:
    fim = "{{- if .Suffix }}<pre>{{ .Prompt }}<suf>{{ .Suffix }}<mid>{{ else if .M }}{{ range .M }}{{ end }}{{ end }}"
    path, body = plan(replace(MODEL, preset=Preset(template=fim)), suffix="s")
    assert (path, body["prompt"]) == ("/completion", "<pre>?<suf>s<mid>")
    assert plan(suffix="s")[0] == "/infill"
    for raw in (False, True):
        with pytest.raises(RequestError, match="m does not support insert"):
            plan(replace(MODEL, details=ModelDetails()), suffix="s", raw=raw)
