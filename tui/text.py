"""Text as terminal cells: what others wrote made harmless, cut and padded to a width, and brought down to ASCII."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Literal

from rich.cells import cell_len, set_cell_size

Align = Literal["left", "right"]

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~]?)")
# controls, marks that reorder the rest of the line, joiners, tags, halves of characters
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_UNSURE = re.compile("[\ufe00-\ufe0f\U0001f3fb-\U0001f3ff\U000e0100-\U000e01ef]")  # terminals disagree on their width
_FLAG_LETTERS = {0x1F1E6 + index: chr(ord("A") + index) for index in range(26)}

# one for one
_FROM = "…·•°µ×→←↑↓∞⏎─━│┃╭╮╰╯┌┐└┘▲▼▸●○◌◐◔◕✗✓▆█▌▐░▁▔–—‘’“”"
_TO = "~-* ux><^v-E-=||++++++++^v>*.~~~~x+##>#:_---''\"\""
_ASCII = dict(zip(_FROM, _TO, strict=True))
_DOT_LEVELS = " .:-=+*#@"  # for a braille character of 0 to 8 dots


def plain(text: str) -> str:
    """Text from outside on one line, without anything that a terminal would obey or measure in its own way."""
    if text.isascii() and text.isprintable():
        return text
    text = _ESCAPES.sub("", text).replace("\t", "    ").replace("\n", " ")
    if not text.isascii():
        text = _UNSURE.sub("", text).translate(_FLAG_LETTERS)
    return "".join(character for character in text if unicodedata.category(character) not in _INVISIBLE)


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
    width = max(2, width)  # no character is wider
    if text.isascii():
        return [text[start : start + width] for start in range(0, len(text), width)] or [""]
    lines, room = [""], width
    for character in text:
        cells = cell_len(character)
        if cells > room:
            lines.append("")
            room = width
        lines[-1] += character
        room -= cells
    return lines


def wrap_words(text: str, width: int) -> list[str]:
    """Wrapped between words; one that is too long is broken."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return [piece for line in lines for piece in wrap(line, width)]


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
