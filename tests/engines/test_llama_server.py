from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines import probe
from llamarunner.engines.llama_server import LlamaServerEngine
from llamarunner.errors import EngineMissingError, UnsupportedError

NEW_HELP = """----- common params -----
-c,    --ctx-size N                     size of the prompt context
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
--jinja, --no-jinja                     whether to use jinja
--slots, --no-slots                     expose slots
--ui, --webui, --no-ui, --no-webui      whether to enable the Web UI
"""
OLD_HELP = """usage: llama-server [options]
-c,    --ctx-size N                     size of the prompt context
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
"""
RENAMED_HELP = "--ctx-size N\n--no-ui\n--slots\n--jinja\n--flash-attn <on|off|auto>\n"

Program = Callable[..., Path]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Writes a shell script that stands for llama-server."""

    def write(help_text: str = NEW_HELP, version: str = "version: 6123 (abc1234)", *, script: str = "") -> Path:
        (tmp_path / "help.txt").write_text(help_text)
        (tmp_path / "version.txt").write_text(version)
        path = tmp_path / "llama-server"
        body = (
            script or f'case "$1" in --version) cat {tmp_path}/version.txt >&2;; --help) cat {tmp_path}/help.txt;; esac'
        )
        path.write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def engine(command: Path | str, **config: Any) -> LlamaServerEngine:
    return LlamaServerEngine("default", EngineConfig(command=str(command), **config))


def argv(of: LlamaServerEngine, **flags: Any) -> tuple[str, ...]:
    model = Model("m", Path("/m.gguf"), ModelSettings(flags=flags))
    return of.plan(model, port=4001, api_key="key").argv


def test_the_plan(program: Program) -> None:
    command = program()
    settings = ModelSettings(env={"CUDA_VISIBLE_DEVICES": "1", "B": "model"}, load_timeout=20.0)
    planned = engine(command, args=["--verbose"], env={"A": "engine", "B": "engine"}).plan(
        Model("my m", Path("/m.gguf"), settings), port=4001, api_key="secret"
    )
    assert planned.argv == (
        str(command), "--verbose", "--model", "/m.gguf", "--host", "127.0.0.1", "--port", "4001", "--alias", "my m",
        "--ctx-size", "8192", "--parallel", "1", "--jinja", "--no-webui", "--slots",
    )  # fmt: skip
    assert planned.env == {"A": "engine", "B": "model", "CUDA_VISIBLE_DEVICES": "1", "LLAMA_API_KEY": "secret"}
    assert (planned.load_timeout_s, planned.health_path, planned.base_url) == (20.0, "/health", "http://127.0.0.1:4001")
    assert "secret" not in " ".join(planned.argv)
    assert "secret" not in repr(planned)


def test_planning_runs_nothing(program: Program, tmp_path: Path) -> None:
    argv(engine(program()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        ("version: 6123 (abc1234)\nbuilt with gcc", "6123 (abc1234)"),
        ("ggml_cuda_init: found 1 CUDA devices:\nversion: b11434\nbuilt", "b11434"),
        ("\n\x1b[31mmy fork 2.0\x1b[0m\x07\nmore", "my fork 2.0\ufffd"),
        ("", ""),
    ],
)
def test_the_version(program: Program, version: str, shown: str) -> None:
    info = engine(program(version=version)).info()
    assert (info.version, info.problem, info.kind) == (shown, "", "llama-server")


def test_the_program_is_asked_once_for_each_change(program: Program, tmp_path: Path) -> None:
    asked = engine(program())
    for _ in range(3):
        asked.info()
    assert len((tmp_path / "runs").read_text().splitlines()) == 2  # --version and --help
    program(version="version: 7000 (def)")
    changed = (tmp_path / "llama-server").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "llama-server", ns=(changed, changed))
    assert asked.info().version == "7000 (def)"


def test_only_flags_that_the_program_has(program: Program) -> None:
    old = engine(program(OLD_HELP))
    assert {"--no-webui", "--slots", "--jinja"} < set(argv(old))  # nothing is known yet: today's names
    old.info()
    assert not {"--no-webui", "--no-ui", "--slots", "--jinja"} & set(argv(old))


def test_a_flag_that_was_renamed(program: Program) -> None:
    renamed = engine(program(RENAMED_HELP))
    renamed.info()
    assert "--no-ui" in argv(renamed)
    assert "--no-webui" not in argv(renamed)


@pytest.mark.parametrize(
    ("help_text", "value", "expected"),
    [
        (NEW_HELP, True, ["--flash-attn", "on"]),
        (NEW_HELP, "auto", ["--flash-attn", "auto"]),
        (NEW_HELP, False, []),
        (RENAMED_HELP, True, ["--flash-attn", "on"]),
        (OLD_HELP, True, ["--flash-attn"]),
        (OLD_HELP, "on", ["--flash-attn"]),
        (OLD_HELP, "off", []),
        (OLD_HELP, False, []),
    ],
)
def test_flash_attention_in_old_and_new(program: Program, help_text: str, value: Any, expected: list[str]) -> None:
    asked = engine(program(help_text))
    asked.info()
    arguments = argv(asked, **{"flash-attn": value})
    at = arguments.index("--flash-attn") if "--flash-attn" in arguments else len(arguments)
    assert list(arguments[at:]) == expected


def test_a_program_that_hangs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ANSWER_S", 0.3)
    command = program(script="sleep 61.5 & sleep 61.5")
    start = time.monotonic()
    info = engine(command).info()
    assert time.monotonic() - start < 3
    assert "did not answer within 0.3 s" in info.problem
    assert info.hint
    deadline = time.monotonic() + 5
    while any(p.info["cmdline"] == ["sleep", "61.5"] for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "a child of the program outlived the question"


def test_one_that_closes_its_output_and_hangs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ANSWER_S", 0.3)
    info = engine(program(script="exec >&- 2>&-; sleep 60")).info()
    assert "did not answer" in info.problem


def test_one_that_never_stops_talking(program: Program) -> None:
    start = time.monotonic()
    info = engine(program(script="yes -- --no-webui")).info()
    assert time.monotonic() - start < 5
    assert len(info.version) <= 80


def test_a_megabyte_of_help(program: Program) -> None:
    asked = engine(program(NEW_HELP + "padding --x-flag\n" * 60_000))
    assert asked.info().problem == ""
    assert "--no-webui" in argv(asked)


@pytest.mark.parametrize(
    ("script", "says"),
    [("kill -ILL $$", "ended with SIGILL"), ("exit 1", "names no flags"), ("echo hello", "names no flags")],
)
def test_programs_that_are_no_llama_server(program: Program, script: str, says: str) -> None:
    assert says in engine(program(script=script)).info().problem


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "llama-server"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    assert "cannot be run" in engine(path).info().problem


def test_where_the_program_is_looked_for(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = str(program())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert argv(engine("~/llama-server"))[0] == command
    assert argv(engine("llama-server", env={"PATH": str(tmp_path)}))[0] == command
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert argv(engine("llama-server"))[0] == command


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "not-executable").write_text("x")
    for command in (tmp_path / "gone", "no-such-llama-server", tmp_path / "not-executable", tmp_path):
        missing = engine(command)
        assert "not found" in missing.info().problem
        with pytest.raises(EngineMissingError, match="not found") as caught:
            argv(missing)
        assert "pip install 'llamarunner[builtin]'" in caught.value.hint


def test_a_probe_leaves_no_child(program: Program) -> None:
    before = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, check=False).stdout.split()
    engine(program()).info()
    after = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, check=False).stdout.split()
    assert len(after) == len(before)


def test_what_it_said_is_kept_on_disk(program: Program, tmp_path: Path) -> None:
    command = program()
    first = engine(command)
    assert first.known_version == ""
    first.info()
    assert first.known_version == "6123 (abc1234)"
    probe._known.clear()  # as after a start of the program
    assert engine(command).known_version == ""
    assert engine(command).info().version == "6123 (abc1234)"
    assert len((tmp_path / "runs").read_text().splitlines()) == 2
    with pytest.raises(UnsupportedError, match="unknown flag 'cache-typ-k'"):
        argv(engine(command), **{"cache-typ-k": "q8_0"})


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"version": 1}', '{"version": 1, "answers": {"%s": [1]}}', "\0" * 99]
)
def test_a_damaged_file_of_answers_is_made_anew(program: Program, home: Path, damage: str) -> None:
    command = program()
    engine(command).info()
    probe._known.clear()
    file = home / "cache" / "engines.json"
    assert file.stat().st_size > 10
    file.write_text(damage.replace("%s", str(command)))
    assert engine(command).info().version == "6123 (abc1234)"
    probe._known.clear()
    assert probe._recall(str(command), probe.identity_of(str(command))) is not None


def test_a_cache_that_cannot_be_written_is_no_problem(program: Program, home: Path) -> None:
    home.write_text("a file in the place of the folder")
    assert engine(program()).info().problem == ""


def test_many_who_ask_at_once_run_it_once(program: Program, tmp_path: Path) -> None:
    asked = engine(program())
    with ThreadPoolExecutor(8) as threads:
        assert {info.version for info in threads.map(lambda _: asked.info(), range(16))} == {"6123 (abc1234)"}
    assert len((tmp_path / "runs").read_text().splitlines()) == 2


def test_a_wrapper_tells_of_itself_and_not_of_what_it_runs(program: Program) -> None:
    wrapper = engine(program("usage: nice [OPTION]\n  -n, --adjustment=N   add N\n  --help   display this\n"))
    assert wrapper.info().problem == ""
    assert {"--cache-typ-k", "--jinja"} < set(argv(wrapper, **{"cache-typ-k": "q8_0"}))
