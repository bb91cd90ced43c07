"""The main screen: header, the four panes in the layout of the terminal's size, footer, and the filter line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.widgets import Input

from llamarunner.control.backend import Backend
from llamarunner.control.snapshot import Snapshot
from tui import layout
from tui.lines import Line, LineView
from tui.panes.downloads import Downloads
from tui.panes.footer import Footer, Hint
from tui.panes.hardware import HardwarePane
from tui.panes.header import Header, Troubles
from tui.panes.logs import LogsPane
from tui.panes.models import ModelsPane
from tui.panes.pane import Pane
from tui.panes.requests import RequestsPane
from tui.panes.table_pane import TablePane
from tui.text import fit

if TYPE_CHECKING:
    from tui.app import ControlCenter

_MAX_FILTER = 80  # characters
_HINTS: dict[str, tuple[Hint, ...]] = {
    layout.HARDWARE: (("1-4", "panes"), ("z", "zoom"), ("T", "theme"), ("^p", "commands")),
    layout.MODELS: (
        ("⏎", "details"), ("L", "load"), ("U", "unload"), ("D", "download"), ("/", "filter"), ("s", "sort"),
        ("1-4", "panes"), ("z", "zoom"), ("^p", "commands"),
    ),
    layout.REQUESTS: (
        ("⏎", "details"), ("/", "filter"), ("s", "sort"), ("1-4", "panes"), ("z", "zoom"), ("^p", "commands"),
    ),
    layout.LOGS: (
        ("[ ]", "source"), ("p", "pause"), ("/", "search"), ("n", "next"), ("f", "follow"), ("w", "wrap"),
        ("1-4", "panes"), ("z", "zoom"),
    ),
}  # fmt: skip


class TooSmall(LineView):
    def draw(self, width: int, height: int) -> Sequence[Line]:
        message = "LlamaRunner needs 32x8 cells" if width >= 28 else "needs 32x8"
        return [*[Line()] * ((height - 1) // 2), Line.of((fit(message.center(width), width), "warn"))]


class MainScreen(Screen[None]):
    HORIZONTAL_BREAKPOINTS = layout.WIDTHS
    VERTICAL_BREAKPOINTS = layout.HEIGHTS
    AUTO_FOCUS = ""  # `activate` says where the focus is
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(index + 1), f"pane('{name}')", name.title(), show=False)
            for index, name in enumerate(layout.PANES)
        ),
        Binding("tab", "next_pane(1)", "Next pane", show=False),
        Binding("shift+tab", "next_pane(-1)", "Previous pane", show=False),
        # priority: the field has the focus before the next key is passed on, however fast one types
        Binding("slash", "filter", "Filter", show=False, priority=True),
        Binding("z", "zoom", "Zoom the pane", show=False),
        Binding("escape", "back", "Back", show=False),
        Binding("p", "pause", "Pause the log", show=False),
        Binding("f", "follow", "Follow the log", show=False),
        Binding("w", "wrap", "Wrap the log", show=False),
        Binding("left_square_bracket", "source(-1)", "Previous log", show=False),
        Binding("right_square_bracket", "source(1)", "Next log", show=False),
    ]

    def __init__(self, backend: Backend, *, ascii_only: bool = False) -> None:
        super().__init__()
        self.header = Header(ascii_only=ascii_only)
        self.troubles = Troubles(ascii_only=ascii_only)
        self.downloads = Downloads(ascii_only=ascii_only)
        self.hardware = HardwarePane(ascii_only=ascii_only)
        self.models = ModelsPane(ascii_only=ascii_only)
        self.requests = RequestsPane(ascii_only=ascii_only)
        self.logs = LogsPane(backend, ascii_only=ascii_only)
        self.footer = Footer(ascii_only=ascii_only)
        self.filter = Input(id="filter", max_length=_MAX_FILTER, compact=True, select_on_focus=False)
        self.filter.cursor_blink = False
        self.too_small = TooSmall(id="too-small", ascii_only=ascii_only)
        self.top = Container(self.hardware, self.models, id="top")
        self.bottom = Container(self.requests, self.logs, id="bottom")
        self.panes: dict[str, Pane] = dict(
            zip(layout.PANES, (self.hardware, self.models, self.requests, self.logs), strict=True)
        )
        self.active = layout.MODELS
        self.lower = layout.REQUESTS
        self.zoomed = False
        self._hardware_rows = 0
        self._models_rows = 0

    def compose(self) -> ComposeResult:
        self.filter.display = False
        above = (self.header, self.troubles, self.downloads)
        yield from (*above, self.top, self.bottom, self.footer, self.filter, self.too_small)

    @property
    def center(self) -> ControlCenter:
        return cast("ControlCenter", self.app)

    def on_mount(self) -> None:
        self.fit(self.app.size.width, self.app.size.height)
        self.activate(self.active)

    def on_resize(self, event: events.Resize) -> None:
        self.fit(event.size.width, event.size.height)

    # Data

    def show(self, snapshot: Snapshot) -> None:
        self.header.show(snapshot)
        self.troubles.show(snapshot, self.app.size.width, allowed=not self.too_small.display)
        self.downloads.show(snapshot, self.app.size.width, allowed=not self.too_small.display)
        for pane in self.panes.values():
            pane.show(snapshot)
        rows = (self.hardware.compact_rows(), self.models.wanted_height())
        if rows != (self._hardware_rows, self._models_rows):
            self.fit(self.app.size.width, self.app.size.height)

    # Layout

    def fit(self, width: int, height: int) -> None:
        mode = layout.mode_for(width, height)
        self.set_class(self.zoomed, "-zoomed")
        shown = layout.visible_panes(mode, self.active, self.lower, self.zoomed)
        for name, pane in self.panes.items():
            pane.display = name in shown
        self.top.display = bool(shown & {layout.HARDWARE, layout.MODELS})
        self.bottom.display = bool(shown & {layout.REQUESTS, layout.LOGS})
        tiny = mode is layout.Mode.TINY
        self.too_small.display = tiny
        self.header.display = not tiny
        self.footer.display = not tiny and not self.filter.display
        self.troubles.show(self.center.snapshot, width, allowed=not tiny)
        self.downloads.show(self.center.snapshot, width, allowed=not tiny)
        self._hardware_rows, self._models_rows = self.hardware.compact_rows(), self.models.wanted_height()
        compact = mode is layout.Mode.COMPACT and not self.zoomed
        self.requests.tab = self.logs.title_text if compact else ""
        self.logs.tab = self.requests.title_text if compact else ""
        self.top.styles.height = "auto" if compact else None
        self.hardware.styles.height = min(self._hardware_rows, max(3, height // 4)) if compact else None
        self.models.styles.height = min(self._models_rows, height * 11 // 24) if compact else None

    def activate(self, name: str) -> None:
        self.active = name
        if name in (layout.REQUESTS, layout.LOGS):
            self.lower = name
        self.fit(self.app.size.width, self.app.size.height)
        self.footer.show(_HINTS[name])
        self.logs.pull()
        self.set_focus(self.panes[name], scroll_visible=False)
        self.panes[name].repaint()

    @on(events.DescendantFocus)
    def _pane_focused(self, event: events.DescendantFocus) -> None:
        """A click or the keyboard moved the focus to a pane."""
        for name, pane in self.panes.items():
            if event.widget is pane and name != self.active:
                self.activate(name)

    def action_pane(self, name: str) -> None:
        self.activate(name)

    def action_next_pane(self, step: int) -> None:
        self.activate(layout.PANES[(layout.PANES.index(self.active) + step) % len(layout.PANES)])

    def action_zoom(self) -> None:
        self.zoomed = not self.zoomed
        self.activate(self.active)

    def action_back(self) -> None:
        """Undo the innermost thing: a filter, then the zoom."""
        pane = self.panes[self.active]
        if isinstance(pane, TablePane | LogsPane) and pane.needle:
            pane.set_needle("")
        elif self.zoomed:
            self.action_zoom()

    # Filter and search

    def action_filter(self) -> None:
        pane = self.panes[self.active]
        if self.filter.has_focus:
            self.filter.insert_text_at_cursor("/")
            return
        if not isinstance(pane, TablePane | LogsPane):
            return
        self.filter.value = pane.needle
        self.filter.placeholder = (
            f"{'search' if pane is self.logs else 'filter'} {pane.TITLE.lower()}, Enter keeps it, Esc clears it"
        )
        self.filter.display, self.footer.display = True, False
        self.set_focus(self.filter)  # at once: the next key may be typed already

    @on(Input.Changed, "#filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        if self.filter.display:
            self._apply_filter(event.value)

    def _apply_filter(self, needle: str) -> None:
        pane = self.panes[self.active]
        if isinstance(pane, TablePane | LogsPane) and pane.needle != needle:
            pane.set_needle(needle)

    @on(Input.Submitted, "#filter")
    def _filter_done(self, event: Input.Submitted) -> None:
        self._apply_filter(event.value)  # with fast typing, the last changes are told of only after this
        self._close_filter()
        if self.active == layout.LOGS:
            self.logs.action_find(-1)

    def _close_filter(self) -> None:
        self.filter.display, self.footer.display = False, True
        self.activate(self.active)

    def on_key(self, event: events.Key) -> None:
        if self.filter.has_focus and event.key in ("escape", "tab", "shift+tab"):
            event.stop()
            event.prevent_default()
            self._apply_filter("" if event.key == "escape" else self.filter.value)
            self._close_filter()

    # Logs, from whichever pane

    def action_pause(self) -> None:
        self.logs.toggle_pause()

    def action_follow(self) -> None:
        self.logs.action_newest()

    def action_wrap(self) -> None:
        self.logs.toggle_wrap()

    def action_source(self, step: int) -> None:
        self.logs.step_source(step)

    # Opening

    def on_table_pane_opened(self, event: TablePane.Opened) -> None:
        event.stop()
        if event.pane is self.models:
            self.center.open_model(event.key)
        else:
            self.center.open_request(int(event.key))
