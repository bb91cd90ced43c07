from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Capability, Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.engines.flags import canonical, flags_for, to_arguments
from llamarunner.errors import UnsupportedError

CHAT, EMBED = frozenset({Capability.COMPLETION}), frozenset({Capability.EMBEDDING})


def model(
    name: str = "m",
    *,
    capabilities: frozenset[Capability] = CHAT,
    trained: int = 32768,
    mmproj: Path | None = None,
    **settings: Any,
) -> Model:
    details = ModelDetails(context_length=trained, capabilities=capabilities)
    return Model(name, Path("/models/m.gguf"), ModelSettings(**settings), details=details, mmproj=mmproj)


def arguments(**more: Any) -> str:
    return " ".join(to_arguments(flags_for(model(**more), 4001)))


START = "--model /models/m.gguf --host 127.0.0.1 --port 4001 --alias m"
END = "--no-webui --slots"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, f"{START} --ctx-size 8192 --parallel 1 --jinja {END}"),
        ({"context": 4096, "parallel": 4}, f"{START} --ctx-size 16384 --parallel 4 --jinja {END}"),
        ({"context": 0, "parallel": 2}, f"{START} --ctx-size 65536 --parallel 2 --jinja {END}"),
        ({"context": 99999}, f"{START} --ctx-size 32768 --parallel 1 --jinja {END}"),
        ({"gpu_layers": 12}, f"{START} --ctx-size 8192 --parallel 1 --n-gpu-layers 12 --jinja {END}"),
        ({"gpu_layers": 0}, f"{START} --ctx-size 8192 --parallel 1 --n-gpu-layers 0 --jinja {END}"),
        ({"gpu_layers": "all"}, f"{START} --ctx-size 8192 --parallel 1 --n-gpu-layers 999 --jinja {END}"),
        (
            {"chat_template": "chatml"},
            f"{START} --ctx-size 8192 --parallel 1 --jinja --chat-template chatml {END}",
        ),
        (
            {"chat_template": "gemma"},
            f"{START} --ctx-size 8192 --parallel 1 --no-jinja --chat-template gemma {END}",
        ),
        (
            {"chat_template": "gemma", "flags": {"jinja": True}},
            f"{START} --ctx-size 8192 --parallel 1 --chat-template gemma {END} --jinja",
        ),
        (
            {"mmproj": Path("/models/mmproj.gguf")},
            f"{START} --ctx-size 8192 --parallel 1 --jinja --mmproj /models/mmproj.gguf {END}",
        ),
        (
            {"capabilities": EMBED, "trained": 512},
            f"{START} --ctx-size 512 --parallel 1 --jinja --embeddings --batch-size 512 --ubatch-size 512 {END}",
        ),
        (
            {"embeddings": True},
            f"{START} --ctx-size 8192 --parallel 1 --jinja --embeddings --pooling mean"
            f" --batch-size 2048 --ubatch-size 2048 {END}",
        ),
        (
            {
                "flags": {
                    "cache_type_k": "q8_0",
                    "mlock": True,
                    "metrics": False,
                    "lora": ["a.gguf", "b.gguf"],
                    "temp": 0.5,
                }
            },
            f"{START} --ctx-size 8192 --parallel 1 --jinja {END}"
            " --cache-type-k q8_0 --mlock --lora a.gguf --lora b.gguf --temp 0.5",
        ),
        ({"flags": {"c": 512}}, f"{START} --parallel 1 --jinja {END} --ctx-size 512"),
        ({"flags": {"np": 2}}, f"{START} --ctx-size 16384 --jinja {END} --parallel 2"),
        ({"flags": {"no-jinja": True}}, f"{START} --ctx-size 8192 --parallel 1 {END} --no-jinja"),
        ({"flags": {"jinja": False}}, f"{START} --ctx-size 8192 --parallel 1 {END}"),
        ({"flags": {"webui": True}}, f"{START} --ctx-size 8192 --parallel 1 --jinja --slots --webui"),
        ({"flags": {"alias": "x"}}, f"{START[:-10]} --ctx-size 8192 --parallel 1 --jinja {END} --alias x"),
        (
            {"gpu_layers": "all", "flags": {"--gpu_layers": 3}},
            f"{START} --ctx-size 8192 --parallel 1 --jinja {END} --n-gpu-layers 3",
        ),
        (
            {"chat_template": "chatml", "flags": {"chat-template-file": "/t.jinja"}},
            f"{START} --ctx-size 8192 --parallel 1 --jinja {END} --chat-template-file /t.jinja",
        ),
        (
            {"embeddings": True, "flags": {"rerank": True, "ub": 256, "b": 256}},
            f"{START} --ctx-size 8192 --parallel 1 --jinja --embeddings {END}"
            " --rerank --ubatch-size 256 --batch-size 256",
        ),
    ],
)
def test_the_flags_of(more: dict[str, Any], expected: str) -> None:
    assert arguments(**more) == expected


