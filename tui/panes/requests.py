"""The requests: those being answered first, then the finished, newest first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from llamarunner.control.snapshot import RequestView, RunnerState, Snapshot
from tui import words
from tui.lines import Line
from tui.panes.table_pane import TablePane
from tui.table import Cell, Column, Row
from tui.text import plain


class RequestsPane(TablePane):
    NUMBER, TITLE = 3, "Requests"
    COLUMNS = (
        Column("state", "STATUS", 11),
        Column("client", "CLIENT", 15, priority=3, most=28),
        Column("dialect", "DIALECT", 8, priority=5),
        Column("model", "MODEL", 20, most=34),
        Column("queue", "QUEUE", 5, "right", 6),
        Column("load", "LOAD", 5, "right", 4),
        Column("ttft", "TTFT", 5, "right", 2),
        Column("total", "TOTAL", 5, "right", 1),
        Column("tokens", "IN→OUT", 10, "right", 2),
        Column("rate", "TOK/S", 5, "right", 1),
        Column("endpoint", "ENDPOINT", 14, priority=7, most=24),
        Column("at", "AT", 8, priority=8),
        Column("prompt_rate", "PROMPT/S", 8, "right", 9),
        Column("agent", "PROGRAM", 12, priority=10, most=30),
    )

    def make_rows(self, snapshot: Snapshot) -> list[Row]:
        return self.rows_of(snapshot.requests, lambda request: str(request.request_id), request_row)

    def notes(self) -> tuple[str, str]:
        requests = self.snapshot.requests if self.snapshot else ()
        live = sum(words.is_live(request) for request in requests)
        note = f"{live} live · {len(requests) - live} finished" if requests else ""
        return note, "  ".join(part for part in (self.filter_note(), self.position()) if part)

    def when_empty(self, width: int) -> Sequence[Line]:
        """Lines to paste, with the ports and a model of this very moment."""
        if self.snapshot is None:
            return []
        ports = {p.name: f"{p.host or '127.0.0.1'}:{p.port}" for p in self.snapshot.proxies if p.running}
        if not ports:
            return [Line(), Line.of(("  No requests, and no port is open: see the message at the top.", "bad"))]
        name = _example_model(self.snapshot)
        lines = [Line(), Line.of(("  No requests yet. In another terminal:", "strong"))]
        if "ollama" in ports:
            lines.append(_paste(f"OLLAMA_HOST={ports['ollama']} ollama run {shlex.quote(name)} Hello"))
        where = ports.get("lmstudio") or next(iter(ports.values()))
        quoted = json.dumps(name, ensure_ascii=False).replace("'", "'\\''")
        return [
            *lines,
            _paste(f"curl -N http://{where}/v1/chat/completions \\"),
            _paste("  -H 'Content-Type: application/json' \\"),
            _paste(f'  -d \'{{"model": {quoted}, "stream": true,'),
            _paste('       "messages": [{"role": "user", "content": "Hello"}]}\''),
        ]


def _example_model(snapshot: Snapshot) -> str:
    """One that can chat, best of all one that is loaded."""
    able = [model for model in snapshot.models if not model.problem and model.capabilities != ("embedding",)]
    able.sort(key=lambda model: model.state is not RunnerState.READY)
    return plain(able[0].name) if able else "MODEL"


def _paste(command: str) -> Line:
    return Line.of((f"    {command}", "accent"))


def request_row(request: RequestView) -> Row:
    state, style = words.request_state(request)
    live = words.is_live(request)
    counts = (request.prompt_tokens, request.output_tokens)
    tokens = words.NOTHING if counts == (None, None) else "→".join(map(words.tokens, counts))
    if request.truncated:
        tokens = f"…{tokens}"
    cells = {
        "state": Cell(
            state, style, str(request.status or request.phase), tail=" !" if words.is_marked(request) else ""
        ),
        "client": _client(request),
        "dialect": Cell(plain(request.dialect), order=request.dialect),
        "model": Cell(plain(request.model), "strong" if live else "", request.model.casefold()),
        "queue": Cell(words.duration(request.queue_s or None), order=request.queue_s),
        "load": Cell(words.duration(request.load_s), order=request.load_s),
        "ttft": Cell(words.duration(request.ttft_s), order=request.ttft_s),
        "total": Cell(words.duration(request.total_s), order=request.total_s),
        "tokens": Cell(tokens, "warn" if request.truncated else "", request.output_tokens),
        "rate": Cell(words.rate(request.output_tokens_per_s), order=request.output_tokens_per_s),
        "endpoint": Cell(plain(request.endpoint), order=request.endpoint),
        "at": Cell(words.clock(request.started_at), order=request.started_at),
        "prompt_rate": Cell(words.rate(request.prompt_tokens_per_s), order=request.prompt_tokens_per_s),
        "agent": Cell(plain(request.user_agent), order=request.user_agent),
    }
    search = " ".join(
        (state, request.phase, request.client_name, request.client, request.dialect, request.model, request.endpoint,
         request.user_agent)
    ).casefold()  # fmt: skip
    return Row(str(request.request_id), cells, search, faded=not live)


def _client(request: RequestView) -> Cell:
    """By name, with its priority where it has one; the address where there is room."""
    address = plain(request.client)
    priority = f" {request.priority:+}" if request.priority else ""
    if not request.client_name:
        return Cell(address + priority, order=address)
    name = plain(request.client_name) + priority
    return Cell(f"{name} {address}", order=f"{request.client_name} {address}", short=name)
