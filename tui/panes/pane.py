"""What the four panes share: a title rule that shows the focus, and a body of lines below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len

from llamarunner.control.snapshot import Snapshot
from tui.lines import Line, LineView, Span
from tui.text import fit


class Pane(LineView, can_focus=True):
    NUMBER: ClassVar[int]
    TITLE: ClassVar[str]

    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__(id=self.TITLE.lower(), ascii_only=ascii_only)
        self.snapshot: Snapshot | None = None
        self.tab = ""  # title of the pane that could be in this one's place
        self.add_class("pane")

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.repaint()

    def body(self, width: int, height: int) -> Sequence[Line]:
        raise NotImplementedError

    def notes(self) -> tuple[str, str]:
        """What stands in the title rule after the name, and at its right end."""
        return "", ""

    def draw(self, width: int, height: int) -> Sequence[Line]:
        body = self.body(width, height - 1)  # first: the notes may tell of it
        title = title_line(self.title_text, *self.notes(), width=width, focus=self.has_focus, tab=self.tab)
        return [title, *body]

    @property
    def title_text(self) -> str:
        return f"{self.NUMBER} {self.TITLE}"

    def watch_has_focus(self, has_focus: bool) -> None:
        super().watch_has_focus(has_focus)
        self.repaint()


def title_line(title: str, note: str, right: str, *, width: int, focus: bool, tab: str = "") -> Line:
    rule, rule_style = ("━", "focus") if focus else ("─", "rule")
    if cell_len(title) + cell_len(note) + cell_len(right) + 12 > width:
        right = fit(right, max(0, width - cell_len(title) - 8)).rstrip() if not note else ""
        note = fit(note, max(0, width - cell_len(title) - 8)).rstrip()
    spans: list[Span] = [(rule, rule_style), (f" {title} ", "focus" if focus else "strong")]
    if note:
        spans.append((f" {note} ", "muted"))
    tail: list[Span] = [(f" {right} ", "accent"), (rule, rule_style)] if right else []
    if tab and sum(cell_len(text) for text, _ in (*spans, *tail)) + cell_len(tab) + 4 <= width:
        tail += [(f" {tab} ", "muted"), (rule, rule_style)]
    used = sum(cell_len(text) for text, _ in (*spans, *tail))
    return Line((*spans, (rule * max(0, width - used), rule_style), *tail))
