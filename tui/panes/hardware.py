"""GPUs, or CPU and memory where there is none, with their last minutes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rich.cells import cell_len

from llamarunner.control.snapshot import GpuView, HostView, Snapshot, UseView
from tui import words
from tui.graphs import bar, history, shares
from tui.lines import Line, Span
from tui.panes.pane import Pane
from tui.text import fit, plain

_SAMPLES = 240  # one a second
_HOT_C = 83
_TALLEST = 4  # rows of a history
_FULL = 0.92


class HardwarePane(Pane):
    NUMBER, TITLE = 1, "Hardware"

    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__(ascii_only=ascii_only)
        self._history: dict[str, deque[float]] = {}
        self._taken_at = 0.0

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.taken_at != self._taken_at:
            self._taken_at = snapshot.taken_at
            self._sample(snapshot)
        super().show(snapshot)

    def _sample(self, snapshot: Snapshot) -> None:
        host = snapshot.host
        samples = {f"gpu{gpu.index}": gpu.utilization or 0.0 for gpu in snapshot.gpus}
        samples["cpu"] = host.cpu or 0.0
        samples["ram"] = _share(host.memory_used_bytes, host.memory_total_bytes)
        for name, value in samples.items():
            self._history.setdefault(name, deque(maxlen=_SAMPLES)).append(value)

    def compact_rows(self) -> int:
        """Rows of the compact form: the title, then one a GPU, or CPU and memory."""
        return 1 + (len(self.snapshot.gpus) if self.snapshot and self.snapshot.gpus else 2)

    def notes(self) -> tuple[str, str]:
        snapshot = self.snapshot
        if snapshot is None:
            return "", ""
        if len(snapshot.gpus) > 1:
            used, total = sum(g.used_bytes for g in snapshot.gpus), sum(g.total_bytes for g in snapshot.gpus)
            return f"{words.size(used)} of {words.size(total)} on {len(snapshot.gpus)} GPUs", ""
        return ("", "") if snapshot.gpus else ("no GPU", "")

    def body(self, width: int, height: int) -> Sequence[Line]:
        if self.snapshot is None:
            return []
        gpus, host = self.snapshot.gpus, self.snapshot.host
        if height <= max(2, len(gpus)):
            rows = [self._gpu_row(gpu, width) for gpu in gpus] or self._host_rows(host, width)
            return rows
        if not gpus:
            return self._host_block(host, width, height)
        each = (height - 3) // len(gpus)  # below them, an empty line, the processor and the memory
        gap = each == 3 or each > 4
        lines: list[Line] = []
        for gpu in gpus:
            lines += [self._gpu_row(gpu, width)] if each < 2 else self._gpu_block(gpu, width, each - gap)
            if gap:
                lines.append(Line())
        if not gap and len(lines) < height - 2:
            lines.append(Line())
        lines = [*lines[: max(0, height - 2)], *self._host_rows(host, width)]
        return [*lines, *_use_lines(host.use, width)] if len(lines) < height else lines

    def _gpu_row(self, gpu: GpuView, width: int) -> Line:
        name = _short_name(gpu.name)
        figures = self._gpu_figures(gpu)
        graph = 12 if width >= 100 else 8 if width >= 76 else 0
        label = fit(f"{gpu.index} {name}", 12 if width >= 70 else 3)
        memory = f"{_figure(gpu.used_bytes)}/{words.size(gpu.total_bytes)}"
        tail = f" {memory:>11} "
        used = 1 + cell_len(label) + 1 + cell_len(tail) + sum(cell_len(text) for text, _ in figures) + graph + 2
        meter = _meter(gpu.use, gpu.used_bytes, gpu.total_bytes, max(4, width - used), stale=gpu.stale)
        spans: list[Span] = [(" ", ""), (label, "strong"), (" ", ""), *meter, (tail, ""), *figures]
        if graph:
            spans += [(" ", ""), (history(list(self._history[f"gpu{gpu.index}"]), graph)[0], "good")]
        return Line(tuple(spans))

    def _gpu_figures(self, gpu: GpuView) -> list[Span]:
        if gpu.stale:
            return [("not answering   ", "bad")]
        hot = gpu.temperature_c is not None and gpu.temperature_c >= _HOT_C
        temperature = words.NOTHING if gpu.temperature_c is None else f"{gpu.temperature_c:.0f}°C"
        power = words.NOTHING if gpu.power_w is None else f"{gpu.power_w:.0f}W"
        return [
            (f"{words.percent(gpu.utilization):>4}", "strong"),
            (f" {temperature:>5}", "bad" if hot else ""),
            (f" {power:>5}", ""),
        ]

    def _gpu_block(self, gpu: GpuView, width: int, rows: int) -> list[Line]:
        """Name and figures, bar, what holds the memory, and what is left of `rows` for the history."""
        figures = self._gpu_figures(gpu)
        room = max(4, width - sum(cell_len(text) for text, _ in figures) - 3)
        name = plain(gpu.name) if cell_len(gpu.name) + 3 <= room else _short_name(gpu.name)
        memory = f" {_figure(gpu.used_bytes)}/{words.size(gpu.total_bytes)}"
        meter = _meter(gpu.use, gpu.used_bytes, gpu.total_bytes, max(4, width - 2 - len(memory)), stale=gpu.stale)
        use = _use_lines(gpu.use, width) if rows > 2 else []
        depth = max(0, min(_TALLEST, rows - 2 - len(use)))
        graph = history(list(self._history[f"gpu{gpu.index}"]), max(4, width - 2), depth)
        return [
            Line.of((" ", ""), (fit(f"{gpu.index} {name}", room), "strong"), (" ", ""), *figures),
            Line.of((" ", ""), *meter, (memory, "")),
            *use,
            *(Line.of((" ", ""), (row, "good")) for row in graph),
        ]

    def _host_rows(self, host: HostView, width: int) -> list[Line]:
        memory = _share(host.memory_used_bytes, host.memory_total_bytes)
        load = "" if host.load_1m is None else f"load {host.load_1m:.1f}"
        note = load if width < 60 else " ".join(filter(None, (words.plural(host.cores, "core"), load)))
        sizes = f"{_figure(host.memory_used_bytes)}/{words.size(host.memory_total_bytes)}"
        return [
            self._host_row("CPU", host.cpu or 0.0, words.percent(host.cpu), note, width),
            self._host_row("RAM", memory, words.percent(memory), sizes, width, host),
        ]

    def _host_row(
        self, label: str, share: float, figure: str, note: str, width: int, host: HostView | None = None
    ) -> Line:
        """With `host`, of its memory."""
        graph = 12 if width >= 100 else 8 if width >= 76 else 0
        note_width = min(17, max(11, width // 4))
        room = max(4, width - 2 - 4 - 5 - 2 - note_width - (graph + 1 if graph else 0))
        filled, empty = bar(share, room)
        meter: list[Span] = [(filled, _share_style(share)), (empty, "rule")]
        if host is not None:
            meter = _meter(host.use, host.memory_used_bytes, host.memory_total_bytes, room)
        spans: list[Span] = [(" ", ""), (label, "title"), (" ", ""), *meter]
        spans += [(f" {figure:>4} ", "strong"), (fit(note, note_width, "right"), "")]
        if graph:
            spans += [(" ", ""), (history(list(self._history[label.lower()]), graph)[0], "good")]
        return Line(tuple(spans))

    def _host_block(self, host: HostView, width: int, height: int) -> list[Line]:
        """Without a GPU, the processor and the memory have the room."""
        depth = max(0, min(_TALLEST, (height - 5) // 2))
        lines: list[Line] = []
        for line, name in zip(self._host_rows(host, min(width, 75)), ("cpu", "ram"), strict=True):
            graph = history(list(self._history[name]), max(4, width - 2), depth)
            use = _use_lines(host.use, width) if name == "ram" and height > 6 else []
            lines += [line, *use, *(Line.of((" ", ""), (row, "good")) for row in graph), Line()]
        if host.gpu_note:
            lines.append(Line.of((fit(f" {plain(host.gpu_note)}", width - 1), "muted")))
        return lines


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _share_style(share: float) -> str:
    return "warn" if share >= _FULL else "primary"


def _meter(use: UseView | None, used: int, total: int, width: int, *, stale: bool = False) -> list[Span]:
    """A bar of what our models hold and what others do, or of both where they are not known apart."""
    style = "muted" if stale else _share_style(_share(used, total))
    if use is None:
        filled, empty = bar(_share(used, total), width)
        return [(filled, style), (empty, "rule")]
    ours, others, free = shares((_share(use.ours_bytes, total), _share(use.others_bytes, total)), width)
    return [(ours, style), (others, "muted"), (free, "rule")]


def _use_lines(use: UseView | None, width: int) -> list[Line]:
    """What the memory is used for, as far as there is room."""
    if use is None:
        return []
    parts = (("ours", use.ours_bytes), ("others", use.others_bytes), ("reserve", use.reserve_bytes),
             ("free", use.free_bytes))  # fmt: skip
    spans: list[Span] = []
    for name, size in parts:
        more: list[Span] = [(f" {name} ", "muted"), (words.size(size), "")]
        if sum(cell_len(text) for text, _ in (*spans, *more)) < width:
            spans += more
    return [Line(tuple(spans))]


def _figure(size_bytes: int) -> str:
    """A size without its unit where the total beside it has the same."""
    return words.size(size_bytes).rstrip("G")


def _short_name(name: str) -> str:
    """ "NVIDIA GeForce RTX 4090" is "RTX 4090" where room is short."""
    short = plain(name)
    for maker in ("NVIDIA ", "GeForce ", "AMD ", "Radeon "):
        short = short.replace(maker, "")
    return short
