from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from gguf_file import model_bytes, projector_bytes

from llamarunner.catalog.catalog import Catalog
from llamarunner.catalog.huggingface_store import huggingface_folder
from llamarunner.catalog.stores import discover
from llamarunner.config.schema import Config, DiscoveryConfig


def put(hub: Path, repository: str, revision: str, path: str, data: bytes) -> Path:
    """As huggingface_hub leaves a file there."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    file = folder / "snapshots" / revision / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(os.path.relpath(blob, file.parent))
    return file


def refer(hub: Path, repository: str, revision: str) -> None:
    reference = hub / f"models--{repository.replace('/', '--')}" / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(revision)


def found(hub: Path, *folders: Path) -> Catalog:
    discovery = DiscoveryConfig(ollama=False, lmstudio=False, folders=list(folders), library=hub / "library")
    return discover(Config(discovery=discovery), environ={"HF_HUB_CACHE": str(hub), "HOME": "/nonexistent"})


def test_its_files_under_the_names_they_are_asked_for_by(tmp_path: Path) -> None:
    small = put(tmp_path, "unsloth/Qwen3-8B-GGUF", "aa", "Qwen3-8B-Q4_K_M.gguf", model_bytes())
    put(tmp_path, "unsloth/Qwen3-8B-GGUF", "aa", "Qwen3-8B-Q8_0.gguf", model_bytes(x=1))
    put(tmp_path, "unsloth/Qwen3-8B-GGUF", "aa", "README.md", b"x")
    (tmp_path / "datasets--a--b").mkdir()
    catalog = found(tmp_path)
    assert [(model.name, model.source) for model in catalog] == [
        ("Qwen3-8B-Q4_K_M", "huggingface"), ("Qwen3-8B-Q8_0", "huggingface")
    ]  # fmt: skip
    assert catalog.find("Qwen3-8B-Q4_K_M").path == small
    for name in ("unsloth/Qwen3-8B-GGUF", "hf.co/unsloth/Qwen3-8B-GGUF:Q4_K_M", "unsloth/qwen3-8b-gguf:q4_k_m"):
        assert catalog.find(name).name == "Qwen3-8B-Q4_K_M"
    assert catalog.find("unsloth/Qwen3-8B-GGUF:Q8_0").name == "Qwen3-8B-Q8_0"


def test_one_name_in_two_repositories(tmp_path: Path) -> None:
    for number, owner in enumerate(("a", "b")):
        put(tmp_path, f"{owner}/m-GGUF", "1", "m.gguf", model_bytes(x=number))
    catalog = found(tmp_path)
    assert [model.name for model in catalog] == ["m", "m-GGUF/m"]
    assert [catalog.find(f"{owner}/m-GGUF/m").name for owner in "ab"] == ["m", "m-GGUF/m"]


def test_revisions(tmp_path: Path) -> None:
    put(tmp_path, "a/m", "old", "m.gguf", model_bytes(x=1))
    put(tmp_path, "a/m", "old", "gone.gguf", model_bytes(x=2))
    new = put(tmp_path, "a/m", "new", "m.gguf", model_bytes(x=3))
    os.utime(new.parent, (1, 1))
    refer(tmp_path, "a/m", "new")
    catalog = found(tmp_path)
    assert {model.name for model in catalog} == {"m", "gone"}
    assert catalog.find("m").path == new


def test_the_same_file_in_another_folder(tmp_path: Path) -> None:
    file = put(tmp_path / "hub", "a/vl-GGUF", "1", "vl-Q4_0.gguf", model_bytes())
    projector = put(tmp_path / "hub", "a/vl-GGUF", "1", "mmproj-F16.gguf", projector_bytes())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/eyes.gguf").symlink_to(file)
    (model,) = found(tmp_path / "hub", tmp_path / "mine")
    assert (model.name, model.mmproj) == ("eyes", projector)
    assert {"vl-Q4_0", "a/vl-GGUF"} <= set(model.aliases)


def test_split_files_in_folders_of_their_own_and_the_projector_above(tmp_path: Path) -> None:
    for part in (1, 2):
        put(tmp_path, "a/big", "1", f"Q4_K_M/big-Q4_K_M-0000{part}-of-00002.gguf", model_bytes(x=part))
    projector = put(tmp_path, "a/big", "1", "mmproj-F16.gguf", projector_bytes())
    (model,) = found(tmp_path)
    assert (model.name, model.problem, model.mmproj) == ("big-Q4_K_M", "", projector)


def test_what_is_not_there_yet(tmp_path: Path) -> None:
    file = put(tmp_path, "a/m", "1", "m.gguf", model_bytes())
    file.resolve().rename(f"{file.resolve()}.incomplete")
    assert len(found(tmp_path)) == 0


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/u"}, "/x/huggingface/hub"),
        ({"HOME": "/u"}, "/u/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], expected: str) -> None:
    assert huggingface_folder(environ) == expected
