"""Environment, layout and imports: what is decided before a screen is there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui import layout
from tui.environment import locale_is_utf8, prepare
from tui.settings import ControlCenterSettings


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"LANG": "en_US.UTF-8"}, True),
        ({"LANG": "C"}, False),
        ({"LANG": "de_DE.ISO-8859-1"}, False),
        ({"LC_ALL": "C", "LANG": "en_US.UTF-8"}, False),
        ({"LC_ALL": "en_US.utf8", "LANG": "C"}, True),
        ({"LC_CTYPE": "en_US.UTF-8", "LANG": "C"}, True),
        ({"LC_CTYPE": "C.UTF-8"}, True),
        ({"LC_CTYPE": "C.UTF-8", "LANG": "POSIX"}, False),  # set by Python itself
        ({"LC_ALL": "", "LANG": ""}, True),
    ],
)
def test_the_locale_decides_on_ascii(environ: dict[str, str], expected: bool) -> None:
    assert locale_is_utf8(environ) is expected


def test_prepare_sets_the_switches_and_leaves_no_color_alone() -> None:
    environ = {"NO_COLOR": "1", "TEXTUAL_ALLOW_SIGNALS": "1"}
    prepare(ControlCenterSettings(fps=7), environ)
    assert environ == {
        "NO_COLOR": "1", "TEXTUAL_FPS": "7", "TEXTUAL_ANIMATIONS": "none", "TEXTUAL_SMOOTH_SCROLL": "0",
        "ESCDELAY": "50",
    }  # fmt: skip


def test_preparing_imports_nothing_of_textual() -> None:
    check = (
        "import sys, tui.environment, tui.settings;"
        "sys.exit(any(name.split('.')[0] in ('textual', 'rich') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_screen_imports_stay_lean() -> None:
    check = (
        "import sys, tui.app;"
        "heavy = [n for n in sys.modules if n.startswith(('markdown_it', 'pygments', 'textual.widgets._data_table', "
        "'textual.widgets._markdown', 'numpy', 'tree_sitter'))];"
        "print(heavy); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", check], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@given(st.integers(0, 400), st.integers(0, 200), st.sampled_from(layout.PANES), st.booleans())
def test_the_active_pane_is_always_seen(width: int, height: int, active: str, zoomed: bool) -> None:
    mode = layout.mode_for(width, height)
    lower = active if active in (layout.REQUESTS, layout.LOGS) else layout.REQUESTS
    shown = layout.visible_panes(mode, active, lower, zoomed)
    assert (active in shown) == (mode is not layout.Mode.TINY)
    if zoomed and mode is not layout.Mode.TINY:
        assert shown == {active}


@pytest.mark.parametrize(
    ("size", "mode"),
    [((20, 5), "tiny"), ((32, 8), "single"), ((200, 17), "single"), ((80, 24), "compact"), ((109, 60), "compact"),
     ((120, 33), "compact"), ((120, 40), "full"), ((200, 60), "wide")],
)  # fmt: skip
def test_modes(size: tuple[int, int], mode: str) -> None:
    assert layout.mode_for(*size) == mode
