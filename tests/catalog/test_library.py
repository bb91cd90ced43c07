from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf_file import model_bytes, projector_bytes, write_model

from llamarunner.catalog.catalog import Model, Preset
from llamarunner.catalog.create import Recipe, create, manifest_bytes
from llamarunner.catalog.details import read_details
from llamarunner.catalog.library import (
    KEEP_LOOSE_S,
    KEEP_PARTIAL_S,
    DigestMismatchError,
    Library,
    LibraryError,
    MissingBlobError,
)
from llamarunner.catalog.manifests import (
    ADAPTER,
    CONFIG_TYPE,
    LICENSE,
    MESSAGES,
    MODEL,
    PARAMS,
    PROJECTOR,
    SYSTEM,
    TEMPLATE,
    Layer,
    Manifest,
    ManifestError,
    read_messages,
    read_object,
    read_text,
)
from llamarunner.catalog.names import ModelName
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import LlamaRunnerError, ModelNotFoundError, RequestError, UnsupportedError


def named(text: str) -> ModelName:
    return ModelName.parse(text)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def upload(library: Library, data: bytes) -> str:
    digest = digest_of(data)
    with library.upload(digest) as writer:
        writer.write(data[:10])
        writer.write(data[10:])
        writer.commit()
    return digest


def add(library: Library, name: str, *blobs: bytes) -> Manifest:
    config, _ = library.put_blob(b"{}", CONFIG_TYPE)
    layers = [library.put_blob(blob, MODEL)[0] for blob in blobs]
    return library.write_manifest(named(name), manifest_bytes(config, layers))


def blobs(library: Library) -> set[str]:
    return {path.name for path in (library.root / "blobs").iterdir()}


def model_at(path: Path, **more: Any) -> Model:
    return Model(path.stem, path, ModelSettings(), details=read_details(path), size_bytes=path.stat().st_size, **more)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


# --- blobs -----------------------------------------------------------------------------------------------------------


def test_a_library_that_nothing_was_put_into_leaves_no_trace(library: Library) -> None:
    assert library.manifests() == []
    assert library.find(named("x")) is None
    assert library.blob(f"sha256:{'0' * 64}") is None
    assert library.prune() == 0
    assert not library.root.exists()


def test_an_upload_is_there_only_when_it_is_whole_and_true(library: Library) -> None:
    data, digest = b"some bytes", digest_of(b"some bytes")
    with library.upload(digest) as writer:
        writer.write(data)
        assert library.blob(digest) is None
    assert blobs(library) == set()
    other = digest_of(b"other")
    with library.upload(other) as writer:
        writer.write(data)
        with pytest.raises(DigestMismatchError) as caught:
            writer.commit()
    assert caught.value.message == f'digest mismatch, expected "{other}", got "{digest}"'
    assert blobs(library) == set()
    upload(library, data)
    path = library.blob(digest)
    assert path is not None
    assert path.read_bytes() == data
    for wrong in ("", "sha256:", "md5:00", f"sha256:{'g' * 64}", f"../{digest}"):
        with pytest.raises(ManifestError, match="invalid digest format"):
            library.upload(wrong)


def test_a_full_disk_is_an_error_of_ours(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LibraryError, match="No space left on device"):
        upload(library, b"some bytes and more")
    with pytest.raises(LibraryError, match="No space left on device"):
        add(library, "m", b"x")
    assert blobs(library) == set()


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    library = Library(tmp_path / "file/library")
    with pytest.raises(LibraryError, match="Not a directory"):
        library.upload(f"sha256:{'0' * 64}")
    with pytest.raises(LibraryError, match="Not a directory"):
        library.put_blob(b"", MODEL)


# --- manifests -------------------------------------------------------------------------------------------------------


def test_models_are_found_in_any_case_and_replaced_in_place(library: Library) -> None:
    first = add(library, "Llama3:8B", b"old")
    assert library.find(named("llama3:8b")) is not None
    second = add(library, "llama3:8b", b"new")
    assert second.path == first.path
    assert [manifest.name.short for manifest in library.manifests()] == ["Llama3:8B"]
    assert library.blob(digest_of(b"old")) is None
    assert library.blob(digest_of(b"new")) is not None


