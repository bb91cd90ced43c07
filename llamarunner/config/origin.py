"""Where a value of the configuration was written, and what is wrong with one; key paths as text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from llamarunner.config.positions import KeyPath

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

Kind = Literal["default", "file", "profile", "environment", "command line"]


@dataclass(frozen=True, slots=True)
class Origin:
    """`key` is the path it was written at, which differs from the path it has effect at for a profile, `[defaults]`
    and inheritance. `via` names the model, or "defaults", a model has it from."""

    kind: Kind = "default"
    name: str = ""  # of the file, the profile or the environment variable
    key: KeyPath = ()
    line: int = 0  # 0 where it is in no file
    via: str = ""

    @property
    def place(self) -> str:
        """How a message begins: "config.toml:12", "profile testing", "LLAMARUNNER__SERVER__HOST"."""
        if self.line:
            return f"{self.name}:{self.line}"
        return f"profile {self.name}" if self.kind == "profile" else self.name or self.kind

    def __str__(self) -> str:
        notes = []
        if self.kind == "profile" and self.line:
            notes.append(f"profile {self.key[1]}")
        if self.via:
            notes.append("by defaults" if self.via == "defaults" else f"inherited from {self.via}")
        return self.place + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True, slots=True)
class Problem:
    """Written as `place: key: what, and what would be right`."""

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.message) if part)


def dotted(path: KeyPath) -> str:
    """A key path in TOML's own notation: models."llama3.1:8b".flags.top-k, and folders[0] for an array's element."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{_key(part)}" if text else _key(part)
    return text


@lru_cache(maxsize=4096)
def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
