"""Models on their way here, a line for each below the header; one that came or failed is told of for a while."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from llamarunner.control.snapshot import PullState, PullView, Snapshot
from tui import words
from tui.graphs import bar
from tui.lines import Line, LineView, Span
from tui.text import fit, plain, wrap_words

_MOST = 3  # lines
_TOLD_S = {PullState.DONE: 30.0, PullState.FAILED: 300.0}  # how long one that ended is told of
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
    told = [[_running_line(pull, width, longest)] for pull in running] + [_ended_lines(pull, width) for pull in ended]
    if len(told) > _MOST:
        rest = len(told) - _MOST + 1
        return [*(lines[0] for lines in told[: _MOST - 1]), Line.of((f"   and {rest} more downloads", "muted"))]
    spare = _MOST - len(told)
    return [line for lines in told for line in lines[: 1 + spare]][:_MOST]


def _ended_lately(pull: PullView, now: float) -> bool:
    return pull.ended_at is not None and now - pull.ended_at < _TOLD_S.get(pull.state, 0.0)


def _ended_lines(pull: PullView, width: int) -> list[Line]:
    """Of a failure the second line is the rest of what is wrong, and what helps; it is there where there is room."""
    glyph, style = words.pull_state(pull)
    name, status = plain(pull.name), plain(words.pull_status(pull))
    if pull.state is PullState.DONE:
        return [Line.of((f" {glyph} ", style), (name, "strong"), (f"  {status}", "muted")).clipped(width)]
    status = status.removeprefix(name).lstrip(": ")
    head: Span = (f" {glyph} {name}: ", style)
    hint: list[Span] = [("   → ", "accent"), (plain(pull.hint), "")] if pull.hint else []
    whole = Line((head, (status, "bad"), *hint))
    if cell_len(whole.text) <= width:
        return [whole]
    first, *rest = wrap_words(status, max(8, width - cell_len(head[0]) - 1))
    second = Line((("   ", ""), (" ".join(rest), "bad"), *hint) if rest else (("", ""), *hint))
    return [Line.of(head, (first, "bad")).clipped(width), second.clipped(width)]


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
