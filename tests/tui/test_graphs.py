from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tui.graphs import bar, history, shares


@given(st.floats(allow_nan=False), st.integers(1, 60))
def test_a_bar_has_its_width(fraction: float, width: int) -> None:
    filled, empty = bar(fraction, width)
    assert len(filled) + len(empty) == width


def test_bars() -> None:
    assert bar(0, 4) == ("", "····")
    assert bar(0.01, 4) == ("▆", "···")
    assert bar(0.5, 4) == ("▆▆", "··")
    assert bar(1, 4) == ("▆▆▆▆", "")


@given(st.lists(st.floats(0, 1), max_size=100), st.integers(1, 40), st.integers(1, 4))
def test_a_history_has_its_size(values: list[float], width: int, height: int) -> None:
    rows = history(values, width, height)
    assert [len(row) for row in rows] == [width] * height
    assert all("\u2800" <= character <= "\u28ff" for row in rows for character in row)


def test_histories_fill_from_the_right() -> None:
    assert history([], 3) == ["⠀⠀⠀"]
    assert history([1.0], 2) == ["⠀⢸"]
    assert history([0.0, 0.01, 0.5, 1.0], 2) == ["⢀⣼"]
    assert history([1.0, 0.5], 1, 2) == ["⡇", "⣿"]


@given(fractions=st.lists(st.floats(-1, 2), min_size=2, max_size=2), width=st.integers(0, 60))
def test_parts_of_a_bar_fill_its_width_and_no_more(fractions: list[float], width: int) -> None:
    parts = shares(fractions, width)
    assert len("".join(parts)) == width
    assert len(parts) == 3
    assert set(parts[0]) <= {"▆"}
    assert set(parts[1]) <= {"░"}
