"""What discovery looked at on the disk, remembered, so that the next look costs little: folders are listed again
only where they changed, and `is_unchanged` tells in a few milliseconds that nothing did.

Blocks; for one thread at a time.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import NamedTuple

# A change within the tick of the file system's clock after a look leaves the time stamp as it was; 2 s is FAT's tick.
_TICK_NS = 2 * 10**9


class Status(NamedTuple):
    """Of what a path leads to, links followed."""

    size: int
    mtime_ns: int
    device: int
    inode: int
    mode: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def modified_at(self) -> float:
        seconds, rest = divmod(self.mtime_ns, 10**9)
        return seconds + 1e-9 * rest  # the same number as st_mtime


@dataclass(frozen=True, slots=True)
class Listing:
    """Names in a folder, sorted. `error` says why it could not be read."""

    folders: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    links: tuple[str, ...] = ()  # to whatever
    error: str = ""


class Disk:
    """Between `begin` and the next one, the disk stands still: each path is looked at once."""

    def __init__(self) -> None:
        self._statuses: dict[str, Status | None] = {}
        self._listings: dict[str, tuple[Status, int, Listing]] = {}  # with the folder's state and the time of the look
        self._listed: set[str] = set()
        self._began = 0

    def begin(self) -> None:
        self._began = time.time_ns()
        self._statuses = {}
        self._listings = {path: known for path, known in self._listings.items() if path in self._listed}
        self._listed = set()

    def status(self, path: str) -> Status | None:
        """None where it leads nowhere, or may not be looked at."""
        if path not in self._statuses:
            self._statuses[path] = _status(path)
        return self._statuses[path]

    def listing(self, folder: str) -> Listing:
        """Empty where there is no such folder."""
        status = self.status(folder)
        if status is None or not status.is_folder:
            return Listing()
        known = self._listings.get(folder)
        if known and known[0] == status and (folder in self._listed or not _is_fresh(*known[:2])):
            self._listed.add(folder)
            return known[2]
        self._listed.add(folder)
        now = time.time_ns()
        listing = _list(folder)
        self._listings[folder] = status, now, listing
        return listing

    def files(self, folder: str) -> tuple[str, ...]:
        """Names of what is no folder, links to files among them."""
        listing = self.listing(folder)
        links = (link for link in listing.links if not self._leads_to_folder(folder, link))
        return tuple(sorted((*listing.others, *links))) if listing.links else listing.others

    def folders(self, folder: str) -> tuple[str, ...]:
        """Names of its folders, links to folders among them."""
        listing = self.listing(folder)
        links = (link for link in listing.links if self._leads_to_folder(folder, link))
        return tuple(sorted((*listing.folders, *links))) if listing.links else listing.folders

    def _leads_to_folder(self, folder: str, link: str) -> bool:
        status = self.status(os.path.join(folder, link))
        return status is not None and status.is_folder

    def is_unchanged(self) -> bool:
        """Whether all that was looked at since `begin` is as it was."""
        if any(_is_fresh(*self._listings[folder][:2]) for folder in self._listed):
            return False
        if any(status is not None and _is_fresh(status, self._began) for status in self._statuses.values()):
            return False
        return all(_status(path) == known for path, known in self._statuses.items())


def _status(path: str) -> Status | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return Status(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino, found.st_mode)


def _is_fresh(status: Status, looked_at: int) -> bool:
    """Whether it changed so shortly before the look that a change right after it would not show. (A time stamp far in
    the future is one of another clock, and any change of ours will differ from it.)"""
    return abs(looked_at - status.mtime_ns) < _TICK_NS


def _list(folder: str) -> Listing:
    folders, others, links = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    links.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    others.append(entry.name)
    except OSError as error:
        return Listing(error=error.strerror or str(error))
    return Listing(tuple(sorted(folders)), tuple(sorted(others)), tuple(sorted(links)))
