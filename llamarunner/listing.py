"""The catalogue as text and as JSON, for `llamarunner models`."""

from __future__ import annotations

import unicodedata
from typing import Any

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.units import format_size


def as_records(catalog: Catalog) -> list[dict[str, Any]]:
    return [_record(model) for model in catalog]


def as_table(catalog: Catalog) -> str:
    """A line for each model: name, size, what it is, whence, its aliases; and below it why it cannot run, if so."""
    rows = [("NAME", "SIZE", "MODEL", "ENGINE", "SOURCE", "ALIASES"), *(_row(model) for model in catalog)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    notes: list[list[str]] = [[], *(_notes(model) for model in catalog)]
    lines = []
    for row, below in zip(rows, notes, strict=True):
        cells = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        lines += ["  ".join(cells).rstrip(), *below]
    return "\n".join(lines)


def _record(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "aliases": list(model.aliases),
        "path": str(model.path),
        "size_bytes": model.size_bytes,
        "architecture": model.details.architecture,
        "parameter_size": model.details.parameter_size,
        "quantization": model.details.quantization,
        "context": model.context,
        "capabilities": sorted(model.capabilities),
        "engine": model.settings.engine,
        "source": model.source,
        "problem": model.problem,
        "hint": model.hint,
    }


def _row(model: Model) -> tuple[str, ...]:
    details = model.details
    about = " ".join(part for part in (details.architecture, details.parameter_size, details.quantization) if part)
    size = format_size(model.size_bytes) if model.size_bytes else "-"
    cells = (model.name, size, about or "-", model.settings.engine, model.source, ", ".join(model.aliases))
    return tuple(map(_printable, cells))


def _notes(model: Model) -> list[str]:
    return [f"  ! {_printable(text)}" for text in (model.problem, model.hint) if text]


def _printable(text: str) -> str:
    """A file's name may hold anything; a terminal obeys some of it."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )
