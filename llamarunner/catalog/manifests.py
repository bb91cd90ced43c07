"""Ollama's store as it lies on the disk: manifests that name blobs. Reads only; blocks, so call it in a thread.

<root>/manifests/<host>/<namespace>/<model>/<tag>   JSON, without a suffix
<root>/blobs/sha256-<64 hex digits>
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from llamarunner.catalog.gguf import printable
from llamarunner.catalog.names import InvalidNameError, ModelName
from llamarunner.errors import LlamaRunnerError

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.ollama.image."
MODEL, PROJECTOR, ADAPTER, DRAFT = (_LAYER + kind for kind in ("model", "projector", "adapter", "draft"))
TEMPLATE, PROMPT, SYSTEM = (_LAYER + kind for kind in ("template", "prompt", "system"))  # prompt: of old manifests
PARAMS, MESSAGES, LICENSE = (_LAYER + kind for kind in ("params", "messages", "license"))
TENSOR, JSON_FILE, EMBED = (_LAYER + kind for kind in ("tensor", "json", "embed"))

MAX_MANIFEST = 4 * 1024**2  # bytes; one of safetensors has a layer for each tensor
MAX_TEXT = 1024**2  # bytes of a template, a licence, parameters
MAX_MANIFESTS = 10_000
_MAX_SIZE = 2**63 - 1

_PART = re.compile(r"[^/\0]+-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


class ManifestError(LlamaRunnerError):
    """A manifest or one of its blobs cannot be used."""

    code = "manifest"


@dataclass(frozen=True, slots=True)
class Layer:
    media_type: str
    digest: str  # "sha256:" and 64 hex digits
    size: int
    name: str = ""
    origin: str = ""  # `from`: the model whose layer it is


@dataclass(frozen=True, slots=True)
class Manifest:
    name: ModelName
    config: Layer
    layers: tuple[Layer, ...]
    digest: str  # 64 hex digits: of the file's bytes
    path: Path | None = None  # None while it is no file yet
    modified_at: float = 0.0  # unix time

    @property
    def size(self) -> int:
        """Bytes of all its blobs."""
        return self.config.size + sum(layer.size for layer in self.layers)

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """All that it refers to."""
        return (*self.layers, self.config)

    @property
    def parts(self) -> tuple[Layer, ...]:
        """The files of a split model, the first one first; none of a whole one. Their names tell llama.cpp how they
        belong together."""
        layers = self.of_type(MODEL)
        return layers if len(layers) > 1 and all(_PART.fullmatch(layer.name) for layer in layers) else ()

    def of_type(self, media_type: str) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.media_type == media_type)


@dataclass(frozen=True, slots=True)
class Problem:
    path: Path
    error: ManifestError


def normal_digest(text: str) -> str:
    """`text` as "sha256:<hex>". Raises ManifestError."""
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise ManifestError("invalid digest format")
    return f"sha256:{match[1].lower()}"


def parse_manifest(name: ModelName, data: bytes, *, path: Path | None = None, modified_at: float = 0.0) -> Manifest:
    """Raises ManifestError."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ManifestError(f"the manifest of {name.short} is no JSON: {error.msg}") from None
    try:
        config, records = _layer(parsed["config"]), parsed["layers"]
        if not isinstance(records, list):
            raise TypeError("layers")
        layers = tuple(map(_layer, records))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ManifestError(f"the manifest of {name.short} is not an image's") from None
    return Manifest(name, config, layers, hashlib.sha256(data).hexdigest(), path, modified_at)


def _layer(record: dict[str, Any]) -> Layer:
    """Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
    size = record["size"]
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_SIZE:
        raise ValueError("size")
    texts = [record["mediaType"], record.get("name") or "", record.get("from") or ""]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not a text")
    try:
        return Layer(texts[0], normal_digest(record["digest"]), size, texts[1], texts[2])
    except ManifestError:
        raise ValueError("digest") from None


def manifest_path(root: Path, name: ModelName) -> Path:
    return root / "manifests" / name.path


def read_manifest(path: Path, name: ModelName) -> Manifest:
    """Raises ManifestError."""
    data, status = _read_bounded(path, MAX_MANIFEST)
    return parse_manifest(name, data, path=path, modified_at=status.st_mtime)


def walk(root: Path) -> Iterator[Manifest | Problem]:
    """Each model of the store at `root`, sorted by name, with the manifests that cannot be read between them; nothing
    where there is no store."""
    top = root / "manifests"
    for count, path in enumerate(_files(top, depth=4)):
        if count == MAX_MANIFESTS:
            yield Problem(top, ManifestError(f"only the first {MAX_MANIFESTS} manifests are listed"))
            return
        try:
            yield read_manifest(path, ModelName.of_path(PurePosixPath(path.relative_to(top).as_posix())))
        except InvalidNameError:
            yield Problem(path, ManifestError(f"{printable(str(path))}: not the path of a model's manifest"))
        except ManifestError as error:
            yield Problem(path, error)


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """Files exactly `depth` levels below. Hidden ones (.DS_Store, drafts) are none."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda each: each.name)
    except OSError:
        return
    for entry in entries:
        try:
            is_folder = entry.is_dir()
        except OSError:
            continue
        if depth > 1 and is_folder:
            yield from _files(Path(entry.path), depth - 1)
        elif depth == 1 and not is_folder:
            yield Path(entry.path)


def blob_path(root: Path, digest: str) -> Path:
    """Where the blob is, or would be: `sha256-<hex>`, or in old stores `sha256:<hex>`. Raises ManifestError for what is
    no digest."""
    digest = normal_digest(digest)
    path = root / "blobs" / digest.replace(":", "-")
    legacy = path.with_name(digest)
    return legacy if not path.exists() and legacy.exists() else path


def split_folder(root: Path, first: Layer) -> Path:
    """Where a split model's files have the names that llama.cpp goes by: links to its blobs."""
    return root / "split" / normal_digest(first.digest).removeprefix("sha256:")


def read_text(root: Path, layer: Layer) -> str:
    """A template, system prompt or licence. Raises ManifestError."""
    return _read_bounded(blob_path(root, layer.digest), MAX_TEXT)[0].decode("utf-8", "replace")


def read_object(root: Path, layer: Layer) -> dict[str, Any]:
    """Parameters, or the config: {"model_format": "gguf", "model_family": ...}. Raises ManifestError."""
    found = _read_json(root, layer)
    if not isinstance(found, dict):
        raise ManifestError(f"the blob {layer.digest} is not a JSON object")
    return found


def read_messages(root: Path, layer: Layer) -> tuple[dict[str, Any], ...]:
    """[{"role", "content"}]. Raises ManifestError."""
    found = _read_json(root, layer)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ManifestError(f"the blob {layer.digest} is not a list of messages")
    return tuple(found)


def _read_json(root: Path, layer: Layer) -> Any:
    try:
        return orjson.loads(_read_bounded(blob_path(root, layer.digest), MAX_TEXT)[0])
    except orjson.JSONDecodeError as error:
        raise ManifestError(f"the blob {layer.digest} is no JSON: {error.msg}") from None


def _read_bounded(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    """Raises ManifestError; a pipe or a device in the place of a file is none and is not waited for."""
    shown = printable(str(path))
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ManifestError(f"{shown}: not a file")
            if status.st_size > limit:
                raise ManifestError(f"{shown}: {status.st_size} bytes are more than it may have")
            return file.read(limit + 1)[:limit], status
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ManifestError(f"{shown}: {reason}") from error
