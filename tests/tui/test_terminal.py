"""The control center in a real terminal: what it survives, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.terminal import KEY, Terminal

FAKE = str(Path(__file__).parents[1] / "fakes" / "fake_backend.py")
WORST_STALL_MS = 250.0

Open = Callable[..., Terminal]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    terminals: list[Terminal] = []

    def open_terminal(
        scene: str = "live", *arguments: str, columns: int = 80, rows: int = 24, env: dict[str, str] | None = None
    ) -> Terminal:
        argv = [sys.executable, FAKE, scene, "--beat", str(tmp_path / "beat"), *arguments]
        terminal = Terminal(argv, columns=columns, rows=rows, env=env)
        terminals.append(terminal)
        return terminal

    yield open_terminal
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def beats(tmp_path: Path) -> Callable[[], list[float]]:
    """How late the loop ran, in ms, for each 100 ms so far."""
    return lambda: [float(line) for line in (tmp_path / "beat").read_text().split()]


@pytest.fixture
def outcome(tmp_path: Path) -> Callable[[], str]:
    def read() -> str:
        path = tmp_path / "beat.outcome"
        return path.read_text() if path.exists() else ""

    return read


def beating(terminal: Terminal, beats: Callable[[], list[float]], more: int) -> list[float]:
    """The lateness during the next `more` beats."""
    before = len(beats())
    terminal.wait_until(lambda: len(beats()) >= before + more, f"{more} more beats of the loop", 15)
    return beats()[before:]


def test_keys_do_what_they_say(opened: Open) -> None:
    terminal = opened("busy")
    terminal.wait_for("2 Models")
    terminal.send("4")
    terminal.wait_for("4 Logs")
    terminal.send("]")
    terminal.wait_for("qwen3-14b [2/4]")
    terminal.send("?")
    terminal.wait_for("ctrl+p")
    terminal.send(KEY["escape"])
    terminal.wait_for("4 Logs")
    terminal.send("2")
    terminal.send("jj")
    terminal.send(KEY["enter"])
    terminal.wait_for("unloads in")
    assert "nomic-embed-text" in terminal.text
    terminal.send(KEY["escape"])
    terminal.wait_for("2 Models")
    terminal.send("/gemma\r")
    terminal.wait_for("filter: gemma")
    assert "nomic-embed-text  " not in terminal.text.split("3 Requests")[0]


@pytest.mark.parametrize("key", ["q", KEY["ctrl+c"], KEY["ctrl+q"]])
def test_leaving_asks_first_and_gives_the_terminal_back(opened: Open, outcome: Callable[[], str], key: str) -> None:
    terminal = opened("busy")
    modes = terminal.local_modes()
    terminal.wait_for("2 Models")
    assert not terminal.local_modes() & termios.ICANON
    terminal.send(key)
    terminal.wait_for("Stop everything")
    assert terminal.is_running
    terminal.send("s")
    terminal.wait_for("outcome: quit")
    assert terminal.wait() == 0
    assert outcome().startswith("quit")
    assert terminal.local_modes() & (termios.ECHO | termios.ICANON | termios.ISIG) == modes & (
        termios.ECHO | termios.ICANON | termios.ISIG
    )
    assert terminal.written.rindex("\x1b[?1049l") > terminal.written.rindex("\x1b[?1049h")
    for restored in ("\x1b[?25h", "\x1b[?2004l", "\x1b[?1003l", "\x1b[?7h"):
        assert restored in terminal.written[-600:]


def test_a_terminal_that_stops_reading_does_not_stop_the_loop(
    opened: Open, beats: Callable[[], list[float]], outcome: Callable[[], str]
) -> None:
    terminal = opened("live", columns=200, rows=60)
    terminal.wait_for("2 Models")
    beating(terminal, beats, 5)
    terminal.stall()
    for _ in range(8):  # whole screens, far more than the pty takes
        terminal.send("zz?" + KEY["escape"])
        lateness = beating(terminal, beats, 3)
        assert max(lateness) < WORST_STALL_MS
    read = terminal.bytes_read
    terminal.send("4]")
    lateness = beating(terminal, beats, 5)
    assert max(lateness) < WORST_STALL_MS
    terminal.resume()
    terminal.wait_for("qwen3-14b [2/4]")
    terminal.wait_for("1 Hardware")
    assert terminal.bytes_read > read
    assert "tok/s" in terminal.text.splitlines()[0]


def test_a_stalled_terminal_does_not_hold_up_the_end(opened: Open, beats: Callable[[], list[float]]) -> None:
    terminal = opened("live", columns=200, rows=60)
    terminal.wait_for("2 Models")
    terminal.stall()
    for _ in range(6):
        terminal.send("zz")
        beating(terminal, beats, 1)
    terminal.signal(signal.SIGTERM)
    began = time.monotonic()
    terminal.wait_until(lambda: (Path(str(terminal.process.args[4])).with_suffix(".outcome")).exists(), "end")  # type: ignore[index]  # argv is a list
    assert time.monotonic() - began < 2
    terminal.resume()
    assert terminal.wait() == 0


@pytest.mark.parametrize("loop", [(), ("--asyncio",)])
def test_a_hang_up_drops_the_screen_and_the_loop_goes_on(
    opened: Open, beats: Callable[[], list[float]], outcome: Callable[[], str], loop: tuple[str, ...]
) -> None:
    terminal = opened("live", *loop)
    terminal.wait_for("2 Models")
    terminal.hang_up()
    terminal.wait_until(lambda: outcome().startswith("detach"), "detach")
    used = terminal.cpu_seconds()
    assert max(beating(terminal, beats, 20)) < WORST_STALL_MS
    assert terminal.cpu_seconds() - used < 0.3  # of two seconds
    terminal.signal(signal.SIGTERM)
    assert terminal.wait() == 0


def test_a_hang_up_that_nobody_is_told_of_is_noticed(opened: Open, outcome: Callable[[], str], tmp_path: Path) -> None:
    """Where SIGHUP is ignored, end of file on the terminal is all that there is to notice."""
    wrapper = tmp_path / "deaf.py"
    wrapper.write_text(
        "import runpy, signal, sys, uvloop\n"
        "class Deaf(uvloop.Loop):\n"
        "    def add_signal_handler(self, number, *rest):\n"
        "        if number != signal.SIGHUP: super().add_signal_handler(number, *rest)\n"
        "uvloop.new_event_loop = Deaf\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [sys.executable, str(wrapper), FAKE, "live", "--beat", str(tmp_path / "beat")]
    with Terminal(argv) as terminal:
        terminal.wait_for("2 Models")
        terminal.hang_up()
        terminal.wait_until(lambda: outcome().startswith("detach"), "detach")
        terminal.signal(signal.SIGTERM)
        assert terminal.wait() == 0


def test_a_hang_up_by_hand_gives_the_living_terminal_back(opened: Open, outcome: Callable[[], str]) -> None:
    terminal = opened("live")
    terminal.wait_for("2 Models")
    terminal.signal(signal.SIGHUP)
    terminal.wait_until(lambda: outcome().startswith("detach"), "detach")
    terminal.wait_until(lambda: "\x1b[?1049l" in terminal.written, "normal screen")
    assert terminal.local_modes() & termios.ECHO
    assert terminal.is_running


def test_leaving_by_signal_restores_the_terminal(opened: Open) -> None:
    terminal = opened("live")
    terminal.wait_for("2 Models")
    terminal.signal(signal.SIGTERM)
    terminal.wait_for("outcome: quit")
    assert terminal.wait() == 0
    assert "\x1b[?1049l" in terminal.written
    assert terminal.local_modes() & termios.ECHO


def test_a_crash_restores_the_terminal_and_shows_no_locals(
    opened: Open, beats: Callable[[], list[float]], outcome: Callable[[], str]
) -> None:
    terminal = opened("crash")
    terminal.wait_for("2 Models")
    terminal.wait_until(lambda: outcome().startswith("crashed"), "crash")
    assert "RuntimeError: the snapshot could not be made" in outcome()
    assert max(beating(terminal, beats, 5)) < WORST_STALL_MS
    assert terminal.is_running
    assert "\x1b[?1049l" in terminal.written
    assert "sk-a-secret" not in terminal.written + outcome()


def test_job_control_does_not_stop_the_service(opened: Open, beats: Callable[[], list[float]]) -> None:
    terminal = opened("busy")
    terminal.wait_for("2 Models")
    terminal.signal(signal.SIGTSTP)
    terminal.send(KEY["ctrl+z"])
    assert len(beating(terminal, beats, 5)) >= 5
    terminal.send("4")
    terminal.wait_for("4 Logs")


def test_stopped_from_outside_and_continued_it_paints_again(opened: Open) -> None:
    terminal = opened("busy")
    terminal.wait_for("2 Models")
    terminal.signal(signal.SIGSTOP)
    terminal.wait_until(lambda: "T (stopped)" in Path(f"/proc/{terminal.process.pid}/status").read_text(), "stop")
    read = terminal.bytes_read
    terminal.signal(signal.SIGCONT)
    terminal.wait_until(lambda: terminal.bytes_read > read + 2000, "whole screen")


def test_a_storm_of_resizes(opened: Open, beats: Callable[[], list[float]]) -> None:
    terminal = opened("busy")
    terminal.wait_for("2 Models")
    for columns, rows in (
        (1, 1),
        (2, 5),
        (300, 100),
        (20, 5),
        (1, 50),
        (200, 1),
        (40, 12),
        (79, 23),
        (110, 34),
        (181, 60),
    ):
        terminal.resize(columns, rows)
        beating(terminal, beats, 1)
    terminal.resize(20, 5)
    terminal.wait_for("needs 32x8")
    terminal.resize(120, 40)
    terminal.wait_for("POST /v1/chat/completions")
    terminal.wait_for("1 Hardware")
    assert terminal.is_running


@pytest.mark.parametrize("marks", [("\x1b[200~", "\x1b[201~"), ("", "")])
def test_a_megabyte_pasted(opened: Open, beats: Callable[[], list[float]], marks: tuple[str, str]) -> None:
    """With the marks of a bracketed paste; and a ninth of it as keys, each of which is a message."""
    terminal = opened("busy")
    terminal.wait_for("2 Models")
    terminal.send("/")
    before = len(beats())
    terminal.send(marks[0] + "gemma " * (175_000 if marks[0] else 20_000) + marks[1])
    terminal.wait_until(lambda: len(beats()) > before + 10, "beats", 30)
    terminal.send(KEY["escape"] + KEY["escape"])
    terminal.wait_for("qwen3-14b", 30)
    assert max(beats()[before:]) < WORST_STALL_MS
    assert terminal.is_running


def test_half_a_character_does_not_end_the_input(opened: Open, beats: Callable[[], list[float]]) -> None:
    """As a slow link may deliver it."""
    terminal = opened("busy")
    terminal.wait_for("2 Models")
    terminal.send("/")
    first, second = "é".encode()[:1], "é".encode()[1:]
    terminal.send(first)
    beating(terminal, beats, 2)  # read by itself
    terminal.send(second + b"x")
    terminal.wait_for("éx")


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"LANG": "de_DE.ISO-8859-1"}, {"LANG": "POSIX"}])
def test_a_locale_without_utf8_gets_ascii(opened: Open, variables: dict[str, str]) -> None:
    terminal = opened("busy", columns=120, rows=40, env=variables)
    terminal.wait_for("2 Models")
    terminal.wait_for("4 Logs")
    terminal.wait_for("* busy")
    terminal.wait_for("x failed")
    terminal.wait_for("POST /v1/chat")
    assert terminal.written.isascii()
    lines = [line for line in terminal.text.splitlines() if "stopped" in line]
    assert lines[0].index(". stopped") == next(
        line.index("* ready") for line in terminal.text.splitlines() if "* ready" in line
    )


def test_no_color_stays_set_and_is_obeyed(opened: Open) -> None:
    terminal = opened("busy", env={"NO_COLOR": "1"})
    terminal.wait_for("2 Models")
    reds = terminal.written.count("38;2;255;138;128")
    assert reds == 0
    environment = Path(f"/proc/{terminal.process.pid}/environ").read_bytes()
    assert b"NO_COLOR=1" in environment


def test_at_rest_it_costs_next_to_nothing(opened: Open, beats: Callable[[], list[float]]) -> None:
    terminal = opened("idle", columns=120, rows=40)
    terminal.wait_for("4 Logs")
    beating(terminal, beats, 10)
    began, read, used = time.monotonic(), terminal.bytes_read, terminal.cpu_seconds()
    beating(terminal, beats, 40)
    seconds = time.monotonic() - began
    assert (terminal.bytes_read - read) / seconds < 5 * 1024
    assert (terminal.cpu_seconds() - used) / seconds < 0.05  # 2 % is the budget; this also writes the beats


def test_output_goes_to_the_terminal_when_errors_go_to_a_file(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with Terminal(["sh", "-c", f"exec {sys.executable} {FAKE} busy 2>{errors}"], env={"PWD": os.getcwd()}) as terminal:
        terminal.wait_for("2 Models")
        terminal.send("q")
        terminal.wait_for("Stop everything")
        terminal.send("s")
        terminal.wait_for("outcome: quit")
    assert "\x1b" not in errors.read_text()
