"""What the stores hand over: a model as its place on the disk tells of it, before its file's header is looked into."""

from __future__ import annotations

from dataclasses import dataclass

from llamarunner.catalog.catalog import Capability, Preset


@dataclass(frozen=True, slots=True)
class Found:
    """`names`: the one wanted first, then those for when it is taken, at last with a number. Paths are text, which is
    quicker than Path where there are thousands."""

    path: str  # of a split model the first part, which need not be there; "" where there is no file
    names: tuple[str, ...]
    source: str
    aliases: tuple[str, ...] = ()
    mmproj: str = ""
    adapters: tuple[str, ...] = ()
    preset: Preset | None = None  # None for a mere file
    manifest_digest: str = ""
    modified_at: float = 0.0  # of its manifest
    size_bytes: int = 0  # likewise, all its blobs
    capabilities: frozenset[Capability] = frozenset()  # that it is said to have, beside those its header tells of
    origin: str = ""  # the model it was made of
    problem: str = ""
    hint: str = ""
