"""Ollama's `options`, checked, and put into llama-server's request fields. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner.proxies.ollama.errors import OptionError

DEFAULTS: Mapping[str, int | float] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": -1,
}
"""Ollama's samplers. All are always sent: llama-server's own defaults are others."""

_PASSED: Mapping[str, str] = {
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
    "draft_num_predict": "speculative.n_max",
}
"""Sent where they are given, under llama-server's name; for the first three Ollama itself has no use any more."""

_FLOATS = {
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat_tau",
    "mirostat_eta",
}
_INTEGERS = {"top_k", "repeat_last_n", "seed", "num_predict", "num_keep", "mirostat", "draft_num_predict"}
_LAUNCH_INTEGERS = {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"}
"""Decided when the model is loaded: see `demands`."""
_FORGOTTEN = {
    "tfs_z",
    "penalize_newline",
    "numa",
    "low_vram",
    "f16_kv",
    "vocab_only",
    "logits_all",
    "embedding_only",
    "use_mlock",
}
"""Of older releases. Clients still send them, and nobody heeds them."""
_KNOWN = _FLOATS | _INTEGERS | _LAUNCH_INTEGERS | _FORGOTTEN | {"use_mmap", "stop"}
_MOST = 2**31 - 1  # llama.cpp counts in 32 bits
_SHOWN_NAMES = 8


def effective(options: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """The request's options over those the model brings along, each of its type. Null ones are not there. Raises
    OptionError."""
    return {name: _checked(name, value) for name, value in {**preset, **_given(options)}.items() if value is not None}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def sampling(options: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Request fields of llama-server for `effective` options; `context` is the tokens a request has."""
    return request_fields({**DEFAULTS, "num_predict": -1, "num_keep": 4, **options}, context)


def request_fields(options: Mapping[str, Any], context: int) -> dict[str, Any]:
    """As `sampling`, of what there is in `options` alone."""
    context = max(context, options.get("num_ctx", 0))
    body: dict[str, Any] = {name: options[name] for name in DEFAULTS if name in options}
    if body.get("repeat_last_n", 0) < 0:
        body["repeat_last_n"] = context  # llama-server refuses -1
    if (wanted := options.get("num_predict")) is not None:
        body["max_tokens"] = wanted if 0 <= wanted <= 10 * context else 10 * context
    if "num_keep" in options:
        body["n_keep"] = max(options["num_keep"], -1)
    if options.get("stop"):
        body["stop"] = options["stop"]
    return body | {theirs: options[name] for name, theirs in _PASSED.items() if name in options}


def unknown(options: Mapping[str, Any]) -> list[str]:
    """Names that mean nothing to us, as far as they look like names: what else a client put there is not repeated."""
    names = [name for name in options if name not in _KNOWN and name.isidentifier() and len(name) <= 40]
    return sorted(names)[:_SHOWN_NAMES]


def _checked(name: str, value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _FLOATS:
        if not is_number:
            raise OptionError(f'option "{name}" must be of type float32')
        return float(value)
    if name in _INTEGERS or name in _LAUNCH_INTEGERS:
        if not is_number:
            raise OptionError(f'option "{name}" must be of type integer')
        if name == "seed" and value >= 0:
            return int(value) % 2**32
        return max(-_MOST, min(int(value), _MOST))
    if name == "use_mmap" and not isinstance(value, bool):
        raise OptionError(f'option "{name}" must be of type boolean')
    if name == "stop":
        if not isinstance(value, list):
            raise OptionError(f'option "{name}" must be of type array')
        if not all(isinstance(each, str) for each in value):
            raise OptionError(f'option "{name}" must be of an array of strings')
    return value
