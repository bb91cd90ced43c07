"""Style names that panes use, resolved in the theme of the moment."""

from __future__ import annotations

from collections.abc import Mapping

from rich.color import Color as RichColor
from rich.style import Style
from textual.color import Color

# name -> (variable of the theme, attributes)
_STYLES: dict[str, tuple[str, str]] = {
    "": ("foreground", ""),
    "strong": ("foreground", "bold"),
    "muted": ("muted", ""),
    "rule": ("rule", ""),
    "title": ("muted", "bold"),
    "focus": ("primary", "bold"),
    "primary": ("primary", ""),
    "accent": ("accent", ""),
    "accent-strong": ("accent", "bold"),
    "good": ("success", ""),
    "warn": ("warning", ""),
    "bad": ("error", ""),
    "bad-strong": ("error", "bold"),
    "match": ("warning", "reverse"),
}
_ROWS = {"cursor": "cursor-row", "cursor-dim": "cursor-row-dim"}
_FALLBACK = {"muted": "ansi_bright_black", "rule": "ansi_bright_black", "cursor-row": "", "cursor-row-dim": ""}


class Palette:
    """Good for as long as neither the theme nor the background changes."""

    def __init__(self, variables: Mapping[str, str], background: Color) -> None:
        self._variables = variables
        self._background = background.rich_color
        self._styles: dict[tuple[str, str], Style] = {}

    def style(self, name: str, row: str = "") -> Style:
        found = self._styles.get((name, row))
        if found is None:
            found = self._styles[name, row] = self._make(name, row)
        return found

    def _make(self, name: str, row: str) -> Style:
        variable, attributes = _STYLES[name]
        background = self._color(_ROWS[row]) if row else self._background
        reverse = "reverse" in attributes
        if background is None:  # the terminal's own colours: the cursor is shown in reverse
            background, reverse = self._background, row == "cursor"
            attributes = f"{attributes} underline" if row == "cursor-dim" else attributes
        return Style(
            color=self._color(variable) or RichColor.default(),
            bgcolor=background,
            bold="bold" in attributes,
            underline="underline" in attributes,
            reverse=reverse,
        )

    def _color(self, variable: str) -> RichColor | None:
        value = self._variables.get(variable, _FALLBACK.get(variable, ""))
        return Color.parse(value).rich_color if value else None
