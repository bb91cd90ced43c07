"""Which projector (mmproj) of a folder belongs to which of its models. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from llamarunner.catalog.catalog import Capability, ModelDetails
from llamarunner.catalog.gguf import Header

_GENERIC_WORDS = {"mmproj", "model", "ggml", "clip", "vision", "gguf", "f16", "fp16", "bf16", "f32", "fp32", "q8", "0"}
_PREFERENCE = ("F16", "BF16", "F32", "Q8_0")  # what runs everywhere first


def pair(models: Mapping[str, ModelDetails], projectors: Mapping[str, Header]) -> dict[str, str]:
    """The projector of each model that has one.

    A folder often holds one model in several quantizations with its projector; then they belong together. Where
    several models lie side by side, the projector's name must be within the model's, or, where it is a mere
    "mmproj-F16", the width that it projects to must be the model's.
    """
    able = {path: details for path, details in models.items() if Capability.COMPLETION in details.capabilities}
    is_one_model = len({(d.architecture, d.embedding_length, d.block_count) for d in able.values()}) == 1
    found = {}
    for path, details in able.items():
        fitting = [p for p, header in projectors.items() if is_one_model or _belongs(p, header, path, details)]
        if fitting:
            found[path] = min(fitting, key=lambda p: (_preference(projectors[p]), PurePath(p).name))
    return found


def _belongs(projector: str, header: Header, model: str, details: ModelDetails) -> bool:
    words = _words(projector)
    if words:
        return words <= _words(model)
    widths = {header.number("clip.vision.projection_dim"), header.number("clip.audio.projection_dim")} - {0}
    return details.embedding_length in widths


def _words(path: str) -> set[str]:
    return set(re.split(r"[-_. ]+", PurePath(path).stem.lower())) - _GENERIC_WORDS - {""}


def _preference(header: Header) -> int:
    stored = max(header.parameters, key=lambda kind: header.parameters[kind], default="")
    return _PREFERENCE.index(stored) if stored in _PREFERENCE else len(_PREFERENCE)
