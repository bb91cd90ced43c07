"""Reading server-sent events, however the network cuts them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson

from llamarunner.errors import EngineGoneError

MAX_EVENT_BYTES = 8 * 1024**2
"""An event that is larger is no event but a fault; real ones with many logprobs reach a megabyte."""

DONE = b"[DONE]"


class EventSplitter:
    """Bytes in, payloads of complete `data:` lines out. Comments, other fields and blank lines are passed over."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, block: bytes) -> list[bytes]:
        if b"\n" not in block:
            self._rest += block
            if len(self._rest) > MAX_EVENT_BYTES:
                raise EngineGoneError("the engine sent an event without an end")
            return []
        *lines, self._rest = (self._rest + block).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class WholeLines:
    """Bytes in, the same bytes out, but lines only whole: of one that never ends nothing is passed on."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._held = 0

    def feed(self, block: bytes) -> bytes:
        if not self._rest and block.endswith(b"\n"):
            return block
        whole, newline, rest = block.rpartition(b"\n")
        out = b"".join([*self._rest, whole, newline]) if newline else b""
        if newline:
            self._rest, self._held = [], 0
        if rest:
            self._rest.append(rest)
            self._held += len(rest)
        if self._held > MAX_EVENT_BYTES:
            raise EngineGoneError("the engine sent an event without an end")
        return out


def amend_lines(data: bytes, mark: bytes, amend: Callable[[dict[str, Any]], None]) -> bytes:
    """`data` (whole lines of a stream, or a whole answer) with each JSON object that holds `mark` changed by `amend`;
    everything else stays byte for byte."""
    if mark not in data:
        return data
    return b"\n".join(_amended(line, amend) if mark in line else line for line in data.split(b"\n"))


def _amended(line: bytes, amend: Callable[[dict[str, Any]], None]) -> bytes:
    prefix = b"data: " if line.startswith(b"data: ") else b""
    try:
        record = orjson.loads(line[len(prefix) :])
        amend(record)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return line  # it has not the shape of an answer
    return prefix + orjson.dumps(record)


async def event_batches(read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[list[bytes]]:
    """The payloads that arrived together, as they arrive; each list has at least one. `read` gives the next block,
    empty at the end."""
    splitter = EventSplitter()
    while block := await read():
        if events := splitter.feed(block):
            yield events
