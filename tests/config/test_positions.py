"""Lines of keys, against tomllib."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarunner.config.positions import KeyPath, locate

_NAMES = re.compile(r"""(?=((?<![A-Za-z0-9_-])[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*'))""")


def key_paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield (*path, key)
        yield from key_paths(inner, (*path, key))


def names_on(line: str) -> set[str]:
    """Every word or quoted text of a line, as the key it would be. It may begin within a string: any quote may open."""
    found = set()
    for match in _NAMES.finditer(line):
        if match[1][0] not in "\"'":
            found.add(match[1])
            continue
        try:
            found |= tomllib.loads(f"{match[1]} = 1").keys()
        except tomllib.TOMLDecodeError:
            continue  # the end of one string to the start of another
    return found


def check(source: str) -> None:
    lines, text = locate(source), source.split("\n")
    paths = set(key_paths(tomllib.loads(source)))
    assert set(lines) == paths
    for path, number in lines.items():
        if isinstance(path[-1], str):
            assert path[-1] in names_on(text[number - 1]), (path, number)


KEYS = st.one_of(
    st.text("abcXYZ019_-", min_size=1, max_size=6),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6),
)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.dates(),
    st.times(),
    st.datetimes(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20),
    st.text("\"'\\\n#=[]{},. ", max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5), st.booleans())
def test_every_key_has_the_line_it_stands_on(document: dict[str, Any], multiline: bool) -> None:
    check(tomli_w.dumps(document, multiline_strings=multiline))


# Styles no writer chooses by itself, put together at random: each is a whole number of statements about its own keys.
PIECES = [
    "{k} = 1 # [not.a.table] = 2",
    "{k} . a . 'b.c' = [1, # one ]\n  \"]\", 'x,',\n\n  [[], {{}}], # end\n]",
    '{k} = """\nnot = "a key"\n[neither]\\""" still \\\n   in""""',
    "{k} = '''\n[no] \"\"\" = 1\n''''' # after",
    '{k} = {{ a = 1, "b c" = {{ d.e = [ {{ f = 2 }} ] }} }}',
    '"{k}\\u00e9\\t" = 1979-05-27 07:32:00Z',
    "\t{k}={{}}\r\n",
    "'{k} #=' = \"#\"",
]
TABLES = ["", "[{k}]", "[ {k} . 'x.y' . z ]", "[[{k}]]", "[[{k}]]\nfirst = 1\n[[{k}]]", "[[{k}.{k}]]\n[{k}.{k}.in]\n"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TABLES), st.lists(st.sampled_from(PIECES), max_size=5)), max_size=4))
def test_every_style_of_writing(parts: list[tuple[str, list[str]]]) -> None:
    lines = []
    for number, (table, pieces) in enumerate(parts):
        lines += ["# comment", table.format(k=f"t{number}") if number else ""]
        lines += [piece.format(k=f"k{number}_{index}") for index, piece in enumerate(pieces)]
    check("\n".join(lines))


@pytest.mark.parametrize(
    ("source", "path", "line"),
    [
        ("\n[a.b]\n[a]\n", ("a",), 3),  # its own header, not the one that implied it
        ("[[a]]\n[a.b]\nc=1\n[[a]]\n[a.b]\nc=2", ("a", 1, "b", "c"), 6),
        ("a = [\n1,\n2]", ("a", 1), 3),
        ('a = """\n\n"""\nb = 1', ("b",), 4),
        ("\r\n# x\r\na = 1\r\n", ("a",), 3),
        ('\n"\\u0061" = 1', ("a",), 2),
    ],
)
def test_lines(source: str, path: KeyPath, line: int) -> None:
    assert locate(source)[path] == line
