"""What a file's name says of its quantization. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

_IN_NAME = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|T?BF16|F16|F32|FP16|FP32|MXFP4(?:_MOE)?|TQ\d_\d))$", re.IGNORECASE
)
_PREFERRED = ("Q4_K_M", "Q4_0", "Q4_K_S", "Q8_0")  # what Ollama, LM Studio and llama.cpp take where none is named


def quantization_in(stem: str) -> str:
    """ "Q4_K_M" of "Qwen3-8B-Q4_K_M"; "" where it says none."""
    match = _IN_NAME.search(stem)
    return match[1].upper() if match else ""


def preferred(stems: Mapping[str, str]) -> str:
    """The path of the one that is meant where none is named; `stems` are the files' by path. "" of none."""

    def rank(path: str) -> tuple[int, str]:
        name = quantization_in(stems[path])
        return (_PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)), path

    return min(stems, key=rank, default="")
