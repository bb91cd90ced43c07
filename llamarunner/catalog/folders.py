"""Models in any folder, at any depth: each under its file's name. Blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llamarunner.catalog.files import Files, projectors_of
from llamarunner.catalog.found import Found
from llamarunner.catalog.gguf import printable


def models_below(files: Files, root: str) -> Iterator[Found]:
    source, top = printable(root), os.path.basename(root.rstrip(os.sep))
    for group in files.below(root):
        paired = projectors_of(group)
        relative = os.path.relpath(group.folder, root)
        above = (top, *(() if relative == os.curdir else relative.split(os.sep)))
        for path, stem in group.models.items():
            yield Found(path, names_within(above, stem), source, mmproj=paired.get(path, ""))


def names_within(above: tuple[str, ...], stem: str) -> tuple[str, ...]:
    """The file's name, then with as many folders before it as may be needed to tell it from others."""
    stem = printable(stem) or printable(above[-1])
    parts = [printable(part) for part in above if part]
    return (stem, *("/".join((*parts[start:], stem)) for start in range(len(parts) - 1, -1, -1)))
