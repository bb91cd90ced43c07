"""Tables as plain data: which columns fit, how wide they are, how rows are filtered, sorted and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from tui.lines import Line, Span
from tui.text import Align, fit


@dataclass(frozen=True, slots=True)
class Column:
    key: str
    title: str
    width: int
    align: Align = "left"
    priority: int = 0  # the highest goes first where there is no room; 0 stays
    most: int = 0  # grows up to this width where there is room


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    style: str = ""
    order: Any = None  # what it is sorted by, None last
    short: str = ""  # in place of a text that there is no room for
    tail: str = ""  # after the text, and kept where that must be cut


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    cells: Mapping[str, Cell]
    search: str = ""
    faded: bool = False  # cells without a style of their own are muted


@dataclass(frozen=True, slots=True)
class Fitted:
    column: Column
    width: int


@dataclass(frozen=True, slots=True)
class Sort:
    key: str = ""  # "" is the order the rows came in
    reverse: bool = False


def fit_columns(columns: Sequence[Column], width: int, gap: int) -> list[Fitted]:
    """Drop columns by priority until the rest fits; what is left over goes to those that may grow."""
    kept = list(columns)
    while kept and (needed := sum(c.width for c in kept) + gap * (len(kept) - 1)) > width:
        last = max(kept, key=lambda column: (column.priority, columns.index(column)))
        if last.priority == 0:
            break
        kept.remove(last)
    needed = sum(c.width for c in kept) + gap * max(0, len(kept) - 1)
    spare = width - needed
    widths = {column.key: column.width for column in kept}
    while spare > 0 and (growing := [column for column in kept if widths[column.key] < column.most]):
        for column in growing[:spare]:
            widths[column.key] += 1
            spare -= 1
    if spare < 0 and kept:  # even the indispensable ones are too wide: the first gives way
        widths[kept[0].key] = max(1, kept[0].width + spare)
    return [Fitted(column, widths[column.key]) for column in kept]


def select_rows(rows: Iterable[Row], needle: str, sort: Sort) -> list[Row]:
    words = needle.casefold().split()
    found = [row for row in rows if all(word in row.search for word in words)]
    if not sort.key:
        return found[::-1] if sort.reverse else found
    known = [row for row in found if row.cells[sort.key].order is not None]
    known.sort(key=lambda row: row.cells[sort.key].order, reverse=sort.reverse)
    return known + [row for row in found if row.cells[sort.key].order is None]


def header_line(fitted: Sequence[Fitted], sort: Sort, gap: int) -> Line:
    spans: list[Span] = [(" ", "")]
    for item in fitted:
        column = item.column
        mark = ("▼" if sort.reverse else "▲") if column.key == sort.key else ""
        text = fit(column.title + mark, item.width, column.align) + " " * gap
        spans.append((text, "accent" if mark else "title"))
    return Line(tuple(spans))


def row_line(row: Row, fitted: Sequence[Fitted], gap: int, background: str) -> Line:
    spans: list[Span] = [("▌" if background == "cursor" else " ", "focus")]
    for item in fitted:
        cell = row.cells[item.column.key]
        style = "muted" if row.faded and not cell.style else cell.style
        text = cell.short if cell.short and cell_len(cell.text) > item.width else cell.text
        if cell.tail:
            text = fit(text, min(cell_len(text), item.width - cell_len(cell.tail))) + cell.tail
        # the gap belongs to its cell: a span of its own would cost 25 bytes of colours
        spans.append((fit(text, item.width, item.column.align) + " " * gap, style))
    return Line(tuple(spans), background)
