"""Text as terminal cells: what others wrote made harmless, cut and padded to a width, and brought down to ASCII."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from rich.cells import cell_len, chop_cells, set_cell_size

Align = Literal["left", "right"]

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~]?)")
# C0, DEL, C1; marks that reorder the rest of the line; joiners and selectors on whose width terminals disagree
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U0001f3fb-\U0001f3ff]"
)
_FLAG_LETTERS = {0x1F1E6 + index: chr(ord("A") + index) for index in range(26)}

# one for one
_FROM = "…·•°µ×→←↑↓∞⏎─━│┃╭╮╰╯┌┐└┘▲▼▸●○◌◐◔◕✗✓▆█▌▐▁▔–—‘’“”"
_TO = "~-* ux><^v-E-=||++++++++^v>*.~~~~x+##>#_---''\"\""
_ASCII = dict(zip(_FROM, _TO, strict=True))
_DOT_LEVELS = " .:-=+*#@"  # for a braille character of 0 to 8 dots


def plain(text: str) -> str:
    """Text from outside on one line, without anything that a terminal would obey or measure in its own way."""
    if text.isascii() and text.isprintable():
        return text
    text = _ESCAPES.sub("", text).replace("\t", "    ").replace("\n", " ")
    return _INVISIBLE.sub("", text).translate(_FLAG_LETTERS)


def fit(text: str, width: int, align: Align = "left") -> str:
    """Exactly `width` cells: cut with an ellipsis, or padded."""
    if width <= 0:
        return ""
    length = cell_len(text)
    if length > width:
        return set_cell_size(set_cell_size(text, width - 1).rstrip(" ") + "…", width)
    return text + " " * (width - length) if align == "left" else " " * (width - length) + text


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells; words are broken, as in a log."""
    return chop_cells(text, width) if text and width > 0 else [text]


def to_ascii(text: str) -> str:
    """As many cells as before, in ASCII alone."""
    return text if text.isascii() else "".join(map(_ascii_character, text))


@lru_cache(1024)
def _ascii_character(character: str) -> str:
    if character.isascii():
        return character
    if "\u2800" <= character <= "\u28ff":
        return _DOT_LEVELS[(ord(character) - 0x2800).bit_count()]
    return _ASCII.get(character) or "?" * cell_len(character)
