"""What is left out of a prompt that is longer than the context: the oldest turns of a conversation, the middle of a
text, the end of what is to be embedded. Pure but for the questions that the caller answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

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


async def least_cut(cuts: Sequence[int], fits: Callable[[int], Awaitable[bool]]) -> int | None:
    """The smallest of `cuts` (ascending) with which the prompt fits, found in few questions; None where none does."""
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        if await fits(cuts[middle]):
            high = middle
        else:
            low = middle + 1
    return cuts[low] if low < len(cuts) else None


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
