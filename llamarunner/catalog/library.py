"""`Library`: our own models, in Ollama's layout. Blocks, so call it in a thread; any thread, and several programs at
once, may.

A manifest is written after all its blobs and removed before them, each file in one step: whatever moment a crash takes
away, every manifest there is has its blobs, and what is left over is pruned later.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from llamarunner import paths
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.manifests import (
    Layer,
    Manifest,
    ManifestError,
    Problem,
    blob_path,
    manifest_path,
    normal_digest,
    parse_manifest,
    read_manifest,
    split_folder,
    walk,
)
from llamarunner.catalog.names import ModelName
from llamarunner.catalog.ollama_store import ollama_folders
from llamarunner.config.schema import Config
from llamarunner.errors import LlamaRunnerError, ModelNotFoundError, RequestError
from llamarunner.units import format_size

logger = logging.getLogger(__name__)

PARTIAL = "-partial"  # what the names of unfinished downloads go on with
KEEP_LOOSE_S = 3600.0  # blobs without a manifest: one may be about to come
KEEP_PARTIAL_S = 14 * 86400.0  # unfinished downloads, which somebody may take up again

_SPARE = 64 * 1024**2  # bytes of the disk that are left free
_UPLOAD = ".upload-"


class LibraryError(LlamaRunnerError):
    """The library's folder cannot be read or written."""

    code = "library"


class DigestMismatchError(RequestError):
    """In Ollama's words."""

    code = "digest_mismatch"

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f'digest mismatch, expected "{expected}", got "{got}"')


class NoSpaceError(LibraryError):
    code = "no_space"


class MissingBlobError(LibraryError):
    def __init__(self, name: ModelName, layer: Layer) -> None:
        super().__init__(f"{name.short} needs the blob {layer.digest}, which is not there", hint="pull it again")


def library_root(config: Config) -> Path:
    return config.discovery.library or paths.data_dir() / "models"


def open_library(config: Config) -> Library:
    """The library of this configuration."""
    return Library(library_root(config), others=ollama_folders(os.environ) if config.discovery.ollama else ())


