"""Models on their way here, a line for each below the header; one that failed is told of for a while."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from llamarunner.control.snapshot import PullState, PullView, Snapshot
from tui import words
from tui.graphs import bar
from tui.lines import Line, LineView, Span
from tui.text import plain

_MOST = 3  # lines
_TOLD_S = 30.0  # how long a failure is told of
_BAR = 20  # cells


class Downloads(LineView):
    """Takes no room where nothing is downloaded."""

    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__(id="downloads", ascii_only=ascii_only)
        self._lines_now: list[Line] = []

    def show(self, snapshot: Snapshot, width: int, *, allowed: bool) -> None:
        self._lines_now = download_lines(snapshot, width)
        self.display = allowed and bool(self._lines_now)
        self.styles.height = max(1, len(self._lines_now))
        self.repaint()

    def draw(self, width: int, height: int) -> Sequence[Line]:
        return self._lines_now


def download_lines(snapshot: Snapshot, width: int) -> list[Line]:
    running = [pull for pull in snapshot.pulls if pull.ended_at is None]
    failed = [pull for pull in snapshot.pulls if _failed_lately(pull, snapshot.taken_at)]
    lines = [_running_line(pull, width) for pull in running] + [_failed_line(pull).clipped(width) for pull in failed]
    if len(lines) <= _MOST:
        return lines
    return [*lines[: _MOST - 1], Line.of((f"   and {len(lines) - _MOST + 1} more downloads", "muted"))]


def _failed_lately(pull: PullView, now: float) -> bool:
    return pull.state is PullState.FAILED and pull.ended_at is not None and now - pull.ended_at < _TOLD_S


def _failed_line(pull: PullView) -> Line:
    hint: list[Span] = [("   → ", "accent"), (plain(pull.hint), "")] if pull.hint else []
    return Line(((f" ✗ {plain(pull.name)}: ", "bad-strong"), (plain(pull.problem), "bad"), *hint))


def _running_line(pull: PullView, width: int) -> Line:
    """What matters less goes first where there is no room."""
    name: list[Span] = [(" ↓ ", "accent-strong"), (plain(pull.name), "strong")]
    if not pull.total:
        return Line((*name, (f"  {plain(pull.status)}", "muted"))).clipped(width)
    done = pull.completed / pull.total
    full, empty = bar(done, _BAR)
    gauge: list[Span] = [("  ", ""), (full, "accent"), (empty, "muted")]
    share: list[Span] = [(f"  {words.percent(done):>4}", "")]
    amount: list[Span] = [(f"  {words.size(pull.completed)} of {words.size(pull.total)}", "muted")]
    speed: list[Span] = [(f"  {words.size(pull.bytes_per_s)}/s", "muted")] if pull.bytes_per_s is not None else []
    left: list[Span] = [(f"  {words.duration(pull.left_s)} left", "muted")] if pull.left_s is not None else []
    for spans in (
        name + gauge + share + amount + speed + left,
        name + share + amount + speed + left,
        name + share + left,
    ):
        if sum(cell_len(text) for text, _ in spans) <= width:
            return Line(tuple(spans))
    return Line(tuple(share + name)).clipped(width)
