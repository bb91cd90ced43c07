"""The answers an engine is giving now: how much of them has come, and whether it owes more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp


class Answers:
    """Of one runner. Read off the connections when somebody asks, so that the hot path has nothing to count."""

    def __init__(self) -> None:
        self._open: set[aiohttp.ClientResponse] = set()
        self._received = 0  # of answers that are over

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def receiving(self, answer: aiohttp.ClientResponse) -> Iterator[None]:
        self._open.add(answer)
        try:
            yield
        finally:
            self._open.discard(answer)
            self._received += answer.content.total_bytes

    @property
    def received(self) -> int:
        """Bytes, ever; it never falls."""
        return self._received + sum(answer.content.total_bytes for answer in self._open)

    @property
    def owed(self) -> int:
        """Answers whose next bytes must come from the engine: they are not over, nor held up by a slow client."""
        return sum(_is_owed(answer) for answer in self._open)


def _is_owed(answer: aiohttp.ClientResponse) -> bool:
    if answer.content.is_eof() or answer.connection is None:
        return False
    transport = answer.connection.transport
    # reading is paused while what has come already waits for its client
    return transport is not None and transport.is_reading()
