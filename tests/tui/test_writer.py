"""The terminal's writer: it never waits, and says when the screen must be painted anew."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tui.driver import TerminalWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_written_arrives_in_order(pipe: tuple[int, int]) -> None:
    writer = TerminalWriter(pipe[1], lambda: None)
    writer.start()
    for number in range(20):
        writer.write(f"{number} ")
    writer.stop("end")
    assert os.read(pipe[0], 1000).decode() == "".join(f"{n} " for n in range(20)) + "end"


def test_a_full_pipe_drops_and_asks_for_a_repaint_once_it_is_drained(pipe: tuple[int, int]) -> None:
    drained: list[bool] = []
    writer = TerminalWriter(pipe[1], lambda: drained.append(True))
    writer.start()
    began = time.monotonic()
    for _ in range(500):
        writer.write("x" * 4096)
    assert time.monotonic() - began < 0.5
    assert not drained
    read = 0

    def drain() -> bool:
        nonlocal read
        if not drained:
            read += len(os.read(pipe[0], 65536))
        return bool(drained)

    until(drain)
    assert read < 500 * 4096
    writer.write("again")
    until(lambda: os.read(pipe[0], 65536).endswith(b"again"))
    writer.stop()
    assert drained == [True]


def test_stopping_does_not_wait_for_a_terminal_that_reads_nothing(pipe: tuple[int, int]) -> None:
    writer = TerminalWriter(pipe[1], lambda: None)
    writer.start()
    for _ in range(200):
        writer.write("x" * 4096)
    began = time.monotonic()
    writer.stop("last words")
    assert time.monotonic() - began < 0.4
    data = b""
    while not data.endswith(b"last words"):  # they still come, should it read again
        data += os.read(pipe[0], 65536)


def test_nobody_there_is_no_error() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    writer = TerminalWriter(fd, lambda: None)
    writer.start()
    writer.write("into the void")
    until(lambda: not writer._thread.is_alive())
    writer.write("and more")
    writer.stop("end")
    os.close(fd)


def test_ascii_alone_where_asked_for(pipe: tuple[int, int]) -> None:
    writer = TerminalWriter(pipe[1], lambda: None, ascii_only=True)
    writer.start()
    writer.write("● 通义 ─\x1b[1m")
    writer.stop()
    assert os.read(pipe[0], 1000) == b"* ???? -\x1b[1m"
