"""The whole program in a real terminal: what a person sees and does, and what becomes of it when the terminal goes,
stalls or ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running_program import Home, eventually, smollm2

from tests.fakes.terminal import Terminal


@pytest.fixture
def terminal(home: Home, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """The control center on the scripted engine, its first frame drawn. Parameter: the engine's script."""
    script = getattr(request, "param", {})
    home.configure(f"[models.fake]\npath = {str(smollm2())!r}\nengine = 'fake'\n", **script)
    with Terminal(home.command(), columns=120, rows=40, env={"LLAMARUNNER_HOME": home.env["LLAMARUNNER_HOME"]}) as made:
        made.wait_for("? keys", 20)
        eventually(home.answers)
        yield made


def engine_pids(terminal: Terminal) -> list[int]:
    return [child.pid for child in psutil.Process(terminal.process.pid).children(recursive=True)]


def all_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_a_request_is_seen_from_its_load_to_its_end(home: Home, terminal: Terminal) -> None:
    for port in (home.ollama, home.lmstudio):
        assert str(port) in terminal.text
    assert home.chat("fake").status_code == 200
    terminal.wait_for("● ready")
    terminal.wait_for("200")
    assert home.chat("nonesuch").status_code == 404
    terminal.wait_for("404")


@pytest.mark.parametrize(
    "terminal", [{"exit": {"at": "load", "code": 3}, "log": ["error: no such luck"]}], indirect=True
)
def test_a_load_that_fails_is_seen_with_its_cause(home: Home, terminal: Terminal) -> None:
    assert home.chat("fake").status_code == 500
    terminal.wait_for("✗ failed")
    terminal.send("2\r")
    terminal.wait_for("no such luck")


def test_a_model_is_loaded_and_unloaded_by_key(home: Home, terminal: Terminal) -> None:
    terminal.send("2")
    terminal.send("L")
    terminal.wait_for("● ready")
    terminal.send("U")
    terminal.wait_for("Unload")
    terminal.send("n\x1b")  # away from the question
    terminal.wait_until(lambda: "● ready" in terminal.text, "ready model")
    time.sleep(0.2)  # an escape key is told from an escape sequence by what does not follow
    terminal.send("U")
    terminal.wait_for("Unload")
    terminal.send("y")
    terminal.wait_until(lambda: "● ready" not in terminal.text, "unloaded model")


@pytest.mark.parametrize("terminal", [{"tokens": ["a"] * 60, "delay_s": 0.05}], indirect=True)
def test_sigterm_lets_answers_end_and_gives_the_terminal_back(home: Home, terminal: Terminal) -> None:
    lines: list[dict[str, Any]] = []
    client = threading.Thread(target=stream, args=(home, lines))
    client.start()
    eventually(lambda: lines)
    pids = engine_pids(terminal)
    terminal.signal(signal.SIGTERM)
    client.join(20)
    assert terminal.wait(20) == 0
    assert lines[-1].get("done") is True, lines[-1]
    assert "\x1b[?1049l" in terminal.written, "the screen was left"
    eventually(lambda: all_gone(pids))


def stream(home: Home, lines: list[dict[str, Any]]) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    with httpx.stream("POST", f"http://127.0.0.1:{home.ollama}/api/chat", json=body, timeout=30) as response:
        for line in response.iter_lines():
            lines.append(json.loads(line))  # noqa: PERF401 others watch the list grow


@pytest.mark.parametrize("terminal", [{"tokens": ["a"] * 60, "delay_s": 0.05}], indirect=True)
def test_a_lost_terminal_leaves_the_service_running(home: Home, terminal: Terminal) -> None:
    """The SSH session drops in the midst of an answer: the answer ends, the next one comes, no core spins."""
    lines: list[dict[str, Any]] = []
    client = threading.Thread(target=stream, args=(home, lines))
    client.start()
    eventually(lambda: lines)
    terminal.hang_up()
    client.join(20)
    assert lines[-1].get("done") is True
    assert home.chat("fake").status_code == 200
    program = psutil.Process(terminal.process.pid)
    before, begun = sum(program.cpu_times()[:2]), time.monotonic()
    eventually(lambda: time.monotonic() - begun > 1.5)
    assert sum(program.cpu_times()[:2]) - before < 0.5, "it is spinning"
    terminal.signal(signal.SIGTERM)
    assert terminal.wait(20) == 0


def test_a_terminal_that_stops_reading_stops_nothing(home: Home, terminal: Terminal) -> None:
    terminal.stall()
    for _ in range(20):
        begun = time.monotonic()
        assert home.chat("fake").status_code == 200
        terminal.resize(121, 40)  # each one repaints all of it
        terminal.resize(120, 40)
        assert time.monotonic() - begun < 5
    terminal.resume()
    terminal.wait_for("200")


