from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gguf_file import gguf_bytes, model_bytes, projector_bytes
from hypothesis import given
from hypothesis import strategies as st
from registry import FakeRegistry, serve_registry

from llamarunner.catalog.catalog import Model
from llamarunner.catalog.create import Recipe, create
from llamarunner.catalog.hub import HubFile, choose, parse_file
from llamarunner.catalog.library import Library
from llamarunner.catalog.manifests import MODEL, PROJECTOR
from llamarunner.catalog.names import InvalidNameError, ModelName
from llamarunner.catalog.pull import Pulls
from llamarunner.catalog.registry import RegistryError
from llamarunner.catalog.stores import discover
from llamarunner.config.schema import Config
from llamarunner.errors import LlamaRunnerError

SPLIT = "m-Q8_0-{:05}-of-00002.gguf"
FILES = {
    "m-Q4_K_M.gguf": model_bytes(),
    "m-Q4_K_S.gguf": model_bytes("qwen3"),
    "Q8_0/" + SPLIT.format(1): model_bytes(),
    "Q8_0/" + SPLIT.format(2): gguf_bytes({"general.architecture": "llama", "split.no": 1}),
    "mmproj-m-f32.gguf": projector_bytes(),
    "mmproj-m-F16.gguf": projector_bytes(audio=True),
}
PATHS = [HubFile(path, len(data), "0" * 64) for path, data in FILES.items()]


# --- what is meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("hf.co/org/repo/m-Q4_K_M.gguf", "hf.co/org/repo:m-Q4_K_M", "m-Q4_K_M.gguf"),
        ("hf.co/org/repo/Q8_0/m-Q8_0-00001-of-00002.gguf", "hf.co/org/repo:m-Q8_0", "Q8_0/m-Q8_0-00001-of-00002.gguf"),
        ("HuggingFace.co/o/r/-a b\N{SNOWMAN}c.GGUF", "HuggingFace.co/o/r:a-b-c", "-a b\N{SNOWMAN}c.GGUF"),
        ("hf.co/o/r/" + "x" * 100 + ".gguf", "hf.co/o/r:" + "x" * 80, "x" * 100 + ".gguf"),
    ],
)
def test_a_file_by_its_name(text: str, name: str, path: str) -> None:
    assert parse_file(text) == (ModelName.parse(name), path)


@pytest.mark.parametrize(
    "text", ["hf.co/org/repo:Q4_K_M", "hf.co/org/repo", "hf.co/repo.gguf", "example.org/a/b/c.gguf", ""]
)
def test_what_is_no_file(text: str) -> None:
    assert parse_file(text) is None


@pytest.mark.parametrize("text", ["hf.co/o/r/../x.gguf", "hf.co//r/x.gguf", "hf.co/o r/r/x.gguf", "hf.co/o/r/.gguf"])
def test_paths_that_lead_elsewhere(text: str) -> None:
    with pytest.raises(InvalidNameError):
        parse_file(text)


@given(st.text(alphabet="hf.co/ab-_.:\0 ", max_size=40).map(lambda text: f"hf.co/{text}.gguf"))
def test_any_path_is_a_name_or_an_error_of_ours(text: str) -> None:
    try:
        found = parse_file(text)
    except InvalidNameError:
        return
    if found is not None:
        assert ".." not in found[1].split("/")


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        ("m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("q4_k_s", ["m-Q4_K_S.gguf", "mmproj-m-F16.gguf"]),
        ("latest", ["m-Q4_K_M.gguf", "mmproj-m-F16.gguf"]),
        ("Q8_0", ["Q8_0/" + SPLIT.format(1), "Q8_0/" + SPLIT.format(2), "mmproj-m-F16.gguf"]),
        ("Q8_0/" + SPLIT.format(1), ["Q8_0/" + SPLIT.format(1), "Q8_0/" + SPLIT.format(2)]),
        ("mmproj-m-f32.gguf", ["mmproj-m-f32.gguf"]),
    ],
)
def test_what_is_chosen(wanted: str, paths: list[str]) -> None:
    assert [file.path for _, file in choose(PATHS, wanted)] == paths


def test_what_there_is_nothing_of() -> None:
    for wanted in ("Q5_K_M", "4_K_M", "other.gguf", ""):
        with pytest.raises(RegistryError, match="file does not exist"):
            choose(PATHS, wanted)
    with pytest.raises(RegistryError, match="1 of 2 parts of this model are missing, Q8_0/m-Q8_0-00002"):
        choose([file for file in PATHS if "00002-of" not in file.path], "Q8_0")


# --- pulled ----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[FakeRegistry]:
    async with serve_registry() as registry:
        registry.hub["org/repo"] = dict(FILES)
        monkeypatch.setenv("HF_ENDPOINT", f"http://{registry.host}")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield registry


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest_asyncio.fixture
async def pulls(library: Library) -> AsyncIterator[Pulls]:
    async def changed() -> None:
        pass

    pulls = Pulls(library, changed)
    yield pulls
    await pulls.close()


async def statuses(pulls: Pulls, name: str) -> list[str]:
    async with aclosing(pulls.pull(name)) as lines:
        return [line.status async for line in lines]


