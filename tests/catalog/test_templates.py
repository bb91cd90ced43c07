"""Go templates of the kind that models of Ollama's library have, and the format of each in llama.cpp."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.templates import _FINGERPRINTS, built_in_template


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}", "chatml"),
        ("<|im_start|>user<|im_sep|>{{ .Prompt }}<|im_end|>", "phi4"),
        ("<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>", "llama3"),
        ("<|header_start|>user<|header_end|>\n\n{{ .Prompt }}<|eot|>", "llama4"),
        ("[INST] <<SYS>>{{ .System }}<</SYS>>\n\n{{ .Prompt }} [/INST]", "llama2-sys"),
        ("[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}[/INST] {{ .Response }}</s>", "mistral-v3"),
        ("[INST] {{ .Prompt }} [/INST]", "mistral-v1"),
        ("[INST]{{ .Prompt }}[/INST]{{ .Response }}</s>", "mistral-v3-tekken"),
        ("[SYSTEM_PROMPT] {{ .System }}[/SYSTEM_PROMPT][INST] {{ .Prompt }}[/INST]", "mistral-v7"),
        ("[SYSTEM_PROMPT]{{ .System }}[/SYSTEM_PROMPT][INST]{{ .Prompt }}[/INST]", "mistral-v7-tekken"),
        ("<start_of_turn>user\n{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n", "gemma"),
        ("{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n", "phi3"),
        ("<|user|>\n{{ .Prompt }}<|endoftext|>\n<|assistant|>\n", "zephyr"),
        ("{{ .System }}\n\nUSER: {{ .Prompt }}\nASSISTANT: {{ .Response }}</s>", "vicuna"),
        ("SYSTEM: {{ .System }}\nUSER: {{ .Prompt }}\nASSISTANT: ", "vicuna-orca"),
        ("GPT4 Correct User: {{ .Prompt }}<|end_of_turn|>GPT4 Correct Assistant:", "openchat"),
        ("<｜User｜>{{ .Prompt }}<｜Assistant｜>{{ .Response }}<｜end▁of▁sentence｜>", "deepseek3"),
        ("### Instruction:\n{{ .Prompt }}\n### Response:\n{{ .Response }}\n<|EOT|>", "deepseek"),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ .Prompt }}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "command-r"),
        ("<|start_of_role|>user<|end_of_role|>{{ .Prompt }}<|end_of_text|>", "granite"),
        ("[gMASK]<sop><|user|>\n{{ .Prompt }}<|assistant|>\n", "chatglm4"),
        ("[|user|]{{ .Prompt }}\n[|assistant|]{{ .Response }}[|endofturn|]", "exaone3"),
        ("<用户>{{ .Prompt }}<AI>", "minicpm"),
    ],
)  # fmt: skip
def test_families(template: str, name: str) -> None:
    assert built_in_template(template) == name


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ .Prompt }}",
        "@@ Instruction\n{{ .Prompt }}\n\n@@ Response\n",
        "### Instruction:\n{{ .Prompt }}\n\n### Response:\n",
        "<|user|>\n{{ .Prompt }}</s>\n<|assistant|>\n",  # llama.cpp's zephyr ends turns otherwise
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "{{- /* <|im_start|> <|im_end|> */ -}}{{ .Prompt }}",
    ],
)
def test_what_llama_cpp_has_no_equal_of(template: str) -> None:
    assert built_in_template(template) == ""


@given(st.text())
def test_any_text_is_a_known_name_or_none(text: str) -> None:
    assert built_in_template(text) in {"", *(name for name, *_ in _FINGERPRINTS)}
