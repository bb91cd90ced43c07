"""Models found by what clients call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import ModelNotFoundError


def model(name: str, *aliases: str) -> Model:
    return Model(name, Path(f"/{name}.gguf"), ModelSettings(), aliases=aliases)


CATALOG = Catalog([model("qwen3:8b", "qwen"), model("Smol"), model("hf.co/Org/Repo:Q4_K_M"), model("someone/smol")])


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("qwen3:8b", "qwen3:8b"), ("QWEN3:8B", "qwen3:8b"), ("qwen:latest", "qwen3:8b"), ("library/smol", "Smol"),
        ("registry.ollama.ai/library/qwen3:8b", "qwen3:8b"), ("smol:latest", "Smol"), (" smol ", "Smol"),
        ("registry.ollama.ai/someone/smol", "someone/smol"), ("hf.co/org/repo:q4_k_m", "hf.co/Org/Repo:Q4_K_M"),
    ],
)  # fmt: skip
def test_names(asked: str, name: str) -> None:
    assert CATALOG.find(asked).name == name


@pytest.mark.parametrize("asked", ["", "qwen3", "qwen3:4b", "other/smol", "hf.co/library/qwen3:8b", "smol:1"])
def test_what_is_not_there(asked: str) -> None:
    with pytest.raises(ModelNotFoundError):
        CATALOG.find(asked)
