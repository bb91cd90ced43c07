"""What is told of a model's place, and of several together."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import LoadError
from llamarunner.events import RunnerState
from llamarunner.runners.place import Place, Residence, Share, together
from llamarunner.runners.placement import RAM
from llamarunner.runners.runner import Runner
from llamarunner.runners.waiters import Waiters


def a_place(runner: dict[str, Any] | None = None, **more: Any) -> Place:
    place = Place("m", Model("m", Path("/m.gguf"), ModelSettings()), Waiters(60), **more)
    if runner is not None:
        facts = {"state": RunnerState.READY, "slots": 2, "pid": 1}
        place.runner = cast(Runner, SimpleNamespace(**(facts | runner)))
    return place


def residence(**more: Any) -> Residence:
    facts: dict[str, Any] = {
        "runner": None, "in_flight": 0, "queued": 0, "keep_alive_s": 300.0, "idle_left_s": None, "failure": None,
        "failed_s": 0.0,
    }  # fmt: skip
    return Residence(**(facts | more))


@pytest.mark.parametrize(("now", "left_s"), [(101.0, 9.0), (105.0, 5.0), (111.0, 0.0)])
def test_a_model_just_loaded_is_protected_for_a_while(now: float, left_s: float) -> None:
    place = a_place({}, ready_since=95.0, idle_since=100.0, keep_alive_s=300.0)
    assert place.residence(now, min_residency_s=50.0).protected_s == left_s
    place.idle_since = None
    assert place.residence(now, min_residency_s=50.0).protected_s == 0.0, "it answers: nobody unloads it anyway"


def test_one_that_failed_tells_when_it_is_tried_again() -> None:
    place = a_place(failure=LoadError("no"), failed_at=100.0)
    for at in (99.0, 99.5, 100.0):
        place.restarts.failed(at)
    told = place.residence(101.0)
    assert (told.failures, told.retry_s, told.is_left_alone) == (3, 1.0, False)
    for at in (101.0, 102.0, 103.0):
        place.restarts.failed(at)
    told = place.residence(104.0)
    assert (told.failures, told.retry_s, told.is_left_alone) == (6, 595.0, True)
    place.restarts.reset()
    assert place.residence(104.0).is_left_alone is False


def test_slots_are_as_many_as_the_configuration_allows() -> None:
    assert a_place({"slots": 4}).residence(0.0).slots == 4
    assert a_place({"slots": None}).residence(0.0).slots is None
    assert a_place().residence(0.0).slots is None


def runner(state: RunnerState = RunnerState.READY) -> Any:
    return SimpleNamespace(state=state)


def test_replicas_are_told_of_as_one() -> None:
    hung = residence(name="m", runner=runner(), slots=2, hung_s=9.0, idle_left_s=20.0, shares=(Share(RAM, 5, 10, 11),))
    sound = residence(name="m#2", runner=runner(), slots=4, idle_left_s=math.inf, shares=(Share(RAM, 5, 10, None),))
    loading = residence(name="m#3", runner=runner(RunnerState.LOADING), queued=2, shares=(Share("gpu0"),))
    whole = together([hung, sound, loading])
    assert (whole.name, whole.hung_s) == ("m#2", None), "of one that is well"
    assert (whole.slots, whole.queued, whole.idle_left_s) == (6, 2, math.inf)
    assert whole.shares == (Share(RAM, None, 20, 11), Share("gpu0"))
    busy = residence(runner=runner(), slots=2, in_flight=1)
    assert together([busy, sound]).idle_left_s is None, "one of them is in use"
    assert together([sound]) is sound
