"""The headers of the GGUF files on the disk, each read once: kept in memory, and in a file that survives restarts.

The file is a line with its version and a checksum, then two lines of JSON for each GGUF: what every listing shows, and
the header itself, which is only parsed when someone asks for it. Blocks; for one thread at a time.
"""

from __future__ import annotations

import logging
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import orjson

from llamarunner.catalog.catalog import Capability, ModelDetails, Weights
from llamarunner.catalog.compat import needs_patched_engine
from llamarunner.catalog.details import details_of
from llamarunner.catalog.disk import Status
from llamarunner.catalog.gguf import Header, Tensor, read_both
from llamarunner.errors import ModelFileError

logger = logging.getLogger(__name__)

VERSION = 1  # of the file; raise it whenever something read from a header, or concluded from it, changes
MAX_FILES = 10_000
MAX_KEPT_BYTES = 2 * 1024**2  # of one header as JSON; a larger one is read anew after a restart
_MAX_CACHE_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A GGUF file's header and what it means for this file alone."""

    details: ModelDetails
    kind: str  # general.type, "mmproj" for any projector, "" or "model" for a model
    needs: str  # why only Ollama's own engine can load it; "" where any llama.cpp can
    packed: bytes

    @property
    def is_projector(self) -> bool:
        return self.kind == "mmproj"

    @property
    def is_model(self) -> bool:
        return self.kind in ("", "model")

    @property
    def header(self) -> Header:
        """Parsed with each call."""
        metadata, tensor_count, parameters, sizes, lengths = orjson.loads(self.packed)
        by_group = {(group, kind): size for group, kind, size in sizes}
        return Header(metadata, tensor_count, parameters, by_group, lengths)


class _Metadata(Mapping[str, Any]):
    """A header's keys and values, parsed when they are first asked for."""

    __slots__ = ("_packed", "_parsed")

    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._parsed: dict[str, Any] | None = None

    @property
    def _whole(self) -> dict[str, Any]:
        if self._parsed is None:
            self._parsed = cast("dict[str, Any]", orjson.loads(self._packed)[0])
        return self._parsed

    def __getitem__(self, key: str) -> Any:
        return self._whole[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def __repr__(self) -> str:
        return f"_Metadata({len(self._packed)} bytes)"


def know(header: Header, tensors: Iterable[Tensor]) -> KnownFile:
    """A number that JSON does not have (NaN, infinity) becomes None."""
    sizes = [(group, kind, size) for (group, kind), size in header.tensor_bytes.items()]
    packed = orjson.dumps([header.metadata, header.tensor_count, header.parameters, sizes, header.lengths])
    details = replace(details_of(header), metadata=_Metadata(packed))
    kind = "mmproj" if header.is_projector else header.text("general.type")
    return KnownFile(details, kind, needs_patched_engine(header, tensors), packed)


@dataclass(slots=True)
class _Entry:
    size: int
    mtime_ns: int
    known: KnownFile | ModelFileError
    is_used: bool = False  # by this process


class HeaderCache:
    def __init__(self, file: Path | None = None, *, writes: bool = True) -> None:
        """Without `file` it forgets all with the process."""
        self._file = file
        self._writes = writes
        self._entries: dict[str, _Entry] = {}
        self._is_dirty = False

    def get(self, path: str, status: Status | None) -> KnownFile:
        """Raises ModelFileError, with the same error until the file changes."""
        if status is None or not status.is_file:
            return know(*read_both(Path(path)))  # which says what is wrong
        entry = self._entries.get(path)
        if entry is None or (entry.size, entry.mtime_ns) != (status.size, status.mtime_ns):
            entry = _Entry(status.size, status.mtime_ns, _read(path))
            self._entries.pop(path, None)
            self._entries[path] = entry
            self._is_dirty |= isinstance(entry.known, KnownFile)
            while len(self._entries) > 2 * MAX_FILES:
                del self._entries[next(iter(self._entries))]
        entry.is_used = True
        if isinstance(entry.known, ModelFileError):
            raise entry.known
        return entry.known

    def load(self) -> None:
        """Blocks. A file that cannot be understood is left aside: it is written anew with the next `save`."""
        if self._file is None:
            return
        try:
            with self._file.open("rb") as file:
                if os.fstat(file.fileno()).st_size > _MAX_CACHE_BYTES:
                    raise ValueError("it is too large")
                self._entries = _parsed(file.read())
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("the headers read before are not known: %s", error)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            logger.warning("%s is of no use (%s): every model's header is read again", self._file, error)

    def save(self) -> None:
        """Blocks. The file is replaced whole or not at all; nothing happens where nothing is new."""
        if self._file is None or not (self._writes and self._is_dirty):
            return
        kept = {path: entry for path, entry in self._entries.items() if entry.is_used or os.path.exists(path)}
        self._entries = dict(list(kept.items())[-MAX_FILES:])
        try:
            _replace(self._file, _written(self._entries))
        except OSError as error:
            logger.warning("the headers read are not kept: %s", error)
        self._is_dirty = False


def _read(path: str) -> KnownFile | ModelFileError:
    try:
        return know(*read_both(Path(path)))
    except ModelFileError as error:
        return error


def _written(entries: Mapping[str, _Entry]) -> bytes:
    lines: list[bytes] = []
    for path, entry in entries.items():
        known = entry.known
        if isinstance(known, ModelFileError) or len(known.packed) > MAX_KEPT_BYTES:
            continue
        # a path is bytes, and JSON is text: Latin-1 has a letter for each byte
        head = [os.fsencode(path).decode("latin-1"), entry.size, entry.mtime_ns, known.kind, known.needs]
        lines += [orjson.dumps([*head, *_details_out(known.details)]), known.packed]
    body = b"\n".join(lines)
    return orjson.dumps({"version": VERSION, "checksum": zlib.crc32(body)}) + b"\n" + body


def _parsed(data: bytes) -> dict[str, _Entry]:
    """Raises ValueError, TypeError, KeyError or IndexError."""
    first, *lines = data.split(b"\n")
    start = orjson.loads(first)
    if start["version"] != VERSION:
        raise ValueError(f"version {start['version']!r}")
    if start["checksum"] != zlib.crc32(memoryview(data)[len(first) + 1 :]):
        raise ValueError("it is damaged")
    if lines == [b""]:
        return {}
    entries = {}
    for line, packed in zip(lines[::2], lines[1::2], strict=True):
        path, size, mtime_ns, kind, needs, *details = orjson.loads(line)
        known = KnownFile(_details_in(details, packed), kind, needs, packed)
        entries[os.fsdecode(path.encode("latin-1"))] = _Entry(size, mtime_ns, known)
    return entries


def _details_out(details: ModelDetails) -> list[Any]:
    weights = details.weights
    return [
        details.architecture,
        details.parameter_count,
        details.parameter_size,
        details.quantization,
        details.context_length,
        details.embedding_length,
        details.block_count,
        details.chat_template,
        details.basename,
        sorted(details.capabilities),
        [weights.layers, weights.experts, weights.embedding, weights.output, weights.other, weights.by_type],
        details.vocabulary,
        details.merges,
    ]


def _details_in(values: list[Any], packed: bytes) -> ModelDetails:
    *first, capabilities, (layers, experts, *rest), vocabulary, merges = values
    if len(first) != 9:
        raise ValueError(f"{len(values)} values")
    details: Any = ModelDetails  # mypy does not count what is unpacked
    weights = Weights(tuple(layers), tuple(experts), *rest)
    found = frozenset(map(Capability, capabilities))
    return cast("ModelDetails", details(*first, found, _Metadata(packed), weights, vocabulary, merges))


def _replace(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
