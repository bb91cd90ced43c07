"""A question that is answered by typing. What is wrong with the answer is said below it, and it can be mended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import ModalScreen
from textual.widgets import Input

from llamarunner.control.backend import Outcome
from tui.lines import Line, LineView
from tui.text import fit, plain, wrap_words

_WIDEST = 72
_MOST = 300  # characters


class PromptText(LineView):
    def __init__(self, *, id: str, ascii_only: bool) -> None:
        super().__init__(id=id, ascii_only=ascii_only)
        self.paragraphs: list[tuple[str, str]] = []  # text and style

    def draw(self, width: int, height: int) -> Sequence[Line]:
        inner = max(8, width - 4)
        wrapped = [(piece, style) for text, style in self.paragraphs for piece in wrap_words(plain(text), inner)]
        return [Line.of((f"  {fit(piece, inner)}", style)) for piece, style in wrapped]

    def say(self, *paragraphs: tuple[str, str]) -> None:
        self.paragraphs = list(paragraphs)
        self.repaint()

    def rows(self, width: int) -> int:
        return len(self.draw(width, 0))


class Prompt(ModalScreen[str]):
    """`submit` is awaited with what was typed. Where its outcome is good, its message is the screen's result; "" is
    Esc."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", show=False)]

    def __init__(
        self, title: str, text: Sequence[str], submit: Callable[[str], Awaitable[Outcome]], *, placeholder: str = "",
        ascii_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._submit = submit
        self._is_busy = False
        self.head = PromptText(id="prompt-head", ascii_only=ascii_only)
        self.head.paragraphs = [(title, "accent-strong"), (" ", ""), *((line, "") for line in text), (" ", "")]
        self.field = Input(id="prompt-field", placeholder=placeholder, max_length=_MOST, compact=True)
        self.field.cursor_blink = False
        self.note = PromptText(id="prompt-note", ascii_only=ascii_only)
        self._frame = Container(self.head, self.field, self.note, id="prompt")

    def compose(self) -> ComposeResult:
        yield self._frame

    def on_mount(self) -> None:
        self.fit_into(self.app.size.width)
        self.say_keys()
        self.field.focus()

    def on_resize(self, event: events.Resize) -> None:
        self.fit_into(event.size.width)

    def fit_into(self, width: int) -> None:
        across = max(10, min(_WIDEST, width - 2))
        self._frame.styles.width = across
        self.head.styles.height = self.head.rows(across - 2)

    def say_keys(self) -> None:
        self.note.say((" ", ""), ("Enter begins, Esc goes back", "muted"))

    @on(Input.Changed)
    def _changed(self) -> None:
        self.say_keys()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if not self._is_busy:
            self._is_busy = True
            self.run_worker(self._try(event.value.strip()), exclusive=True)

    async def _try(self, text: str) -> None:
        try:
            outcome = await self._submit(text)
        finally:
            self._is_busy = False
        if not self.is_current:  # Esc was quicker
            return
        if outcome.ok:
            _ = self.dismiss(outcome.message)
        else:
            self.note.say(
                (" ", ""), (f"✗ {outcome.message}", "bad"), *([(f"→ {outcome.hint}", "")] if outcome.hint else [])
            )

    def action_cancel(self) -> None:
        if self.is_current:
            _ = self.dismiss("")
