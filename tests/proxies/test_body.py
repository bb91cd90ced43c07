"""Bodies that are not what they should be get the words of Go's decoder."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.errors import RequestError
from llamarunner.proxies.body import LoneSurrogateError, parse_object, without_lone_surrogates


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b'{"model":', "unexpected EOF"),
        (b'{"model": "a"', "unexpected EOF"),
        (b"hello", "invalid character 'h' looking for beginning of value"),
        (b'{"a": nope}', "invalid character 'n' looking for beginning of value"),
        (b'{"keep_alive": 1e400}', "json: cannot unmarshal number into Go value of type float64"),
        (b"[1]", "json: cannot unmarshal array into an object"),
        (b'"text"', "json: cannot unmarshal string into an object"),
        (b"null", "json: cannot unmarshal null into an object"),
        ('{"model":"a"}'.encode("utf-16"), "the request body must be UTF-8, and this looks like UTF-16"),
        ('{"model":"a"}'.encode("utf-16-le"), "the request body must be UTF-8, and this looks like UTF-16"),
        (b'{"model":"\xff\xfe"}', "the request body is not valid UTF-8"),
        pytest.param(b"[" * 2000 + b"]" * 2000, "json: exceeded max depth", id="deep"),
    ],
)
def test_each_mistake_has_its_word(raw: bytes, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_object(raw)
    assert refused.value.message == words
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"\ud83d", "\ufffd"), (r"a\uD83Db\uDE00c", "a\ufffdb\ufffdc"), (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ud83d\ude00", "\ufffd😀"), (r"\\ud83d\ude00", "\\ud83d\ufffd"),
    ],
)  # fmt: skip
def test_half_an_emoji_is_read_as_go_reads_it(sent: str, read: str) -> None:
    raw = b'{"a": "%s", "b": [1.5, "\\ud83d\\ude00"]}' % sent.encode()
    with pytest.raises(LoneSurrogateError):
        parse_object(raw)
    assert parse_object(without_lone_surrogates(raw)) == {"a": read, "b": [1.5, "😀"]}


@pytest.mark.parametrize("raw", [b'{"a": "\\ud83d"', b"[" * 5000, b'{"a": "\\ud83d", "b": ' + b"9" * 5000])
def test_what_is_wrong_besides_stays_so(raw: bytes) -> None:
    assert without_lone_surrogates(raw) == raw


@given(st.binary(max_size=200))
def test_no_bytes_surprise_it(raw: bytes) -> None:
    with contextlib.suppress(RequestError):
        assert isinstance(parse_object(raw), dict)
