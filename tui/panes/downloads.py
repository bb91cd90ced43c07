"""Models on their way here, a line for each below the header; one that came or failed is told of for a while."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from llamarunner.control.snapshot import PullState, PullView, Snapshot
from tui import words
from tui.graphs import bar
from tui.lines import Line, LineView, Span
from tui.text import fit, plain

_MOST = 3  # lines
_TOLD_S = {PullState.DONE: 30.0, PullState.FAILED: 600.0}  # how long one that ended is told of
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
    ended = [pull for pull in snapshot.pulls if _ended_lately(pull, snapshot.taken_at)]
    longest = max((cell_len(plain(pull.name)) for pull in running if _has_bar(pull)), default=0)
    lines = [_running_line(pull, width, longest) for pull in running] + [_ended_line(pull, width) for pull in ended]
    if len(lines) <= _MOST:
        return lines
    return [*lines[: _MOST - 1], Line.of((f"   and {len(lines) - _MOST + 1} more downloads", "muted"))]


def _ended_lately(pull: PullView, now: float) -> bool:
    return pull.ended_at is not None and now - pull.ended_at < _TOLD_S.get(pull.state, 0.0)


def _ended_line(pull: PullView, width: int) -> Line:
    glyph, style = words.pull_state(pull)
    name, status = plain(pull.name), plain(words.pull_status(pull))
    if pull.state is PullState.DONE:
        return Line.of((f" {glyph} ", style), (name, "strong"), (f"  {status}", "muted")).clipped(width)
    status = status.removeprefix(name).lstrip(": ")
    hint: list[Span] = [("   → ", "accent"), (plain(pull.hint), "")] if pull.hint else []
    return Line(((f" {glyph} {name}: ", style), (status, "bad"), *hint)).clipped(width)


def _has_bar(pull: PullView) -> bool:
    return pull.total > 0 and pull.state is PullState.RUNNING


def _running_line(pull: PullView, width: int, longest: int) -> Line:
    """What matters less goes first where there is no room. `longest` is the width of the longest name."""
    glyph, style = words.pull_state(pull)
    mark: Span = (f" {glyph} ", style)
    name: list[Span] = [mark, (plain(pull.name), "strong")]
    if not _has_bar(pull):
        return Line((*name, (f"  {plain(words.pull_status(pull))}", "muted"))).clipped(width)
    done = pull.completed / pull.total
    full, empty = bar(done, _BAR)
    gauge: list[Span] = [("  ", ""), (full, "accent"), (empty, "muted")]
    share: list[Span] = [(f"  {words.percent(done):>4}", "")]
    amount: list[Span] = [(f"  {words.size(pull.completed):>5} of {words.size(pull.total)}", "muted")]
    speed: list[Span] = [(f"  {words.size(pull.bytes_per_s):>5}/s", "muted")] if pull.bytes_per_s is not None else []
    left: list[Span] = [(f"  {words.countdown(pull.left_s)} left", "muted")] if pull.left_s is not None else []
    if pull.completed >= pull.total:
        speed, left = [(f"  {plain(pull.status)}", "muted")], []
    aligned: list[Span] = [mark, (fit(plain(pull.name), longest), "strong")]
    for spans in (
        aligned + gauge + share + amount + speed + left,
        name + gauge + share + amount + speed + left,
        name + share + amount + speed + left,
        name + share + left,
    ):
        if sum(cell_len(text) for text, _ in spans) <= width:
            return Line(tuple(spans))
    return Line(tuple(share + name)).clipped(width)