def found(library: Library, **more: Any) -> list[Model]:
    tables = {"discovery": {"library": library.root, "folders": [], "ollama": False, "lmstudio": False,
                            "huggingface": False}}  # fmt: skip
    return list(discover(Config.model_validate(tables | more), environ={}))


async def test_a_named_file(registry: FakeRegistry, pulls: Pulls, library: Library) -> None:
    assert (await statuses(pulls, "hf.co/org/repo/m-Q4_K_S.gguf"))[-1] == "success"
    (model,) = found(library)
    assert model.name == "hf.co/org/repo:m-Q4_K_S"
    assert not model.problem
    assert model.path.read_bytes() == FILES["m-Q4_K_S.gguf"]
    assert {each.authorization for each in registry.asked} == {""}


async def test_the_registry_protocol_is_asked_first(registry: FakeRegistry, pulls: Pulls, library: Library) -> None:
    registry.add("repo", tag="Q4_K_M", model=model_bytes())
    registry.manifests["org/repo/Q4_K_M"] = registry.manifests["library/repo/Q4_K_M"]
    assert (await statuses(pulls, "hf.co/org/repo:Q4_K_M"))[-1] == "success"
    assert not [each for each in registry.asked if each.path.startswith("/api/")]


async def test_a_split_model_keeps_its_files_names(registry: FakeRegistry, pulls: Pulls, library: Library) -> None:
    registry.refused["org/repo/Q8_0"] = "The specified tag is a sharded GGUF. Ollama does not support this yet."
    await statuses(pulls, "https://hf.co/org/repo:Q8_0")
    (model,) = found(library)
    assert model.name == "hf.co/org/repo:Q8_0"
    assert not model.problem
    assert model.path.name == SPLIT.format(1)
    assert (model.path.parent / SPLIT.format(2)).read_bytes() == FILES["Q8_0/" + SPLIT.format(2)]
    assert model.mmproj is not None
    assert model.mmproj.read_bytes() == FILES["mmproj-m-F16.gguf"]
    manifest = library.manifests()[0]
    assert [layer.media_type for layer in manifest.layers] == [MODEL, MODEL, PROJECTOR]
    create(library, ModelName.parse("preset"), Recipe(model, system="Be brief."))
    library.delete(manifest.name)
    (preset,) = found(library)
    assert not preset.problem
    assert preset.path.name == SPLIT.format(1)
    library.delete(ModelName.parse("preset"))
    assert list((library.root / "blobs").iterdir()) == list((library.root / "split").iterdir()) == []


async def test_a_split_model_of_a_folder_made_a_preset(library: Library, tmp_path: Path) -> None:
    for path in ("Q8_0/" + SPLIT.format(1), "Q8_0/" + SPLIT.format(2)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(FILES[path])
    tables = {"models": {"big": {"path": str(tmp_path / "Q8_0" / SPLIT.format(1)), "context": 1234, "pin": True}}}
    (base,) = found(library, **tables)
    create(library, ModelName.parse("preset"), Recipe(base, system="Be brief."))
    preset = found(library, **tables)[1]
    assert not preset.problem
    assert preset.size_bytes > base.size_bytes  # its texts as well
    assert preset.settings.context == 1234  # it runs like what it was made of
    (tmp_path / "Q8_0" / SPLIT.format(2)).unlink()
    assert "is missing" in found(library, **tables)[1].problem


async def test_a_gated_repository_wants_a_token(
    registry: FakeRegistry, pulls: Pulls, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.gated["org/repo"] = "hf_secret"
    with pytest.raises(LlamaRunnerError, match="accepted its conditions") as caught:
        await statuses(pulls, "hf.co/org/repo/m-Q4_K_M.gguf")
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (await statuses(pulls, "hf.co/org/repo/m-Q4_K_M.gguf"))[-1] == "success"
    assert {each.authorization for each in registry.asked if each.port == registry.bytes_port} == {""}


async def test_a_token_for_the_registry_protocol(
    registry: FakeRegistry, pulls: Pulls, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("repo", model=model_bytes())
    registry.manifests["org/repo/latest"] = registry.manifests["library/repo/latest"]
    registry.token, registry.token_is_given = "hf_secret", False
    with pytest.raises(LlamaRunnerError, match="HF_TOKEN"):
        await statuses(pulls, "hf.co/org/repo")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (await statuses(pulls, "hf.co/org/repo"))[-1] == "success"
    assert {each.authorization for each in registry.asked if each.port == registry.bytes_port} == {""}


async def test_what_is_not_there(registry: FakeRegistry, pulls: Pulls, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlamaRunnerError, match="pull model manifest: file does not exist"):
        await statuses(pulls, "hf.co/org/other/m.gguf")
    with pytest.raises(LlamaRunnerError, match="pull model manifest: file does not exist"):
        await statuses(pulls, "hf.co/org/repo/other.gguf")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(LlamaRunnerError, match="Hugging Face cannot be asked"):
        await statuses(pulls, "hf.co/org/repo/m-Q4_K_M.gguf")


def test_it_is_no_part_of_the_start() -> None:
    code = "import llamarunner.service, llamarunner.pull, sys; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
