"""`create`: a model of our library made of another model or of uploaded files, with parameters and texts of its own.
Blocks, so call it in a thread."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from llamarunner.catalog.catalog import Model, ModelDetails, Preset
from llamarunner.catalog.details import read_details
from llamarunner.catalog.files import Split
from llamarunner.catalog.gguf import Header, read_header
from llamarunner.catalog.library import Library
from llamarunner.catalog.manifests import (
    ADAPTER,
    CONFIG_TYPE,
    LICENSE,
    MANIFEST_TYPE,
    MESSAGES,
    MODEL,
    PARAMS,
    PROJECTOR,
    SYSTEM,
    TEMPLATE,
    Layer,
    ManifestError,
    normal_digest,
)
from llamarunner.catalog.names import ModelName
from llamarunner.errors import ModelFileError, RequestError, UnsupportedError

_BLOB_NAME = re.compile(r"sha256-[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the new model is made of: `base` or `files`, and what is laid over them. None leaves the base's as it is."""

    base: Model | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # name -> digest of an uploaded blob
    adapters: Mapping[str, str] = field(default_factory=dict)  # likewise
    parameters: Mapping[str, Any] = field(default_factory=dict)  # over the base's, one by one
    system: str | None = None
    template: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    licenses: tuple[str, ...] = ()  # beside the base's


def create(library: Library, name: ModelName, recipe: Recipe) -> list[str]:
    """Add the model; what was done, in Ollama's words. Raises RequestError, ModelFileError, ManifestError or
    LibraryError, and nothing has changed then."""
    work = _Work(library)
    if recipe.base is not None:
        details, preset = work.take_base(recipe.base), recipe.base.preset
    elif recipe.files:
        details, preset = work.take_files(recipe.files), Preset()
    else:
        raise RequestError("neither 'from' or 'files' was specified")
    for digest in recipe.adapters.values():
        work.take_upload(ADAPTER, digest)
    for text in (*preset.licenses, *recipe.licenses):
        work.put(LICENSE, text.encode())
    texts = ((TEMPLATE, recipe.template, preset.template), (SYSTEM, recipe.system, preset.system))
    for media_type, given, inherited in texts:
        if text := inherited if given is None else given:
            work.put(media_type, text.encode())
    if parameters := {**preset.parameters, **recipe.parameters}:
        work.put(PARAMS, orjson.dumps(parameters))
    if messages := preset.messages if recipe.messages is None else recipe.messages:
        work.put(MESSAGES, orjson.dumps(messages))
    work.finish(name, details)
    return work.done


class _Work:
    """Layers as they come together."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._layers: list[Layer] = []
        self.done: list[str] = []

    def take_base(self, base: Model) -> ModelDetails:
        if base.problem:
            raise ModelFileError(f"{base.name} cannot run: {base.problem}", hint=base.hint)
        if base.is_remote or not base.path.is_file():
            raise UnsupportedError(f"{base.name} is no file of this machine, so nothing can be made of it")
        split = Split.of(base.path.name)
        for name in [split.name(part) for part in range(1, split.total + 1)] if split else [""]:
            path = base.path.with_name(name) if name else base.path
            self._link(MODEL, path, base.name if base.source == "config" else "", name)
        for media_type, paths in ((PROJECTOR, [base.mmproj] if base.mmproj else []), (ADAPTER, base.adapters)):
            for path in paths:
                self._link(media_type, path)
        return base.details

    def _link(self, media_type: str, path: Path, origin: str = "", name: str = "") -> None:
        layer = Layer(media_type, _digest_of(path.resolve()), path.stat().st_size, name, origin)
        self._library.link_blob(path, layer.digest)
        self._take(layer, is_new=False)

    def take_files(self, files: Mapping[str, str]) -> ModelDetails:
        if any(Split.of(file) for file in files):
            raise UnsupportedError(
                "a split model cannot be made of blobs, which lose their files' names",
                hint="put its files into a folder of discovery.folders, or merge them with llama-gguf-split",
            )
        models = []
        self.done.append("parsing GGUF")
        for digest in files.values():
            path = self._uploaded(digest)
            header = _header(path)
            kind = PROJECTOR if header.is_projector else ADAPTER if header.text("general.type") == "adapter" else MODEL
            if kind == MODEL:
                models.append(path)
            self.take_upload(kind, digest)
        if len(models) != 1:
            raise RequestError(f"one of the files must be a model, and {len(models)} are")
        return read_details(models[0])

    def take_upload(self, media_type: str, digest: str) -> None:
        path = self._uploaded(digest)
        _header(path)
        self._take(Layer(media_type, normal_digest(digest), path.stat().st_size), is_new=False)

    def _uploaded(self, digest: str) -> Path:
        try:
            path = self._library.blob(digest)
        except ManifestError as error:
            raise RequestError(error.message) from None
        if path is None:
            raise RequestError(f"there is no blob {digest}", hint="POST it to /api/blobs first")
        return path

    def put(self, media_type: str, data: bytes) -> None:
        layer, is_new = self._library.put_blob(data, media_type)
        self._take(layer, is_new=is_new)

    def _take(self, layer: Layer, *, is_new: bool) -> None:
        self._layers.append(layer)
        self.done.append(f"{'creating new' if is_new else 'using existing'} layer {layer.digest}")

    def finish(self, name: ModelName, details: ModelDetails) -> None:
        config, is_new = self._library.put_blob(config_blob(details, self._layers), CONFIG_TYPE)
        self.done.append(f"{'creating new' if is_new else 'using existing'} layer {config.digest}")
        self._library.write_manifest(name, manifest_bytes(config, self._layers))
        self.done.append("writing manifest")


def _header(path: Path) -> Header:
    """Raises RequestError: what was uploaded is the client's doing."""
    try:
        return read_header(path)
    except ModelFileError as error:
        raise RequestError(error.message, hint=error.hint) from error


def _digest_of(path: Path) -> str:
    """A blob's is its name; another file's stands for its place, size and time: hashing 100 GB would take minutes."""
    if _BLOB_NAME.fullmatch(path.name):
        return path.name.replace("-", ":")
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime}"
    return f"sha256:{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}"


def config_blob(details: ModelDetails, layers: Iterable[Layer]) -> bytes:
    """What Ollama keeps of a model beside its files."""
    return orjson.dumps(
        {
            "model_format": "gguf",
            "model_family": details.architecture,
            "model_families": [details.architecture],
            "model_type": details.parameter_size,
            "file_type": details.quantization,
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
    )


def manifest_bytes(config: Layer, layers: Iterable[Layer]) -> bytes:
    return orjson.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _record(config),
            "layers": [_record(layer) for layer in layers],
        }
    )


def _record(layer: Layer) -> dict[str, Any]:
    record = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
    return record | {key: text for key, text in (("from", layer.origin), ("name", layer.name)) if text}
