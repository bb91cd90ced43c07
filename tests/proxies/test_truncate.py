"""What is left out of prompts that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.proxies.ollama.truncate import cuts, least, likely_cut, without_end, without_middle, without_oldest

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
TOKENS = st.lists(st.integers(0, 99), max_size=60)


def turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": str(number)} for number, role in enumerate(roles)]


def test_an_answer_of_a_tool_goes_with_its_call() -> None:
    messages = turns("system", "user", "assistant", "tool", "tool", "assistant", "user")
    assert cuts(messages) == [1, 2, 5, 6]
    assert [m["role"] for m in without_oldest(messages, 5)] == ["system", "assistant", "user"]
    assert cuts(turns("user", "assistant", "tool")) == [1, 2], "the newest stays, whatever it is"
    assert cuts(turns("user")) == []


@given(st.lists(ROLES, min_size=1, max_size=12), st.data())
def test_system_messages_and_the_newest_always_stay(roles: list[str], data: st.DataObject) -> None:
    messages = turns(*roles)
    for count in cuts(messages):
        kept = without_oldest(messages, count)
        assert kept[-1] == messages[-1]
        assert [m for m in kept if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]
        others = [m for m in messages[:-1] if m["role"] != "system"]
        kept_others = [m for m in kept[:-1] if m["role"] != "system"]
        assert kept_others == others[len(others) - len(kept_others) :], "the newest of them"


@given(st.lists(ROLES, min_size=1, max_size=40), st.integers(0, 50), st.integers(0, 50))
async def test_no_more_is_left_out_than_needed(roles: list[str], room: int, likely: int) -> None:
    messages, asked = turns(*roles), 0

    possible = cuts(messages)

    async def fits(index: int) -> bool:
        nonlocal asked
        asked += 1
        return len(without_oldest(messages, possible[index])) < room

    found = await least(len(possible), fits, likely % max(len(possible), 1))
    fitting = [n for n, count in enumerate(possible) if len(without_oldest(messages, count)) < room]
    assert found == (fitting[0] if fitting else None)
    assert asked <= 11, "few questions: each costs two to the engine"


@given(st.lists(st.integers(0, 400), min_size=2, max_size=60), st.integers(50, 2000))
async def test_a_good_guess_saves_questions(lengths: list[int], room: int) -> None:
    messages, asked = [{"role": "user", "content": "x" * length} for length in lengths], 0

    def tokens(count: int) -> int:
        return sum(len(m["content"]) // 4 + 5 for m in without_oldest(messages, count))

    possible = cuts(messages)

    async def fits(index: int) -> bool:
        nonlocal asked
        asked += 1
        return tokens(possible[index]) < room

    found = await least(len(possible), fits, likely_cut(messages, possible, tokens(0), room))
    assert found == next((n for n, count in enumerate(possible) if tokens(count) < room), None)
    assert asked <= 4


@given(TOKENS, st.integers(-2, 70), st.integers(3, 50))
def test_a_text_without_its_middle_fits(tokens: list[int], keep: int, room: int) -> None:
    kept = without_middle(tokens, keep, room)
    if len(tokens) < room:
        assert kept == tokens
        return
    assert len(kept) < room
    first = next((n for n in range(len(kept), -1, -1) if kept[:n] == tokens[:n]), 0)
    assert first + 1 >= min(max(keep, 0), room // 2), "the beginning stays"
    assert kept[-1] == tokens[-1]


@pytest.mark.parametrize(
    ("tokens", "plain", "kept"),
    [
        ([1, 10, 11, 12, 2], [10, 11, 12], [1, 10, 11, 2]),
        ([10, 11, 12, 13], [10, 11, 12, 13], [10, 11, 12, 13]),
        ([10, 11, 12, 13, 14], [10, 11, 12, 13, 14], [10, 11, 12, 13]),
        ([1, 10, 11, 12, 13], [10, 11, 12, 13], [1, 10, 11, 12]),
    ],
    ids=["both ends", "fits", "no specials", "one before"],
)
def test_what_is_embedded_keeps_its_special_tokens(
    tokens: Sequence[int], plain: Sequence[int], kept: list[int]
) -> None:
    assert without_end(tokens, plain, 4) == kept
