"""Chat templates in Go's language, which Ollama's models have beside files that bring none. llama.cpp cannot run those,
but knows the formats of most families by name. Pure.
"""

from __future__ import annotations

import re

# llama.cpp's name, marks that must all be in the Go template, and marks that must not; the first that fits is taken, so
# what is special comes before what is common
_FINGERPRINTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("phi4", ("<|im_start|>", "<|im_sep|>"), ()),
    ("chatml", ("<|im_start|>", "<|im_end|>"), ()),
    ("llama4", ("<|header_start|>", "<|header_end|>"), ()),
    ("llama3", ("<|start_header_id|>", "<|end_header_id|>"), ()),
    ("granite", ("<|start_of_role|>", "<|end_of_role|>"), ()),
    ("command-r", ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"), ("<|START_RESPONSE|>",)),
    ("gemma", ("<start_of_turn>", "<end_of_turn>"), ()),
    ("deepseek3", ("<｜User｜>", "<｜Assistant｜>"), ()),
    ("llama2-sys", ("[INST]", "<<SYS>>"), ()),
    ("mistral-v7", ("[INST]", "[SYSTEM_PROMPT] "), ()),
    ("mistral-v7-tekken", ("[INST]", "[SYSTEM_PROMPT]"), ()),
    ("mistral-v1", ("[INST] ", " [/INST]"), ()),
    ("mistral-v3", ("[INST] ", "[/INST]"), ()),
    ("mistral-v3-tekken", ("[INST]", "[/INST]"), ()),
    ("exaone4", ("[|user|]", "[|assistant|]", "[|endofturn|]", "[|tool|]"), ()),
    ("exaone3", ("[|user|]", "[|assistant|]", "[|endofturn|]"), ()),
    ("chatglm4", ("[gMASK]<sop>", "<|assistant|>"), ()),
    ("phi3", ("<|assistant|>", "<|end|>"), ()),
    ("zephyr", ("<|assistant|>", "<|endoftext|>"), ()),
    ("openchat", ("GPT4 Correct ", "<|end_of_turn|>"), ()),
    ("vicuna-orca", ("SYSTEM: ", "USER: ", "ASSISTANT: "), ()),
    ("vicuna", ("USER: ", "ASSISTANT: "), ("SYSTEM:",)),
    ("deepseek", ("### Instruction:", "### Response:", "<|EOT|>"), ()),
    ("minicpm", ("<用户>", "<AI>"), ()),
)
_COMMENT = re.compile(r"\{\{-?\s*/\*.*?\*/\s*-?\}\}", re.DOTALL)


def built_in_template(template: str) -> str:
    """llama.cpp's name for the format that the Go template writes; "" where none is known to be the same."""
    text = _COMMENT.sub("", template)
    for name, present, absent in _FINGERPRINTS:
        if all(mark in text for mark in present) and not any(mark in text for mark in absent):
            return name
    return ""
