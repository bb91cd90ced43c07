"""The header cache, and looks at a disk that did and did not change."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest
from gguf_file import gguf_bytes, model_bytes, projector_bytes, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ollama_folder import add_model

from llamarunner.catalog import disk, headers
from llamarunner.catalog.details import read_details
from llamarunner.catalog.disk import Disk
from llamarunner.catalog.headers import HeaderCache, KnownFile
from llamarunner.catalog.stores import Discovery
from llamarunner.config.schema import Config, DiscoveryConfig
from llamarunner.errors import ModelFileError


def get(cache: HeaderCache, path: Path) -> KnownFile:
    return cache.get(str(path), Disk().status(str(path)))


def reloaded(cache: HeaderCache, file: Path) -> HeaderCache:
    cache.save()
    again = HeaderCache(file)
    again.load()
    return again


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "read_both", lambda path: pytest.fail(f"{path} was read again"))


def test_what_was_read_survives_a_restart(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff\n.gguf"))
    moe = {"llama.block_count": 3, "tokenizer.chat_template": "{{ tools }}", "x": [1, 2.5]}
    strange.write_bytes(
        gguf_bytes({"general.architecture": "llama", **moe}, [("blk.1.ffn_up_exps.weight", (32,), 0, 0)], 128)
    )
    (tmp_path / "p.gguf").write_bytes(projector_bytes())
    paths = [smollm2, strange, tmp_path / "p.gguf"]
    cache = HeaderCache(tmp_path / "cache/headers")
    before = [get(cache, path) for path in paths]
    again = reloaded(cache, tmp_path / "cache/headers")
    forbid_reading(monkeypatch)
    assert [get(again, path) for path in paths] == before
    known = get(again, smollm2)
    fresh = read_details(smollm2)
    assert (known.details, dict(known.details.metadata or {})) == (fresh, fresh.metadata)
    assert known.header.tensor_bytes == before[0].header.tensor_bytes
    assert get(again, tmp_path / "p.gguf").is_projector


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    cache = HeaderCache()
    assert get(cache, path).details.architecture == "llama"
    assert get(cache, path) is get(cache, path)
    time_before = path.stat().st_mtime_ns
    write_model(path, "qwen3")
    os.utime(path, ns=(time_before + 10**9, time_before + 10**9))
    assert get(cache, path).details.architecture == "qwen3"


def test_a_bad_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_text("<html>")
    cache = HeaderCache()
    for _ in range(2):
        with pytest.raises(ModelFileError, match="web page"):
            get(cache, tmp_path / "m.gguf")
        forbid_reading(monkeypatch)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data.replace(b'"qwen3"', b'"llama"', 1), "damaged"),
        (lambda data: data.replace(b'"version":1', b'"version":99'), "version 99"),
        (lambda data: b"\x00\xff", "of no use"),
        (lambda data: b"[]\n", "of no use"),
    ],
)
def test_a_cache_of_no_use_is_left_aside_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: object, says: str
) -> None:
    file, path = tmp_path / "headers", write_model(tmp_path / "m.gguf", "qwen3")
    cache = HeaderCache(file)
    get(cache, path)
    cache.save()
    whole = file.read_bytes()
    assert callable(spoil)
    file.write_bytes(spoil(whole))
    with caplog.at_level(logging.WARNING):
        again = HeaderCache(file)
        again.load()
    assert says in caplog.text
    assert get(again, path).details.architecture == "qwen3"
    again.save()
    assert file.read_bytes() == whole


def test_no_cache_and_one_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = HeaderCache(tmp_path / "file/headers")
    cache.load()
    get(cache, write_model(tmp_path / "m.gguf"))
    cache.save()
    assert "not kept" in caplog.text
    HeaderCache(tmp_path / "missing").load()


def test_a_cache_of_nothing_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "headers"
    (tmp_path / "m.gguf").write_text("no model")
    cache = HeaderCache(file)
    with pytest.raises(ModelFileError):
        get(cache, tmp_path / "m.gguf")
    cache.save()
    assert not file.exists()  # a download that grows shall not write it anew each time
    get(cache, write_model(tmp_path / "m.gguf", x="\0" * (headers.MAX_KEPT_BYTES // 5)))
    assert len(reloaded(cache, file)._entries) == 0
    assert file.exists()
    assert not caplog.records


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_FILES", 3)
    monkeypatch.setattr(headers, "MAX_KEPT_BYTES", 2000)
    file = tmp_path / "headers"
    cache = HeaderCache(file)
    paths = [
        write_model(tmp_path / f"m{number}.gguf", **({"x": "y" * 3000} if number == 4 else {})) for number in range(5)
    ]
    for path in paths:
        get(cache, path)
    paths[3].unlink()
    again = reloaded(cache, file)
    forbid_reading(monkeypatch)
    get(again, paths[2])
    for path in (paths[0], paths[4]):  # pushed out; too large
        with pytest.raises(pytest.fail.Exception):
            get(again, path)


def test_files_that_are_gone_leave_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    cache = HeaderCache(file)
    for name in ("a", "b"):
        get(cache, write_model(tmp_path / f"{name}.gguf"))
    again = reloaded(cache, file)
    (tmp_path / "a.gguf").unlink()
    get(again, write_model(tmp_path / "c.gguf"))
    again.save()
    assert b"a.gguf" not in file.read_bytes()
    assert b"b.gguf" in file.read_bytes()


VALUES = st.one_of(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.text(max_size=20),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.lists(st.integers(0, 9), max_size=4),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=8))
def test_any_metadata_comes_back_as_it_was(tmp_path: Path, metadata: dict[str, object]) -> None:
    metadata.pop("general.alignment", None)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama", **metadata}))
    cache = HeaderCache(tmp_path / "headers")
    known = get(cache, path)
    again = get(reloaded(cache, tmp_path / "headers"), path)
    assert again.details == known.details
    assert dict(again.details.metadata or {}) == read_details(path).metadata


# --- looks at the disk -----------------------------------------------------------------------------------------------


def discovery(*folders: Path, cache: HeaderCache | None = None) -> Discovery:
    found = DiscoveryConfig(ollama=False, lmstudio=False, huggingface=False, folders=list(folders))
    return Discovery(Config(discovery=found), headers=cache)


def age(*paths: Path) -> None:
    """Longer ago than any file system's clock ticks."""
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))


