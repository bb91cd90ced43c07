"""A pane with a table: cursor by the row's key, filter, sort, and scrolling that follows the cursor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from llamarunner.control.snapshot import Snapshot
from tui.lines import Line
from tui.panes.pane import Pane
from tui.table import Column, Row, Sort, fit_columns, header_line, row_line, select_rows

View = TypeVar("View")

MOST_BELOW = 4  # lines, where the table leaves them
_ROOMY = 100  # cells from which columns stand two apart


class TablePane(Pane):
    COLUMNS: ClassVar[tuple[Column, ...]]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("pagedown,ctrl+d", "page(1)", "Page down", show=False),
        Binding("pageup,ctrl+u", "page(-1)", "Page up", show=False),
        Binding("home,g", "edge(-1)", "First", show=False),
        Binding("end,G", "edge(1)", "Last", show=False),
        Binding("s", "sort", "Sort", show=False),
        Binding("S", "reverse", "Reverse the order", show=False),
        Binding("enter", "open", "Details", show=False),
    ]

    @dataclass
    class Opened(Message):
        pane: TablePane
        key: str

    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__(ascii_only=ascii_only)
        self.cursor = ""
        self.needle = ""
        self.sort = Sort()
        self.rows: list[Row] = []  # as shown: filtered and sorted
        self._made: dict[str, tuple[object, Row]] = {}
        self._index = 0  # where the cursor was, should its row go away
        self._top = 0
        self._table_height = 1
        self._shown_columns: list[str] = []

    def make_rows(self, snapshot: Snapshot) -> list[Row]:
        raise NotImplementedError

    def rows_of(self, views: Sequence[View], key_of: Callable[[View], str], make: Callable[[View], Row]) -> list[Row]:
        """A row for each view; those of views that are as they were are kept, for there may be thousands."""
        before, self._made = self._made, {}
        rows = []
        for view in views:
            key = key_of(view)
            known = before.get(key)
            row = known[1] if known is not None and (known[0] is view or known[0] == view) else make(view)
            self._made[key] = (view, row)
            rows.append(row)
        return rows

    def when_empty(self, width: int) -> Sequence[Line]:
        """What to do where there is nothing to show."""
        raise NotImplementedError

    def below(self, width: int, most: int) -> Sequence[Line]:
        """Lines that stand below the table, `most` of them at the most."""
        return ()

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.rearrange()

    def rearrange(self) -> None:
        """Filter, sort and keep the cursor on its row, then repaint."""
        if self.snapshot is None:
            return
        self.rows = select_rows(self.make_rows(self.snapshot), self.needle, self.sort)
        keys = [row.key for row in self.rows]
        if self.cursor in keys:
            self._index = keys.index(self.cursor)
        elif keys:
            self._index = min(self._index, len(keys) - 1)
            self.cursor = keys[self._index]
        self.repaint()

    @property
    def selected(self) -> Row | None:
        return self.rows[self._index] if self.rows and self._index < len(self.rows) else None

    def body(self, width: int, height: int) -> Sequence[Line]:
        if not self.rows:
            if self.needle:
                return [Line(), Line.of(("  Nothing matches the filter. Esc clears it.", "muted"))]
            return self.when_empty(width)
        most = max(2, height // 3, min(MOST_BELOW, height - 1 - len(self.rows)))
        below = list(self.below(width, most)) if height >= 6 else []
        gap = 2 if width >= _ROOMY else 1
        fitted = fit_columns(self.COLUMNS, width - 2, gap)
        self._shown_columns = [item.column.key for item in fitted]
        self._table_height = max(1, height - 1 - len(below))
        self._scroll()
        lines = [header_line(fitted, self.sort, gap)]
        for index, row in enumerate(self.rows[self._top : self._top + self._table_height], self._top):
            chosen = index == self._index
            lines.append(row_line(row, fitted, gap, ("cursor" if self.has_focus else "cursor-dim") if chosen else ""))
        if below and len(lines) + len(below) < height:
            lines.append(Line())
        return lines + below

    def position(self) -> str:
        """ "3–12 of 40" where not all rows are in view."""
        if len(self.rows) <= self._table_height:
            return ""
        return f"{self._top + 1}–{min(len(self.rows), self._top + self._table_height)} of {len(self.rows)}"

    def filter_note(self) -> str:
        return f"filter: {self.needle}" if self.needle else ""

    def _scroll(self) -> None:
        self._top = min(self._top, self._index, max(0, len(self.rows) - self._table_height))
        self._top = max(self._top, self._index - self._table_height + 1)

    def move_to(self, index: int) -> None:
        if self.rows:
            self._index = max(0, min(len(self.rows) - 1, index))
            self.cursor = self.rows[self._index].key
            self.repaint()

    def action_move(self, step: int) -> None:
        self.move_to(self._index + step)

    def action_page(self, direction: int) -> None:
        self.move_to(self._index + direction * self._table_height)

    def action_edge(self, direction: int) -> None:
        self.move_to(0 if direction < 0 else len(self.rows) - 1)

    def action_sort(self) -> None:
        choices = ["", *self._shown_columns]
        now = choices.index(self.sort.key) if self.sort.key in choices else 0
        self.sort = Sort(choices[(now + 1) % len(choices)], self.sort.reverse)
        self.rearrange()

    def action_reverse(self) -> None:
        self.sort = Sort(self.sort.key, not self.sort.reverse)
        self.rearrange()

    def action_open(self) -> None:
        if self.selected is not None:
            self.post_message(self.Opened(self, self.selected.key))

    def set_needle(self, needle: str) -> None:
        self.needle = needle
        self.rearrange()

    def on_click(self, event: events.Click) -> None:
        index = self._top + event.y - 2  # below the title and the header
        if event.y >= 2 and index < len(self.rows):
            self.move_to(index)
            if event.chain == 2:
                self.action_open()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self.move_to(self._index + 1)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.move_to(self._index - 1)
