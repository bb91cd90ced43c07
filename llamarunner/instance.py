"""The file by which other commands find the program that runs: its process and where its proxies listen.

Written when the service is ready, removed when it stops. One that was left behind names a process that is gone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from llamarunner import paths


@dataclass(frozen=True, slots=True)
class Instance:
    pid: int
    started_at: float
    proxies: dict[str, tuple[str, int]]  # host and port by the proxy's name


class InstanceFile:
    def __init__(self, path: Path | None = None) -> None:
        self._path = path or paths.state_dir() / "instance.json"
        self._written = False

    def write(self, started_at: float, proxies: dict[str, tuple[str, int]]) -> None:
        """Replace the file in one step. Raises OSError."""
        paths.make_private(self._path.parent)
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        record = {
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),
            "started_at": started_at,
            "proxies": proxies,
        }
        draft.write_text(json.dumps(record), encoding="utf-8")
        draft.replace(self._path)
        self._written = True

    def read(self) -> Instance | None:
        """The program that runs now; None where there is none, or the file is another's leavings."""
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            pid, created = int(record["pid"]), float(record["created"])
            if abs(psutil.Process(pid).create_time() - created) > 1:
                return None  # the number now belongs to another process
            proxies = {str(name): (str(host), int(port)) for name, (host, port) in record["proxies"].items()}
            return Instance(pid, float(record["started_at"]), proxies)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, psutil.Error):
            return None

    def remove(self) -> None:
        if self._written:
            self._written = False
            self._path.unlink(missing_ok=True)
