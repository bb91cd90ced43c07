"""Pictures and sounds of a message, as content parts of OpenAI's API. Pure.

An engine reads PNG, JPEG, GIF and BMP, WAV and MP3. What a file is, its first bytes say: Ollama's clients send nothing
else about it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError

_PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp"}
_HEAD_CHARACTERS = 64
_DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,")


def media_parts(files: Sequence[str], model: Model) -> list[dict[str, Any]]:
    """A part for each of `files`: base64, or data: URIs of it. Raises RequestError for what no engine can read."""
    return [_part(text, model) for text in files]


def _part(text: str, model: Model) -> dict[str, Any]:
    if text.startswith("data:"):
        uri = _DATA_URI.match(text)
        if uri is None:
            raise RequestError("a data: URI must be in base64")
        text = text[uri.end() :]
    head = _head(text)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _sound(text, "wav", model)
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # an MPEG frame, layer III
        return _sound(text, "mp3", model)
    if Capability.VISION not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support vision")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        raise RequestError("WebP images are not supported: send PNG or JPEG")
    kind = next((kind for magic, kind in _PICTURES.items() if head.startswith(magic)), "")
    if not kind:
        raise RequestError("unknown image format: expected PNG, JPEG, GIF or BMP")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{text}"}}


def _sound(text: str, kind: str, model: Model) -> dict[str, Any]:
    if Capability.AUDIO not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support audio")
    return {"type": "input_audio", "input_audio": {"data": text, "format": kind}}


def _head(text: str) -> bytes:
    """The first bytes of the file; the rest is the engine's to decode."""
    start = text[:_HEAD_CHARACTERS]
    try:
        return base64.b64decode(start + "=" * (-len(start) % 4), validate=True)
    except ValueError:  # binascii.Error for a wrong length, its parent for what is not ASCII
        raise RequestError("illegal base64 data in field images") from None
