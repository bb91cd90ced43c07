"""Tests of the terminal look the same on every machine: UTC, a UTF-8 locale, colours, nothing that moves."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from textual.pilot import Pilot

from tests.fakes.fake_backend import FakeBackend
from tui.app import ControlCenter, ControlCenterSettings

RunApp = Callable[..., AbstractAsyncContextManager[tuple[ControlCenter, Pilot[None]]]]


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def run_app() -> RunApp:
    """`async with run_app(backend, size=(80, 24)) as (app, pilot)`"""

    @asynccontextmanager
    async def run(
        backend: FakeBackend, *, size: tuple[int, int] = (120, 40), **settings: object
    ) -> AsyncIterator[tuple[ControlCenter, Pilot[None]]]:
        app = ControlCenter(backend, ControlCenterSettings(**settings))  # type: ignore[arg-type]  # fields by name
        async with app.run_test(size=size, notifications=True) as pilot:
            await pilot.pause()
            yield app, pilot

    return run
