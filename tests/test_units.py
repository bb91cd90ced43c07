"""Durations and sizes: what is written is read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("+0", 0),
        ("300ms", 0.3),
        ("-1.5h", -5400),
        ("2h45m", 9900),
        ("1h2m3s4ms5us6ns", 3723.004005006),
        ("1µs", 1e-6),
        ("1μs", 1e-6),
        (".5s", 0.5),
        ("5.s", 5),
        ("1m1m", 120),
        ("7d", 604800),
        (" 5m ", 300),
        ("forever", math.inf),
        ("Never", math.inf),
        ("inf", math.inf),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        (".", 'time: invalid duration "."'),
        ("m", 'time: invalid duration "m"'),
        ("--1s", 'time: invalid duration "--1s"'),
        ("5", 'time: missing unit in duration "5"'),
        ("1h5", 'time: missing unit in duration "1h5"'),
        ("5x", 'time: unknown unit "x" in duration "5x"'),
        ("5 m", 'time: unknown unit " m" in duration "5 m"'),
        ("5M", 'time: unknown unit "M" in duration "5M"'),
        ("1e3s", 'time: unknown unit "e" in duration "1e3s"'),
        ("٣s", 'time: invalid duration "٣s"'),
        ("nan", 'time: invalid duration "nan"'),
    ],
)
def test_bad_durations_are_told_in_gos_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^time: ") as caught:
        parse_duration(text)
    assert str(caught.value) == message


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from(["ns", "us", "ms", "s", "m", "h", "d"])),
        min_size=1,
        max_size=5,
    )
)
def test_parts_of_a_duration_add_up(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(text) == pytest.approx(sum(parse_duration(f"{number}{unit}") for number, unit in parts))
    assert parse_duration("-" + text) == -parse_duration(text)


@given(st.floats(0, 1e8))
def test_a_duration_as_shown_reads_back_to_what_is_shown(seconds: float) -> None:
    shown = format_duration(seconds)
    assert len(shown) <= 8
    step = next(
        step for limit, step in ((0.9995, 0.001), (9.95, 0.1), (3600, 1), (86400, 60), (1e9, 3600)) if seconds < limit
    )
    assert abs(parse_duration(shown) - seconds) <= step
    assert format_duration(-seconds).removeprefix("-") == shown


def test_for_ever_reads_back() -> None:
    assert parse_duration(format_duration(math.inf)) == math.inf
    assert format_duration(-math.inf) == "-∞"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0ms"),
        (0.4, "400ms"),
        (1, "1.0s"),
        (12, "12s"),
        (59.7, "1m00s"),
        (185, "3m05s"),
        (7800, "2h10m"),
        (442800, "5d03h"),
    ],
)
def test_durations_as_shown(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("8GiB", 8 * 1024**3),
        ("8G", 8 * 1024**3),
        ("8gb", 8 * 10**9),
        ("1.5 KiB", 1536),
        (".5k", 512),
        ("0", 0),
        ("7B", 7),
        ("2TiB", 2 * 1024**4),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1", "1e9", "5 parsecs", "1 2", "GiB", "٣", "9" * 400, "9" * 300 + "TiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_a_size_as_shown_reads_back_to_a_decimal(size: int) -> None:
    shown = format_size(size)
    unit = shown.split()[1]
    assert abs(parse_size(shown) - size) <= 0.0501 * parse_size(f"1{unit}")
    assert unit == "TiB" or float(shown.split()[0]) < 1024


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            value = parse(text)
        except ValueError as error:
            assert text in str(error)  # noqa: PT017  either outcome is right
        else:
            assert not math.isnan(value)
