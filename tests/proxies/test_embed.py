"""Inputs and vectors of Ollama's embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import EngineError, RequestError
from llamarunner.proxies.ollama.embed import inputs_of, is_raw, tokens_of, vector_of
from llamarunner.proxies.vectors import unit


@pytest.mark.parametrize(("given_", "texts"), [(None, []), ("", []), ([], []), ("a", ["a"]), (["a", ""], ["a", ""])])
def test_inputs(given_: Any, texts: list[str]) -> None:
    assert inputs_of(given_) == texts


@pytest.mark.parametrize("given_", [7, True, {}, [7], ["a", None], [["a"]]])
def test_what_is_no_input(given_: Any) -> None:
    with pytest.raises(RequestError, match="invalid input type"):
        inputs_of(given_)


@given(st.lists(st.floats(-1e6, 1e6), max_size=20), st.integers(-3, 30))
def test_a_vector_has_length_one(vector: list[float], dimensions: int) -> None:
    found = unit(vector, dimensions)
    assert len(found) == (min(dimensions, len(vector)) if dimensions > 0 else len(vector))
    assert math.hypot(*found) == pytest.approx(1.0) or not any(abs(each) > 1e-300 for each in vector[: len(found)])


@pytest.mark.parametrize(
    ("architecture", "metadata", "raw"),
    [
        ("nomic-bert", {}, True), ("nomic-bert-moe", {}, True), ("bert", {"tokenizer.ggml.model": "t5"}, True),
        ("bert", {"tokenizer.ggml.model": "bert"}, False), ("llama", {}, False), ("qwen3", {}, False),
        ("nomic-bert", {"nomic-bert.normalize_embeddings": True}, False),
        ("bert", {"tokenizer.ggml.model": "t5", "bert.normalize_embeddings": True}, False),
    ],
)  # fmt: skip
def test_which_models_the_older_endpoint_leaves_raw(architecture: str, metadata: dict[str, Any], raw: bool) -> None:
    model = Model("m", Path("/m.gguf"), ModelSettings(), ModelDetails(architecture=architecture, metadata=metadata))
    assert is_raw(model) is raw
    assert is_raw(replace(model, details=ModelDetails())) is False


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{}]}, {"data": [{"embedding": "AAAA"}]}, {"data": 7}])
def test_an_engine_that_answers_something_else(answer: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        vector_of(answer)
    assert tokens_of(answer) == 0
