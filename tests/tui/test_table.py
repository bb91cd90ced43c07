from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from llamarunner.control.snapshot import ModelView, RunnerState
from tui.lines import Line, changed_cells
from tui.panes.models import ModelsPane, model_row
from tui.panes.requests import RequestsPane
from tui.table import Cell, Column, Row, Sort, fit_columns, header_line, row_line, select_rows

COLUMNS = (Column("name", "NAME", 10, most=20), Column("a", "A", 5, "right", 1), Column("b", "B", 5, "right", 2))


def row(name: str, a: float | None = None) -> Row:
    return Row(name, {"name": Cell(name, order=name), "a": Cell(str(a), order=a), "b": Cell("–")}, name.casefold())


def test_columns_drop_by_priority_and_the_rest_grows() -> None:
    assert [(item.column.key, item.width) for item in fit_columns(COLUMNS, 22, 1)] == [("name", 10), ("a", 5), ("b", 5)]
    assert [(item.column.key, item.width) for item in fit_columns(COLUMNS, 21, 1)] == [("name", 15), ("a", 5)]
    assert [(item.column.key, item.width) for item in fit_columns(COLUMNS, 12, 1)] == [("name", 12)]
    assert [(item.column.key, item.width) for item in fit_columns(COLUMNS, 6, 1)] == [("name", 6)]
    assert [(item.column.key, item.width) for item in fit_columns(COLUMNS, 99, 1)] == [("name", 20), ("a", 5), ("b", 5)]


@given(st.integers(30, 300), st.integers(1, 2), st.sampled_from([ModelsPane.COLUMNS, RequestsPane.COLUMNS]))
def test_real_columns_fit_every_width(width: int, gap: int, columns: tuple[Column, ...]) -> None:
    fitted = fit_columns(columns, width, gap)
    assert sum(item.width for item in fitted) + gap * (len(fitted) - 1) <= width
    assert {column.key for column in columns if column.priority == 0} <= {item.column.key for item in fitted}


def test_rows_are_filtered_by_every_word_and_sorted_with_unknowns_last() -> None:
    rows = [row("beta two", 2.0), row("alpha", None), row("Beta one", 1.0)]
    assert [r.key for r in select_rows(rows, "BETA o", Sort())] == ["beta two", "Beta one"]
    assert [r.key for r in select_rows(rows, "", Sort("a"))] == ["Beta one", "beta two", "alpha"]
    assert [r.key for r in select_rows(rows, "", Sort("a", reverse=True))] == ["beta two", "Beta one", "alpha"]
    assert [r.key for r in select_rows(rows, "", Sort(reverse=True))] == ["Beta one", "alpha", "beta two"]


def test_lines_align_whatever_the_names_are_made_of() -> None:
    fitted = fit_columns(COLUMNS, 30, 2)
    widths = {
        cell_len(row_line(row(name, 1.0), fitted, 2, "").text)
        for name in ("ascii", "通义千问 very long indeed", "😀😀😀", "مرحبا بالعالم", "é" * 30)
    }
    assert widths == {cell_len(header_line(fitted, Sort("a"), 2).text)}
    assert "A▲" in header_line(fitted, Sort("a"), 2).text


@given(st.integers(32, 200), st.sampled_from([RunnerState.STARTING, RunnerState.LOADING]), st.integers(0, 99))
def test_the_progress_of_a_load_is_whole_at_every_width(width: int, state: RunnerState, percent: int) -> None:
    loading = model_row(ModelView("a-model-whose-name-takes-room", state, progress=percent / 100))
    line = row_line(loading, fit_columns(ModelsPane.COLUMNS, width, 1), 1, "")
    assert f"{percent}%" in line.text.split()


def test_only_changed_cells_are_painted() -> None:
    old = Line.of(("ab", ""), ("通义", ""), ("12", "good"))
    assert changed_cells(old, old) == []
    assert changed_cells(old, Line.of(("ab", ""), ("通义", ""), ("13", "good"))) == [(6, 2)]
    assert changed_cells(old, Line.of(("xy", ""), ("通义", "bad"), ("12", "good"))) == [(0, 2), (2, 4)]
    assert changed_cells(old, Line.of(("abc", ""), ("通义", ""), ("12", "good"))) is None
    assert changed_cells(old, Line(old.spans, "cursor")) is None
    assert changed_cells(None, old) is None
