"""What the control center is told at its start. Plain data: importing it loads nothing of Textual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ControlCenterSettings:
    theme: str = "llamarunner"
    mouse: bool = True
    fps: int = 15
    ascii: bool = False
    theme_folders: tuple[Path, ...] = ()  # looked through after the themes that come with the program