def test_a_manifest_without_its_blobs_is_not_written(library: Library) -> None:
    config, _ = library.put_blob(b"{}", CONFIG_TYPE)
    data = manifest_bytes(config, [Layer(MODEL, f"sha256:{'0' * 64}", 5)])
    with pytest.raises(MissingBlobError, match="m:latest needs the blob sha256:000"):
        library.write_manifest(named("m"), data)
    assert library.manifests() == []
    with pytest.raises(ManifestError):
        library.write_manifest(named("m"), b"{}")


def test_deleting_takes_only_what_no_other_model_needs(library: Library) -> None:
    add(library, "a", b"shared", b"of a")
    add(library, "b", b"shared", b"of b")
    library.copy(library.manifests()[0], named("me/copy:1"))
    library.delete(named("A"))
    assert library.blob(digest_of(b"of a")) is not None  # the copy has it
    library.delete(named("me/copy:1"))
    assert library.blob(digest_of(b"of a")) is None
    assert library.blob(digest_of(b"shared")) is not None
    assert not (library.root / "manifests/registry.ollama.ai/me").exists()
    library.delete(named("b"))
    assert blobs(library) == set()
    with pytest.raises(ModelNotFoundError):
        library.delete(named("b"))


def test_nothing_is_taken_that_is_held_or_that_an_unreadable_manifest_may_need(library: Library) -> None:
    held = add(library, "held", b"held").blobs[0].digest
    with library.hold([held]):
        library.delete(named("held"))
        assert library.blob(held) is not None
    add(library, "m", b"of m")
    broken = library.root / "manifests/registry.ollama.ai/library/broken/latest"
    broken.parent.mkdir()
    broken.write_text("{")
    library.delete(named("m"))
    assert library.blob(digest_of(b"of m")) is not None
    broken.unlink()


def test_pruning_takes_what_is_old_and_loose(library: Library) -> None:
    needed = add(library, "m", b"needed").blobs[0].digest
    folder = library.root / "blobs"
    now = time.time()
    ages = {
        f"sha256-{'1' * 64}": KEEP_LOOSE_S + 60, f"sha256-{'2' * 64}": 60, ".draft-1-1": KEEP_LOOSE_S + 60,
        ".upload-x": 60, f"sha256-{'3' * 64}-partial": KEEP_PARTIAL_S + 60, f"sha256-{'4' * 64}-partial": 86400,
        f"sha256-{'4' * 64}-partial.json": 86400, "not ours": 10**7,
    }  # fmt: skip
    for name, age in ages.items():
        (folder / name).touch()
        os.utime(folder / name, (now - age, now - age))
    os.utime(folder / needed.replace(":", "-"), (0, 0))
    before = blobs(library)
    assert library.prune() == 3
    assert before - blobs(library) == {f"sha256-{'1' * 64}", ".draft-1-1", f"sha256-{'3' * 64}-partial"}


@pytest.mark.parametrize("step", ["replace", "unlink", "fsync", "rmdir", "symlink", "link"])
@pytest.mark.parametrize("at", range(6))
def test_a_failure_at_any_step_leaves_every_manifest_with_its_blobs(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, at: int
) -> None:
    base = model_at(write_model(tmp_path / "base.gguf"))
    add(library, "old", b"old")
    calls = 0
    real = getattr(os, step)

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise OSError(5, "Input/output error")
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        for change in (
            lambda: create(library, named("new"), Recipe(base, system="Be brief.", parameters={"seed": 1})),
            lambda: create(library, named("old"), Recipe(base, system="Be long.")),
            lambda: library.delete(named("old")),
        ):
            with suppress(LlamaRunnerError):
                change()
    for manifest in library.manifests():
        assert all(library.blob(layer.digest) for layer in manifest.blobs), manifest.name
    create(library, named("again"), Recipe(base, system="Be brief."))
    assert library.find(named("again")) is not None


