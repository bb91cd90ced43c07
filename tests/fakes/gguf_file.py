"""Writes GGUF files of any content, the impossible included: what `gguf`'s own writer would refuse to."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_U32, _FLOAT, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """A value with its type before it."""
    match value:
        case bytes():
            return value  # raw: type and value together
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _U32, value)
        case float():
            return struct.pack("<If", _FLOAT, value)
        case str():
            return struct.pack("<I", _STRING) + text(value)
        case list():
            items = [typed(item) for item in value]
            kind = items[0][:4] if items else struct.pack("<I", _U32)
            return struct.pack("<I", _ARRAY) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    raise TypeError(value)


def gguf_bytes(
    metadata: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = (),
    data: int = 0,
    *,
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """`tensors` are (name, shape, type, offset); `data` zero bytes follow the header, aligned to 32."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    counts = (len(tensors) if tensor_count is None else tensor_count, len(pairs) if key_count is None else key_count)
    parts = [b"GGUF", struct.pack("<IQQ", version, *counts)]
    parts += [text(key) + typed(value) for key, value in pairs]
    for name, shape, kind, offset in tensors:
        parts.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % 32) + bytes(data) if data or tensors else header


def model_bytes(architecture: str = "llama", **more: Any) -> bytes:
    """A small whole model: 64 x 32 elements of F16."""
    metadata = {"general.architecture": architecture, f"{architecture}.context_length": 4096}
    metadata |= {f"{architecture}.embedding_length": 64, f"{architecture}.block_count": 2, "general.file_type": 1}
    return gguf_bytes(metadata | more, [("token_embd.weight", (64, 32), 1, 0)], 64 * 32 * 2)


def write_model(path: Path, architecture: str = "llama", **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model_bytes(architecture, **more))
    return path


def projector_bytes(width: int = 64, *, vision: bool = True, audio: bool = False) -> bytes:
    metadata = {"general.architecture": "clip", "general.type": "mmproj", "clip.has_vision_encoder": vision}
    metadata |= {"clip.has_audio_encoder": audio, "clip.vision.projection_dim": width, "clip.projector_type": "mlp"}
    return gguf_bytes(metadata, [("mm.0.weight", (width, 4), 1, 0)], width * 4 * 2)


def whole_files() -> list[bytes]:
    """Every type of value, lists within lists, vocabularies, several kinds of model, several tensor types."""
    scalars = {f"x.{code}": struct.pack(f"<I{letter}", code, 1) for code, letter in enumerate("BbHhIif?") if code != 8}
    scalars |= {f"x.{code}": struct.pack(f"<I{letter}", code, 1) for code, letter in ((10, "Q"), (11, "q"), (12, "d"))}
    nested = struct.pack("<IIQ", 9, 9, 2) + 2 * typed(["a", "bc"])[4:]
    words = [f"token{number}" for number in range(300)]
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [float(number) for number in range(300)],
        "tokenizer.ggml.merges": words[:200],
        "tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}<think></think>",
    }
    tensors = [
        ("token_embd.weight", (2, 300), 1, 0),
        ("blk.0.attn_q.weight", (256, 4), 12, 1216),
        ("blk.0.ffn_up_exps.weight", (32, 4, 2), 8, 1792),
        ("v.patch_embd.weight", (16,), 0, 2112),
        ("fork.weight", (16,), 137, 2176),
    ]
    mixed = {"general.architecture": "qwen3moe", "qwen3moe.block_count": 2, "x.short": [1, 2, 3], "x.nested": nested}
    return [
        gguf_bytes({**mixed, **scalars, **tokenizer, "x.long": list(range(600))}, tensors, 2240),
        gguf_bytes({"general.alignment": 64, **mixed, **tokenizer}, tensors[:1], 1280),
        *(model_bytes(architecture, **tokenizer) for architecture in ("gemma3", "gpt-oss", "bert", "mamba")),
        gguf_bytes({"general.architecture": "llama", "general.type": "adapter"}),
        projector_bytes(),
        model_bytes(),
    ]