def test_an_unchanged_tree_is_neither_listed_nor_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write_model(tmp_path / f"{number % 4}/m{number}.gguf")
    age(tmp_path, *tmp_path.rglob("*"))
    looks = discovery(tmp_path)
    catalog = looks.look()
    assert len(catalog) == 20
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "scandir", lambda path: pytest.fail(f"{path} was listed again"))
        forbid_reading(patch)
        assert looks.look() is catalog
    real, listed = os.scandir, []
    monkeypatch.setattr(disk.os, "scandir", lambda path: (listed.append(path), real(path))[1])
    write_model(tmp_path / "2/new.gguf")
    assert len(looks.look()) == 21
    assert listed == [str(tmp_path / "2")]


def test_a_change_within_the_clocks_tick_is_seen(tmp_path: Path) -> None:
    write_model(tmp_path / "a.gguf")
    looks = discovery(tmp_path)
    assert len(looks.look()) == 1
    before = tmp_path.stat()
    write_model(tmp_path / "b.gguf")
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(looks.look()) == 2


@pytest.mark.parametrize("change", ["grow", "remove", "replace", "link", "root"])
def test_every_kind_of_change_is_seen(tmp_path: Path, change: str) -> None:
    root, path = tmp_path / "models", tmp_path / "models/a/m.gguf"
    write_model(path)
    (tmp_path / "elsewhere").mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere/later")
    age(root, path.parent, path)
    looks = discovery(root, tmp_path / "second")
    before = looks.look()
    match change:
        case "grow":
            with path.open("ab") as file:
                file.write(b"more")
        case "remove":
            path.unlink()
        case "replace":
            write_model(tmp_path / "n.gguf", "qwen3").rename(path)
        case "link":
            write_model(tmp_path / "elsewhere/later/n.gguf")
        case "root":
            write_model(tmp_path / "second/n.gguf")
    after = looks.look()
    assert after is not before
    assert [(m.name, m.size_bytes, m.details.architecture) for m in after] != [
        (m.name, m.size_bytes, m.details.architecture) for m in before
    ]
    assert looks.look() is after


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_end_in_what_a_first_look_sees(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder, store, hub = tmp_path / "models", tmp_path / "ollama", tmp_path / "hub"
    found = DiscoveryConfig(folders=[folder], library=tmp_path / "library")
    environ = {"HOME": str(tmp_path), "OLLAMA_MODELS": str(store), "HF_HUB_CACHE": str(hub)}
    looks = Discovery(Config(discovery=found), environ=environ)
    for _ in range(60):
        _change(chance, folder, store, hub, tmp_path / ".lmstudio/models")
        fresh = Discovery(Config(discovery=found), environ=environ).look()
        assert list(looks.look()) == list(fresh)
        for model in fresh:
            assert all(fresh.find(name) is model for name in (model.name, *model.aliases))


def _change(chance: random.Random, folder: Path, store: Path, hub: Path, studio: Path) -> None:
    """One thing on the disk, added, replaced or taken away."""
    model = model_bytes(chance.choice(("llama", "qwen3")), x=chance.randrange(4))
    path = chance.choice((folder, folder / "a", studio / "p/r", hub / "models--o--r/snapshots/1"))
    path /= f"{chance.choice('abc')}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    blobs = [blob for blob in store.glob("blobs/*") if blob.is_file()]
    match chance.randrange(6):
        case 0:
            path.write_bytes(model)
        case 1:
            path.unlink(missing_ok=True)
        case 2:
            (path.parent / "mmproj.gguf").write_bytes(projector_bytes(chance.randrange(1, 9)))
        case 3 | 4:
            layers = [("model", model), ("system", chance.choice("xy")), ("projector", projector_bytes())]
            add_model(store, f"m/{chance.choice('12')}", *layers[: chance.randrange(1, 4)])
        case _ if blobs:
            path.unlink(missing_ok=True)
            chance.choice((path.symlink_to, lambda blob: blob.unlink()))(chance.choice(sorted(blobs)))
        case _:
            (path.parent / "link.gguf").unlink(missing_ok=True)
            (path.parent / "link.gguf").symlink_to(path)


def test_a_cache_is_loaded_and_saved_by_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache/headers"
    path = write_model(tmp_path / "models/m.gguf")
    (first,) = discovery(path.parent, cache=HeaderCache(file)).look()
    assert file.exists()
    forbid_reading(monkeypatch)
    (second,) = discovery(path.parent, cache=HeaderCache(file)).look()
    assert second == first
