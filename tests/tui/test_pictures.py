"""Pictures of the screens. After a change that is meant: `pytest tests/tui/test_pictures.py --snapshot-update`, and a
look at what it changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from textual.pilot import Pilot

from tests.fakes.fake_backend import FakeBackend, live
from tui.app import ControlCenter, ControlCenterSettings

Compare = Callable[..., bool]


def control_center(scene: str = "busy", theme: str = "llamarunner", *, ascii: bool = False) -> ControlCenter:
    return ControlCenter(FakeBackend.of(scene), ControlCenterSettings(theme=theme, ascii=ascii))


async def a_minute_later(pilot: Pilot[None]) -> None:
    """So that there are histories to see."""
    app = pilot.app
    assert isinstance(app, ControlCenter)
    assert isinstance(app.backend, FakeBackend)
    for step in range(60):
        app.backend.current = live(app.backend.current, step)
        app.pull()
    await pilot.pause()


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_main_screen(snap_compare: Compare, size: tuple[int, int]) -> None:
    assert snap_compare(control_center(), terminal_size=size, run_before=a_minute_later)


@pytest.mark.parametrize("theme", ["llamarunner-light", "high-contrast", "ansi-dark", "ansi-light"])
def test_themes(snap_compare: Compare, theme: str) -> None:
    assert snap_compare(control_center(theme=theme), terminal_size=(100, 30), run_before=a_minute_later)


def test_ascii(snap_compare: Compare) -> None:
    assert snap_compare(control_center(ascii=True), terminal_size=(120, 40), run_before=a_minute_later)


@pytest.mark.parametrize("scene", ["empty", "trouble", "cpu"])
def test_states(snap_compare: Compare, scene: str) -> None:
    assert snap_compare(control_center(scene), terminal_size=(80, 24))


def test_unload_question(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(80, 24), press=["U"])


def test_downloads(snap_compare: Compare) -> None:
    assert snap_compare(control_center("pulls"), terminal_size=(80, 24))


def test_download_prompt(snap_compare: Compare) -> None:
    assert snap_compare(control_center("pulls"), terminal_size=(80, 24), press=["D", "enter"])


def test_replicas(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(80, 24), press=["j", "enter"])


def test_leave_question(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(80, 24), press=["q"])


def test_model_detail(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(80, 24), press=["enter"])


def test_help(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(80, 30), press=["question_mark"])


def test_filter_and_zoom(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(80, 24), press=["3", "z", "slash", "o", "l", "l"])


def test_too_small(snap_compare: Compare) -> None:
    assert snap_compare(control_center(), terminal_size=(20, 5))
