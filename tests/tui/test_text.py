from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tui.text import fit, plain, to_ascii, wrap, wrap_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("bell\x07 nul\x00 del\x7f c1\x9b2J", "bell nul del c12J"),
        ("two\nlines\tand a tab", "two lines    and a tab"),
        ("\u202eturned\u2066", "turned"),
        ("wo\u200brd 👨\u200d👩 👍🏽 ❤\ufe0f", "word 👨👩 👍 ❤"),
        ("🇩🇪", "DE"),
        ("通义 😀 é [red]", "通义 😀 é [red]"),
        ("lone \x1b", "lone "),
    ],
)
def test_plain_removes_what_a_terminal_would_obey(text: str, expected: str) -> None:
    assert plain(text) == expected


@given(st.text(max_size=60), st.integers(0, 40), st.sampled_from(["left", "right"]))
def test_fit_is_exactly_that_wide(text: str, width: int, align: str) -> None:
    assert cell_len(fit(plain(text), width, align)) == width  # type: ignore[arg-type]  # one of both


@given(st.text(max_size=80), st.integers(2, 30))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    clean = plain(text)
    assert all(cell_len(line) <= width for line in wrap(clean, width))
    assert "".join(wrap(clean, width)) == clean
    assert all(cell_len(line) <= width for line in wrap_words(clean, width))
    assert "".join(wrap_words(clean, width)).replace(" ", "") == clean.replace(" ", "")


@given(st.text(max_size=60))
def test_ascii_keeps_the_width(text: str) -> None:
    clean = plain(text)
    assert to_ascii(clean).isascii()
    assert cell_len(to_ascii(clean)) == sum(map(cell_len, clean))


def test_ascii_has_a_sign_for_each_glyph() -> None:
    assert to_ascii("● ○ ◐ ✗ ✓ … ⣿ ⠀ ▆") == "* . ~ x + ~ @   #"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [("model", 3, "mo…"), ("通义千问", 5, "通义…"), ("通义千问", 4, "通… "), ("ab", 4, "ab  "), ("x", 0, "")],
)
def test_fit_cuts_with_an_ellipsis(text: str, width: int, expected: str) -> None:
    assert fit(text, width) == expected