def test_q_offers_to_leave_the_servers_running(home: Home, terminal: Terminal) -> None:
    terminal.send("q")
    terminal.wait_for("without a screen")
    terminal.send("d")
    terminal.wait_for("Serving without a screen")
    assert home.chat("fake").status_code == 200
    terminal.send(b"\x03")
    assert terminal.wait(20) == 0


def test_q_stops_everything_when_told(home: Home, terminal: Terminal) -> None:
    assert home.chat("fake").status_code == 200
    pids = engine_pids(terminal)
    terminal.send("q")
    terminal.wait_for("Stop everything")
    terminal.send("s")
    assert terminal.wait(20) == 0
    eventually(lambda: all_gone(pids))


def test_ctrl_c_asks_first(home: Home, terminal: Terminal) -> None:
    terminal.send(b"\x03")
    terminal.wait_for("Stop everything")
    assert home.answers()


def test_sigkill_leaves_no_engine_behind(home: Home, terminal: Terminal) -> None:
    assert home.chat("fake").status_code == 200
    pids = engine_pids(terminal)
    assert len(pids) >= 2
    terminal.signal(signal.SIGKILL)
    terminal.wait()
    eventually(lambda: all_gone(pids))


@pytest.mark.parametrize(("columns", "rows"), [(20, 5), (1, 1), (80, 24), (300, 100)])
def test_any_size_is_survived(home: Home, terminal: Terminal, columns: int, rows: int) -> None:
    terminal.resize(columns, rows)
    assert home.chat("fake").status_code == 200
    terminal.resize(120, 40)
    terminal.wait_for("● ready")


def test_without_a_terminal_it_refuses_with_the_way_out(home: Home) -> None:
    home.configure("")
    refused = home.run()
    assert refused.returncode == 2
    assert "--no-tui" in refused.stderr
    dumb = Terminal(home.command(), env={"TERM": "dumb", "LLAMARUNNER_HOME": home.env["LLAMARUNNER_HOME"]})
    with dumb:
        dumb.wait_for("--no-tui")
        assert dumb.wait() == 2


def test_no_models_at_all_says_what_to_do(home: Home) -> None:
    home.configure("")
    with Terminal(
        home.command(), columns=120, rows=40, env={"LLAMARUNNER_HOME": home.env["LLAMARUNNER_HOME"]}
    ) as empty:
        empty.wait_for(".gguf", 20)
        empty.wait_for("llamarunner init")


def test_names_in_any_script_stay_in_line(home: Home) -> None:
    name = "模型/メタ 😀 my model"
    home.configure(f"[models.{json.dumps(name, ensure_ascii=False)}]\npath = {str(smollm2())!r}\nengine = 'fake'\n")
    with Terminal(
        home.command(), columns=120, rows=40, env={"LLAMARUNNER_HOME": home.env["LLAMARUNNER_HOME"]}
    ) as screen:
        screen.wait_for("my model", 20)
        assert home.chat(name).status_code == 200
        assert home.chat(name).json()["model"] == name
        screen.wait_for("● ready")


def test_a_crash_of_the_screen_leaves_the_service_running(home: Home, tmp_path: Path) -> None:
    """The screen is broken on purpose, from outside: its snapshot raises after the third."""
    home.configure(f"[models.fake]\npath = {str(smollm2())!r}\nengine = 'fake'\n")
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        "from llamarunner.control import local\n"
        "genuine, calls = local.LocalBackend.snapshot, []\n"
        "def snapshot(self):\n"
        "    calls.append(1)\n"
        "    api_key = 'sk-' + 'very-secret'\n"
        "    if len(calls) > 3:\n"
        "        raise RuntimeError('broken on purpose')\n"
        "    return genuine(self)\n"
        "local.LocalBackend.snapshot = snapshot\n"
        f"sys.argv = ['llamarunner', '--config', {str(home.config)!r}]\n"
        "from llamarunner.cli import main\n"
        "main()\n"
    )
    python = home.command()[0]
    with Terminal(
        [python, str(broken)], columns=120, rows=40, env={"LLAMARUNNER_HOME": home.env["LLAMARUNNER_HOME"]}
    ) as it:
        it.wait_for("The service goes on without it", 20)
        assert "broken on purpose" in it.text
        assert "sk-very-secret" not in it.written
        assert home.chat("fake").status_code == 200
        it.send(b"\x03")
        assert it.wait(20) == 0
    assert os.listdir(home.folder / "home" / "logs")
