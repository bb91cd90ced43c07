from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.manifests import manifest_path
from llamarunner.catalog.names import InvalidNameError, ModelName

parts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", fullmatch=True)
namespaces = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", fullmatch=True)
hosts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", fullmatch=True)
anything = st.text(max_size=60) | st.text(alphabet="ab.:/-_\\~\0 \n", max_size=40)


@pytest.mark.parametrize(
    ("text", "whole", "short"),
    [
        ("llama3", "registry.ollama.ai/library/llama3:latest", "llama3:latest"),
        ("llama3.2:1b-Q4_K_M", "registry.ollama.ai/library/llama3.2:1b-Q4_K_M", "llama3.2:1b-Q4_K_M"),
        ("mike/mistral", "registry.ollama.ai/mike/mistral:latest", "mike/mistral:latest"),
        ("library/mistral:7b", "registry.ollama.ai/library/mistral:7b", "mistral:7b"),
        ("Registry.Ollama.AI/Library/x", "Registry.Ollama.AI/Library/x:latest", "x:latest"),
        ("hf.co/bartowski/Qwen-GGUF:Q8_0", "hf.co/bartowski/Qwen-GGUF:Q8_0", "hf.co/bartowski/Qwen-GGUF:Q8_0"),
        ("localhost:5000/me/m", "localhost:5000/me/m:latest", "localhost:5000/me/m:latest"),
        ("localhost:5000/me/m:1", "localhost:5000/me/m:1", "localhost:5000/me/m:1"),
    ],
)
def test_the_parts_left_out_are_the_defaults(text: str, whole: str, short: str) -> None:
    name = ModelName.parse(text)
    assert (str(name), name.short) == (whole, short)
    assert ModelName.parse(text.upper()).key == name.key


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "/", "a:", ":a", "/a", "a/", "a//b", ".", "..", "../x", "a/../b:c", "a/b/..", "a/b/c/d", "-a", "a:-b",
        "a b", "a\0", "a\n", "å", "name.space/model", "host/na.me/m", "a:b:c/d", "m:t:u", "a" * 81, f"m:{'t' * 81}",
        f"{'h' * 351}/n/m", "~/m", "a\\b", "a%2fb",
    ],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidNameError, match="invalid model name"):
        ModelName.parse(text)


def test_the_longest_name() -> None:
    text = f"{'h' * 350}/{'n' * 80}/{'m' * 80}:{'t' * 80}"
    assert str(ModelName.parse(text)) == text


@given(hosts, namespaces, parts, parts)
def test_a_name_survives_being_written(host: str, namespace: str, model: str, tag: str) -> None:
    name = ModelName(host, namespace, model, tag)
    assert ModelName.parse(str(name)) == name
    assert ModelName.parse(name.short).key == name.key
    assert ModelName.of_path(name.path) == name


@given(anything)
def test_no_text_leads_out_of_the_store(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except InvalidNameError:
        return
    assert ModelName.parse(str(name)) == name
    root = Path("/store")
    inside = manifest_path(root, name)
    assert inside.parts[:3] == ("/", "store", "manifests")
    assert len(inside.parts) == 7
    assert not {".", "..", ""} & set(inside.parts[3:])


@given(st.lists(anything, min_size=1, max_size=6))
def test_no_path_is_taken_for_a_name_that_it_is_not(names: list[str]) -> None:
    path = PurePosixPath(*names)
    try:
        name = ModelName.of_path(path)
    except InvalidNameError:
        return
    assert name.path == path