class Library:
    """Nothing is made on the disk before something is put into it."""

    def __init__(
        self,
        root: Path,
        *,
        others: Sequence[str] = (),
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        """`others` are stores of the same layout, Ollama's own, whose blobs need not be fetched once more."""
        self.root = root
        self._others = tuple(map(Path, others))
        self._free_bytes = free_bytes
        self._mutex = threading.RLock()
        self._held: Counter[str] = Counter()

    # -- what there is -----------------------------------------------------------------------------------------------

    def manifests(self) -> list[Manifest]:
        return [each for each in walk(self.root) if isinstance(each, Manifest)]

    def find(self, name: ModelName) -> Manifest | None:
        """The model of this name, whatever its case."""
        with suppress(ManifestError):
            return read_manifest(manifest_path(self.root, name), name)
        return next((each for each in self.manifests() if each.name.key == name.key), None)

    def blob(self, digest: str) -> Path | None:
        """None where it is not there, or is a link whose file has gone. Raises ManifestError for what is no digest."""
        path = blob_path(self.root, digest)
        return path if path.exists() else None

    def check_space(self, wanted: int, name: str) -> None:
        """Raises NoSpaceError where the disk has no room for so many more bytes of `name`."""
        if not wanted:
            return
        with self._explained():
            free = self._free_bytes(self.blobs)
        if free < wanted + _SPARE:
            raise NoSpaceError(
                f"not enough disk space: {name} needs {format_size(wanted)} more, "
                f"and {format_size(free)} are free in {self.root}",
                hint="remove a model with `llamarunner rm`, or set discovery.library to a folder on another disk",
            )

    # -- blobs -------------------------------------------------------------------------------------------------------

    def upload(self, digest: str) -> Upload:
        """Raises ManifestError for what is no digest, LibraryError where nothing can be written."""
        with self._explained():
            return Upload(self.blobs, normal_digest(digest))

    def put_blob(self, data: bytes, media_type: str) -> tuple[Layer, bool]:
        """The layer of a small blob, and whether it is new."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        layer = Layer(media_type, digest, len(data))
        if self.blob(digest) is not None:
            return layer, False
        with self._explained():
            self._write(self.blobs / digest.replace(":", "-"), data)
        return layer, True

    def link_blob(self, file: Path, digest: str) -> None:
        """Make `file` a blob without copying it.

        A blob of another store on the same file system becomes a hard link, and outlives its removal there: its content
        never changes. Any other file becomes a symbolic link: one that is removed or replaced at its place is so here.
        """
        target, place = file.resolve(), blob_path(self.root, digest)
        if target == place or (place.exists() and place.samefile(target)):
            return
        with self._explained():
            draft = self._draft()
            draft.unlink(missing_ok=True)
            try:
                if target.name != digest.replace(":", "-"):
                    raise OSError
                os.link(target, draft)
            except OSError:  # also another file system, or another's file
                draft.symlink_to(target)
            draft.replace(place)

    def take_from_others(self, layer: Layer) -> bool:
        """Whether another store had the blob, which is ours as well now."""
        for other in self._others:
            path = blob_path(other, layer.digest)
            try:
                if path.stat().st_size == layer.size:
                    self.link_blob(path, layer.digest)
                    return True
            except OSError:
                continue  # it has none, or none for us
        return False

    @property
    def blobs(self) -> Path:
        """The folder, made where it is not there. Raises OSError."""
        folder = self.root / "blobs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def hold(self, digests: Iterable[str]) -> Iterator[None]:
        """Let nothing of this program take these blobs away meanwhile."""
        mine = list(digests)
        with self._mutex:
            self._held.update(mine)
        try:
            yield
        finally:
            with self._mutex:
                self._held -= Counter(mine)

    # -- models ------------------------------------------------------------------------------------------------------

    def write_manifest(self, name: ModelName, data: bytes) -> Manifest:
        """Add the model, or replace that of the same name. Raises ManifestError for what is no manifest,
        MissingBlobError where a blob is not there."""
        manifest = parse_manifest(name, data)
        with self._locked():
            for layer in manifest.blobs:
                if self.blob(layer.digest) is None:
                    raise MissingBlobError(name, layer)
            old = self.find(name)
            path = old.path if old is not None and old.path is not None else manifest_path(self.root, name)
            self._lay_out(manifest)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, data)
            if old is not None:
                self._drop({layer.digest for layer in old.blobs})
            return read_manifest(path, name)

    def _lay_out(self, manifest: Manifest) -> None:
        """Give a split model's files their names."""
        for layer in manifest.parts:
            folder = split_folder(self.root, manifest.parts[0])
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / f".{layer.name}"
            draft.unlink(missing_ok=True)
            draft.symlink_to(blob_path(self.root, layer.digest).resolve())
            draft.replace(folder / layer.name)

    def copy(self, source: Manifest, destination: ModelName) -> Manifest:
        if source.path is None:
            raise LibraryError(f"{source.name.short} has no manifest yet")
        with self._explained():
            return self.write_manifest(destination, source.path.read_bytes())

    def delete(self, name: ModelName) -> Manifest:
        """Remove the model and the blobs that no other needs. Raises ModelNotFoundError."""
        with self._locked():
            manifest = self.find(name)
            if manifest is None or manifest.path is None:
                raise ModelNotFoundError(name.short)
            manifest.path.unlink()
            with suppress(OSError):  # folders that are not empty stay
                for folder in list(manifest.path.parents)[:3]:
                    folder.rmdir()
            self._drop({layer.digest for layer in manifest.blobs})
            return manifest

    def prune(self) -> int:
        """Remove what crashes, uploads that nobody used and downloads that nobody took up again left behind. How many
        files that were."""
        if not self.root.is_dir():
            return 0
        with self._locked():
            needed = self._needed()
            return 0 if needed is None else sum(self._prune_one(path, needed) for path in list(self.blobs.iterdir()))

    def _prune_one(self, path: Path, needed: set[str]) -> bool:
        try:
            age = time.time() - path.lstat().st_mtime
            name = path.name.partition(PARTIAL)[0]
            if name != path.name:
                is_loose = age > KEEP_PARTIAL_S
            else:
                is_loose = age > KEEP_LOOSE_S and (path.name.startswith(".") or normal_digest(name) not in needed)
            if is_loose:
                path.unlink()
        except (OSError, ManifestError):
            return False  # gone already, or nothing of ours
        return is_loose

    def _needed(self) -> set[str] | None:
        """Digests that must stay; None where it cannot be told, because a manifest cannot be read."""
        needed = set(self._held.keys())
        for found in walk(self.root):
            if isinstance(found, Problem):
                logger.warning("no blobs are removed while a manifest cannot be read: %s", found.error)
                return None
            needed.update(layer.digest for layer in found.blobs)
        return needed

    def _drop(self, digests: set[str]) -> None:
        needed = self._needed()
        for digest in digests - needed if needed is not None else ():
            blob_path(self.root, digest).unlink(missing_ok=True)
            shutil.rmtree(split_folder(self.root, Layer("", digest, 0)), ignore_errors=True)

    # -- one at a time -----------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against other threads, and against other programs that use this folder."""
        with self._mutex, self._explained():
            self.root.mkdir(parents=True, exist_ok=True)
            with open(self.root / ".lock", "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = printable(str(error.filename or self.root))
            raise LibraryError(f"{place}: {error.strerror or error}", hint="see discovery.library") from error

    def _write(self, path: Path, data: bytes) -> None:
        """In one step. Drafts lie with the blobs, where `prune` finds those of a crash."""
        draft = self._draft()
        try:
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _draft(self) -> Path:
        return self.blobs / f".draft-{os.getpid()}-{threading.get_ident()}"


class Upload:
    """A blob being written. It is there only after `commit`; leaving the `with` block without one leaves nothing."""

    def __init__(self, folder: Path, digest: str) -> None:
        self._digest = digest
        self._place = folder / digest.replace(":", "-")
        self._hash = hashlib.sha256()
        self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=_UPLOAD, delete=False)  # noqa: SIM115 closed in __exit__

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def write(self, block: bytes) -> None:
        """Raises LibraryError."""
        self._hash.update(block)
        try:
            self._file.write(block)
        except OSError as error:
            raise LibraryError(f"the blob cannot be written: {error.strerror}") from error

    def commit(self) -> None:
        """Raises DigestMismatchError, or LibraryError."""
        got = f"sha256:{self._hash.hexdigest()}"
        if got != self._digest:
            raise DigestMismatchError(self._digest, got)
        try:
            self._file.flush()
            os.fchmod(self._file.fileno(), 0o644)
            os.fsync(self._file.fileno())
            os.replace(self._file.name, self._place)
        except OSError as error:
            raise LibraryError(f"the blob cannot be written: {error.strerror}") from error