KILLED = """
import sys, hashlib
from pathlib import Path
from llamarunner.catalog.create import manifest_bytes
from llamarunner.catalog.library import Library
from llamarunner.catalog.manifests import CONFIG_TYPE, MODEL
from llamarunner.catalog.names import ModelName
library = Library(Path(sys.argv[1]))
print("begun", flush=True)
number = 0
while True:
    number += 1
    config, _ = library.put_blob(b"{}", CONFIG_TYPE)
    layer, _ = library.put_blob(f"{number}".encode() * 1000, MODEL)
    library.write_manifest(ModelName.parse(f"m:{number % 3}"), manifest_bytes(config, [layer]))
    if number % 4 == 0:
        library.delete(ModelName.parse(f"m:{number % 3}"))
"""


def test_a_program_killed_in_the_midst_of_it_leaves_whole_models(library: Library) -> None:
    for round_ in range(5):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(library.root)], stdout=subprocess.PIPE) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == b"begun\n"
            time.sleep(0.02 + round_ * 0.013)
            program.send_signal(signal.SIGKILL)
        for manifest in library.manifests():
            for layer in manifest.blobs:
                path = library.blob(layer.digest)
                assert path is not None
                assert digest_of(path.read_bytes()) == layer.digest
    add(library, "after", b"after")  # no lock was left behind


def test_many_threads_at_once(library: Library) -> None:
    failed: list[Exception] = []

    def work(number: int) -> None:
        try:
            for turn in range(8):
                try:
                    add(library, f"m:{turn % 2}", b"common", f"{number}".encode())
                    library.delete(named(f"m:{turn % 2}"))
                except (ModelNotFoundError, MissingBlobError):
                    pass  # another was quicker
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for manifest in library.manifests():
        assert all(library.blob(layer.digest) for layer in manifest.blobs)


# --- create ----------------------------------------------------------------------------------------------------------


