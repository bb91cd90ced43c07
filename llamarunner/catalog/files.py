"""The GGUF files below a folder: whole ones and sets of parts, and the projector of each. Blocks."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llamarunner.catalog.catalog import ModelDetails
from llamarunner.catalog.disk import Disk
from llamarunner.catalog.gguf import Header, printable
from llamarunner.catalog.headers import MAX_FILES, HeaderCache, KnownFile
from llamarunner.catalog.projectors import pair
from llamarunner.errors import ModelFileError

logger = logging.getLogger(__name__)

MAX_FOLDERS = 50_000  # folders looked into, in case a folder such as / is given
SUFFIX = ".gguf"

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.gguf", re.IGNORECASE)
_UNFINISHED_STEM = re.compile(r"\.(part|partial|incomplete|crdownload|tmp)$", re.IGNORECASE)
_UNFINISHED_BESIDE = (".aria2", ".part", ".incomplete")  # left beside a file by the downloader that still writes it


@dataclass(frozen=True, slots=True)
class Split:
    """The name of a split model's part."""

    stem: str
    part: int
    total: int
    suffix: str  # as it is spelled

    @classmethod
    def of(cls, name: str) -> Split | None:
        match = _SPLIT.fullmatch(name)
        return Split(match["stem"], int(match["part"]), int(match["total"]), name[-len(SUFFIX) :]) if match else None

    def name(self, part: int) -> str:
        return f"{self.stem}-{part:05}-of-{self.total:05}{self.suffix}"


@dataclass(slots=True)
class Group:
    """Of one folder: the path of each model with its name (of a split one that of the first part), and projectors."""

    folder: str
    models: dict[str, str] = field(default_factory=dict)
    details: dict[str, ModelDetails] = field(default_factory=dict)
    projectors: dict[str, Header] = field(default_factory=dict)


class Files:
    """One look at the disk for GGUF files; folders at any depth are looked into once, whatever the links say."""

    def __init__(self, disk: Disk, headers: HeaderCache) -> None:
        self.disk = disk
        self.headers = headers
        self._folders_seen: set[tuple[int, int]] = set()
        self._left = MAX_FILES

    def known(self, path: str) -> KnownFile:
        """Raises ModelFileError."""
        return self.headers.get(path, self.disk.status(path))

    def below(self, root: str) -> Iterator[Group]:
        """The models of each folder that has some, sorted. What may not be read is passed over."""
        pending = [root]
        while pending and self._left:
            folder = pending.pop()
            if not self._enter(folder):
                continue
            if error := self.disk.listing(folder).error:
                logger.warning("models in %s are not listed: %s", printable(folder), error)
                continue
            pending.extend(os.path.join(folder, name) for name in reversed(self.disk.folders(folder)))
            every = self.disk.files(folder)
            names = [name for name in every if self._is_finished_model(folder, name, every)]
            if len(names) > self._left:
                logger.warning("only the first %d model files are listed", MAX_FILES)
                names = names[: self._left]
            self._left -= len(names)
            if names:
                yield self._group(folder, names)

    def _enter(self, folder: str) -> bool:
        status = self.disk.status(folder)
        if status is None or not status.is_folder or status.identity in self._folders_seen:
            return False  # it is missing, which is no error, or a link that leads nowhere, or round in a circle
        if len(self._folders_seen) == MAX_FOLDERS:
            logger.warning("only the first %d folders are searched for models", MAX_FOLDERS)
            self._left = 0
            return False
        self._folders_seen.add(status.identity)
        return True

    def _is_finished_model(self, folder: str, name: str, beside: tuple[str, ...]) -> bool:
        stem, suffix = name[: -len(SUFFIX)], name[-len(SUFFIX) :]
        if suffix.lower() != SUFFIX or name.startswith("._") or _UNFINISHED_STEM.search(stem):
            return False
        if len(beside) > 1 and any(name + more in beside for more in _UNFINISHED_BESIDE):
            return False
        status = self.disk.status(os.path.join(folder, name))
        return status is not None and status.is_file and status.size > 0

    def _group(self, folder: str, names: Iterable[str]) -> Group:
        group = Group(folder)
        for name, stem in _joined(names):
            path = os.path.join(folder, name)
            try:
                known = self.known(path)
            except ModelFileError:
                if "mmproj" not in stem.lower():
                    group.models[path] = stem  # listed, with what is wrong
                continue
            if known.is_projector:
                if not known.needs:
                    group.projectors[path] = known.header
            elif known.is_model:
                group.models[path] = stem
                group.details[path] = known.details
        return group


def projectors_of(group: Group) -> dict[str, str]:
    """The projector of each model that has one."""
    return pair(group.details, group.projectors) if group.projectors else {}


def _joined(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, stem) of each single file, and of the first part of each set."""
    sets_seen: set[tuple[str, int]] = set()
    for name in names:
        split = Split.of(name) if "-of-" in name else None
        if split is None:
            yield name, name[: -len(SUFFIX)].strip()
        elif (split.stem, split.total) not in sets_seen:
            sets_seen.add((split.stem, split.total))
            yield split.name(1), split.stem
