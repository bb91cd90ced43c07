"""Requests of OpenAI's API that llama-server serves only in another way: a completion with a suffix, and embeddings of
fewer dimensions. Pure."""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.openai_body import expect
from llamarunner.proxies.sse import amend_lines
from llamarunner.proxies.upstream import parse_answer
from llamarunner.proxies.vectors import unit


@dataclass(frozen=True, slots=True)
class Detour:
    """What the engine is asked instead, and how its answer becomes the one that was asked for. `amend` gets a whole
    answer, or whole lines of a stream."""

    path: str
    body: dict[str, Any]
    amend: Callable[[bytes], bytes]


# --- a completion with a suffix: llama.cpp's /infill -----------------------------------------------------------------


def infill_detour(body: Mapping[str, Any], model: Model) -> Detour | None:
    suffix = body.get("suffix")
    if suffix is None or suffix == "":
        return None
    if Capability.INSERT not in model.capabilities:
        raise UnsupportedError(f"{model.name} does not support insert")
    asked = {
        "input_prefix": expect(body.get("prompt"), str, "prompt"),
        "input_suffix": expect(suffix, str, "suffix"),
        **{name: value for name, value in body.items() if name not in ("prompt", "suffix", "max_tokens")},
    }
    if body.get("max_tokens") is not None:
        asked["n_predict"] = body["max_tokens"]
    completion = {"id": f"cmpl-{os.urandom(8).hex()}", "object": "text_completion", "created": int(time.time())}
    return Detour("/infill", asked, partial(_completions, {**completion, "model": body["model"]}))


def _completions(completion: Mapping[str, Any], data: bytes) -> bytes:
    amended = amend_lines(data, b'"content":', partial(_as_completion, completion))
    # a last event has its figures, and OpenAI's streams an end of their own
    is_end = data.startswith(b"data:") and b'"stop":true' in data
    return amended.rstrip(b"\n") + b"\n\ndata: [DONE]\n\n" if is_end else amended


def _as_completion(completion: Mapping[str, Any], record: dict[str, Any]) -> None:
    choice = {"text": record["content"], "index": record.get("index", 0), "logprobs": None, "finish_reason": None}
    made: dict[str, Any] = {**completion, "choices": [choice]}
    if record["stop"]:
        choice["finish_reason"] = "length" if record.get("stop_type") == "limit" else "stop"
        read, written = record.get("tokens_evaluated", 0), record.get("tokens_predicted", 0)
        made["usage"] = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        made["timings"] = record.get("timings")
    record.clear()
    record.update(made)


# --- embeddings of fewer dimensions -----------------------------------------------------------------------------------


def dimensions_detour(body: Mapping[str, Any], model: Model) -> Detour | None:
    """llama-server takes no notice of `dimensions`."""
    wanted = body.get("dimensions")
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise RequestError("dimensions must be a positive number")
    asked = {name: value for name, value in body.items() if name != "dimensions"}
    in_base64 = body.get("encoding_format") == "base64"
    if in_base64:
        asked["encoding_format"] = "float"
    return Detour("/v1/embeddings", asked, partial(_shortened, wanted, in_base64=in_base64))


def _shortened(dimensions: int, data: bytes, *, in_base64: bool) -> bytes:
    answer = parse_answer(data)
    for record in answer.get("data") or ():
        vector = unit(record["embedding"], dimensions)
        record["embedding"] = _as_base64(vector) if in_base64 else vector
    return orjson.dumps(answer)


def _as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
