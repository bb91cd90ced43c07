"""The themes that come with the program: they load, and their text can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.color import Color as RichColor
from rich.color import ColorSystem
from textual.color import Color
from textual.theme import Theme

from tui.theme import load_themes, shipped_themes

READABLE = 4.5  # WCAG AA for text
SHIPPED = load_themes([shipped_themes()])
GOOD = (shipped_themes() / "llamarunner.toml").read_text()


def luminance(color: Color) -> float:
    def linear(part: int) -> float:
        share = part / 255
        return float(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)

    return 0.2126 * linear(color.r) + 0.7152 * linear(color.g) + 0.0722 * linear(color.b)


def contrast(one: Color, other: Color) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def as_256(color: Color) -> Color:
    quantised = RichColor.from_rgb(color.r, color.g, color.b).downgrade(ColorSystem.EIGHT_BIT).get_truecolor()
    return Color(*quantised)


def test_the_shipped_themes_load() -> None:
    assert SHIPPED.failed == ()
    assert {theme.name for theme in SHIPPED.loaded} == {"llamarunner", "llamarunner-light", "high-contrast"}


@pytest.mark.parametrize("theme", SHIPPED.loaded, ids=lambda theme: theme.name)
@pytest.mark.parametrize("colours", ["true", "256"])
def test_text_can_be_read(theme: Theme, colours: str) -> None:
    seen = as_256 if colours == "256" else lambda color: color
    texts = {
        "foreground": theme.foreground, "muted": theme.variables["muted"], "primary": theme.primary,
        "accent": theme.accent, "success": theme.success, "warning": theme.warning, "error": theme.error,
    }  # fmt: skip
    grounds = {"background": theme.background, "surface": theme.surface, "cursor": theme.variables["cursor-row-dim"]}
    for ground, behind in grounds.items():
        for name, text in texts.items():
            ratio = contrast(seen(Color.parse(str(text))), seen(Color.parse(str(behind))))
            assert ratio >= READABLE, f"{name} on {ground}: {ratio:.2f}"
    ratio = contrast(seen(Color.parse(str(theme.foreground))), seen(Color.parse(theme.variables["cursor-row"])))
    assert ratio >= READABLE, f"foreground on the cursor: {ratio:.2f}"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("name = ", "Invalid value"),
        ("dark = true\n[colours]\n", "needs a name"),
        (GOOD.replace("#14181a", "puce-ish"), "puce-ish"),
        (GOOD.replace("muted =", "muffled ="), "unknown colour 'muffled'"),
        (GOOD.replace('muted = "#95a5a1"', ""), "'muted' is missing"),
        (GOOD + "\n[more]\n", "unknown key 'more'"),
        ("x = 1\n" * 20_000, "larger than"),
        ('name = "x"\ncolours = 3', "a table"),
        ("\udcff", "codec"),
    ],
)
def test_a_bad_file_is_told_of_and_the_others_load(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "bad.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "good.toml").write_text(GOOD.replace('"llamarunner"', '"mine"'))
    result = load_themes([tmp_path, tmp_path / "missing"])
    assert [theme.name for theme in result.loaded] == ["mine"]
    assert len(result.failed) == 1
    assert result.failed[0].startswith("bad.toml: ")
    assert complaint in result.failed[0]


def test_a_later_folder_wins(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(GOOD.replace("#14181a", "#000000"))
    result = load_themes([shipped_themes(), tmp_path])
    own = next(theme for theme in result.loaded if theme.name == "llamarunner")
    assert own.background == "#000000"
