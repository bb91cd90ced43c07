"""Waits grow, the circuit opens and closes again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamarunner.runners.restarts import OPEN_AFTER, WINDOW_S, Restarts


def test_the_wait_doubles_with_each_failure() -> None:
    restarts = Restarts()
    assert restarts.wait_s(100) == 0
    waits = []
    now = 100.0
    for _ in range(OPEN_AFTER - 1):
        restarts.failed(now)
        waits.append(restarts.wait_s(now))
        now += waits[-1]
        assert restarts.wait_s(now) == 0
    assert waits == [0, 1, 2, 4, 8]


def test_many_failures_open_the_circuit_until_they_are_long_ago() -> None:
    restarts = Restarts()
    for at in range(OPEN_AFTER):
        restarts.failed(100 + at)
    assert restarts.is_open(110)
    assert restarts.wait_s(110) == 100 + WINDOW_S - 110
    assert not restarts.is_open(100 + WINDOW_S)
    assert restarts.wait_s(105 + WINDOW_S) == 0


def test_a_person_closes_it() -> None:
    restarts = Restarts()
    for _ in range(OPEN_AFTER):
        restarts.failed(100)
    restarts.reset()
    assert restarts.wait_s(100) == 0
    assert not restarts.is_open(100)


@given(st.lists(st.floats(0, 2000), max_size=40), st.floats(0, 3000))
def test_no_history_makes_it_wait_longer_than_the_window(failures: list[float], later: float) -> None:
    restarts = Restarts()
    for at in sorted(failures):
        restarts.failed(at)
    now = max([*failures, 0.0]) + later
    wait = restarts.wait_s(now)
    assert 0 <= wait <= WINDOW_S
    assert restarts.is_open(now) or wait <= 8
    assert restarts.wait_s(now + WINDOW_S) == 0
