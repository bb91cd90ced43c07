"""What /api/show says of a model and what it brings along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llamarunner.catalog.catalog import Capability, Model, ModelDetails, Preset
from llamarunner.catalog.gguf import Tensor
from llamarunner.config.schema import ModelSettings
from llamarunner.proxies.ollama.show import Files, show

DETAILS = ModelDetails(
    architecture="qwen3",
    parameter_count=8_190_735_360,
    parameter_size="8.2B",
    quantization="Q4_K_M",
    context_length=40960,
    embedding_length=4096,
    chat_template="{% if tools %}{{ tools }}{% endif %}",
    basename="Qwen3",
    capabilities=frozenset({Capability.COMPLETION, Capability.TOOLS, Capability.THINKING}),
    metadata={
        "tokenizer.ggml.tokens": None, "qwen3.block_count": 36, "general.name": "x", "general.basename": "Qwen3",
        "tokenizer.chat_template": "...", "general.architecture": "qwen3", "qwen3.context_length": 40960,
    },
)  # fmt: skip
PLAIN = Model("qwen3:8b", Path("/m/qwen3.gguf"), ModelSettings(context=8192), DETAILS)
PRESET = Preset(
    parameters={"temperature": 0.6, "stop": ["<|im_end|>", '"'], "use_mmap": True},
    system="Be brief",
    messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}),
    licenses=("MIT", "Apache"),
)


def shown(model: Model, files: Files | None = None, user_agent: str = "", **request: Any) -> dict[str, Any]:
    return show(model, {"model": "QWEN3:8b", **request}, files or Files(), user_agent=user_agent)


def test_a_plain_model() -> None:
    record = shown(PLAIN)
    assert record["parameters"] == "num_ctx                        8192"
    assert record["template"] == DETAILS.chat_template
    assert record["capabilities"] == ["completion", "tools", "thinking"]
    assert list(record["model_info"].items()) == [
        ("general.architecture", "qwen3"), ("general.basename", "Qwen3"), ("general.parameter_count", 8_190_735_360),
        ("qwen3.block_count", 36), ("qwen3.context_length", 40960), ("qwen3.embedding_length", 4096),
        ("tokenizer.ggml.tokens", None),
    ]  # fmt: skip
    assert not {"license", "system", "messages", "projector_info", "tensors"} & set(record)


def test_what_it_brings_along() -> None:
    record = shown(replace(PLAIN, preset=PRESET))
    assert record["parameters"].splitlines() == [
        "num_ctx                        8192",
        'stop                           "<|im_end|>"',
        'stop                           "\\""',
        "temperature                    0.6",
        "use_mmap                       true",
    ]
    assert record["license"] == "MIT\nApache"
    assert record["system"] == "Be brief"
    assert record["messages"] == list(PRESET.messages)
    for line in ("FROM /m/qwen3.gguf", 'SYSTEM """Be brief"""', 'PARAMETER stop "<|im_end|>"', "MESSAGE assistant Ho"):
        assert line in record["modelfile"].splitlines()


def test_the_request_may_lay_its_own_over_it() -> None:
    record = shown(replace(PLAIN, preset=PRESET), system="Be long", options={"temperature": 1.5, "num_ctx": 100})
    assert record["system"] == "Be long"
    assert "num_ctx                        100" in record["parameters"]
    assert "temperature                    1.5" in record["parameters"]


def test_copilot_shows_the_basename() -> None:
    assert shown(PLAIN, user_agent="GitHubCopilotChat/0.31")["model_info"]["general.basename"] == "QWEN3:8b"
    assert shown(PLAIN, user_agent="curl/8")["model_info"]["general.basename"] == "Qwen3"


def test_files_are_told_of_where_they_were_read() -> None:
    record = shown(PLAIN, Files({"clip.b": 2, "clip.a": 1}, [Tensor("token_embd.weight", "Q8_0", (576, 49152))]))
    assert list(record["projector_info"]) == ["clip.a", "clip.b"]
    assert record["tensors"] == [{"name": "token_embd.weight", "type": "Q8_0", "shape": [576, 49152]}]


def test_clients_find_what_they_look_for_in_a_template() -> None:
    filling = replace(PLAIN, details=replace(DETAILS, capabilities=frozenset({Capability.INSERT})))
    assert ".Suffix" in shown(filling)["template"]
    bare = replace(PLAIN, details=replace(DETAILS, chat_template=""), preset=Preset(template="{{ .System }}"))
    assert shown(bare)["template"] == "{{ .System }}"


def test_a_header_that_says_little_still_has_what_clients_rely_on() -> None:
    info = shown(Model("m", Path("/m.gguf"), ModelSettings()))["model_info"]
    assert info["general.architecture"] == "unknown"
    assert isinstance(info["unknown.context_length"], int)
