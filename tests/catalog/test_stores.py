from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from gguf_file import gguf_bytes, model_bytes, projector_bytes, write_model

from llamarunner.catalog import disk, files
from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.stores import discover
from llamarunner.config.schema import Config, DiscoveryConfig, ModelConfig, ModelSettings


def found(*folders: Path, models: dict[str, ModelConfig] | None = None, **defaults: Any) -> Catalog:
    discovery = DiscoveryConfig(ollama=False, lmstudio=False, huggingface=False, folders=list(folders))
    return discover(Config(models=models or {}, discovery=discovery, defaults=ModelSettings(**defaults)))


def names(catalog: Catalog) -> list[str]:
    return [model.name for model in catalog]


def only(catalog: Catalog) -> Model:
    (model,) = catalog
    return model


# --- the configuration's models --------------------------------------------------------------------------------------


def test_a_configured_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "file.gguf")
    settings = ModelConfig(path=path, aliases=["short"], context=2048)
    catalog = found(models={"日本 my/model 😀": settings})
    model = only(catalog)
    assert catalog.find("SHORT") is model
    assert (model.name, model.source, model.problem) == ("日本 my/model 😀", "config", "")
    assert model.settings is settings
    assert (model.size_bytes, model.modified_at) == (path.stat().st_size, path.stat().st_mtime)
    assert model.details.architecture == "llama"
    assert model.context == 2048


def test_one_that_cannot_run_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all")
    (tmp_path / "cut.gguf").write_bytes(model_bytes()[:-100])
    (tmp_path / "mmproj.gguf").write_bytes(projector_bytes())
    (tmp_path / "lora.gguf").write_bytes(gguf_bytes({"general.architecture": "llama", "general.type": "adapter"}))
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "nothing.gguf").write_bytes(gguf_bytes())
    write_model(tmp_path / "good.gguf")
    expected = {
        "text.gguf": "not a GGUF",
        "cut.gguf": "cut short",
        "mmproj.gguf": "a projector",
        "lora.gguf": "'adapter'",
        "empty.gguf": "empty",
        "nothing.gguf": "architecture",
        "missing.gguf": "no such file",
        "": "a folder",
    }
    models = {f"m{name}": ModelConfig(path=tmp_path / name) for name in expected}
    models["no eyes"] = ModelConfig(path=tmp_path / "good.gguf", mmproj=tmp_path / "missing.gguf")
    models["wrong eyes"] = ModelConfig(path=tmp_path / "good.gguf", mmproj=tmp_path / "good.gguf")
    catalog = found(models=models)
    for name, problem in expected.items():
        model = catalog.find(f"m{name}")
        assert problem in model.problem
        assert model.hint
    assert "no such file" in catalog.find("no eyes").problem
    assert "not a projector" in catalog.find("wrong eyes").problem


