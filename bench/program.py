"""The real program on the scripted engine, in a folder of its own, and what its processes use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.fakes.gguf_file import gguf_bytes

CHECKOUT = Path(__file__).resolve().parents[1]
FAKE_ENGINE = CHECKOUT / "tests" / "fakes" / "fake_engine.py"
PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Program:
    """How it is started: `argv` in `env`; where it answers: its two ports."""

    home: Path
    engine: Path
    model: Path
    script: Path
    ollama: int
    lmstudio: int

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-m", "llamarunner", "--config", str(self.home / "config.toml")]

    @property
    def env(self) -> dict[str, str]:
        return {"LLAMARUNNER_HOME": str(self.home)}

    def tell_engine(self, script: dict[str, Any]) -> None:
        """What running and later engines do from now on; whole in one step, for they read it at each request."""
        written = self.script.with_suffix(".new")
        written.write_text(json.dumps(script), encoding="utf-8")
        written.replace(self.script)


def prepare(home: Path) -> Program:
    """A configuration with one model, `m`, on the scripted engine."""
    model, engine = home / "m.gguf", home / "engine"
    model.write_bytes(gguf_bytes({"general.architecture": "llama", "llama.context_length": 4096}))
    engine.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_ENGINE}" --script "{home / "script.json"}" "$@"\n')
    engine.chmod(0o755)
    program = Program(home, engine, model, home / "script.json", free_port(), free_port())
    (home / "config.toml").write_text(
        f"proxies.ollama.port = {program.ollama}\n"
        f"proxies.lmstudio.port = {program.lmstudio}\n"
        f'engines.default = {{ kind = "llama-server", command = "{engine}" }}\n'
        f'models.m = {{ path = "{model}", parallel = 64, keep_alive = "1h" }}\n'
        "discovery = { ollama = false, lmstudio = false, huggingface = false, folders = [] }\n"
    )
    program.tell_engine({})
    return program


@contextlib.contextmanager
def serving(program: Program, cores: set[int] | None = None) -> Iterator[tuple[psutil.Process, float]]:
    """The daemon, and the seconds until both ports answered."""
    log = (program.home / "daemon.log").open("wb")
    started = time.monotonic()
    process = subprocess.Popen(
        [*program.argv, "--no-tui"],
        env={**os.environ, **program.env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    log.close()
    try:
        until(lambda: answers(program.ollama) and answers(program.lmstudio), "answer on both ports")
        ready_s = time.monotonic() - started
        if cores:
            os.sched_setaffinity(process.pid, cores)
        yield psutil.Process(process.pid), ready_s
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {PATIENCE_S:.0f} s")
        time.sleep(0.002)


def answers(port: int, path: str = "/v1/models") -> bool:
    """Whether an HTTP server answers there; a port that only listens does not count."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return connection.recv(64).startswith(b"HTTP/1.1 200")
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_seconds(process: psutil.Process, *, helpers: bool = False) -> float:
    """User and system time so far; with `helpers`, that of its child processes as well."""
    family = [process, *(process.children(recursive=True) if helpers else ())]
    return sum(times.user + times.system for times in (each.cpu_times() for each in family))


def engine_of(process: psutil.Process) -> tuple[int, str]:
    """The port and the key of its one engine."""
    for child in process.children(recursive=True):
        for connection in child.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                return int(connection.laddr.port), str(child.environ()["LLAMA_API_KEY"])
    raise LookupError("no child process listens")
