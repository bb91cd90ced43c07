"""POST /api/embed and /api/embeddings: what is to be embedded, and the vectors as Ollama has them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import EngineError, RequestError, UnsupportedError

TOO_LONG = "the input length exceeds the context length"
L2, RAW = 2, -1
"""llama-server's `embd_normalize`."""

_RAW_ARCHITECTURES = ("nomic-bert", "nomic-bert-moe")


def inputs_of(value: Any) -> list[str]:
    """The texts of `input`: none for "" and [], which only load the model."""
    match value:
        case None | "" | []:
            return []
        case str():
            return [value]
        case list() if all(isinstance(each, str) for each in value):
            return list(value)
        case _:
            raise RequestError("invalid input type")


def require_embeddings(model: Model) -> None:
    """An engine must be started for embeddings: one that was not cannot make them."""
    if Capability.EMBEDDING not in model.capabilities:
        raise UnsupportedError(
            f"{model.name} does not support embeddings", hint="set `embeddings = true` for it in config.toml"
        )


def is_raw(model: Model) -> bool:
    """Whether /api/embeddings gives this model's vectors as they come, not of length 1."""
    metadata = model.details.metadata or {}
    architecture = model.details.architecture
    odd_bert = architecture == "bert" and metadata.get("tokenizer.ggml.model") != "bert"
    return (architecture in _RAW_ARCHITECTURES or odd_bert) and not metadata.get(f"{architecture}.normalize_embeddings")


def body_of(text: str | Sequence[int], normalize: int) -> dict[str, Any]:
    """POST /v1/embeddings of one text, or of its tokens."""
    return {"input": text, "embd_normalize": normalize, "encoding_format": "float"}


def vector_of(answer: Mapping[str, Any]) -> list[float]:
    try:
        vector = answer["data"][0]["embedding"]
    except (KeyError, IndexError, TypeError):
        vector = None
    if not isinstance(vector, list) or not all(isinstance(each, int | float) for each in vector):
        raise EngineError("the engine answered without an embedding")
    return vector


def tokens_of(answer: Mapping[str, Any]) -> int:
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0
