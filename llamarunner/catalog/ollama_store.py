"""Models in a store of Ollama's layout: Ollama's own, which is never written to, or our library. Blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llamarunner.catalog import manifests
from llamarunner.catalog.catalog import Capability, Preset
from llamarunner.catalog.disk import Disk, Status
from llamarunner.catalog.found import Found
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.manifests import Layer, Manifest, ManifestError
from llamarunner.catalog.names import InvalidNameError, ModelName

logger = logging.getLogger(__name__)

SYSTEM_STORE = "/usr/share/ollama/.ollama/models"  # of the service that Ollama's installer sets up on Linux

_DEPTH = 4  # host, namespace, model, tag
_AGAIN = "pull it again"


def ollama_folders(environ: Mapping[str, str]) -> list[str]:
    """Where Ollama keeps models, for this user and as a service; the folders need not exist."""
    home = environ.get("HOME") or os.path.expanduser("~")
    named = environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    folders = [named] if named else []
    return list(dict.fromkeys([*folders, os.path.join(home, ".ollama", "models"), SYSTEM_STORE]))


def closed_folders(environ: Mapping[str, str]) -> list[str]:
    """Those of Ollama's folders that are there and may not be read."""
    closed = []
    for folder in ollama_folders(environ):
        try:
            os.scandir(os.path.join(folder, "manifests")).close()
        except PermissionError:
            closed.append(folder)
        except OSError:
            continue  # it is not there
    return closed


@dataclass(frozen=True, slots=True)
class _Read:
    """A manifest with its small blobs, as long as all its files are as they were."""

    manifest: Manifest
    statuses: tuple[Status | None, ...]
    found: Found | None


class OllamaStore:
    def __init__(self, root: str, source: str) -> None:
        self.root = root
        self.source = source
        self._read: dict[str, _Read] = {}

    def models(self, disk: Disk) -> Iterator[Found]:
        """All but those of the cloud and those that are no GGUF, sorted by name."""
        before, self._read = self._read, {}
        top = os.path.join(self.root, "manifests")
        for count, path in enumerate(_manifests(disk, top, _DEPTH)):
            if count == manifests.MAX_MANIFESTS:
                logger.warning("only the first %d models in %s are listed", count, printable(self.root))
                return
            try:
                name = ModelName.of_path(PurePosixPath(os.path.relpath(path, top)))
            except InvalidNameError:
                logger.debug("%s: not the path of a model's manifest", printable(path))
                continue
            if found := self._found(disk, path, name, before.get(path)):
                yield found

    def _found(self, disk: Disk, path: str, name: ModelName, before: _Read | None) -> Found | None:
        names = (name.short, str(name))
        try:
            manifest = manifests.read_manifest(Path(path), name)
        except ManifestError as error:
            return Found("", names, self.source, problem=error.message, hint=_AGAIN)
        statuses = (disk.status(path), *(disk.status(self._blob(disk, layer)) for layer in manifest.blobs))
        if before is None or (before.manifest, before.statuses) != (manifest, statuses):
            before = _Read(manifest, statuses, self._understood(disk, manifest, names))
        self._read[path] = before
        return before.found

    def _understood(self, disk: Disk, manifest: Manifest, names: tuple[str, ...]) -> Found | None:
        files = manifest.of_type(manifests.MODEL)
        if not files and (manifest.of_type(manifests.TENSOR) or manifest.of_type(manifests.JSON_FILE)):
            return None  # safetensors, for an engine of Ollama's own
        try:
            config = manifests.read_object(Path(self.root), manifest.config)
            if config.get("remote_host") or config.get("model_format") == "safetensors":
                return None
            if not files:
                raise ManifestError(f"the manifest of {manifest.name.short} names no model")
            self._check_blobs(disk, manifest)
            preset = self._preset(manifest)
        except ManifestError as error:
            path = self._blob(disk, files[-1]) if files else ""
            return self._as_found(manifest, names, path, Preset(), problem=error.message, hint=error.hint or _AGAIN)
        projectors = manifest.of_type(manifests.PROJECTOR)
        return self._as_found(
            manifest,
            names,
            self._model_file(disk, manifest),
            preset,
            mmproj=self._blob(disk, projectors[0]) if projectors else "",
            adapters=tuple(self._blob(disk, layer) for layer in manifest.of_type(manifests.ADAPTER)),
            capabilities=_capabilities(config),
            origin=files[-1].origin,
        )

    def _as_found(self, manifest: Manifest, names: tuple[str, ...], path: str, preset: Preset, **more: Any) -> Found:
        return Found(
            path,
            names,
            self.source,
            preset=preset,
            manifest_digest=manifest.digest,
            modified_at=manifest.modified_at,
            size_bytes=manifest.size,
            **more,
        )

    def _model_file(self, disk: Disk, manifest: Manifest) -> str:
        if parts := manifest.parts:
            return os.path.join(manifests.split_folder(Path(self.root), parts[0]), parts[0].name)
        return self._blob(disk, manifest.of_type(manifests.MODEL)[-1])  # the last one counts, as for Ollama

    def _blob(self, disk: Disk, layer: Layer) -> str:
        blobs = os.path.join(self.root, "blobs")
        path, legacy = os.path.join(blobs, layer.digest.replace(":", "-")), os.path.join(blobs, layer.digest)
        return legacy if disk.status(path) is None and disk.status(legacy) is not None else path

    def _check_blobs(self, disk: Disk, manifest: Manifest) -> None:
        """Raises ManifestError."""
        for layer in manifest.blobs:
            path = self._blob(disk, layer)
            status = disk.status(path)
            if status is None:
                raise ManifestError(f"{printable(path)}: this blob of it is missing", hint=_AGAIN)
            if status.size != layer.size:
                raise ManifestError(f"{printable(path)}: of {layer.size} bytes {status.size} are there", hint=_AGAIN)

    def _preset(self, manifest: Manifest) -> Preset:
        """Raises ManifestError."""
        parameters: dict[str, Any] = {}
        for layer in manifest.of_type(manifests.PARAMS):
            parameters |= manifests.read_object(Path(self.root), layer)
        messages = [manifests.read_messages(Path(self.root), layer) for layer in manifest.of_type(manifests.MESSAGES)]
        templates = self._texts(manifest, manifests.PROMPT) + self._texts(manifest, manifests.TEMPLATE)
        return Preset(
            parameters,
            "".join(self._texts(manifest, manifests.SYSTEM)[-1:]),
            "".join(templates[-1:]),
            messages[-1] if messages else (),
            tuple(self._texts(manifest, manifests.LICENSE)),
        )

    def _texts(self, manifest: Manifest, media_type: str) -> list[str]:
        return [manifests.read_text(Path(self.root), layer) for layer in manifest.of_type(media_type)]


def _manifests(disk: Disk, folder: str, depth: int) -> Iterator[str]:
    """Files exactly `depth` levels below. Hidden ones (.DS_Store, drafts) are none."""
    names = disk.files(folder) if depth == 1 else disk.folders(folder)
    for name in names:
        if name.startswith("."):
            continue
        if depth == 1:
            yield os.path.join(folder, name)
        else:
            yield from _manifests(disk, os.path.join(folder, name), depth - 1)


def _capabilities(config: Mapping[str, Any]) -> frozenset[Capability]:
    listed = config.get("capabilities")
    known = {capability.value for capability in Capability}
    words = [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []
    return frozenset(Capability(word) for word in words if word in known)
