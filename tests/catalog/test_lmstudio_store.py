from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_file import model_bytes, projector_bytes, write_model

from llamarunner.catalog.catalog import Catalog
from llamarunner.catalog.lmstudio_store import lmstudio_home
from llamarunner.catalog.stores import discover
from llamarunner.config.schema import Config, DiscoveryConfig

PUBLISHED = "lmstudio-community/Qwen3-8B-GGUF"


def found(home: Path) -> Catalog:
    config = Config(discovery=DiscoveryConfig(ollama=False, huggingface=False, folders=[], library=home / "library"))
    return discover(config, environ={"HOME": str(home)})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def studio(home: Path) -> Path:
    return home / ".lmstudio"


def test_its_models_under_their_files_names_and_its_own(home: Path, studio: Path) -> None:
    for quantization in ("Q8_0", "Q4_K_M"):
        write_model(studio / f"models/{PUBLISHED}/Qwen3-8B-{quantization}.gguf", "qwen3", n=int(quantization[1]))
    catalog = found(home)
    assert [(model.name, model.source) for model in catalog] == [
        ("Qwen3-8B-Q4_K_M", "lmstudio"), ("Qwen3-8B-Q8_0", "lmstudio")
    ]  # fmt: skip
    for name in ("qwen3-8b", "qwen3-8b@q4_k_m", PUBLISHED):
        assert catalog.find(name).name == "Qwen3-8B-Q4_K_M"
    for name in ("qwen3-8b@q8_0", f"{PUBLISHED}@q8_0"):
        assert catalog.find(name).name == "Qwen3-8B-Q8_0"


def test_one_repository_of_two_publishers_and_embeddings(home: Path, studio: Path) -> None:
    for number, publisher in enumerate(("a", "b")):
        write_model(studio / f"models/{publisher}/m-GGUF/m-Q4_0.gguf", x=number)
    write_model(studio / "models/nomic-ai/nomic-embed-text-v1.5-GGUF/nomic-embed-text-v1.5.Q8_0.gguf", "nomic-bert")
    catalog = found(home)
    assert [catalog.find(name).path.parts[-3] for name in ("m", "a/m", "b/m", "b/m@q4_0")] == ["a", "a", "b", "b"]
    for name in ("text-embedding-nomic-embed-text-v1.5", "text-embedding-nomic-embed-text-v1.5@q8_0"):
        assert catalog.find(name).name == "nomic-embed-text-v1.5.Q8_0"


def test_vision_and_split_models(home: Path, studio: Path) -> None:
    folder = studio / "models/p/vl-GGUF"
    write_model(folder / "vl-Q4_K_M.gguf")
    (folder / "mmproj-vl-f16.gguf").write_bytes(projector_bytes())
    for part in (1, 2):
        write_model(studio / f"models/p/big-GGUF/big-Q4_0-0000{part}-of-00002.gguf")
    catalog = found(home)
    assert catalog.find("vl").mmproj == folder / "mmproj-vl-f16.gguf"
    assert "vision" in catalog.find("vl@q4_k_m").capabilities
    assert catalog.find("big").details.parameter_count == 2 * 64 * 32


def test_an_entry_of_its_hub_is_a_name_for_what_it_stands_for(home: Path, studio: Path) -> None:
    write_model(studio / f"models/{PUBLISHED}/Qwen3-8B-Q4_K_M.gguf")
    write_model(studio / "models/other/Thing-GGUF/Thing-Q4_0.gguf", x=1)
    hub = studio / "hub/models/qwen/qwen3-8b"
    hub.mkdir(parents=True)
    sources = [{"type": "huggingface", "user": "lmstudio-community", "repo": "Qwen3-8B-GGUF"}]
    dependency = {"type": "model", "purpose": "baseModel", "modelKeys": ["x/y"], "sources": sources}
    (hub / "manifest.json").write_text(json.dumps({"type": "model", "dependencies": [dependency, 7]}))
    other = studio / "hub/models/me/thing"
    other.mkdir(parents=True)
    (other / "model.yaml").write_text(
        "model: me/thing\nbase:\n  - key: other/thing-gguf\n    sources:\n      - type: x\n"
    )
    (studio / "hub/models/me/bad").mkdir()
    (studio / "hub/models/me/bad/manifest.json").write_text("{")
    catalog = found(home)
    assert catalog.find("qwen/qwen3-8b").name == "Qwen3-8B-Q4_K_M"
    assert catalog.find("Qwen/Qwen3-8B@Q4_K_M").name == "Qwen3-8B-Q4_K_M"
    assert catalog.find("me/thing").name == "Thing-Q4_0"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"dependencies": 7}',
        '{"dependencies": [null, {"modelKeys": 7, "sources": "x"}, {"modelKeys": [[], "a/b/c"], "sources": [7, {}]}]}',
        '{"dependencies": [{"sources": [{"user": [], "repo": {"a": 1}}]}]}',
        "[" * 5000,
        "\x00",
    ],
)
def test_an_entry_that_makes_no_sense(home: Path, studio: Path, text: str) -> None:
    write_model(studio / f"models/{PUBLISHED}/Qwen3-8B-Q4_K_M.gguf")
    hub = studio / "hub/models/a/b"
    hub.mkdir(parents=True)
    (hub / "manifest.json").write_text(text)
    (hub / "model.yaml").write_text(text)
    (studio / "settings.json").write_text(text)
    assert [model.name for model in found(home)] == ["Qwen3-8B-Q4_K_M"]


def test_where_it_keeps_its_files(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert lmstudio_home(environ) == str(tmp_path / ".lmstudio")
    (tmp_path / ".cache/lm-studio").mkdir(parents=True)
    assert lmstudio_home(environ) == str(tmp_path / ".cache/lm-studio")
    (tmp_path / ".lmstudio").mkdir()
    assert lmstudio_home(environ) == str(tmp_path / ".lmstudio")
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path}/elsewhere\n")
    assert lmstudio_home(environ) == f"{tmp_path}/elsewhere"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/settings.json").write_text(json.dumps({"downloadsFolder": f"{tmp_path}/disk2"}))
    write_model(tmp_path / "disk2/p/r/m.gguf")
    assert [model.path for model in found(tmp_path)] == [tmp_path / "disk2/p/r/m.gguf"]


def test_unfinished_downloads_and_files_in_odd_places(home: Path, studio: Path) -> None:
    folder = studio / "models/p/r"
    write_model(folder / "whole.gguf")
    (folder / "downloading_x.gguf.part").write_bytes(model_bytes())
    write_model(studio / "models/loose.gguf", x=1)
    write_model(studio / "models/p/r/deep/er.gguf", x=2)
    assert {model.name for model in found(home)} == {"whole", "loose", "er"}
