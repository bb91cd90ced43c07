"""Whatever is written in a file or a variable: a configuration comes out, or a ConfigError; never anything else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarunner.config.explain import explain
from llamarunner.config.keys import every_key
from llamarunner.config.load import load_config
from llamarunner.errors import ConfigError

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
WORDS = sorted(
    {str(part) for path, _ in every_key() for part in path} | {"inherits", "profiles", "production", "a", "b"}
)
KEYS = st.one_of(st.sampled_from(WORDS), TEXT)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    TEXT,
    st.sampled_from(
        ["a", "b", "default", "auto", "5m", "1GiB", "${HOME}", "${NOPE}", "~", "~nobody/x", "0.0.0.0", "::1", "\0"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=15,
)
MODEL = st.dictionaries(st.sampled_from([*WORDS, "path", "inherits", "aliases"]), VALUES, max_size=4)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("server", "proxies", "engines", "defaults", "profiles", "tui", "discovery"), VALUES),
        "models": st.dictionaries(st.sampled_from(["a", "b", "A", "c:latest", "c"]), MODEL, max_size=4),
    },
)
VARIABLES = st.dictionaries(
    st.lists(st.one_of(st.sampled_from([word.upper() for word in WORDS]), TEXT), max_size=4).map(
        lambda parts: "LLAMARUNNER__" + "__".join(parts)
    ),
    st.one_of(TEXT, VALUES.map(lambda value: str(value)[:200])),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, VARIABLES, st.sampled_from(["", "production", "a", "testing"]))
def test_no_document_and_no_variable_breaks_the_loader(
    document: dict[str, Any], environ: dict[str, str], profile: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.toml")
        file.write_text(tomli_w.dumps(document), encoding="utf-8")
        refusal, values = None, []
        try:
            values = list(explain(load_config(file, profile=profile, environ=environ)))
        except ConfigError as error:
            refusal = error
    assert all(": " in problem for problem in refusal.problems) if refusal else values
