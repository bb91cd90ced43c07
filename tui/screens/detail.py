"""All that is known of one model or one request, kept up to date while it is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen

from llamarunner.control.snapshot import Snapshot
from tui.lines import Line, LineView
from tui.panes.footer import Footer, Hint
from tui.panes.pane import title_line
from tui.text import plain, wrap_words

Fact = tuple[str, str, str]  # label, text, style; a label of "" continues the one above
Facts = Callable[[Snapshot], list[Fact] | None]  # None: it is not known any more

_LABEL_WIDTH = 14


class DetailView(LineView, can_focus=True):
    def __init__(self, title: str, *, ascii_only: bool) -> None:
        super().__init__(id="detail", ascii_only=ascii_only)
        self._title = plain(title)
        self._facts: list[Fact] | None = []
        self._top = 0
        self._height = 1
        self._length = 0

    def show(self, facts: list[Fact] | None) -> None:
        if facts is not None or self._facts == []:
            self._facts = facts
        self.repaint()

    def draw(self, width: int, height: int) -> Sequence[Line]:
        lines = fact_lines(self._facts or [("", "It is not known any more.", "muted")], width)
        self._height, self._length = max(1, height - 2), len(lines)
        self._top = max(0, min(self._top, self._length - self._height))
        shown = lines[self._top : self._top + self._height]
        more = f"{self._top + 1}–{self._top + len(shown)} of {self._length}" if self._length > self._height else ""
        return [title_line(self._title, "", more, width=width, focus=True), Line(), *shown]

    def scroll_by(self, step: int) -> None:
        self._top = max(0, min(self._top + step, self._length - self._height))
        self.repaint()

    @property
    def page(self) -> int:
        return self._height

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self.scroll_by(2)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.scroll_by(-2)


class Detail(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace", "close", "Back", show=False),
        Binding("down,j", "scroll_by(1)", show=False),
        Binding("up,k", "scroll_by(-1)", show=False),
        Binding("pagedown,ctrl+d,space", "scroll_page(1)", show=False),
        Binding("pageup,ctrl+u", "scroll_page(-1)", show=False),
        Binding("home,g", "scroll_by(-9999)", show=False),
        Binding("end,G", "scroll_by(9999)", show=False),
    ]

    def __init__(
        self, title: str, facts: Facts, snapshot: Snapshot, *, model: str = "", hints: Sequence[Hint] = (),
        ascii_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model  # that load and unload are about
        self._facts = facts
        self._snapshot = snapshot
        self.view = DetailView(title, ascii_only=ascii_only)
        self._footer = Footer((("Esc", "back"), ("j k", "scroll"), *hints), ascii_only=ascii_only)

    def compose(self) -> ComposeResult:
        yield self.view
        yield self._footer

    def on_mount(self) -> None:
        self.view.focus()
        self.show(self._snapshot)

    def show(self, snapshot: Snapshot) -> None:
        self.view.show(self._facts(snapshot))

    def action_close(self) -> None:
        if self.is_current:  # a second key may come before the screen is gone
            _ = self.dismiss()

    def action_scroll_by(self, step: int) -> None:
        self.view.scroll_by(step)

    def action_scroll_page(self, direction: int) -> None:
        self.view.scroll_by(direction * self.view.page)


def fact_lines(facts: Sequence[Fact], width: int) -> list[Line]:
    lines: list[Line] = []
    for label, text, style in facts:
        room = max(8, width - _LABEL_WIDTH - 4)
        for index, piece in enumerate(wrap_words(plain(text), room)):
            head = label if index == 0 else ""
            lines.append(Line.of((f"  {head:<{_LABEL_WIDTH}}", "muted"), (piece, style)))
    return lines