def test_a_preset_of_a_file_refers_to_it(library: Library, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    parameters = {"temperature": 0.2, "stop": ["a", "b"]}
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    recipe = Recipe(
        model_at(path), parameters=parameters, system="Sei kurz.", template="{{ .Prompt }}", messages=messages,
        licenses=("MIT", "more"),
    )  # fmt: skip
    done = create(library, named("preset"), recipe)
    assert done[0].startswith("using existing layer sha256:")
    assert [line.split(" sha256")[0] for line in done[1:]] == ["creating new layer"] * 7 + ["writing manifest"]
    manifest = library.find(named("preset"))
    assert manifest is not None
    (layer,) = manifest.of_type(MODEL)
    blob = library.blob(layer.digest)
    assert blob is not None
    assert blob.resolve() == path
    assert layer.size == path.stat().st_size
    assert read_object(library.root, manifest.of_type(PARAMS)[0]) == parameters
    assert read_text(library.root, manifest.of_type(SYSTEM)[0]) == "Sei kurz."
    assert read_text(library.root, manifest.of_type(TEMPLATE)[0]) == "{{ .Prompt }}"
    assert read_messages(library.root, manifest.of_type(MESSAGES)[0]) == messages
    assert [read_text(library.root, each) for each in manifest.of_type(LICENSE)] == ["MIT", "more"]
    assert read_object(library.root, manifest.config)["model_family"] == "llama"
    library.delete(named("preset"))
    assert path.exists()
    assert blobs(library) == set()


def test_a_preset_of_a_preset_lays_its_own_over_it(library: Library, tmp_path: Path) -> None:
    preset = Preset({"temperature": 0.2, "seed": 1}, "old", "template", ({"role": "user", "content": "x"},), ("MIT",))
    base = model_at(write_model(tmp_path / "base.gguf"), preset=preset, manifest_digest="0" * 64)
    create(library, named("n"), Recipe(base, parameters={"seed": 2}, system="", messages=(), licenses=("BSD",)))
    manifest = library.find(named("n"))
    assert manifest is not None
    assert read_object(library.root, manifest.of_type(PARAMS)[0]) == {"temperature": 0.2, "seed": 2}
    assert manifest.of_type(SYSTEM) == manifest.of_type(MESSAGES) == ()
    assert read_text(library.root, manifest.of_type(TEMPLATE)[0]) == "template"
    assert [read_text(library.root, each) for each in manifest.of_type(LICENSE)] == ["MIT", "BSD"]


def test_a_blob_of_another_store_becomes_a_hard_link_with_its_digest(library: Library, tmp_path: Path) -> None:
    data = model_bytes()
    blob = tmp_path / "ollama/blobs" / digest_of(data).replace(":", "-")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    projector = tmp_path / "mmproj.gguf"
    projector.write_bytes(projector_bytes())
    create(library, named("n"), Recipe(model_at(blob, mmproj=projector, adapters=(projector,))))
    manifest = library.find(named("n"))
    assert manifest is not None
    assert [layer.media_type for layer in manifest.layers] == [MODEL, PROJECTOR, ADAPTER]
    assert manifest.layers[0].digest == digest_of(data)
    assert blob.stat().st_nlink == 2
    blob.unlink()
    ours = library.blob(digest_of(data))
    assert ours is not None
    assert ours.read_bytes() == data


def test_a_model_of_uploaded_files(library: Library) -> None:
    model, projector = upload(library, model_bytes()), upload(library, projector_bytes())
    done = create(library, named("n"), Recipe(files={"m.gguf": model, "mmproj.gguf": projector}))
    assert done[0] == "parsing GGUF"
    assert done[1] == f"using existing layer {model}"
    manifest = library.find(named("n"))
    assert manifest is not None
    assert [layer.media_type for layer in manifest.layers] == [MODEL, PROJECTOR]


@pytest.mark.parametrize(
    "kind", ["nothing", "no blob", "no digest", "no model", "two", "split", "text", "gone", "remote"]
)
def test_what_cannot_be_created(library: Library, tmp_path: Path, kind: str) -> None:
    model, projector = upload(library, model_bytes()), upload(library, projector_bytes())
    other, text = upload(library, model_bytes("qwen3")), upload(library, b"no model at all")
    gone = model_at(write_model(tmp_path / "gone.gguf"))
    gone.path.unlink()
    recipe, words, error = {
        "nothing": (Recipe(), "neither 'from' or 'files' was specified", RequestError),
        "no blob": (Recipe(files={"m": f"sha256:{'0' * 64}"}), "there is no blob sha256:00", RequestError),
        "no digest": (Recipe(files={"m": "/etc/passwd"}), "invalid digest format", RequestError),
        "no model": (Recipe(files={"m": projector}), "must be a model, and 0 are", RequestError),
        "two": (Recipe(files={"m": model, "o": other}), "must be a model, and 2 are", RequestError),
        "split": (Recipe(files={"m-00001-of-00002.gguf": model}), "a split model", UnsupportedError),
        "text": (Recipe(files={"m": text}), "not a GGUF", RequestError),
        "gone": (Recipe(gone), "no file of this machine", UnsupportedError),
        "remote": (Recipe(Model("r", Path("r"), ModelSettings(), is_remote=True)), "no file", UnsupportedError),
    }[kind]
    with pytest.raises(error, match=words):
        create(library, named("n"), recipe)
    assert library.manifests() == []


def test_the_library_is_one_that_ollama_could_read(library: Library, tmp_path: Path) -> None:
    create(library, named("ns/n:tag"), Recipe(model_at(write_model(tmp_path / "base.gguf"))))
    path = library.root / "manifests/registry.ollama.ai/ns/n/tag"
    record = json.loads(path.read_bytes())
    assert record["schemaVersion"] == 2
    assert record["config"]["mediaType"] == CONFIG_TYPE
    assert record["layers"][0].keys() == {"mediaType", "digest", "size", "from"}
