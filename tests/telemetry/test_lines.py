from __future__ import annotations

import itertools
import time
import tracemalloc

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.telemetry.lines import MAX_LINE_BYTES, LineSplitter, clean, guess_level

# what makes the difference: line ends, pieces of characters and of sequences, and ordinary text
PIECES = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"a", b".", b"\x1b[31m", b"\x1b", b"[", "模".encode(), b"\xe6", b"\xff", b"\t"]
    )
    | st.binary(max_size=6)
    | st.just(b"x" * 5000),
    max_size=30,
).map(b"".join)


def split(blocks: list[bytes]) -> list[str]:
    splitter = LineSplitter()
    return [line for block in blocks for line in splitter.feed(block)] + splitter.flush()


@given(PIECES, st.lists(st.integers(0, 2**16), max_size=20))
def test_any_cut_into_blocks_gives_the_same_lines(data: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    blocks = [data[start:end] for start, end in itertools.pairwise(places)]
    assert split([*blocks, b""]) == split([data])
    assert split([bytes([byte]) for byte in data[:3000]]) == split([data[:3000]])


@given(st.binary(max_size=200))
def test_lines_are_safe_whatever_the_bytes(data: bytes) -> None:
    for line in split([data]):
        assert line
        assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in line)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\ntwo\r\nthree\rfour", ["one", "two", "three", "four"]),
        (b"\n\n\r\r\n  \n", []),
        (b"\r 10%\r 20%\rdone\n", [" 10%", " 20%", "done"]),
        ("Größe 模型 🦙\n".encode(), ["Größe 模型 🦙"]),
        (b"bad \xff\xfe bytes\n", ["bad \ufffd\ufffd bytes"]),
        (b"a\tb\n", ["a   b"]),
        (b"nul\x00 bell\x07 back\x08space\n", ["nul bell backspace"]),
    ],
)
def test_splitting(data: bytes, lines: list[str]) -> None:
    assert split([data]) == lines


def test_dots_of_progress_are_one_line_and_can_be_seen_before_it_ends() -> None:
    splitter = LineSplitter()
    for _ in range(50):
        assert splitter.feed(b".") == []
    assert splitter.unfinished == "." * 50
    assert splitter.feed(b"\n") == ["." * 50]
    assert splitter.unfinished == ""


def test_a_long_line_is_cut_and_says_so() -> None:
    (line,) = split([b"x" * (MAX_LINE_BYTES + 5)])
    assert line == "x" * MAX_LINE_BYTES + " … (5 bytes more)"
    assert split([b"x" * MAX_LINE_BYTES + b"\nnext"]) == ["x" * MAX_LINE_BYTES, "next"]


def test_a_cut_through_a_character_leaves_no_trace_of_it() -> None:
    (line,) = split(["模".encode() * MAX_LINE_BYTES])
    assert line.startswith("模" * (MAX_LINE_BYTES // 3) + " …")


def test_a_line_that_never_ends_takes_no_memory() -> None:
    splitter = LineSplitter()
    block = b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(1024):  # 64 MiB
            assert splitter.feed(block) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024**2
    assert splitter.flush() == ["x" * MAX_LINE_BYTES + f" … ({64 * 1024**2 - MAX_LINE_BYTES} bytes more)"]


HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[38;2;255;0;0;48:5:1mred", "red"),
    ("\x1b[2J\x1b[Hcleared", "cleared"),
    ("\x1b[?1049lleft", "left"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]0;title\x1b\\text", "text"),
    ("\x1b]52;c;aGVsbG8=\x07clip", "clip"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP+q544e\x1b\\dcs", "dcs"),
    ("\x1b_apc\x1b\\after", "after"),
    ("\x1b^pm\x1b\\after", "after"),
    ("\x1bXsos\x1b\\after", "after"),
    ("\x1b(0charset", "charset"),
    ("\x1bcreset", "reset"),
    ("\x1b7\x1b8saved", "saved"),
    ("\x1b#8aligned", "aligned"),
    ("\x9b31mC1 colour", "C1 colour"),
    ("\x9d0;title\x9ctext", "text"),
    ("\x90dcs\x9ctext", "text"),
    ("\x1b\x1b[m[31mnested", "[31mnested"),
    ("\x1b]0;never ends", "0;never ends"),
    ("\x1b[", ""),
    ("end\x1b", "end"),
    ("\u202egnp.exe", "gnp.exe"),
    ("\u2066a\u2069\u200f\u061c", "a"),
    ("two\u2028lines\u2029here\x85", "twolineshere"),
    ("\ufeffmark\u200b", "mark"),
    ("tag\U000e0041", "tag"),
    ("lone\ud800surrogate", "lonesurrogate"),
    ("family 👨‍👩‍👧 stays", "family 👨‍👩‍👧 stays"),
    ("no\u00a0break", "no\u00a0break"),
]


@pytest.mark.parametrize(("text", "cleaned"), HOSTILE)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_nothing_cleaned_moves_a_cursor_or_leaves_its_row() -> None:
    for text, _ in HOSTILE:
        screen = pyte.Screen(80, 4)
        stream = pyte.Stream(screen)
        stream.feed("top\r\n" + clean(text) + "\r\nbottom")
        assert screen.display[0].rstrip() == "top"
        assert screen.display[2].rstrip() == "bottom"
        assert screen.title == ""
        assert screen.cursor.attrs.fg == "default"


@pytest.mark.parametrize("piece", ["\x9d", "\x1b]", "\x90", "\x1bP", "\x1b[", "\x9b0;", "\x1b ", "\x1b]0;a"])
def test_cleaning_takes_no_longer_for_hostile_lines(piece: str) -> None:
    text = piece * (MAX_LINE_BYTES // len(piece))
    started = time.perf_counter()
    clean(text)
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("0.00.128.256 E llama_model_load: error loading model: tensor not found", "error"),
        ("0.00.003.689 W srv          init: embeddings enabled with n_batch (2048)", "warning"),
        ("0.00.000.625 I srv          init: the error path is not taken", "info"),
        ("1.02.000.625 D slot update: failed to find a prefix", "debug"),
        ("W init: embeddings required", "warning"),
        ("error: unknown argument: --nope", "error"),
        ("main: error: unable to load model", "error"),
        ("CUDA error: out of memory", "error"),
        ("ggml-cuda.cu:70: GGML_ASSERT(x) failed", "error"),
        ("terminate called after throwing an instance of 'std::runtime_error'", "error"),
        ("Traceback (most recent call last):", "error"),
        ("ValueError: no such thing", "error"),
        ("warning: not compiled with GPU support", "warning"),
        ("WARN  something", "warning"),
        ('INFO:     127.0.0.1 - "POST /error" 200', "info"),
        ("DEBUG: error counter reset", "debug"),
        ("print_info: n_ctx_train = 8192", "info"),
        ("llama_perf: error_rate = 0", "info"),
        ("", "info"),
    ],
)
def test_levels(text: str, level: str) -> None:
    assert guess_level(text) == level
