"""What is left out of a prompt that is longer than the context: the oldest turns of a conversation, the middle of a
text, the end of what is to be embedded. Pure but for the questions that the caller answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

_AROUND_CHARACTERS = 20  # what a template puts around a message, roughly
IMAGE_TOKENS = 768
"""What a picture is taken to be: only the engine's projector could say exactly."""


def cuts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many of the oldest messages may be left out, fewest first. The newest always stays, and no answer of a tool
    comes without the call it answers, unless it is the newest."""
    newest = len(messages) - 1
    return [index for index in range(1, newest + 1) if index == newest or messages[index].get("role") != "tool"]


def without_oldest(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Without the first `count` messages, those of the system excepted."""
    return [m for index, m in enumerate(messages) if index >= count or m.get("role") == "system"]


def likely_cut(messages: Sequence[Mapping[str, Any]], cuts: Sequence[int], tokens: int, room: int) -> int:
    """Which of `cuts` probably makes `tokens` fit into `room`, by the length of the messages: its index."""
    sizes = [len(str(message.get("content") or "")) + _AROUND_CHARACTERS for message in messages]
    share = room / max(tokens, 1) * sum(sizes)
    kept = sum(sizes)
    left_out = 0
    for index, count in enumerate(cuts):
        kept -= sum(sizes[at] for at in range(left_out, count) if messages[at].get("role") != "system")
        left_out = count
        if kept < share:
            return index
    return max(len(cuts) - 1, 0)


async def least(size: int, fits: Callable[[int], Awaitable[bool]], likely: int = 0) -> int | None:
    """The smallest index below `size` for which `fits`, as it does for all above it; None where there is none. Each
    question costs, so the search begins at `likely` and widens from there."""
    low, high = 0, size  # what is below `low` does not fit, what is from `high` on does
    at, step = likely, 1
    while low < high:
        if await fits(at):
            high = at
            at = max(low, high - step)
        else:
            low = at + 1
            at = min(high - 1, low + step - 1)
        step *= 2
        if low > 0 and high < size:
            at = (low + high) // 2
    return low if low < size else None


def without_middle(tokens: Sequence[int], keep: int, room: int) -> list[int]:
    """The first `keep` of `tokens`, and of the newest as many as leave half of what is then left of `room` for the
    answer. A negative `keep` keeps as much of the beginning as there can be."""
    if len(tokens) < room:
        return list(tokens)
    keep = min(keep, room // 2) if keep >= 0 else room // 2
    newest = max((room - keep) // 2, 1)
    return [*tokens[:keep], *tokens[len(tokens) - newest :]]


def without_end(tokens: Sequence[int], plain: Sequence[int], room: int) -> list[int]:
    """The first of `tokens`, as many as fit into `room`, and the special ones at their end, which an embedding needs.
    `plain` are the same without special tokens."""
    begins = next((i for i in range(len(tokens)) if list(tokens[i : i + len(plain)]) == list(plain)), 0)
    ends = tokens[begins + len(plain) :]
    return [*tokens[: max(room - len(ends), 0)], *ends]
