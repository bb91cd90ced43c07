"""The keys that matter here and now. What does not fit is left out from the right; help never is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from tui.lines import Line, LineView, Span

Hint = tuple[str, str]  # key, what it does
_ALWAYS: tuple[Hint, ...] = (("?", "keys"), ("q", "quit"))


class Footer(LineView):
    def __init__(self, hints: Sequence[Hint] = (), *, ascii_only: bool = False) -> None:
        super().__init__(id="footer", ascii_only=ascii_only)
        self._hints = tuple(hints)

    def show(self, hints: Sequence[Hint]) -> None:
        self._hints = tuple(hints)
        self.repaint()

    def draw(self, width: int, height: int) -> Sequence[Line]:
        return [footer_line(self._hints, width)]


def footer_line(hints: Sequence[Hint], width: int) -> Line:
    right = _spans(_ALWAYS)
    room = width - 1 - sum(cell_len(text) for text, _ in right)
    left: list[Span] = []
    for hint in hints:
        spans = _spans((hint,))
        needed = sum(cell_len(text) for text, _ in spans)
        if needed > room - 1:
            break
        left += spans
        room -= needed
    return Line((*left, (" " * max(0, room), ""), *right))


def _spans(hints: Sequence[Hint]) -> list[Span]:
    return [span for key, what in hints for span in ((f" {key}", "focus"), (f" {what} ", "muted"))]
