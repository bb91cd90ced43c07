"""The logs: of the program and of each runner; following, paused, wrapped, searched."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType

from llamarunner.control.backend import Backend
from llamarunner.control.snapshot import LogLine, Snapshot
from tui import words
from tui.lines import Line, Span
from tui.panes.pane import Pane
from tui.text import plain, wrap

_KEPT = 2000  # lines held for one source
_PAGE = 500  # lines asked for at once
_STYLES = {"error": "bad", "critical": "bad", "warning": "warn", "debug": "muted"}
_STAMP = 10  # cells before the text: the time and its margins


class LogsPane(Pane):
    NUMBER, TITLE = 4, "Logs"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "scroll_lines(1)", "Down", show=False),
        Binding("up,k", "scroll_lines(-1)", "Up", show=False),
        Binding("pagedown,ctrl+d", "scroll_pages(1)", "Page down", show=False),
        Binding("pageup,ctrl+u", "scroll_pages(-1)", "Page up", show=False),
        Binding("home,g", "oldest", "First", show=False),
        Binding("end,G", "newest", "Last", show=False),
        Binding("n", "find(-1)", "Next match (older)", show=False),
        Binding("N", "find(1)", "Previous match (newer)", show=False),
    ]

    def __init__(self, backend: Backend, *, ascii_only: bool = False) -> None:
        super().__init__(ascii_only=ascii_only)
        self._backend = backend
        self.source = ""
        self.sources: tuple[str, ...] = ()
        self.needle = ""
        self.following = True
        self.paused = False
        self.wrapping = False
        self.unseen = 0
        self.skipped = 0
        self._held: deque[LogLine] = deque(maxlen=_KEPT)
        self._last = 0  # number of the newest line held
        self._bottom = 0  # number of the line at the bottom while not following
        self._found = 0  # number of the line that was searched to
        self._height = 1

    # Lines come in

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        if snapshot.log_sources != self.sources:
            self.sources = snapshot.log_sources
            if self.source not in self.sources and self.sources:
                self.select(self.sources[0])
            self.repaint()

    def select(self, source: str) -> None:
        self.source = source
        self._held.clear()
        self._last = self.unseen = self.skipped = self._found = 0
        self.following, self.paused = True, False
        self.pull()
        self.repaint()

    def pull(self) -> None:
        """Fetch what is new, at the rate of the timer, and only while it can be seen."""
        if not self.source or not self.display:
            return
        page = self._backend.logs(self.source, self._last, _PAGE)
        if not page.lines:
            return
        missed = page.lines[0].number - self._last - 1 if self._last else 0
        self._held.extend(page.lines)
        self._last = page.lines[-1].number
        self.skipped += missed
        if not self.following:
            self.unseen += len(page.lines) + missed
        self.repaint()

    # They are shown

    def notes(self) -> tuple[str, str]:
        position = f"[{self.sources.index(self.source) + 1}/{len(self.sources)}]" if self.source in self.sources else ""
        found = sum(1 for line in self._held if self._matches(line)) if self.needle else 0
        search = f"search: {self.needle} ({words.plural(found, 'match').replace('matchs', 'matches')})"
        state = "paused" if self.paused else "follow" if self.following else "scrolled"
        new = f"{self.unseen} new" if self.unseen else ""
        lost = f"{self.skipped} skipped" if self.skipped else ""
        wrapped = "wrap" if self.wrapping else ""
        right = " · ".join(part for part in (search if self.needle else "", wrapped, lost, state, new) if part)
        return f"{plain(self.source)} {position}".strip(), right

    def body(self, width: int, height: int) -> Sequence[Line]:
        self._height = height
        if not self._held:
            return [Line(), Line.of(("  Nothing was written yet.", "muted"))]
        lines: deque[Line] = deque()
        for entry in reversed(self._held):
            if not self.following and entry.number > self._bottom:
                continue
            for line in reversed(self._entry_lines(entry, width)):
                lines.appendleft(line)
            if len(lines) >= height:
                break
        return list(lines)[-height:]

    def _entry_lines(self, entry: LogLine, width: int) -> list[Line]:
        text, style = plain(entry.text), _STYLES.get(entry.level, "")
        pieces = wrap(text, max(8, width - _STAMP - 1)) if self.wrapping else [text]
        row = "cursor" if entry.number == self._found else ""
        stamp = f" {words.clock(entry.at)} "
        lines = []
        for index, piece in enumerate(pieces):
            head: Span = (stamp, "muted") if index == 0 else (" " * _STAMP, "")
            lines.append(Line((head, *self._marked(piece, style)), row).clipped(width))
        return lines

    def _marked(self, text: str, style: str) -> list[Span]:
        """The text, with each match of the search in its own style."""
        needle, folded = self.needle.casefold(), text.casefold()
        if not needle or len(folded) != len(text):
            return [(text, style)]
        spans: list[Span] = []
        start = 0
        while (at := folded.find(needle, start)) >= 0:
            spans += [(text[start:at], style), (text[at : at + len(needle)], "match")]
            start = at + len(needle)
        return [span for span in (*spans, (text[start:], style)) if span[0]]

    def _matches(self, line: LogLine) -> bool:
        return self.needle.casefold() in plain(line.text).casefold()

    # Moving about

    def set_needle(self, needle: str) -> None:
        self.needle = needle
        self._found = 0
        self.repaint()

    def action_scroll_lines(self, step: int) -> None:
        numbers = [line.number for line in self._held]
        if not numbers:
            return
        if self.following:
            if step >= 0:
                return
            self._bottom = numbers[-1]
        at = next((i for i, number in enumerate(numbers) if number >= self._bottom), len(numbers) - 1)
        lowest = min(len(numbers) - 1, self._height - 1)
        at = max(lowest, at + step)
        if at >= len(numbers) - 1:
            if not self.paused:
                self.action_newest()
                return
            at = len(numbers) - 1
        self.following = False
        self._bottom = numbers[at]
        self.repaint()

    def action_scroll_pages(self, direction: int) -> None:
        self.action_scroll_lines(direction * max(1, self._height - 1))

    def action_oldest(self) -> None:
        self.action_scroll_lines(-_KEPT)

    def action_newest(self) -> None:
        self.following, self.paused = True, False
        self.unseen = self._found = 0
        self.repaint()

    def toggle_pause(self) -> None:
        if self.paused:
            self.action_newest()
            return
        self.paused = True
        if self.following:
            self.following = False
            self._bottom = self._last
        self.repaint()

    def toggle_wrap(self) -> None:
        self.wrapping = not self.wrapping
        self.repaint()

    def step_source(self, step: int) -> None:
        if self.sources:
            now = self.sources.index(self.source) if self.source in self.sources else 0
            self.select(self.sources[(now + step) % len(self.sources)])

    def action_find(self, direction: int) -> None:
        """Go to the next match upwards (-1) or downwards (1), around the ends."""
        matches = [line.number for line in self._held if self.needle and self._matches(line)]
        if not matches:
            return
        if direction < 0:
            earlier = [number for number in matches if number < (self._found or self._last + 1)]
            self._found = earlier[-1] if earlier else matches[-1]
        else:
            later = [number for number in matches if number > self._found]
            self._found = later[0] if later else matches[0]
        self._bring_into_view(self._found)

    def _bring_into_view(self, number: int) -> None:
        numbers = [line.number for line in self._held]
        at = numbers.index(number)
        self.following = False
        self._bottom = numbers[min(len(numbers) - 1, max(self._height - 1, at + self._height // 2))]
        self.repaint()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self.action_scroll_lines(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.action_scroll_lines(-3)
