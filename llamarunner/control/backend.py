"""What a front end talks to. `LocalBackend` is the one in the same process; another may reach a program far away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llamarunner.control.snapshot import LogPage, Snapshot


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command went, in words for a person."""

    ok: bool
    message: str
    hint: str = ""


class Backend(Protocol):
    """`snapshot` and `logs` return at once; the commands return when the thing is done, or has failed."""

    def snapshot(self) -> Snapshot: ...

    def logs(self, source: str, after: int = 0, limit: int = 500) -> LogPage:
        """The newest `limit` lines of `source` with a number greater than `after`, oldest first. An unknown source has
        no lines."""
        ...

    async def load(self, model: str) -> Outcome: ...

    async def unload(self, model: str, *, force: bool = False) -> Outcome:
        """Wait for the answers in flight and unload; with `force`, end them. New requests load it again."""
        ...

    async def start_pull(self, model: str) -> Outcome:
        """Begin to download a model by its name in a registry ("llama3.2:1b", "hf.co/ns/repo"); `Snapshot.pulls` shows
        how far it is."""
        ...

    async def cancel_pull(self, model: str) -> Outcome:
        """End its download; what there is stays for the next one."""
        ...
