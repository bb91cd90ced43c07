"""All that is known of one model or one request, kept up to date while it is open."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen

from llamarunner.control.snapshot import ModelView, RequestView, RunnerState, Snapshot
from tui import words
from tui.lines import Line, LineView
from tui.panes.footer import Footer, Hint
from tui.panes.pane import title_line
from tui.text import plain, wrap_words

Fact = tuple[str, str, str]  # label, text, style; a label of "" continues the one above
Facts = Callable[[Snapshot], list[Fact] | None]  # None: it is not known any more

_LABEL_WIDTH = 14


class DetailView(LineView, can_focus=True):
    def __init__(self, title: str, *, ascii_only: bool) -> None:
        super().__init__(id="detail", ascii_only=ascii_only)
        self._title = plain(title)
        self._facts: list[Fact] | None = []
        self._top = 0
        self._height = 1
        self._length = 0

    def show(self, facts: list[Fact] | None) -> None:
        if facts is not None or self._facts == []:
            self._facts = facts
        self.repaint()

    def draw(self, width: int, height: int) -> Sequence[Line]:
        lines = fact_lines(self._facts or [("", "It is not known any more.", "muted")], width)
        self._height, self._length = max(1, height - 2), len(lines)
        self._top = max(0, min(self._top, self._length - self._height))
        shown = lines[self._top : self._top + self._height]
        more = f"{self._top + 1}–{self._top + len(shown)} of {self._length}" if self._length > self._height else ""
        return [title_line(self._title, "", more, width=width, focus=True), Line(), *shown]

    def scroll_by(self, step: int) -> None:
        self._top = max(0, min(self._top + step, self._length - self._height))
        self.repaint()

    @property
    def page(self) -> int:
        return self._height

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self.scroll_by(2)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.scroll_by(-2)


class Detail(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace", "close", "Back", show=False),
        Binding("down,j", "scroll_by(1)", show=False),
        Binding("up,k", "scroll_by(-1)", show=False),
        Binding("pagedown,ctrl+d,space", "scroll_page(1)", show=False),
        Binding("pageup,ctrl+u", "scroll_page(-1)", show=False),
        Binding("home,g", "scroll_by(-9999)", show=False),
        Binding("end,G", "scroll_by(9999)", show=False),
    ]

    def __init__(
        self, title: str, facts: Facts, snapshot: Snapshot, *, model: str = "", hints: Sequence[Hint] = (),
        ascii_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model  # that load and unload are about
        self._facts = facts
        self._snapshot = snapshot
        self.view = DetailView(title, ascii_only=ascii_only)
        self._footer = Footer((("Esc", "back"), ("j k", "scroll"), *hints), ascii_only=ascii_only)

    def compose(self) -> ComposeResult:
        yield self.view
        yield self._footer

    def on_mount(self) -> None:
        self.view.focus()
        self.show(self._snapshot)

    def show(self, snapshot: Snapshot) -> None:
        self.view.show(self._facts(snapshot))

    def action_close(self) -> None:
        if self.is_current:  # a second key may come before the screen is gone
            _ = self.dismiss()

    def action_scroll_by(self, step: int) -> None:
        self.view.scroll_by(step)

    def action_scroll_page(self, direction: int) -> None:
        self.view.scroll_by(direction * self.view.page)


def fact_lines(facts: Sequence[Fact], width: int) -> list[Line]:
    lines: list[Line] = []
    for label, text, style in facts:
        room = max(8, width - _LABEL_WIDTH - 4)
        for index, piece in enumerate(wrap_words(plain(text), room)):
            head = label if index == 0 else ""
            lines.append(Line.of((f"  {head:<{_LABEL_WIDTH}}", "muted"), (piece, style)))
    return lines


def model_facts(name: str) -> Facts:
    def facts(snapshot: Snapshot) -> list[Fact] | None:
        model = next((model for model in snapshot.models if model.name == name), None)
        return None if model is None else _of_model(model, snapshot)

    return facts


def request_facts(request_id: int) -> Facts:
    def facts(snapshot: Snapshot) -> list[Fact] | None:
        request = next((request for request in snapshot.requests if request.request_id == request_id), None)
        return None if request is None else _of_request(request)

    return facts


def _of_model(model: ModelView, snapshot: Snapshot) -> list[Fact]:
    state, style = words.model_state(model)
    facts: list[Fact] = [("state", f"{state} for {words.duration(float(int(model.state_s)))}", style)]
    if model.reason:
        facts.append(("because", model.reason, "bad" if model.state is RunnerState.FAILED else ""))
    if model.problem:
        facts.append(("problem", model.problem, "bad-strong"))
    if model.hint:
        facts.append(("what helps", model.hint, "accent"))
    if model.progress is not None:
        facts.append(("loaded so far", words.percent(model.progress), style))
    facts.append(("", " ", ""))
    if model.slots:
        waiting = f", {model.queued} waiting" if model.queued else ""
        facts.append(("answers", f"{model.in_flight} of {model.slots} slots{waiting}", ""))
    idle = "" if model.idle_left_s is None else words.countdown(model.idle_left_s)
    memory = [f"{words.size(model.gpu_bytes)} on GPU" if model.gpu_bytes else "",
              f"{words.size(model.memory_bytes)} in RAM" if model.memory_bytes else ""]  # fmt: skip
    kind = " ".join(part for part in (model.architecture, model.parameter_size, model.quantization) if part)
    known: list[tuple[str, str]] = [
        ("at work", ", ".join(model.activity)),
        ("unloads in", idle),
        ("speed", f"{words.rate(model.tokens_per_s)} tokens/s" if model.tokens_per_s else ""),
        ("memory", ", ".join(filter(None, memory))),
        ("estimated", _estimate(model, snapshot)),
        ("context", f"{model.context} tokens a request" if model.context else ""),
        ("load took", words.duration(model.load_s) if model.load_s is not None else ""),
        ("pinned", "yes: never unloaded to make room" if model.pinned else ""),
        ("kind", kind),
        ("can do", ", ".join(model.capabilities)),
        ("aliases", ", ".join(model.aliases)),
        ("file", model.path),
        ("file size", words.size(model.file_bytes) if model.file_bytes else ""),
        ("found in", model.source),
        ("engine", model.engine),
        ("process", f"pid {model.pid}, port {model.port}" if model.pid else ""),
        ("command", shlex.join(model.argv)),
    ]
    facts += [(label, text, "") for label, text in known if text]
    recent = [request for request in snapshot.requests if request.model == model.name][:8]
    if recent:
        facts.append(("", " ", ""))
    for index, request in enumerate(recent):
        status, style = words.request_state(request)
        text = f"{status:<10} {words.clock(request.started_at)}  {request.client}  {words.duration(request.total_s)}"
        facts.append(("requests" if index == 0 else "", text, style))
    return facts


def _estimate(model: ModelView, snapshot: Snapshot) -> str:
    """With its error, where all of what it foretells was measured."""
    if not model.estimated_bytes:
        return ""
    is_whole = model.gpu_bytes is not None or not snapshot.gpus  # some drivers do not say whose memory it is
    is_loaded = model.state in (RunnerState.READY, RunnerState.DRAINING)
    measured = (model.gpu_bytes or 0) + (model.memory_bytes or 0) if is_whole and is_loaded else 0
    error = f", {model.estimated_bytes / measured - 1:+.0%} of what was measured" if measured else ""
    return f"{words.size(model.estimated_bytes)}{error}"


def _of_request(request: RequestView) -> list[Fact]:
    state, style = words.request_state(request)
    facts: list[Fact] = [("status", state, style)]
    if request.error:
        facts.append(("error", request.error, "bad-strong"))
    if request.stripped:
        facts.append(("left out", f"{request.stripped}: its engine cannot do them", "warn"))
    if request.truncated:
        facts.append(("truncated", f"{request.truncated}: the prompt was longer than the context", "warn"))
    if request.ignored:
        facts.append(("ignored", f"unknown options: {request.ignored}", "warn"))
    if request.waiting_for:
        left = f", about {words.duration(request.left_s)} yet" if request.left_s is not None else ""
        facts.append(("turn", f"number {request.position}{left}", "warn"))
        facts.append(("", request.waiting_for, "warn"))
    speed = words.rate(request.output_tokens_per_s)
    prompt = words.rate(request.prompt_tokens_per_s)
    cached = f", {request.cached_tokens} of them cached" if request.cached_tokens else ""
    known: list[tuple[str, str]] = [
        ("model", request.model),
        ("asked", f"{request.dialect} {request.endpoint}{', streamed' if request.stream else ''}"),
        ("client", request.client),
        ("program", request.user_agent),
        ("came at", words.clock(request.started_at)),
        ("", " "),
        ("in the queue", words.duration(request.queue_s)),
        ("loading", words.duration(request.load_s)),
        ("first token", words.duration(request.ttft_s)),
        ("in all", words.duration(request.total_s)),
        ("", " "),
        ("prompt", f"{words.tokens(request.prompt_tokens)} tokens{cached}, {prompt} tokens/s"),
        ("answer", f"{words.tokens(request.output_tokens)} tokens, {speed} tokens/s, {words.size(request.bytes_out)}"),
    ]
    return facts + [(label, text, "") for label, text in known if text]
