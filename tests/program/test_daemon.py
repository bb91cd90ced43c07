"""The program without a terminal: what it loads, how it ends, what it leaves behind, whom it lets in."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running_program import Home, engines_of, eventually, smollm2

FAKE = "[models.fake]\npath = {path!r}\nengine = 'fake'\n"


@pytest.fixture
def fake_model(tmp_path: Path) -> str:
    """Any GGUF will do for the scripted engine."""
    return FAKE.format(path=str(smollm2()))


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_never_loads_a_user_interface(home: Home, fake_model: str) -> None:
    home.configure(fake_model)
    report = home.folder / "modules.json"
    code = f"""
import atexit, json, sys
def report():
    open({str(report)!r}, "w").write(json.dumps(sorted(sys.modules)))
atexit.register(report)
sys.argv = ["llamarunner", "--config", {str(home.config)!r}, "--no-tui"]
from llamarunner.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=home.env, stderr=subprocess.DEVNULL)
    eventually(home.answers)
    assert home.chat("fake").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    packages = {module.partition(".")[0] for module in json.loads(report.read_text())}
    assert "aiohttp" in packages
    assert not packages & {"textual", "rich", "tui", "pygments", "xllamacpp"}


def test_what_was_set_up_for_ollama_goes_on(home: Home, fake_model: str) -> None:
    home.configure(fake_model)
    text = home.config.read_text().replace(f"[proxies.ollama]\nport = {home.ollama}\n", "")
    home.config.write_text(text)
    home.env |= {"OLLAMA_HOST": f"http://localhost:{home.ollama}/", "OLLAMA_KEEP_ALIVE": "-1", "OLLAMA_DEBUG": "0",
                 "OLLAMA_CONTEXT_LENGTH": "512"}  # fmt: skip
    with home.daemon():
        assert home.chat("fake").status_code == 200
        (running,) = httpx.get(f"http://localhost:{home.ollama}/api/ps").json()["models"]
        assert running["context_length"] == 512
        assert running["expires_at"] > "2100"
    assert "OLLAMA_CONTEXT_LENGTH, OLLAMA_HOST, OLLAMA_KEEP_ALIVE" in home.stderr()
    home.env["OLLAMA_HOST"] = "0.0.0.0"
    refused = home.run("--no-tui")
    assert refused.returncode == 3
    assert "OLLAMA_HOST: proxies.ollama.host: anyone who reaches 0.0.0.0" in refused.stderr


def test_a_real_model_answers_on_both_ports(home: Home) -> None:
    home.configure(f"[models.smollm2]\npath = {str(smollm2())!r}\n[engines.default]\nkind = 'builtin'\n")
    with home.daemon():
        answer = home.chat("smollm2", options={"num_predict": 5}).json()
        assert answer["message"]["content"]
        assert answer["eval_count"] == 5
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        other = httpx.post(f"http://127.0.0.1:{home.lmstudio}/v1/chat/completions", json=body, timeout=30).json()
        assert other["usage"]["completion_tokens"] == 5


def test_sigkill_leaves_no_engine_behind(home: Home, fake_model: str) -> None:
    home.configure(fake_model, grandchild="setsid", grandchild_pid_file=str(home.folder / "grandchild"))
    with home.daemon() as process:
        assert home.chat("fake").status_code == 200
        family = engines_of(process)
        grandchild = psutil.Process(eventually(lambda: int((home.folder / "grandchild").read_text() or 0)))
        assert len(family) >= 2
        process.kill()
        process.wait()
        eventually(lambda: all(gone(member) for member in [*family, grandchild]))


