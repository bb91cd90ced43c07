"""Draws docs/screenshot.svg: the control center at 120x40 on a scripted busy machine.

python docs/make_screenshot.py
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 120, 40
SECONDS = 90  # of history
FONTS = "DejaVu Sans Mono, Menlo, Consolas, Liberation Mono, monospace"


async def draw() -> str:
    from tests.fakes.fake_backend import FakeBackend, live
    from tui.app import ControlCenter, ControlCenterSettings

    backend = FakeBackend.of("busy")
    app = ControlCenter(backend, ControlCenterSettings())
    async with app.run_test(size=(COLUMNS, ROWS)) as pilot:
        for step in range(SECONDS):
            backend.current = live(backend.current, step)
            app.pull()
        await pilot.pause()
        svg = app.export_screenshot(title="llamarunner")
    return svg


def everywhere(svg: str) -> str:
    """The same picture in every viewer: no fonts fetched from elsewhere, runs of spaces and "=>" as they are."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("<text class", '<text xml:space="preserve" class')
    return svg.replace("font-family: Fira Code, monospace", f"font-variant-ligatures: none; font-family: {FONTS}")


if __name__ == "__main__":
    os.environ |= {"TZ": "UTC", "LC_ALL": "C.UTF-8"}
    time.tzset()
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs" / "screenshot.svg").write_text(everywhere(asyncio.run(draw())), encoding="utf-8")
