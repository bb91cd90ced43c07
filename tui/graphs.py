"""Bars and histories as strings: one style and few bytes a frame."""

from __future__ import annotations

from collections.abc import Sequence

_PARTS = ("▆", "░")
# dots of a braille cell that are lit for 0 to 4 rows filled from below, in its left and its right column
_LEFT = (0x00, 0x40, 0x44, 0x46, 0x47)
_RIGHT = (0x00, 0x80, 0xA0, 0xB0, 0xB8)


def bar(fraction: float, width: int) -> tuple[str, str]:
    """The filled and the empty part of a bar, `width` cells together; a little is shown as one cell, not as none."""
    bounded = max(0.0, min(1.0, fraction))
    filled = max(1, round(bounded * width)) if bounded > 0.005 else 0
    return "▆" * filled, "·" * (width - filled)


def shares(fractions: Sequence[float], width: int) -> list[str]:
    """A bar of several parts, each with its own character, and last the empty part; `width` cells together."""
    parts: list[str] = []
    room = width
    for fraction, character in zip(fractions, _PARTS, strict=True):
        cells = min(room, len(bar(fraction, width)[0]))
        parts.append(character * cells)
        room -= cells
    return [*parts, "·" * room]


def history(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """The newest `2 * width` values (0 to 1) as braille, `height` rows, newest on the right."""
    columns = [0.0] * max(0, 2 * width - len(values)) + list(values[-2 * width :])
    dots = [_dots(value, height) for value in columns]
    rows = []
    for row in range(height - 1, -1, -1):
        levels = [max(0, min(4, dot - 4 * row)) for dot in dots]
        rows.append("".join(chr(0x2800 + _LEFT[a] + _RIGHT[b]) for a, b in zip(levels[::2], levels[1::2], strict=True)))
    return rows


def _dots(value: float, height: int) -> int:
    """Anything above zero shows at least one dot."""
    bounded = max(0.0, min(1.0, value))
    return max(1, round(bounded * 4 * height)) if bounded > 0.005 else 0