def test_a_name_is_one_argument_and_one_with_commas_is_no_alias() -> None:
    assert to_arguments(flags_for(model("日本 a/b 😀"), 1))[6:8] == ["--alias", "日本 a/b 😀"]
    assert "--alias" not in to_arguments(flags_for(model("a, b"), 1))


def test_what_a_manifest_brings_along() -> None:
    brought = replace(model(), chat_template="llama3", adapters=(Path("/a.gguf"), Path("/b.gguf")))
    flags = flags_for(brought, 1)
    assert (flags["chat-template"], flags["lora"]) == ("llama3", "/a.gguf,/b.gguf")
    own = replace(brought, settings=ModelSettings(chat_template="chatml"))
    assert flags_for(own, 1)["chat-template"] == "chatml"


def test_a_chat_template_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{{ messages }}")
    assert flags_for(model(chat_template=str(path)), 1)["chat-template-file"] == str(path)
    with pytest.raises(UnsupportedError, match=r"no chat template .*gone\.jinja"):
        flags_for(model(chat_template="gone.jinja"), 1)


@pytest.mark.parametrize(
    "name",
    ["host", "port", "api-key", "api_key", "model", "m", "--model", "hf", "hf-repo", "api-key-file", "ssl-key-file"],
)
def test_flags_that_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the flag '{name}' cannot be set") as caught:
        flags_for(model(flags={name: "x"}), 1)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["", "--", "a b", "x=y", "日本", "-1"])
def test_what_is_not_the_name_of_a_flag(name: str) -> None:
    with pytest.raises(UnsupportedError, match="not the name of a flag"):
        flags_for(model(flags={name: True}), 1)


def test_one_flag_in_two_spellings() -> None:
    with pytest.raises(UnsupportedError, match="'ctx_size' and 'c' are the same"):
        flags_for(model(flags={"ctx_size": 1, "c": 2}), 1)


SPELLINGS = st.sampled_from(
    """
    c ctx-size ctx_size ctx__size np parallel ngl gpu_layers jinja no-jinja chat-template chat-template-file mmproj mm
    slots no-slots webui no-ui embedding embeddings pooling rerank b ub batch-size alias a host port model m api-key
    threads t x no-x api_key --host -h hf_repo
    """.split()  # noqa: SIM905 - a list of forty strings is harder to read
)
VALUES = st.one_of(st.booleans(), st.integers(), st.text("ab-", max_size=3), st.lists(st.integers(), max_size=2))


@given(
    flags=st.dictionaries(SPELLINGS, VALUES, max_size=8),
    embeddings=st.sampled_from([None, True]),
    template=st.sampled_from([None, "chatml"]),
    layers=st.sampled_from(["all", "auto", 5]),
)
def test_no_flag_twice_and_the_address_is_ours(
    flags: dict[str, Any], embeddings: bool | None, template: str | None, layers: Any
) -> None:
    wanted = model(
        flags=flags, embeddings=embeddings, chat_template=template, gpu_layers=layers, mmproj=Path("/p.gguf")
    )
    try:
        decided = flags_for(wanted, 4001)
    except UnsupportedError:
        spelled = [canonical(name) for name in flags]
        assert len(set(spelled)) < len(spelled) or {"host", "port", "model", "api-key", "hf-repo"} & set(spelled)
        return
    assert (decided["host"], decided["port"], decided["model"]) == ("127.0.0.1", 4001, "/models/m.gguf")
    assert not {"api-key", "hf-repo"} & set(decided)
    assert all(canonical(name) == name for name in decided)
    for name, value in flags.items():
        assert decided[canonical(name)] == value
    texts = to_arguments({name: value for name, value in decided.items() if not isinstance(value, list | str)})
    given_once = [text for text in texts if text.startswith("--")]
    assert len(set(given_once)) == len(given_once)
