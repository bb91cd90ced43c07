"""The same wishes in the words of builds from 2024 to 2026, by what their --help lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ModelSettings
from llamarunner.engines.flags import canonical, flags_for, to_arguments
from llamarunner.engines.known_flags import as_known
from llamarunner.engines.probe import Probe, parse_help
from llamarunner.errors import UnsupportedError

HELP = Path(__file__).with_name("help")
OLD, NEW, IK = (
    parse_help((HELP / f"{name}.txt").read_text())
    for name in ("llama.cpp-2024-12", "llama.cpp-2026-11", "ik_llama.cpp-2026")
)


def theirs(known: Probe, **flags: Any) -> list[str]:
    """The arguments that `flags` come to, without those that are ours."""
    model = Model("m", Path("/m.gguf"), ModelSettings(flags={name.replace("_", "-"): flags[name] for name in flags}))
    written = {canonical(name): name for name in model.settings.flags}
    plain = to_arguments(as_known(flags_for(Model("m", Path("/m.gguf"), ModelSettings()), 1), known, {}, "m"))
    arguments = to_arguments(as_known(flags_for(model, 1), known, written, "m"))
    return [argument for argument in arguments if argument not in plain]


def test_the_help_is_read_entry_by_entry() -> None:
    assert {"flash-attn", "fa", "n-gpu-layers", "gpu-layers", "draft", "slots", "no-slots"} <= OLD.flags
    assert {"flash-attn", "mlock", "no-mmap", "help", "usage"} <= OLD.bare
    assert not OLD.switches
    assert not {"ctx-size", "ngl", "split-mode", "tensor-split", "override-kv"} & OLD.bare
    assert NEW.switches == {"fa", "flash-attn", "fit"}
    assert {"kv-offload", "no-kv-offload", "nkvo", "no-kv-unified", "no-kvu"} <= NEW.bare
    assert {"embedding", "embeddings"} <= IK.flags
    assert IK.switches == {"context-shift"}


def test_what_was_removed_is_not_there() -> None:
    assert not {"draft", "draft-max", "draft-n", "draft-min"} & NEW.flags
    assert "spec-ngram-mod-n-max" not in NEW.flags  # an explanation names it, no entry


@pytest.mark.parametrize(
    ("flags", "old", "new", "ik"),
    [
        ({"fa": True}, ["--flash-attn"], ["--flash-attn", "on"], ["--flash-attn"]),
        ({"flash_attn": "on"}, ["--flash-attn"], ["--flash-attn", "on"], ["--flash-attn"]),
        ({"flash_attn": "off"}, [], ["--flash-attn", "off"], []),
        ({"flash_attn": "auto"}, [], ["--flash-attn", "auto"], []),
        ({"no_mmap": True}, ["--no-mmap"], ["--load-mode", "none"], ["--no-mmap"]),
        ({"mlock": True}, ["--mlock"], ["--load-mode", "mmap+mlock"], ["--mlock"]),
        (
            {"no_mmap": True, "mlock": True},
            ["--no-mmap", "--mlock"],
            ["--load-mode", "mlock"],
            ["--no-mmap", "--mlock"],
        ),
        ({"load_mode": "none"}, ["--no-mmap"], ["--load-mode", "none"], ["--no-mmap"]),
        ({"lm": "mlock"}, ["--no-mmap", "--mlock"], ["--load-mode", "mlock"], ["--no-mmap", "--mlock"]),
        ({"load_mode": "mmap"}, [], ["--load-mode", "mmap"], []),
        ({"fit": "off"}, [], ["--fit", "off"], []),
        ({"model_draft": "/d"}, ["--model-draft", "/d"], ["--spec-draft-model", "/d"], ["--model-draft", "/d"]),
        ({"spec_draft_model": "/d"}, ["--model-draft", "/d"], ["--spec-draft-model", "/d"], ["--model-draft", "/d"]),
        ({"draft": 7}, ["--draft", "7"], ["--spec-draft-n-max", "7"], ["--draft", "7"]),
        ({"draft_max": 7}, ["--draft", "7"], ["--spec-draft-n-max", "7"], ["--draft", "7"]),
        ({"spec_draft_n_max": 7}, ["--draft", "7"], ["--spec-draft-n-max", "7"], ["--draft", "7"]),
        ({"spec_type": "none"}, [], ["--spec-type", "none"], []),
        ({"cache_ram": 0}, [], ["--cache-ram", "0"], []),
        ({"log_verbosity": 3}, ["--verbosity", "3"], ["--verbosity", "3"], ["--verbosity", "3"]),
        ({"kv_unified": True}, [], ["--kv-unified"], []),
        ({"no_context_shift": True}, ["--no-context-shift"], ["--no-context-shift"], ["--no-context-shift"]),
        ({"context_shift": True}, [], ["--context-shift"], ["--context-shift", "on"]),
        ({"kv_offload": True}, [], ["--kv-offload"], []),
        ({"no_jinja": True}, [], ["--no-jinja"], []),
        ({"cache_type_k": False}, [], [], []),
        ({"not_a_flag_at_all": False}, [], [], []),
    ],
)
def test_one_wish_in_each_build(flags: dict[str, Any], old: list[str], new: list[str], ik: list[str]) -> None:
    assert [theirs(known, **flags) for known in (OLD, NEW, IK)] == [old, new, ik]


def test_ours_in_each_build() -> None:
    def ours(known: Probe) -> set[str]:
        return set(to_arguments(as_known(flags_for(Model("m", Path("/m.gguf"), ModelSettings()), 1), known, {}, "m")))

    assert {"--slots", "--no-webui"} < ours(OLD)
    assert "--jinja" not in ours(OLD)
    assert {"--slots", "--no-webui", "--jinja"} < ours(NEW)
    assert "--jinja" in ours(IK)
    assert not {"--slots", "--no-webui"} & ours(IK)
    assert ours(Probe()) == ours(NEW)


@pytest.mark.parametrize(
    ("known", "flag", "value", "near"),
    [
        (NEW, "cache-typ-k", "q8_0", "did you mean 'cache-type-k'?"),
        (NEW, "flash-atn", True, "did you mean 'flash-attn'?"),
        (OLD, "cache-ram", 512, ""),
        (OLD, "fit-ctx", 4096, ""),
        (OLD, "spec-type", "draft-mtp", ""),
        (OLD, "load-mode", "dio", ""),
        (IK, "zzz", "1", "leave it out"),
    ],
)
def test_what_a_build_does_not_have_is_refused(known: Probe, flag: str, value: Any, near: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        theirs(known, **{flag.replace("-", "_"): value})
    assert refused.value.message == f"model 'm': unknown flag '{flag}'"
    assert near in refused.value.hint


def test_a_build_that_was_not_asked_gets_the_words_of_the_user() -> None:
    for flag in ("model-draft", "spec-draft-model", "draft-max", "draft"):
        assert theirs(Probe(), **{flag.replace("-", "_"): "x"}) == [f"--{flag}", "x"]
    assert theirs(Probe(), ctk="q8_0") == ["--cache-type-k", "q8_0"]  # a short one would want one dash
    assert theirs(Probe(), cache_typ_k="q8_0") == ["--cache-typ-k", "q8_0"]


@given(
    st.sampled_from([OLD, NEW, IK]),
    st.dictionaries(
        st.sampled_from(sorted(name for name in OLD.flags | NEW.flags | IK.flags if len(name) > 4)),
        st.sampled_from([True, False, "on", "off", "none", 3]),
        max_size=4,
    ),
)
def test_nothing_unknown_reaches_a_build_that_was_asked(known: Probe, flags: dict[str, Any]) -> None:
    try:
        arguments = theirs(known, **{name.replace("-", "_"): value for name, value in flags.items()})
    except UnsupportedError:
        return
    assert all(argument[2:] in known.flags for argument in arguments if argument.startswith("--"))
