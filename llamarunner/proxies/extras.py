"""What llama-server has beyond OpenAI's API, on both ports: tokens of a text and the text of tokens, and reranking."""

from __future__ import annotations

from typing import Any

from llamarunner.catalog.catalog import Model
from llamarunner.errors import RequestError, UnsupportedError
from llamarunner.proxies.openai_body import expect

_MOST_TOKENS = 2**31  # llama.cpp counts them in 32 bits
_RERANKING = ("rerank", "reranking")


def check_tokenize(body: dict[str, Any], model: Model) -> bool:
    expect(body.get("content"), str, "content")
    return False


def check_detokenize(body: dict[str, Any], model: Model) -> bool:
    for index, token in enumerate(expect(body.get("tokens"), list, "tokens")):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < _MOST_TOKENS:
            raise RequestError(f"tokens[{index}] is no token")
    return False


def check_rerank(body: dict[str, Any], model: Model) -> bool:
    """An engine must be started for it."""
    if not any(model.settings.flags.get(name) for name in _RERANKING):
        raise UnsupportedError(
            f"{model.name} does not support reranking", hint="set `flags.reranking = true` for it in config.toml"
        )
    expect(body.get("query"), str, "query")
    for index, document in enumerate(expect(body.get("documents"), list, "documents")):
        expect(document, str, f"documents[{index}]")
    return False
