from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog import manifests
from llamarunner.catalog.manifests import (
    LICENSE,
    MESSAGES,
    MODEL,
    PARAMS,
    Layer,
    Manifest,
    ManifestError,
    Problem,
    blob_path,
    parse_manifest,
    read_manifest,
    read_messages,
    read_object,
    read_text,
    walk,
)
from llamarunner.catalog.names import ModelName

NAME = ModelName.parse("llama3.2:1b")
HEX = "6a" * 32
DIGEST = f"sha256:{HEX}"


def record(**changes: Any) -> dict[str, Any]:
    config = {"mediaType": manifests.CONFIG_TYPE, "digest": f"sha256:{'0' * 64}", "size": 5}
    layer = {"mediaType": MODEL, "digest": DIGEST, "size": 100, "from": "/a/b", "name": "n"}
    return {"schemaVersion": 2, "mediaType": manifests.MANIFEST_TYPE, "config": config, "layers": [layer], **changes}


def put(root: Path, path: str, data: bytes | None = None) -> Path:
    file = root / "manifests" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(json.dumps(record()).encode() if data is None else data)
    return file


def put_blob(root: Path, data: bytes, media_type: str = PARAMS) -> Layer:
    digest = hashlib.sha256(data).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    return Layer(media_type, f"sha256:{digest}", len(data))


def test_a_manifest_is_read_whole(tmp_path: Path) -> None:
    path = put(tmp_path, "registry.ollama.ai/library/llama3.2/1b")
    manifest = read_manifest(path, NAME)
    assert manifest.size == 105
    assert manifest.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.modified_at == path.stat().st_mtime
    assert manifest.path == path
    assert manifest.of_type(MODEL) == (Layer(MODEL, DIGEST, 100, "n", "/a/b"),)
    assert manifest.of_type(LICENSE) == ()
    assert [layer.digest for layer in manifest.blobs] == [DIGEST, f"sha256:{'0' * 64}"]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"config":1,"layers":[]}', b"\xff\xfe",
        *(
            json.dumps(each).encode()
            for each in (
                record(config=None), record(layers=None), record(layers={}), record(layers=["x"]), record(layers=[{}]),
                record(layers=[{"mediaType": MODEL, "digest": "sha256:zz", "size": 1}]),
                record(layers=[{"mediaType": MODEL, "digest": f"sha256:../{HEX[3:]}", "size": 1}]),
                record(layers=[{"mediaType": MODEL, "digest": DIGEST, "size": -1}]),
                record(layers=[{"mediaType": MODEL, "digest": DIGEST, "size": 2**63}]),
                record(layers=[{"mediaType": MODEL, "digest": DIGEST, "size": True}]),
                record(layers=[{"mediaType": 7, "digest": DIGEST, "size": 1}]),
                record(layers=[{"mediaType": MODEL, "digest": DIGEST, "size": 1, "from": 7}]),
                record(layers=[{"mediaType": MODEL, "digest": 7, "size": 1}]),
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"the manifest of llama3\.2:1b is "):
        parse_manifest(NAME, data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(DIGEST) | st.just(MODEL),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["config", "layers", "digest", "size", "mediaType", "from"]), inner)
    ),
)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_manifest_or_an_error_of_ours(data: bytes) -> None:
    try:
        manifest = parse_manifest(NAME, data)
    except ManifestError:
        return
    assert all(layer.digest.startswith("sha256:") and layer.size >= 0 for layer in manifest.blobs)


def test_a_store_is_walked_in_order_with_what_is_wrong_in_it(tmp_path: Path) -> None:
    put(tmp_path, "registry.ollama.ai/library/b/latest")
    put(tmp_path, "hf.co/ns/repo-GGUF/Q4_K_M")
    put(tmp_path, "registry.ollama.ai/library/a/broken", b"{")
    put(tmp_path, "registry.ollama.ai/library/a/.DS_Store", b"{")
    put(tmp_path, "registry.ollama.ai/library/stray", b"{")
    put(tmp_path, "registry.ollama.ai/library/deep/er/tag")
    put(tmp_path, "registry.ollama.ai/library/a/sp ace")
    put(tmp_path, "registry.ollama.ai/library/a/huge", b" " * (manifests.MAX_MANIFEST + 1))
    os.mkfifo(tmp_path / "manifests/registry.ollama.ai/library/a/pipe")
    (tmp_path / "manifests/registry.ollama.ai/library/a/gone").symlink_to(tmp_path / "nowhere")
    found = list(walk(tmp_path))
    assert [each.name.short for each in found if isinstance(each, Manifest)] == [
        "hf.co/ns/repo-GGUF:Q4_K_M",
        "b:latest",
    ]
    problems = {each.path.name: each.error.message for each in found if isinstance(each, Problem)}
    assert problems.keys() == {"broken", "sp ace", "huge", "pipe", "gone"}
    assert "not the path of a model" in problems["sp ace"]
    assert "not a file" in problems["pipe"]
    assert "No such file" in problems["gone"]


def test_no_store_has_no_models(tmp_path: Path) -> None:
    assert list(walk(tmp_path / "nothing")) == []


def test_a_store_with_too_many_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MAX_MANIFESTS", 2)
    for tag in "abc":
        put(tmp_path, f"registry.ollama.ai/library/m/{tag}")
    *listed, problem = walk(tmp_path)
    assert len(listed) == 2
    assert isinstance(problem, Problem)
    assert "only the first 2" in problem.error.message


def test_blobs_under_their_new_and_their_old_name(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    assert blob_path(tmp_path, DIGEST) == blobs / f"sha256-{HEX}"
    (blobs / DIGEST).write_text("old")
    assert blob_path(tmp_path, DIGEST.replace(HEX, HEX.upper())) == blobs / DIGEST
    (blobs / f"sha256-{HEX}").write_text("new")
    assert blob_path(tmp_path, DIGEST).read_text() == "new"
    with pytest.raises(ManifestError, match="invalid digest format"):
        blob_path(tmp_path, "sha256:../../etc/passwd")


def test_small_blobs(tmp_path: Path) -> None:
    assert read_text(tmp_path, put_blob(tmp_path, "Du bist ein Bär.".encode())) == "Du bist ein Bär."
    assert read_object(tmp_path, put_blob(tmp_path, b'{"stop":["a"]}')) == {"stop": ["a"]}
    messages = [{"role": "user", "content": "hi"}]
    assert read_messages(tmp_path, put_blob(tmp_path, json.dumps(messages).encode(), MESSAGES)) == tuple(messages)
    for wrong in (b"[]", b"{", b"7"):
        with pytest.raises(ManifestError):
            read_object(tmp_path, put_blob(tmp_path, wrong))
    for wrong in (b"{}", b'["x"]', b""):
        with pytest.raises(ManifestError):
            read_messages(tmp_path, put_blob(tmp_path, wrong))
    with pytest.raises(ManifestError, match="more than it may have"):
        read_text(tmp_path, put_blob(tmp_path, b" " * (manifests.MAX_TEXT + 1)))
    with pytest.raises(ManifestError, match="No such file"):
        read_text(tmp_path, Layer(PARAMS, DIGEST, 3))
