"""Reads the header of a GGUF file, which may be hostile: bounded in memory and time, and nothing in it is believed.

Only regular files are opened, they are read forwards through one small window, every count and length is checked
against the file's size and against caps, and token lists are stepped over. Whatever is wrong is a `ModelFileError`.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llamarunner.catalog.tensor_types import TENSOR_TYPES
from llamarunner.errors import ModelFileError
from llamarunner.units import format_size

# The largest headers met in the field (vocabularies of 256k tokens with 512k merges) stay below each.
MAX_HEADER_BYTES = 64 * 1024**2
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_TEXT_BYTES = 2 * 1024**2  # of all keys and texts together, token lists aside
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 512  # of a tensor; llama.cpp takes 63
MAX_DEPTH = 4
MAX_WALKED = 1_250_000  # strings stepped over one by one
MAX_NESTED = 4096  # arrays within arrays
KEPT_ITEMS = 512  # of an array, which is as many as llama.cpp takes layers; a longer one is None in the metadata

_WINDOW_BYTES = 256 * 1024
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**63 - 1
_STRING, _ARRAY = 8, 9
_SCALAR_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {code: struct.Struct("=" + letter) for code, letter in _SCALAR_LETTERS.items()}
_TENSOR_TAILS = [struct.Struct(f"={dimensions}QIQ") for dimensions in range(_MAX_DIMENSIONS + 1)]
_U32, _U64, _ARRAY_HEAD = struct.Struct("=I"), struct.Struct("=Q"), struct.Struct("=IQ")

_MISTAKEN = (
    (b"<!DOCTYPE", "it is a web page", "the download link led to a page, not to the file"),
    (b"<html", "it is a web page", "the download link led to a page, not to the file"),
    (b"version https://git-lfs", "it is a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (b"PK\x03\x04", "it is a ZIP archive", "unpack it, or convert a PyTorch model with convert_hf_to_gguf.py"),
    (b"tjgg", "it is of the old GGML format", "download a GGUF of the model"),
    (b"fmgg", "it is of the old GGML format", "download a GGUF of the model"),
    (b"lmgg", "it is of the old GGML format", "download a GGUF of the model"),
)
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Header:
    """`metadata` holds every key; long arrays and all lists of the tokenizer are None."""

    metadata: Mapping[str, Any]
    tensor_count: int
    parameters: Mapping[str, int]  # elements by tensor type: {"Q4_K": 7_000_000_000}
    tensor_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)  # by group (see _group) and type
    lengths: Mapping[str, int] = field(default_factory=dict)  # items of each array that is None in the metadata

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    @property
    def is_projector(self) -> bool:
        return self.architecture == "clip" or self.text("general.type") == "mmproj"

    @property
    def is_model(self) -> bool:
        """False for a projector, a LoRA adapter, an importance matrix."""
        return not self.is_projector and self.text("general.type") in ("", "model")

    def text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


# Most strings of a vocabulary have less than 32 bytes. So many of them in a row are stepped over in half the time by
# one pattern with an alternative for each length; the usual lengths come first. It takes what it matched for good.
_RUN = 128
_SHORT = sorted(range(32), key=lambda length: abs(length - 7))
_ONE_SHORT = b"|".join(re.escape(_U64.pack(length)) + b".{%d}" % length for length in _SHORT)
_RUN_OF_SHORT = re.compile(b"(?:%s){%d}+" % (_ONE_SHORT, _RUN), re.DOTALL)


class _Damaged(Exception):
    """What is wrong, without the file's name, and what would help."""

    def __init__(self, what: str, hint: str = _AGAIN) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class _Cursor:
    """Moves forwards through the header with one window of it in memory."""

    __slots__ = ("_at", "_file", "_start", "_window", "kept", "nested", "size", "walked")

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._window = b""
        self._start = 0  # of the window in the file
        self._at = 0  # in the window
        self.size = size
        self.walked = 0
        self.nested = 0
        self.kept = 0  # letters of texts

    @property
    def offset(self) -> int:
        return self._start + self._at

    def need(self, length: int) -> None:
        """Have the next `length` bytes in the window."""
        if self._at + length <= len(self._window):
            return
        start = self.offset
        self.check(length)
        self._file.seek(start)
        self._window = self._file.read(max(length, _WINDOW_BYTES))
        self._start, self._at = start, 0
        if len(self._window) < length:
            raise _Damaged("it became shorter while it was read", "try again once it is complete")

    def check(self, length: int) -> None:
        end = self.offset + length
        if end > self.size:
            raise _Damaged(f"cut short or damaged: its header needs {end} bytes or more, it has {self.size}")
        if end > MAX_HEADER_BYTES:
            raise _Damaged(f"its header is larger than {format_size(MAX_HEADER_BYTES)}")

    def read(self, layout: struct.Struct) -> tuple[Any, ...]:
        self.need(layout.size)
        values = layout.unpack_from(self._window, self._at)
        self._at += layout.size
        return values

    def peek(self, layout: struct.Struct) -> tuple[Any, ...]:
        self.need(layout.size)
        return layout.unpack_from(self._window, self._at)

    def take(self, length: int) -> bytes:
        self.need(length)
        data = self._window[self._at : self._at + length]
        self._at += length
        return data

    def skip(self, length: int) -> None:
        self.check(length)
        self._at += length  # may leave the window; the next need() moves it

    def string(self, limit: int, what: str) -> str:
        (length,) = self.read(_U64)
        if length > limit:
            self.check(length)
            raise _Damaged(f"damaged: a {what} of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def text(self, limit: int, what: str) -> str:
        """A string that is kept."""
        text = self.string(limit, what)
        self.kept += len(text)
        if self.kept > MAX_TEXT_BYTES:
            raise _Damaged(f"its texts are larger than {format_size(MAX_TEXT_BYTES)}")
        return text

    def skip_strings(self, count: int) -> None:
        """The one loop that must be quick: vocabularies have hundreds of thousands of strings."""
        self.walk(count)
        unpack, left = _U64.unpack_from, count
        while left:
            self.need(8)
            window, at = self._window, self._at
            while left >= _RUN and (run := _RUN_OF_SHORT.match(window, at)):
                at, left = run.end(), left - _RUN
            with suppress(struct.error, OverflowError):  # past the window's end, without asking for it each time
                for _ in range(min(left, _RUN)):
                    at += 8 + unpack(window, at)[0]
                    left -= 1
            self._at = at
            self.check(0)

    def nest(self, count: int) -> None:
        self.nested += count
        if self.nested > MAX_NESTED:
            raise _Damaged(f"more than {MAX_NESTED} lists within lists")

    def walk(self, count: int) -> None:
        self.check(count * 8)  # each has a length before it
        self.walked += count
        if self.walked > MAX_WALKED:
            raise _Damaged(f"its lists have more than {MAX_WALKED} items")


class Tensor(NamedTuple):
    name: str
    type: str  # "Q4_K"
    shape: tuple[int, ...]  # ggml's order: what lies side by side in memory comes first


def read_header(path: Path) -> Header:
    """Raises ModelFileError where `path` is not a whole GGUF file of this machine's byte order."""
    return _read(path, [])


def read_tensors(path: Path) -> list[Tensor]:
    """Every tensor in the file's order. Raises as `read_header` does."""
    return read_both(path)[1]


def read_both(path: Path) -> tuple[Header, list[Tensor]]:
    """Header and tensors with one look at the file. Raises as `read_header` does."""
    tensors: list[Tensor] = []
    return _read(path, tensors), tensors


def _read(path: Path, tensors: list[Tensor]) -> Header:
    """The header; its tensors are added to `tensors`."""
    shown = printable(str(path))
    try:
        with _open_regular(path) as file:
            return _parse(_Cursor(file, os.fstat(file.fileno()).st_size), tensors)
    except _Damaged as problem:
        raise ModelFileError(f"{shown}: {problem.what}", hint=problem.hint) from None
    except FileNotFoundError:
        raise ModelFileError(f"{shown}: there is no such file", hint="check the path") from None
    except PermissionError:
        raise ModelFileError(f"{shown}: it may not be read", hint="check the permissions of the file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelFileError(f"{shown}: it cannot be read: {error}", hint="check the path and the disk") from None


def _open_regular(path: Path) -> BinaryIO:
    # O_NONBLOCK: opening a FIFO without it waits for a writer
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise _Damaged(f"it is {what}", "give the path of the .gguf file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _parse(cursor: _Cursor, tensors: list[Tensor]) -> Header:
    _check_start(cursor)
    tensor_count, key_count = *cursor.read(_U64), *cursor.read(_U64)
    if tensor_count > MAX_TENSORS:
        raise _Damaged(f"damaged: it claims {tensor_count} tensors")
    if key_count > MAX_KEYS:
        raise _Damaged(f"damaged: it claims {key_count} keys")
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(key_count):
        key = cursor.text(MAX_KEY_BYTES, "key")
        if key in metadata:
            raise _Damaged(f"damaged: the key {printable(key, 80)!r} is there twice")
        (code,) = cursor.read(_U32)
        count = cursor.peek(_ARRAY_HEAD)[1] if code == _ARRAY else 0
        metadata[key] = _value(cursor, code, keep=not key.startswith("tokenizer."), depth=0)
        if metadata[key] is None:
            lengths[key] = count
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**31 or alignment & (alignment - 1):
        raise _Damaged("damaged: its alignment is not a power of two")
    return Header(metadata, tensor_count, *_read_tensors(cursor, tensor_count, alignment, tensors), lengths)


def _check_start(cursor: _Cursor) -> None:
    start = cursor.take(min(cursor.size, 32))
    if start[:4] != b"GGUF":
        for magic, what, hint in _MISTAKEN:
            if start.lstrip()[: len(magic)].lower() == magic.lower():
                raise _Damaged(f"not a GGUF file: {what}", hint)
        raise _Damaged("it is empty" if not start else "not a GGUF file", "download the model as .gguf")
    cursor.skip(4 - len(start))
    (version,) = cursor.read(_U32)
    if version and not version & 0xFFFF:
        other = "big" if sys.byteorder == "little" else "little"
        raise _Damaged(f"it is a GGUF for {other}-endian machines", f"download the {sys.byteorder}-endian file")
    if version < 2:
        raise _Damaged(f"its GGUF version {version} is too old", "download a newer GGUF of the model")
    if version > 3:
        raise _Damaged(f"its GGUF version {version} is not known", "version 2 and 3 can be read")


def _value(cursor: _Cursor, code: int, *, keep: bool, depth: int) -> Any:
    """One value of the metadata; of an array None unless it is short and `keep` is set."""
    if scalar := _SCALARS.get(code):
        return cursor.read(scalar)[0]
    if code == _STRING:
        return cursor.text(MAX_TEXT_BYTES, "text")
    if code != _ARRAY:
        raise _Damaged(f"damaged: a value of the unknown type {code}")
    if depth == MAX_DEPTH:
        raise _Damaged(f"damaged: arrays more than {MAX_DEPTH} deep")
    item, count = cursor.read(_ARRAY_HEAD)
    keep = keep and count <= KEPT_ITEMS
    if scalar := _SCALARS.get(item):
        cursor.check(count * scalar.size)
        if keep:
            return [cursor.read(scalar)[0] for _ in range(count)]
        cursor.skip(count * scalar.size)
        return None
    if item not in (_STRING, _ARRAY):
        raise _Damaged(f"damaged: a list of the unknown type {item}")
    if item == _STRING and not keep:
        cursor.skip_strings(count)
        return None
    cursor.nest(count) if item == _ARRAY else cursor.walk(count)
    values = [_value(cursor, item, keep=keep, depth=depth + 1) for _ in range(count if keep else 0)]
    if keep:
        return values
    for _ in range(count):
        _value(cursor, item, keep=False, depth=depth + 1)
    return None


def _read_tensors(
    cursor: _Cursor, count: int, alignment: int, tensors: list[Tensor]
) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Elements by type, and bytes by group and type; each tensor is added to `tensors`. Raises _Damaged where the data
    of one would lie past the end of the file."""
    cursor.check(count * 24)  # the least that describes a tensor
    parameters: Counter[str] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    names: set[str] = set()
    extent = 0  # of the data, in bytes
    for _ in range(count):
        name = cursor.string(MAX_NAME_BYTES, "tensor name")
        if name in names:
            raise _Damaged(f"damaged: the tensor {printable(name, 80)!r} is there twice")
        names.add(name)
        (dimensions,) = cursor.read(_U32)
        if dimensions > _MAX_DIMENSIONS:
            raise _Damaged(f"damaged: a tensor of {dimensions} dimensions")
        *shape, code, offset = cursor.read(_TENSOR_TAILS[dimensions])
        elements = 1
        for length in shape:
            elements *= length
        if elements > _MAX_ELEMENTS:
            raise _Damaged("damaged: a tensor of more than 2^63 elements")
        if offset % alignment:
            raise _Damaged("damaged: a tensor that is not aligned")
        # forks of llama.cpp have types of their own: of these only the beginning can be checked
        type_name, block, block_bytes = TENSOR_TYPES.get(code) or (f"type {code}", 1, 0)
        if shape and shape[0] % block:
            raise _Damaged(f"damaged: a {type_name} tensor whose rows are not whole blocks")
        size = elements // block * block_bytes
        extent = max(extent, offset + size)
        parameters[type_name] += elements
        sizes[_group(name), type_name] += size
        tensors.append(Tensor(name, type_name, tuple(shape)))
    if count:
        data_start = -(-cursor.offset // alignment) * alignment
        if data_start + extent > cursor.size:
            raise _Damaged(f"cut short: needs {data_start + extent} bytes, has {cursor.size}")
    return dict(parameters), dict(sizes)


_EXPERTS = re.compile(r"ffn_\w+_exps\b")


@lru_cache(maxsize=4096)  # models share most of their tensors' names
def _group(name: str) -> str:
    """What a tensor is placed with: "blk.7", "blk.7 experts", "token_embd", "output" (with its norm), or "" for others.
    Numbers past any real layer's are no group of their own, so that a hostile file makes few."""
    first, _, rest = name.partition(".")
    if first == "blk":
        number, _, part = rest.partition(".")
        if not number.isdecimal() or len(number) > 3:
            return ""
        return f"blk.{int(number)} experts" if _EXPERTS.match(part) else f"blk.{int(number)}"
    if first in ("token_embd", "per_layer_token_embd"):
        return "token_embd"
    return "output" if first in ("output", "output_norm") else ""


def printable(text: str, limit: int = 4096) -> str:
    """Safe to print and to encode: control characters and half characters replaced, cut at `limit`."""
    kept = text[:limit]
    return kept if kept.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in kept)
