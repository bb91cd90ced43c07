"""Models that other programs left on the disk, served without a word of configuration."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import ollama
import psutil
import pytest
from gguf_file import gguf_bytes, model_bytes, write_model
from ollama_folder import add_model, blob
from serving import scripted_config, serve, soon

from llamarunner import service
from llamarunner.catalog.catalog import Catalog

ADAPTER = gguf_bytes({"general.architecture": "llama", "general.type": "adapter"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return tmp_path


async def test_a_model_of_ollamas_runs_with_all_it_brings(home: Path) -> None:
    store = home / "user/.ollama/models"
    template = "{{ range .Messages }}<start_of_turn>{{ .Role }}\n{{ .Content }}<end_of_turn>\n{{ end }}"
    add_model(store, "gem/2b", ("model", model_bytes()), ("adapter", ADAPTER), ("template", template))
    config, scripts = scripted_config(home)
    config["engines"]["default"] = scripts["smol"].engine_config
    config["discovery"] = {"ollama": True}
    async with serve(home / "own", config, scripts) as serving, ollama.AsyncClient(serving.ollama) as client:
        assert {model.model for model in (await client.list()).models} == {"gem:2b", "smol:latest"}
        answer = await client.chat("gem:2b", [{"role": "user", "content": "Hi"}])
        assert answer.message.content
        (pid,) = serving.service.manager.pids
        arguments = psutil.Process(pid).cmdline()
    for flag, value in (
        ("--model", blob(store, model_bytes())),
        ("--lora", blob(store, ADAPTER)),
        ("--chat-template", "gemma"),
    ):
        assert arguments[arguments.index(flag) + 1] == str(value)
    assert "--no-jinja" in arguments


async def test_a_model_put_into_any_place_is_there_within_five_seconds(home: Path) -> None:
    user, model = home / "user", model_bytes(x=1)
    for folder in (
        user / "models",
        user / ".ollama/models",
        user / ".lmstudio/models",
        user / ".cache/huggingface/hub",
    ):
        folder.mkdir(parents=True)
    config, scripts = scripted_config(home)
    config["discovery"] = {"ollama": True, "lmstudio": True, "huggingface": True, "folders": [str(user / "models")]}
    async with serve(home / "own", config, scripts) as serving:

        def names() -> set[str]:
            return {model.name for model in serving.service.catalog}

        assert names() == {"smol"}
        started = time.monotonic()
        await asyncio.to_thread(write_model, user / "models/a/mine.gguf", x=2)
        await asyncio.to_thread(write_model, user / ".lmstudio/models/p/r/studio.gguf", x=3)
        await asyncio.to_thread(write_model, user / ".cache/huggingface/hub/models--o--r/snapshots/1/face.gguf", x=4)
        await asyncio.to_thread(add_model, user / ".ollama/models", "pulled/7b", ("model", model))
        wanted = {"smol", "mine", "studio", "face", "pulled:7b"}
        await soon(lambda: names() == wanted, within_s=8)
        assert time.monotonic() - started < 6  # 5 s, and what a busy machine takes
        (user / "models/a/mine.gguf").unlink()
        await soon(lambda: names() == wanted - {"mine"}, within_s=8)


async def test_one_look_that_fails_is_not_the_last(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_RESCAN_S", 0.05)
    folder = home / "user/models"
    folder.mkdir(parents=True)
    config, scripts = scripted_config(home)
    config["discovery"] = {"folders": [str(folder)]}
    async with serve(home / "own", config, scripts) as serving:
        discovery = serving.service._discovery
        look, failed = discovery.look, []

        def look_or_fail() -> Catalog:
            if not failed:
                failed.append(True)
                raise OSError("the disk is away")
            return look()

        monkeypatch.setattr(discovery, "look", look_or_fail)
        await soon(lambda: failed)
        write_model(folder / "new.gguf")
        await soon(lambda: serving.service.catalog.get("new"))
    assert "could not be looked for" in caplog.text
