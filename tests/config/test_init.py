"""The first configuration of a machine."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from llamarunner.config.init import FoundPort, Machine, initial_config, look_around, write_initial_config
from llamarunner.config.load import load_config
from llamarunner.errors import ConfigError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with nothing in it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_it_is_private_and_loads_without_problems(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "config.toml"
    write_initial_config(path, gpus=["NVIDIA Test 4090"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["config.toml"]
    assert "GPU: NVIDIA Test 4090" in path.read_text()
    loaded = load_config(path, environ={})
    assert loaded.warnings == ()
    assert loaded.config.discovery.folders == [tmp_path / "home" / "models"]


@pytest.mark.parametrize("kind", ["file", "empty file", "folder", "dead link"])
def test_it_never_overwrites(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.toml"
    match kind:
        case "file":
            path.write_text("precious")
        case "empty file":
            path.touch()
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to(tmp_path / "elsewhere.toml")
    with pytest.raises(ConfigError, match="exists already; nothing was written"):
        write_initial_config(path)
    assert kind != "file" or path.read_text() == "precious"
    assert not (tmp_path / "elsewhere.toml").exists()
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "work"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is not a folder"):
        write_initial_config(tmp_path / "file" / "config.toml")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        write_initial_config(tmp_path / "file" / "deeper" / "config.toml")


def test_it_names_the_models_that_it_found(tmp_path: Path) -> None:
    usual = gguf(tmp_path / "home" / "models" / "deep" / "a.gguf")
    here = gguf(tmp_path / "work" / 'odd "name" 小.GGUF')
    for name in ("mmproj-a.gguf", "b-00002-of-00003.gguf", "c.gguf.part", ".cache/d.gguf", "${X}.gguf"):
        gguf(tmp_path / "work" / name)
    path = tmp_path / "config.toml"
    assert write_initial_config(path).models == (usual, here)
    text = path.read_text()
    assert load_config(path, environ={}).config.discovery.folders == [tmp_path / "home" / "models", tmp_path / "work"]
    samples = "\n".join(line[2:] for line in text.splitlines() if line.startswith(("# [models", "# path")))
    path.write_text(samples)
    models = load_config(path, environ={}).config.models
    assert {name: model.path for name, model in models.items()} == {"a": usual, 'odd "name" 小': here}


def test_it_finds_llama_server(tmp_path: Path) -> None:
    program = gguf(tmp_path / "bin" / "llama-server")
    program.chmod(0o755)
    path = tmp_path / "config.toml"
    assert write_initial_config(path).llama_server == str(program)
    assert load_config(path, environ={}).config.engines["default"].command == str(program)


def test_a_taken_port_is_told_and_another_set(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        usual = held.getsockname()[1]
        text = initial_config(Machine(ports=(FoundPort("ollama", usual, "ollama (pid\n8)", usual + 1),)))
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert f"# {usual} is held by ollama (pid?8); stop it to use the usual port." in text
    assert load_config(path, environ={}).config.proxies.ollama.port == usual + 1


def test_it_looks_at_the_real_ports() -> None:
    for found in look_around().ports:
        assert found.port == found.usual or found.port > 0


@pytest.mark.parametrize("has_builtin", [True, False])
def test_without_llama_server_it_says_what_runs_models(has_builtin: bool) -> None:
    text = initial_config(Machine(has_builtin=has_builtin))
    assert ("the built-in llama.cpp runs the models" in text) is has_builtin
    assert ("llamarunner[builtin]" in text) is not has_builtin
