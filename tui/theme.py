"""Themes: one TOML file each, with a name, whether it is dark, and its colours."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from textual.color import Color, ColorParseError
from textual.theme import Theme

_REQUIRED = (
    "background", "surface", "panel", "foreground", "muted", "rule", "primary", "accent", "success", "warning", "error",
    "cursor", "cursor-dim",
)  # fmt: skip
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ThemeLoadResult:
    loaded: tuple[Theme, ...] = ()
    failed: tuple[str, ...] = ()  # "file: why", for a person


def shipped_themes() -> Path:
    """In an installed wheel they are inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "themes"
    return inside if inside.is_dir() else package.parent / "themes"


def load_themes(folders: Sequence[Path]) -> ThemeLoadResult:
    """Every `*.toml` of the folders; a later one replaces an earlier one of the same name. A folder may be missing."""
    loaded: dict[str, Theme] = {}
    failed: list[str] = []
    for folder in folders:
        for path in sorted(folder.glob("*.toml")):
            try:
                theme = read_theme(path)
            except (OSError, ValueError) as error:
                failed.append(f"{path.name}: {error}")
            else:
                loaded[theme.name] = theme
    return ThemeLoadResult(tuple(loaded.values()), tuple(failed))


def read_theme(path: Path) -> Theme:
    """Raises OSError, or ValueError saying what is wrong with the file."""
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise ValueError("larger than a theme can be")
    document = tomllib.loads(raw.decode())
    unknown = sorted(document.keys() - {"name", "dark", "colours"})
    if unknown:
        raise ValueError(f"unknown key '{unknown[0]}'")
    name, dark, colours = document.get("name"), document.get("dark", True), document.get("colours")
    if not isinstance(name, str) or not name:
        raise ValueError("a theme needs a name")
    if not isinstance(dark, bool) or not isinstance(colours, dict):
        raise ValueError("'dark' is true or false, and [colours] a table")
    return _theme(name, dark, {str(key): _colour(str(key), value) for key, value in colours.items()})


def _colour(key: str, value: object) -> str:
    if key not in _REQUIRED:
        raise ValueError(f"unknown colour '{key}'")
    try:
        return Color.parse(str(value)).hex
    except ColorParseError:
        raise ValueError(f"{key}: '{value}' is not a colour such as \"#5fafaf\"") from None


def _theme(name: str, dark: bool, colours: dict[str, str]) -> Theme:
    missing = [key for key in _REQUIRED if key not in colours]
    if missing:
        raise ValueError(f"the colour '{missing[0]}' is missing")
    return Theme(
        name=name,
        dark=dark,
        primary=colours["primary"],
        secondary=colours["accent"],
        accent=colours["accent"],
        success=colours["success"],
        warning=colours["warning"],
        error=colours["error"],
        foreground=colours["foreground"],
        background=colours["background"],
        surface=colours["surface"],
        panel=colours["panel"],
        variables={
            "muted": colours["muted"],
            "rule": colours["rule"],
            "cursor-row": colours["cursor"],
            "cursor-row-dim": colours["cursor-dim"],
            "border": colours["primary"],
            "border-blurred": colours["rule"],
            "block-cursor-background": colours["primary"],
            "block-cursor-foreground": colours["background"],
            "input-cursor-background": colours["foreground"],
            "input-cursor-foreground": colours["background"],
            "input-selection-background": colours["cursor"],
        },
    )
