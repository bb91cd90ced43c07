"""Both ways to start a program, by what speaks for and against the quick one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamarunner.runners import launch as module
from llamarunner.runners.launch import find_setpriv, is_runnable, launch

NATIVE = Path(sys.executable).resolve()
SHOW = (
    "import ctypes, os, resource, sys; signal = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(signal));"
    "print(os.getsid(0) == os.getpid(), resource.getrlimit(resource.RLIMIT_CORE), signal.value, sys.stdin.read(),"
    "sorted(set(os.environ) - {'LC_CTYPE'}))"
)


def output_of(argv: list[str], env: dict[str, str]) -> str:
    reader, writer = os.pipe()
    try:
        process = launch(argv, env, writer)
    finally:
        os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    assert process.wait(10) == 0, text
    return text.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="there are no parent-death signals elsewhere")
@pytest.mark.parametrize("way", ["quick", "without setpriv", "with a library path"])
def test_it_is_the_same_either_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"A": "1"}
    if way == "without setpriv":
        monkeypatch.setattr(module, "find_setpriv", lambda: "")
    elif way == "with a library path":  # which could be setpriv's undoing
        env = {"A": "1", "LD_LIBRARY_PATH": "/nowhere"}
    shown = output_of([str(NATIVE), "-I", "-c", SHOW], env)
    assert shown == f"True (0, 0) {signal.SIGKILL.value}  {sorted(env)}"


def test_arguments_that_look_like_options_are_the_programs(tmp_path: Path) -> None:
    script = tmp_path / "show"
    script.write_text('#!/bin/sh\necho "$@"\n')
    script.chmod(0o755)
    assert output_of([str(script), "--pdeathsig", "--", "-h"], {}) == "--pdeathsig -- -h"


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (b"#!/bin/sh\necho\n", 0o755, True),
        (b"#! /bin/sh -e\n", 0o755, True),
        (b"#!/bin/sh\n", 0o644, False),
        (b"#!/no/such/interpreter\n", 0o755, False),
        (b"#!env python\n", 0o755, False),
        (b"#!\n", 0o755, False),
        (b"#!", 0o755, False),
        (b"\x7fELF and no more", 0o755, False),
        (b"\x7fELF\x01\x02" + b"\0" * 60, 0o755, False),
        (b"echo no shebang\n", 0o755, False),
        (b"", 0o755, False),
    ],
)
def test_what_surely_runs(tmp_path: Path, content: bytes, mode: int, expected: bool) -> None:
    program = tmp_path / "program"
    program.write_bytes(content)
    program.chmod(mode)
    assert is_runnable(str(program)) is expected


def test_what_surely_runs_of_what_there_is(tmp_path: Path) -> None:
    assert is_runnable(str(NATIVE))
    assert not is_runnable(NATIVE.name)
    assert not is_runnable(str(tmp_path))
    assert not is_runnable(str(tmp_path / "gone"))
    itself = tmp_path / "itself"
    itself.write_text(f"#!{itself}\n")
    itself.chmod(0o755)
    assert not is_runnable(str(itself))


@pytest.mark.parametrize("script", ["exit 1", "echo 'unrecognized option'; exit 2", "kill -9 $$", "exec sleep 60"])
def test_a_setpriv_that_cannot_do_it_is_not_used(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BusyBox has one of its own."""
    other = tmp_path / "setpriv"
    other.write_text(f"#!/bin/sh\n{script}\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_TRIAL_S", 0.3)
    find_setpriv.cache_clear()
    try:
        assert find_setpriv() == ""
        assert launch([str(NATIVE), "-c", ""], {}, subprocess.DEVNULL).wait(10) == 0
    finally:
        find_setpriv.cache_clear()
