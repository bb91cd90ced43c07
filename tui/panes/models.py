"""The models: their state, memory, context, slots, speed, and when an idle one is unloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamarunner.control.snapshot import ModelView, RunnerState, Snapshot
from tui import words
from tui.lines import Line
from tui.panes.table_pane import MOST_BELOW, TablePane
from tui.table import Cell, Column, Row
from tui.text import plain, wrap_words

_MIN_HEIGHT = 4
_EMPTY_HEIGHT = 7  # of what is said where there are no models


class ModelsPane(TablePane):
    NUMBER, TITLE = 2, "Models"
    COLUMNS = (
        Column("name", "NAME", 18, most=36),
        Column("state", "STATE", 10, most=14),
        Column("memory", "MEM", 6, "right", 2),
        Column("context", "CTX", 5, "right", 4),
        Column("slots", "SLOTS", 5, "right", 3),
        Column("rate", "TOK/S", 5, "right", 1),
        Column("idle", "IDLE", 5, "right", 2),
        Column("queued", "QUEUE", 5, "right", 3),
        Column("kind", "KIND", 14, priority=5, most=22),
        Column("engine", "ENGINE", 9, priority=6, most=14),
        Column("load", "LOAD", 5, "right", 7),
        Column("source", "SOURCE", 8, priority=8, most=14),
        Column("file", "FILE", 6, "right", 9),
    )

    def make_rows(self, snapshot: Snapshot) -> list[Row]:
        return self.rows_of(snapshot.models, lambda model: model.name, model_row)

    def notes(self) -> tuple[str, str]:
        models = self.snapshot.models if self.snapshot else ()
        running = sum(model.state is RunnerState.READY for model in models)
        failed = sum(model.state is RunnerState.FAILED or bool(model.problem) for model in models)
        counts = [f"{running} of {len(models)} loaded"] if models else []
        if failed:
            counts.append(f"✗ {failed} failed")
        return " · ".join(counts), "  ".join(note for note in (self.filter_note(), self.position()) if note)

    def below(self, width: int, most: int) -> Sequence[Line]:
        """What is wrong: with the chosen model, or else with the first that has something."""
        models = {model.name: model for model in self.snapshot.models} if self.snapshot else {}
        chosen = models.get(self.cursor)
        wrong = [model for model in models.values() if model.state is RunnerState.FAILED]
        model = chosen if chosen and (chosen.problem or chosen.state is RunnerState.FAILED) else next(iter(wrong), None)
        if model is None:
            return ()
        return trouble_lines(model, width, most)

    def when_empty(self, width: int) -> Sequence[Line]:
        return [
            Line(),
            Line.of(("  No models yet.", "strong")),
            Line(),
            Line.of(("  Put a .gguf file into ", "muted"), ("~/models", "accent"), (", or:", "muted")),
            Line.of(("    llamarunner init    ", "accent"), ("writes a configuration for this machine", "muted")),
            Line.of(("    llamarunner doctor  ", "accent"), ("says what was found and what is missing", "muted")),
        ]

    def wanted_height(self) -> int:
        return max(_MIN_HEIGHT, len(self.rows) + 2 + len(self.below(80, MOST_BELOW))) if self.rows else _EMPTY_HEIGHT


def trouble_lines(model: ModelView, width: int, most: int) -> list[Line]:
    """What is wrong, in as many lines as there are, and what helps."""
    name = plain(model.name)
    problem = plain(model.problem or model.reason or "failed").removeprefix(name).lstrip(": ")
    hint = "; ".join(filter(None, (_left_alone(model), plain(model.hint))))
    wrapped = wrap_words(f"{name}: {problem}", max(8, width - 5))
    room = max(1, most - bool(hint))
    wrapped = [*wrapped[: room - 1], " ".join(wrapped[room - 1 :])][:room]  # the last is cut with an ellipsis
    lines = [Line.of((" ✗ ", "bad-strong"), (wrapped[0][: len(name) + 1], "bad-strong"),
                     (wrapped[0][len(name) + 1 :], "bad"))]  # fmt: skip
    lines += [Line.of((f"   {piece}", "bad")) for piece in wrapped[1:] if piece]
    if hint:
        lines.append(Line.of(("   → ", "accent"), (hint, "")))
    return [line.clipped(width - 1) for line in lines]


def _left_alone(model: ModelView) -> str:
    if not model.left_alone:
        return ""
    return f"left alone for {words.duration(math.ceil(model.retry_s / 60) * 60.0)}: L tries now"


def model_row(model: ModelView) -> Row:
    state, style = words.model_state(model)
    if model.problem and model.state is RunnerState.STOPPED:
        state, style = "✗ unusable", "bad"
    short = ""
    if model.progress is not None:
        share = words.percent(model.progress)
        state, short = f"{state} {share}", f"{state[0]} {share}"
    asleep = model.state is RunnerState.STOPPED
    memory = (model.memory_bytes or 0) + (model.gpu_bytes or 0) or None
    slots = f"{model.in_flight}/{model.slots}" if model.slots else words.NOTHING
    soon = model.idle_left_s is not None and model.idle_left_s < 30
    kind = " ".join(part for part in (model.parameter_size, model.quantization) if part)
    name = plain(model.name)
    cells = {
        "name": Cell(name, "" if asleep else "strong", name.casefold(), tail=_marks(model)),
        "state": Cell(state, style, list(RunnerState).index(model.state), short),
        "memory": Cell(words.size(memory), order=memory),
        "context": Cell(words.tokens(model.context), order=model.context),
        "slots": Cell(slots, "accent" if model.in_flight else "", model.in_flight if model.slots else None),
        "rate": Cell(words.rate(model.tokens_per_s), order=model.tokens_per_s),
        "idle": Cell(words.countdown(model.idle_left_s), "warn" if soon else "", _finite(model.idle_left_s)),
        "queued": Cell(str(model.queued or words.NOTHING), "warn" if model.queued else "", model.queued),
        "kind": Cell(plain(kind), "muted", kind),
        "engine": Cell(plain(model.engine), "muted", model.engine),
        "load": Cell(words.duration(model.load_s), order=model.load_s),
        "source": Cell(plain(model.source), "muted", model.source),
        "file": Cell(words.size(model.file_bytes or None), order=model.file_bytes or None),
    }
    words_of = (name, *model.aliases, *model.tags, str(model.state), state, model.engine, kind, model.source)
    search = " ".join(words_of).casefold()
    return Row(model.name, cells, search, faded=asleep)


def _marks(model: ModelView) -> str:
    """ "×3" for three replicas, "×2/3" where two of them are ready, "•" where it is pinned."""
    count = max(model.replica_count, len(model.replicas))
    ready = sum(replica.state is RunnerState.READY for replica in model.replicas)
    some = f"{ready}/" if 0 < ready < count else ""
    return (f" ×{some}{count}" if count > 1 else "") + (" •" if model.pinned else "")


def _finite(seconds: float | None) -> float | None:
    return None if seconds is None or math.isinf(seconds) else seconds
