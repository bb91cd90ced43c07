"""A question over the screen: what it is about, and the answers, each with a key of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from tui.lines import Line, LineView
from tui.text import fit, plain, wrap_words

_WIDEST = 72


@dataclass(frozen=True, slots=True)
class Option:
    key: str
    label: str
    value: str
    style: str = ""


class ChoiceView(LineView, can_focus=True):
    def __init__(
        self, title: str, text: Sequence[str], options: Sequence[Option], *, ascii_only: bool, chosen: int
    ) -> None:
        super().__init__(id="choice", ascii_only=ascii_only)
        self._title = plain(title)
        self._text = [plain(line) for line in text]
        self.options = options
        self.chosen = chosen

    def lines(self, width: int) -> list[Line]:
        inner = width - 4
        lines = [Line(), Line.of(("  ", ""), (fit(self._title, inner), "accent-strong")), Line()]
        lines += [Line.of((f"  {piece}", "")) for text in self._text for piece in wrap_words(text, inner)]
        lines += [Line()] if self._text else []
        for index, option in enumerate(self.options):
            on = index == self.chosen
            label = fit(f" {option.key}  {option.label}", inner - 1)
            style = option.style or ("strong" if on else "")
            spans = (("  ", ""), ("▸" if on else " ", "focus"), (label, style))
            lines.append(Line(spans, "cursor" if on else ""))
        return [*lines, Line()]

    def draw(self, width: int, height: int) -> Sequence[Line]:
        return self.lines(width)

    def fit_into(self, width: int, height: int) -> None:
        longest = max(map(cell_len, (self._title, *self._text, *(f"    {o.label}  " for o in self.options))), default=0)
        across = max(10, min(_WIDEST, width - 2, longest + 8))
        self.styles.width = across
        self.styles.height = min(height, len(self.lines(across - 2)) + 2)


class Choice(ModalScreen[str]):
    """Gives the chosen option's value, "" for Esc. The one that Enter takes must be harmless: the last, where `chosen`
    does not say another."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j,tab,right", "move(1)", show=False),
        Binding("up,k,shift+tab,left", "move(-1)", show=False),
        Binding("enter", "choose", show=False),
        Binding("escape", "cancel", show=False),
    ]

    def __init__(
        self, title: str, text: Sequence[str], options: Sequence[Option], *, chosen: int | None = None,
        ascii_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._options = options
        first = len(options) - 1 if chosen is None else chosen
        self.view = ChoiceView(title, text, options, ascii_only=ascii_only, chosen=first)

    def compose(self) -> ComposeResult:
        yield self.view

    def on_mount(self) -> None:
        self.view.fit_into(self.app.size.width, self.app.size.height)
        self.view.focus()

    def on_resize(self, event: events.Resize) -> None:
        self.view.fit_into(event.size.width, event.size.height)

    def on_key(self, event: events.Key) -> None:
        for option in self._options:
            if event.character == option.key:
                event.stop()
                self.give(option.value)
                return

    def give(self, value: str) -> None:
        if self.is_current:  # a second key may come before the screen is gone
            _ = self.dismiss(value)

    def action_move(self, step: int) -> None:
        self.view.chosen = (self.view.chosen + step) % len(self._options)
        self.view.repaint()

    def action_choose(self) -> None:
        self.give(self._options[self.view.chosen].value)

    def action_cancel(self) -> None:
        self.give("")
