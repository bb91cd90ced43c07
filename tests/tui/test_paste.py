"""What of a paste gets through, in whatever pieces it comes."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tui.paste import BEGIN, END, MAX_PASTE, PasteLimit

LONG = "x" * (MAX_PASTE + 500)
pieces = st.sampled_from(["a", "\x1b", "[", "200~", "201~", "\x1b[20", BEGIN, END, "word ", LONG])


def fed(texts: Sequence[str]) -> str:
    limit = PasteLimit()
    return "".join(map(limit.feed, texts))


def test_a_short_paste_and_keys_pass_as_they_are() -> None:
    text = f"ab\x1b[A{BEGIN}hello\x1b[Aworld{END}c\x1b"
    assert fed([text]) == text
    assert fed(list(text)) == text


def test_a_long_paste_is_cut_and_ends_as_it_did() -> None:
    text = f"a{BEGIN}{LONG}{END}b{BEGIN}short{END}"
    assert fed([text]) == f"a{BEGIN}{LONG[:MAX_PASTE]}{END}b{BEGIN}short{END}"


def test_an_escape_outside_of_a_paste_is_not_held_back() -> None:
    limit = PasteLimit()
    assert limit.feed("\x1b") == "\x1b"
    assert limit.feed("[200") == "[200"
    assert limit.feed(f"~{LONG}") == f"~{LONG[:MAX_PASTE]}"


@given(st.lists(pieces, max_size=12), st.integers(1, 700))
def test_in_any_pieces_the_same_gets_through(texts: list[str], size: int) -> None:
    whole = "".join(texts)
    cut = fed([whole[start : start + size] for start in range(0, len(whole), size)])
    at_once = fed([whole])
    assert cut == at_once
    if BEGIN not in whole:
        assert cut == whole
