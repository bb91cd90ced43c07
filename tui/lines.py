"""A widget made of lines of styled text that repaints only the cells that changed.

Panes say what they look like as plain `Line`s; `LineView` compares them with what is on the screen. Textual itself
sends a whole widget again at every refresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.segment import Segment
from textual import events
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from tui.palette import Palette
from tui.text import fit, to_ascii

Span = tuple[str, str]  # text, and a style's name in the palette


@dataclass(frozen=True, slots=True)
class Line:
    spans: tuple[Span, ...] = ()
    row: str = ""  # name of the background of the whole line

    @classmethod
    def of(cls, *spans: Span, row: str = "") -> Line:
        return cls(spans, row)

    def clipped(self, width: int) -> Line:
        """At most `width` cells, with an ellipsis where something is missing."""
        spans: list[Span] = []
        for text, style in self.spans:
            length = cell_len(text)
            if length > width:
                spans.append((fit(text, width), style))
                break
            spans.append((text, style))
            width -= length
        return Line(tuple(spans), self.row)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)


def changed_cells(old: Line | None, new: Line) -> list[tuple[int, int]] | None:
    """Where two lines differ, as (first cell, cells); None where the whole line must be painted."""
    if old is None or old.row != new.row or len(old.spans) != len(new.spans):
        return None
    changes: list[tuple[int, int]] = []
    position = 0
    for before, after in zip(old.spans, new.spans, strict=True):
        width = cell_len(after[0])
        if before != after:
            if cell_len(before[0]) != width:
                return None
            changes.append((position, width))
        position += width
    return changes


class LineView(Widget):
    """Subclasses give `draw`; whoever changes what it would say calls `repaint`."""

    ALLOW_SELECT = False

    def __init__(self, *, id: str | None = None, ascii_only: bool = False) -> None:
        super().__init__(id=id)
        self.ascii_only = ascii_only
        self._lines: list[Line] = []
        self._drawn: tuple[int, int] = (0, 0)
        self._palette: Palette | None = None

    def draw(self, width: int, height: int) -> Sequence[Line]:
        raise NotImplementedError

    def repaint(self) -> None:
        width, height = self.size
        if not (width and height and self.is_attached and self.display):
            self._drawn = (0, 0)
            return
        if self._drawn != (width, height):
            self._redraw(width, height)
            self.refresh()
            return
        before, regions = self._lines, []
        self._redraw(width, height)
        for y in range(max(len(before), len(self._lines))):
            old = before[y] if y < len(before) else Line()
            new = self._lines[y] if y < len(self._lines) else Line()
            if old == new:
                continue
            changes = changed_cells(old, new)
            spans = [(0, width)] if changes is None else changes
            regions += [Region(x, y, cells, 1) for x, cells in spans if x < width]
        if regions:
            self.refresh(*regions)

    def _redraw(self, width: int, height: int) -> None:
        self._lines = list(self.draw(width, height)[:height])
        self._drawn = (width, height)

    def render_line(self, y: int) -> Strip:
        width, height = self.size
        if self._drawn != (width, height):
            self._redraw(width, height)
        if self._palette is None:
            self._palette = Palette(self.app.theme_variables, self.background_colors[1])
        palette = self._palette
        line = self._lines[y] if y < len(self._lines) else Line()
        translate = to_ascii if self.ascii_only else str
        segments = [Segment(translate(text), palette.style(style, line.row)) for text, style in line.spans if text]
        return Strip(segments).adjust_cell_length(width, palette.style("", line.row))

    def notify_style_update(self) -> None:
        self._palette = None
        super().notify_style_update()

    def on_resize(self, event: events.Resize) -> None:
        self.repaint()

    @property
    def shown_text(self) -> str:
        """What is on the screen, for tests and copies."""
        return "\n".join(line.text.rstrip() for line in self._lines)