def stream(home: Home, lines: list[dict[str, Any]]) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    with httpx.stream("POST", f"http://127.0.0.1:{home.ollama}/api/chat", json=body, timeout=30) as response:
        lines.extend(json.loads(line) for line in response.iter_lines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_answer_end_and_then_all_is_gone(home: Home, fake_model: str, number: signal.Signals) -> None:
    home.configure(fake_model, tokens=["a"] * 20, delay_s=0.05)
    with home.daemon() as process:
        lines: list[dict[str, Any]] = []
        client = threading.Thread(target=stream, args=(home, lines))
        client.start()
        family = eventually(lambda: len(engines_of(process)) >= 2 and engines_of(process))
        eventually(lambda: "loading → ready" in home.stderr() or lines or home.chat("fake").status_code == 200)
        process.send_signal(number)
        client.join(20)
        assert process.wait(20) == 0
        assert lines[-1]["done"] is True
        assert sum(bool(line["message"]["content"]) for line in lines) == 20
        eventually(lambda: all(gone(member) for member in family))
        assert not (home.folder / "home" / "state" / "instance.json").exists()


def test_a_second_signal_hurries(home: Home, fake_model: str) -> None:
    home.configure(fake_model, tokens=["a"] * 10_000, delay_s=0.05)
    with home.daemon() as process:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
        with httpx.stream("POST", f"http://127.0.0.1:{home.ollama}/api/chat", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: "waiting for 1 request" in home.stderr())
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0


def test_a_hangup_changes_nothing(home: Home, fake_model: str) -> None:
    home.configure(fake_model)
    with home.daemon() as process:
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "without a screen" in home.stderr())
        assert home.chat("fake").status_code == 200


def test_a_taken_port_leaves_the_other_proxy_serving(home: Home, fake_model: str) -> None:
    home.configure(fake_model)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", home.ollama))
        holder.listen()
        process = subprocess.Popen(home.command("--no-tui"), env=home.env, stderr=subprocess.PIPE, text=True)
        try:
            url = f"http://127.0.0.1:{home.lmstudio}/v1/models"
            eventually(lambda: _status(url) == 200)
        finally:
            process.terminate()
            _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert re.search(rf"127.0.0.1:{home.ollama} is taken by .*pytest|127.0.0.1:{home.ollama} is taken by", stderr)


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=1).status_code
    except httpx.TransportError:
        return 0


def test_nothing_to_serve_is_exit_code_4(home: Home, fake_model: str) -> None:
    home.configure(fake_model)
    with socket.socket() as one, socket.socket() as other:
        for holder, port in ((one, home.ollama), (other, home.lmstudio)):
            holder.bind(("127.0.0.1", port))
            holder.listen()
        ended = home.run("--no-tui")
    assert ended.returncode == 4
    assert str(home.ollama) in ended.stderr
    assert str(home.lmstudio) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_listens_on_loopback_alone(home: Home, fake_model: str) -> None:
    home.configure(fake_model)
    with home.daemon() as process:
        assert home.chat("fake").status_code == 200
        programs = [psutil.Process(process.pid), *engines_of(process)]
        addresses = {
            connection.laddr.ip
            for program in programs
            for connection in program.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert addresses == {"127.0.0.1"}


def test_ask_uses_the_program_that_runs(home: Home, fake_model: str) -> None:
    home.configure(fake_model, tokens=["Hello", " there"])
    with home.daemon() as process:
        before = {member.pid for member in engines_of(process)}
        asked = home.run("ask", "fake", "hi")
        assert (asked.returncode, asked.stdout) == (0, "Hello there\n"), asked.stderr
        assert {member.pid for member in engines_of(process)} != before, "the running program loaded the model"


def test_ask_starts_what_it_needs(home: Home, fake_model: str) -> None:
    home.configure(fake_model, tokens=["Hello", " there"])
    asked = home.run("ask", "fake", "--json", input="from a pipe")
    assert asked.returncode == 0, asked.stderr
    record = json.loads(asked.stdout)
    assert record["answer"] == "Hello there"
    assert record["usage"]["completion_tokens"] == 2


def test_ask_tells_what_went_wrong(home: Home, fake_model: str) -> None:
    home.configure(fake_model, exit={"at": "load", "code": 7}, log=["error: no such luck"])
    unknown = home.run("ask", "fak", "hi")
    assert unknown.returncode == 2
    assert "'fake'" in unknown.stderr
    broken = home.run("ask", "fake", "hi")
    assert broken.returncode == 4
    assert "no such luck" in broken.stderr
    assert "Traceback" not in broken.stderr + unknown.stderr