def test_a_configured_projector_says_what_it_can_do(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    (tmp_path / "p.gguf").write_bytes(projector_bytes(vision=False, audio=True))
    model = only(found(models={"m": ModelConfig(path=path, mmproj=tmp_path / "p.gguf")}))
    assert model.capabilities == {"completion", "audio"}


# --- folders ---------------------------------------------------------------------------------------------------------


def test_files_at_any_depth_under_their_own_names(tmp_path: Path) -> None:
    write_model(tmp_path / "b.gguf")
    write_model(tmp_path / "a/very/deep/folder/Qwen3 日本語 😀.Q4_K_M.GGUF")
    (tmp_path / "readme.md").write_text("x")
    (tmp_path / "a/._b.gguf").write_text("a resource fork")
    catalog = found(tmp_path, context=1024)
    assert names(catalog) == ["b", "Qwen3 日本語 😀.Q4_K_M"]
    assert catalog.find("qwen3 日本語 😀.q4_k_m").context == 1024
    assert {model.source for model in catalog} == {str(tmp_path)}


def test_no_folder_and_an_empty_one_are_no_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(found(tmp_path / "missing", tmp_path)) == 0
    assert not caplog.records


def test_one_name_for_several_files(tmp_path: Path) -> None:
    for path in ("x/model.gguf", "y/model.gguf", "z/y/model.gguf", "z/Model.gguf", "y/model-2.gguf"):
        write_model(tmp_path / path)
    catalog = found(tmp_path)
    assert names(catalog) == ["model", "model-2", "y/model", "z/Model", "z/y/model"]
    assert [model.path.parent.name for model in catalog] == ["x", "y", "y", "z", "y"]
    assert names(found(tmp_path)) == names(catalog)
    for path in (model.path for model in catalog if model.path.stem.lower() == "model"):
        assert catalog.find(f"{tmp_path.name}/{path.relative_to(tmp_path).with_suffix('')}").path == path


def test_an_alias_is_listed_where_it_leads(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one.gguf"), write_model(tmp_path / "x/one.gguf")
    (tmp_path / "two.gguf").symlink_to(one)
    write_model(tmp_path / "y/two.gguf", x=1)
    catalog = found(tmp_path)
    assert [(model.name, model.path) for model in catalog if "two" in model.aliases] == [("one", one)]
    assert catalog.find("two").path == one
    for model in catalog:
        for alias in model.aliases:
            assert catalog.find(alias) is model
    assert catalog.find("x/one").path == other


def test_the_configuration_has_the_name_first(tmp_path: Path) -> None:
    write_model(tmp_path / "models/a.gguf")
    write_model(tmp_path / "models/b.gguf")
    other = write_model(tmp_path / "elsewhere.gguf")
    catalog = found(tmp_path / "models", models={"A": ModelConfig(path=other, aliases=["b"])})
    assert names(catalog) == ["A", "models/a", "models/b"]
    assert catalog.find("a").path == other


def test_a_configured_file_is_not_listed_again(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    assert names(found(tmp_path, models={"mine": ModelConfig(path=path)})) == ["mine"]
    assert names(found(tmp_path, tmp_path / ".", tmp_path)) == ["a"]


def test_links_that_go_in_circles(tmp_path: Path) -> None:
    write_model(tmp_path / "a/m.gguf")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "a/gone.gguf").symlink_to(tmp_path / "nothing")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert names(found(tmp_path)) == ["m"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    write_model(tmp_path / "good/m.gguf")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert names(found(tmp_path)) == ["m"]
    closed.chmod(0o700)


def test_a_folder_that_vanishes_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "good/m.gguf")
    write_model(tmp_path / "bad/n.gguf")
    real = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "bad":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(disk.os, "scandir", scandir)
    assert names(found(tmp_path)) == ["m"]


def test_unfinished_downloads_are_left_out(tmp_path: Path) -> None:
    write_model(tmp_path / "whole.gguf")
    for name in ("a.gguf.part", "b.gguf.incomplete", "c.part.gguf", "d.gguf.crdownload"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "zero.gguf").touch()
    write_model(tmp_path / "reserved.gguf")
    (tmp_path / "reserved.gguf.aria2").touch()
    assert names(found(tmp_path)) == ["whole"]


def test_a_bad_file_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_text("<!DOCTYPE html>")
    os.mkfifo(tmp_path / "fifo.gguf")
    model = only(found(tmp_path))
    assert model.name == "bad"
    assert "web page" in model.problem
    assert model.size_bytes == 15


def test_names_that_are_not_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/bad\xff\x1b[31m.gguf"
    Path(os.fsdecode(raw)).write_bytes(model_bytes())
    model = only(found(tmp_path))
    assert model.name == "bad\ufffd\ufffd[31m"
    assert model.problem == ""
    assert os.fsencode(model.path) == raw


def test_no_more_than_the_stated_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(12):
        write_model(tmp_path / f"{number % 3}/m{number}.gguf")
    monkeypatch.setattr(files, "MAX_FILES", 10)
    with caplog.at_level(logging.WARNING):
        assert len(found(tmp_path)) == 10
    assert "only the first 10" in caplog.text


# --- split models ----------------------------------------------------------------------------------------------------


def write_parts(folder: Path, total: int, missing: tuple[int, ...] = ()) -> Path:
    for part in range(1, total + 1):
        if part not in missing:
            write_model(folder / f"big-Q4-{part:05}-of-{total:05}.gguf")
    return folder / f"big-Q4-00001-of-{total:05}.gguf"


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    first = write_parts(tmp_path, 3)
    for model in (only(found(tmp_path)), only(found(models={"big-Q4": ModelConfig(path=first)}))):
        assert (model.name, model.path, model.problem) == ("big-Q4", first, "")
        assert model.size_bytes == 3 * first.stat().st_size
        assert model.details.parameter_count == 3 * 64 * 32


@pytest.mark.parametrize(
    ("missing", "says"),
    [((2,), "big-Q4-00002-of-00003.gguf: there is no such file"), ((1, 3), "2 of 3 parts are missing")],
)
def test_a_split_model_with_parts_missing(tmp_path: Path, missing: tuple[int, ...], says: str) -> None:
    first = write_parts(tmp_path, 3, missing)
    model = only(found(tmp_path))
    assert (model.name, model.path) == ("big-Q4", first)
    assert says in model.problem
    assert model.hint == "download the whole model"


def test_a_later_part_is_no_model(tmp_path: Path) -> None:
    write_parts(tmp_path, 2)
    model = only(found(models={"m": ModelConfig(path=tmp_path / "big-Q4-00002-of-00002.gguf")}))
    assert "only part 2" in model.problem
    assert "big-Q4-00001-of-00002.gguf" in model.hint


def test_a_damaged_part(tmp_path: Path) -> None:
    write_parts(tmp_path, 2)
    (tmp_path / "big-Q4-00002-of-00002.gguf").write_bytes(model_bytes()[:-9])
    assert "cut short" in only(found(tmp_path)).problem


# --- projectors ------------------------------------------------------------------------------------------------------


def test_the_projector_of_the_folder_belongs_to_its_model(tmp_path: Path) -> None:
    write_model(tmp_path / "vl/Qwen-VL-Q4.gguf")
    write_model(tmp_path / "vl/Qwen-VL-Q8.gguf")
    (tmp_path / "vl/mmproj-F16.gguf").write_bytes(projector_bytes())
    write_model(tmp_path / "other/text.gguf")
    catalog = found(tmp_path)
    assert names(catalog) == ["text", "Qwen-VL-Q4", "Qwen-VL-Q8"]
    assert [model.mmproj and model.mmproj.name for model in catalog] == [None, "mmproj-F16.gguf", "mmproj-F16.gguf"]
    assert "vision" in catalog.find("qwen-vl-q4").capabilities
    assert "vision" not in catalog.find("text").capabilities


def test_projectors_of_a_folder_with_several_models(tmp_path: Path) -> None:
    write_model(tmp_path / "gemma-3-4b-it-Q4.gguf", "gemma3")
    write_model(tmp_path / "llama-Q4.gguf")
    (tmp_path / "mmproj-gemma-3-4b-it-f16.gguf").write_bytes(projector_bytes(2560))
    catalog = found(tmp_path)
    assert catalog.find("gemma-3-4b-it-Q4").mmproj == tmp_path / "mmproj-gemma-3-4b-it-f16.gguf"
    assert catalog.find("llama-Q4").mmproj is None


def test_a_damaged_projector_is_no_model(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    (tmp_path / "mmproj-m.gguf").write_bytes(projector_bytes()[:-20])
    assert only(found(tmp_path)).mmproj is None
