"""What models were measured to need, kept on disk: it takes the place of the estimates of `memory.py`.

Only `load` and `save` touch the disk, and block; all else is quick and belongs to one thread."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llamarunner.catalog.catalog import Model
from llamarunner.engines.flags import flags_for
from llamarunner.runners.memory import Allocation, Need
from llamarunner.runners.placement import RAM, Placement

logger = logging.getLogger(__name__)

MAX_FOOTPRINTS = 1000
RECENT = 5  # measurements of each that count: older ones may be of another driver or another use
_MAX_FILE_BYTES = 16 * 1024**2
_VERSION = 1
_NOT_OF_THE_MODEL = ("port", "host", "alias")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a runner took at most, and how long its load was. A device that could not be measured is left out."""

    bytes_by_device: Mapping[str, int]
    load_s: float


@dataclass(frozen=True, slots=True)
class Best:
    """`error` is the estimate's: +0.1 where it was a tenth too high; None while nothing is measured."""

    bytes_by_device: Mapping[str, int]
    source: Literal["measured", "estimated"]
    error: float | None = None
    load_s: float | None = None


def footprint_key(model: Model, *, engine: str, version: str, placement: Placement) -> str:
    """The same as long as nothing changes that decides memory: the file, the flags with context and slots, the engine's
    kind and version, and where the model lies. Raises UnsupportedError for a flag that may not be set."""
    flags = {name: value for name, value in flags_for(model, 0).items() if name not in _NOT_OF_THE_MODEL}
    file = [str(model.path), model.size_bytes, model.modified_at]
    identity = json.dumps([file, flags, engine, version, placement.key], sort_keys=True)
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Footprints:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, tuple[Measured, ...]] = {}  # the newest last, both in the dict and for each key

    def __len__(self) -> int:
        return len(self._seen)

    def record(self, key: str, measured: Measured) -> None:
        kept = (*self._seen.pop(key, ()), measured)[-RECENT:]
        self._seen[key] = kept
        while len(self._seen) > MAX_FOOTPRINTS:
            del self._seen[next(iter(self._seen))]

    def grow(self, key: str, bytes_by_device: Mapping[str, int]) -> None:
        """The run recorded last was seen to take more."""
        if not (seen := self._seen.get(key)):
            return
        newest = seen[-1]
        most = _most((newest.bytes_by_device, bytes_by_device))
        self._seen[key] = (*seen[:-1], Measured(most, newest.load_s))

    def lookup(self, key: str) -> Measured | None:
        """The most that any recent run took of each device, and their median load time."""
        seen = self._seen.get(key)
        if not seen:
            return None
        return Measured(_most([run.bytes_by_device for run in seen]), statistics.median(run.load_s for run in seen))

    def best(self, key: str, estimated: Mapping[str, int]) -> Best:
        """The measured figures where there are any; a device that was not measured keeps its estimate."""
        measured = self.lookup(key)
        if measured is None:
            return Best(estimated, "estimated")
        known = [device for device, size in measured.bytes_by_device.items() if size]
        taken = sum(measured.bytes_by_device[device] for device in known)
        error = sum(estimated.get(device, 0) for device in known) / taken - 1 if taken else None
        merged = {**estimated, **{device: measured.bytes_by_device[device] for device in known}}
        return Best(merged, "measured", error, measured.load_s)

    def corrected(self, need: Need, key: str, placement: Placement) -> Need:
        """`need` as it was measured where it last lay at `placement`; place it again with that."""
        measured = self.lookup(key)
        if measured is None:
            return need
        return need.corrected(
            _allocation(placement, placement.bytes_by_device), _allocation(placement, measured.bytes_by_device)
        )

    def load(self) -> None:
        """Blocks. A file that cannot be understood is put aside as `….broken` and everything is measured anew."""
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("measured footprints are not read: %s", error)
            return
        try:
            self._seen = _parsed(data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            aside = self._path.with_name(f"{self._path.name}.broken")
            logger.warning("%s is damaged (%s): it is kept as %s", self._path, error, aside.name)
            with suppress(OSError):
                os.replace(self._path, aside)

    def save(self) -> None:
        """Blocks. The file is replaced whole or not at all; raises OSError where it cannot be."""
        runs = dict(self._seen)  # one step: the owner may go on recording while a thread saves
        entries = {
            key: [{"bytes": dict(run.bytes_by_device), "load_s": round(run.load_s, 3)} for run in seen]
            for key, seen in runs.items()
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "footprints": entries}, file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _most(several: Sequence[Mapping[str, int]]) -> dict[str, int]:
    most: dict[str, int] = {}
    for one in several:
        for device, size in one.items():
            most[device] = max(size, most.get(device, 0))
    return most


def _allocation(placement: Placement, sizes: Mapping[str, int]) -> Allocation:
    return Allocation(sizes.get(RAM, 0), tuple(sizes.get(device, 0) for device in placement.devices))


def _parsed(data: bytes) -> dict[str, tuple[Measured, ...]]:
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"more than {_MAX_FILE_BYTES} bytes")
    whole = json.loads(data)
    if whole["version"] != _VERSION:
        raise ValueError(f"version {whole['version']!r}")
    entries = list(whole["footprints"].items())[-MAX_FOOTPRINTS:]
    return {key: tuple(_run(run) for run in runs[-RECENT:]) for key, runs in entries}


def _run(run: Mapping[str, Any]) -> Measured:
    sizes = {str(device): size for device, size in run["bytes"].items()}
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes.values()):
        raise ValueError("a size that is none")
    load_s = float(run["load_s"])
    if not 0 <= load_s < 1e9:
        raise ValueError("a time that is none")
    return Measured(sizes, load_s)
