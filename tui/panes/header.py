"""The line at the top: what runs, on which ports, how busy it is; and below it, what is wrong with a port."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from llamarunner.control.snapshot import ProxyView, RequestPhase, Snapshot
from tui import words
from tui.lines import Line, LineView, Span
from tui.text import plain


class Header(LineView):
    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__(id="header", ascii_only=ascii_only)
        self.snapshot: Snapshot | None = None

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.repaint()

    def draw(self, width: int, height: int) -> Sequence[Line]:
        return [header_line(self.snapshot, width)] if self.snapshot else []


class Troubles(LineView):
    """What is wrong with each proxy that should serve and does not. Takes no room where all is well."""

    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__(id="troubles", ascii_only=ascii_only)
        self._lines_now: list[Line] = []

    def show(self, snapshot: Snapshot, width: int, *, allowed: bool) -> None:
        self._lines_now = trouble_lines(snapshot, width)
        self.display = allowed and bool(self._lines_now)
        self.styles.height = max(1, len(self._lines_now))
        self.repaint()

    def draw(self, width: int, height: int) -> Sequence[Line]:
        return self._lines_now


def trouble_lines(snapshot: Snapshot, width: int) -> list[Line]:
    """What helps goes to a line of its own where both do not fit into one."""
    lines = []
    for proxy in snapshot.proxies:
        if not proxy.enabled or not proxy.problem:
            continue
        title = f" ✗ {plain(proxy.title or proxy.name)}: "
        problem = Line.of((title, "bad-strong"), (plain(proxy.problem), "bad"))
        hint = Line.of(("   → ", "accent"), (plain(proxy.hint), "")) if proxy.hint else Line()
        if cell_len(problem.text + hint.text) < width or not hint.spans:
            lines.append(Line(problem.spans + hint.spans).clipped(width))
        else:
            lines += [problem.clipped(width), hint.clipped(width)]
    return lines


def header_line(snapshot: Snapshot, width: int) -> Line:
    """What matters less goes first where there is no room."""
    wide = width >= 110
    name: list[Span] = [(" LlamaRunner", "focus")]
    version: list[Span] = [(f" {plain(snapshot.version)}", "muted")]
    profile: list[Span] = [(f" · {plain(snapshot.profile)}", "muted")] if snapshot.profile else []
    stopping: list[Span] = [("  ◌ stopping", "warn")] if snapshot.stopping else []
    proxies = [span for proxy in snapshot.proxies for span in _proxy_spans(proxy, wide)]
    ports = [span for proxy in snapshot.proxies for span in _port_spans(proxy)]
    live = [request for request in snapshot.requests if words.is_live(request)]
    waiting = sum(request.phase in (RequestPhase.QUEUED, RequestPhase.LOADING) for request in live)
    flight: list[Span] = [(f"{len(live)}", "accent-strong" if live else "muted"), (" in flight", "muted")]
    if waiting:
        flight.append((f" ({waiting} waiting)", "warn"))
    rate: list[Span] = [
        ("  ", ""),
        (words.rate(snapshot.tokens_per_s), "accent-strong" if snapshot.tokens_per_s else "muted"),
        (" tok/s", "muted"),
    ]
    uptime: list[Span] = [(f"  up {words.duration(_uptime(snapshot))}", "muted")]
    clock: list[Span] = [(f"  {words.clock(snapshot.taken_at)}", "muted")] if wide else []
    for left, right in (
        (name + version + profile + stopping + proxies, flight + rate + uptime + clock),
        (name + version + stopping + proxies, flight + rate + uptime),
        (name + stopping + proxies, flight + rate),
        (name + stopping + proxies, flight),
        (name + stopping + ports, flight[:2]),
        (name + stopping + ports, []),
        (name + stopping, flight),
    ):
        gap = width - 1 - sum(cell_len(text) for text, _ in left + right)
        if gap >= 2:
            return Line((*left, (" " * gap, ""), *right))
    return Line(tuple(name)).clipped(width)


def _uptime(snapshot: Snapshot) -> float:
    """Seconds for the first minute, whole minutes then: a figure that need not be painted every second."""
    seconds = max(0.0, snapshot.taken_at - snapshot.started_at)
    return seconds // 60 * 60 if seconds >= 60 else float(int(seconds))


def _proxy_spans(proxy: ProxyView, wide: bool) -> list[Span]:
    title = plain(proxy.title or proxy.name)
    if not proxy.enabled:
        return [(f"   ○ {title}", "muted"), (" off", "muted")]
    where = f":{proxy.port}" if proxy.port else ""
    if proxy.running:
        return [("   ● ", "good"), (title, ""), (where, "strong"), (" up" if wide else "", "good")]
    return [("   ✗ ", "bad-strong"), (title, ""), (where, "strong"), (" down", "bad-strong")]


def _port_spans(proxy: ProxyView) -> list[Span]:
    """The shortest form: state and port."""
    if not proxy.enabled:
        return []
    return [("  ●", "good") if proxy.running else ("  ✗", "bad-strong"), (f" {proxy.port}", "")]
