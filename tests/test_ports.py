"""Who holds a port: real sockets, real processes, and servers that say what they are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llamarunner import ports

LISTENER = """
import socket, sys
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
listening.listen()
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.socket() as held:
        held.bind((host, 0))
        held.listen()
        yield held.getsockname()[1]


@contextmanager
def serving(answers: dict[str, bytes]) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, b""))

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_port_is_free_or_not() -> None:
    with listening() as port:
        assert not ports.is_free("127.0.0.1", port)
        assert not ports.is_free("localhost", port)
        assert not ports.is_free("0.0.0.0", port)
        assert ports.free_port_near("127.0.0.1", port) != port
    assert ports.is_free("127.0.0.1", port)
    assert ports.free_port_near("127.0.0.1", port) == port
    assert ports.free_port_near("127.0.0.1", port, avoid=(port,)) > port


def test_an_address_of_another_machine_is_not_free() -> None:
    assert not ports.is_free("192.0.2.1", 11434)


def test_a_program_is_named_with_its_process() -> None:
    with subprocess.Popen([sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        port = int(program.stdout.readline())
        holder = ports.holder_of("127.0.0.1", port)
        assert holder.startswith("python")
        assert holder.endswith(f"(pid {program.pid})")
        assert ports.holder_of("0.0.0.0", port) == holder
        program.communicate(b"")
    assert ports.holder_of("127.0.0.1", port) == ""


def test_a_script_is_named_rather_than_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "ollamalike.py"
    script.write_text(LISTENER)
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        port = int(program.stdout.readline())
        assert ports.holder_of("127.0.0.1", port) == f"ollamalike (pid {program.pid})"
        program.communicate(b"")


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ({"/": b"Ollama is running"}, "Ollama"),
        ({"/lmstudio-greeting": b'{ "lmstudio": true }'}, "LM Studio"),
        ({"/": b"hello" * 100_000}, ""),
        ({}, ""),
    ],
)
def test_known_servers_are_recognised_where_the_process_is_hidden(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, bytes], name: str
) -> None:
    monkeypatch.setattr(ports, "_listening_pids", lambda host, port: [])  # as for another user's program
    with serving(answers) as port:
        assert ports.holder_of("127.0.0.1", port) == name
        assert ports.holder_of("0.0.0.0", port) == name


def test_a_silent_server_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_ASK_TIMEOUT_S", 0.05)
    with listening() as port:
        assert ports.recognise("127.0.0.1", port) == ""


def test_our_own_process_is_found() -> None:
    with listening() as port:
        assert ports.holder_of("127.0.0.1", port).endswith(f"(pid {os.getpid()})")
