"""Pictures and sounds in messages: what they are is told from their first bytes."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Capability, Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import RequestError
from llamarunner.proxies.ollama.media import media_parts


def model(*capabilities: Capability) -> Model:
    return Model("m", Path("/m.gguf"), ModelSettings(), ModelDetails(capabilities=frozenset(capabilities)))


ABLE = model(Capability.COMPLETION, Capability.VISION, Capability.AUDIO)


def text(head: bytes) -> str:
    return base64.b64encode(head + bytes(100)).decode()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff\xe0", "image/jpeg"), (b"GIF89a", "image/gif"),
        (b"BM", "image/bmp"),
    ],
)  # fmt: skip
def test_pictures(head: bytes, kind: str) -> None:
    data = text(head)
    expected = [{"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}]
    assert media_parts([data], ABLE) == expected
    assert media_parts([f"data:image/whatever;charset=x;base64,{data}"], ABLE) == expected


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"RIFF\x24\0\0\0WAVEfmt ", "wav"), (b"ID3\x04", "mp3"), (b"\xff\xfb\x90", "mp3"), (b"\xff\xf3\x40", "mp3")],
)
def test_sounds(head: bytes, kind: str) -> None:
    data = text(head)
    assert media_parts([data], ABLE) == [{"type": "input_audio", "input_audio": {"data": data, "format": kind}}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (text(b"RIFF\x24\0\0\0WEBPVP8 "), "WebP images are not supported: send PNG or JPEG"),
        (text(b"%PDF"), "unknown image format: expected PNG, JPEG, GIF or BMP"), ("", "unknown image format"),
        ("data:image/png,%89PNG", "a data: URI must be in base64"), ("é", "illegal base64 data in field images"),
        ("https://example.org/a.png", "illegal base64 data in field images"), ("!!!!", "illegal base64"),
    ],
)  # fmt: skip
def test_what_no_engine_reads(data: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        media_parts([data], ABLE)
    assert refused.value.message.startswith(message)


def test_what_the_model_cannot_do() -> None:
    with pytest.raises(RequestError, match="m does not support vision"):
        media_parts([text(b"\x89PNG")], model(Capability.COMPLETION))
    with pytest.raises(RequestError, match="m does not support audio"):
        media_parts([text(b"ID3")], model(Capability.VISION))


@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda raw: base64.b64encode(raw).decode()))
def test_anything_is_a_part_or_refused(data: str) -> None:
    with contextlib.suppress(RequestError):
        assert media_parts([data], ABLE)[0]["type"] in ("image_url", "input_audio")
