"""Several runners of one model: who gets the request, and what becomes of it where one fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import soon
from test_manager import make_stage as make_stage
from test_manager import use

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import LoadError
from llamarunner.runners import replicas
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.place import Place
from llamarunner.runners.waiters import Waiters


def replicated(stage: Any, name: str, **more: Any) -> Model:
    """On the engines "a" and "b", which the test scripts one by one."""
    settings = ModelSettings(engine="a", **{"parallel": 2, **more})
    return replace(stage.model("a"), name=name, settings=settings)


def names(stage: Any) -> list[str]:
    return [change.model for change in stage.changes if change.old == "stopped"]


async def test_a_second_replica_is_loaded_when_the_first_is_full(make_stage: Any) -> None:
    stage = make_stage()
    model = replicated(stage, "m", replicas=2)
    hold = asyncio.Event()
    holders = [asyncio.create_task(use(stage, model, hold)) for _ in range(2)]
    await soon(lambda: stage.at("m").in_flight == 2)
    assert names(stage) == ["m"], "its engine has two slots"
    holders += [asyncio.create_task(use(stage, model, hold)) for _ in range(2)]
    await soon(lambda: stage.at("m").in_flight == 4)
    assert names(stage) == ["m", "m#2"]
    residence = stage.at("m")
    assert [(each.name, each.in_flight) for each in residence.replicas] == [("m", 2), ("m#2", 2)]
    assert (residence.in_flight, residence.slots, residence.idle_left_s) == (4, 4, None)
    hold.set()
    assert len(set(await asyncio.gather(*holders))) == 2
    await stage.manager.unload(model)
    assert stage.manager.pids == [], "unloading a model unloads them all"


async def test_requests_spread_evenly(make_stage: Any) -> None:
    stage = make_stage()
    model = replicated(stage, "m", replicas=2)
    hold = asyncio.Event()
    warm = [asyncio.create_task(use(stage, model, hold)) for _ in range(4)]
    await soon(lambda: stage.at("m").in_flight == 4)
    hold.set()
    await asyncio.gather(*warm)
    served: list[str] = []

    async def request() -> None:
        async with stage.manager.acquire(model) as lease:
            served.append(lease.name)
            await asyncio.sleep(0.005)

    for _ in range(25):
        await asyncio.gather(*(request() for _ in range(4)))
    assert abs(served.count("m") - 50) <= 5, "within a tenth of its half"


async def test_who_waits_for_one_replica_is_served_by_another_that_is_free_sooner(make_stage: Any) -> None:
    stage = make_stage()
    stage.model("b", load_s=60)
    model = replicated(stage, "m", also_on=["b"])
    hold = asyncio.Event()
    holders = [asyncio.create_task(use(stage, model, hold)) for _ in range(2)]
    await soon(lambda: stage.at("m").in_flight == 2)
    waiter = asyncio.create_task(use(stage, model))
    await soon(lambda: names(stage) == ["m", "m#2"])
    hold.set()
    async with asyncio.timeout(5):
        await waiter
    await asyncio.gather(*holders)


async def test_where_a_replica_cannot_be_loaded_the_others_serve(make_stage: Any) -> None:
    stage = make_stage()
    stage.model("b", exit={"at": "load", "code": 3})
    model = replicated(stage, "m", also_on=["b"])
    hold = asyncio.Event()
    holders = [asyncio.create_task(use(stage, model, hold)) for _ in range(2)]
    await soon(lambda: stage.at("m").in_flight == 2)
    waiters = [asyncio.create_task(use(stage, model)) for _ in range(3)]
    await soon(lambda: stage.at("m").replicas[1].failure)
    assert not any(waiter.done() for waiter in waiters)
    hold.set()
    await asyncio.gather(*holders, *waiters)
    assert names(stage) == ["m", "m#2"], "it is not tried again for each"


async def test_where_none_can_be_loaded_the_failure_is_told(make_stage: Any) -> None:
    stage = make_stage()
    stage.model("b", exit={"at": "load", "code": 3})
    model = replicated(stage, "m", also_on=["b"])
    stage.model("a", exit={"at": "load", "code": 4})
    with pytest.raises(LoadError) as failed:
        async with asyncio.timeout(10):
            await use(stage, model)
    assert failed.value.exit_code in (3, 4)
    assert sorted(names(stage)) == ["m", "m#2"], "each was tried"


async def test_a_replica_that_cannot_be_told_is_not_loaded_again_for_what_requests_want(make_stage: Any) -> None:
    stage = make_stage()
    stage.model("b")
    model = replicated(stage, "m", also_on=["b"])
    stage.engines["b"].is_adjustable = False
    hold = asyncio.Event()
    holders = [asyncio.create_task(use(stage, model, hold)) for _ in range(2)]
    await soon(lambda: stage.at("m").in_flight == 2)
    for threads in (2, 3, 2):
        await use(stage, model, demand=Demand(flags={"threads": threads}))
    assert names(stage) == ["m", "m#2"]
    hold.set()
    await asyncio.gather(*holders)


def place(name: str, *, waiting: int = 0) -> Place:
    found = Place(name, Model("m", Path("/m.gguf"), ModelSettings(parallel=2)), Waiters(60))
    found.holders[0] = waiting
    return found


def test_one_that_leaves_requests_unanswered_is_ejected_for_a_while() -> None:
    one, other = place("m"), place("m#2", waiting=1)
    for _ in range(replicas.STRIKES):
        assert replicas.choose([one, other], NO_DEMAND, 100) is one
        replicas.strike(one, 100)
    assert replicas.choose([one, other], NO_DEMAND, 101) is other
    assert replicas.choose([one, other], NO_DEMAND, 100 + replicas.EJECTED_S) is one
    assert replicas.choose([one], NO_DEMAND, 101) is one, "there is no other"
    replicas.answered(one)
    assert replicas.choose([one, other], NO_DEMAND, 101) is one


def test_one_to_avoid_is_asked_where_there_is_no_other() -> None:
    one, other = place("m"), place("m#2")
    assert replicas.choose([one, other], NO_DEMAND, 0, ["m"]) is other
    assert replicas.choose([one, other], NO_DEMAND, 0, ["m", "m#2"]) is one


async def test_nobody_waits_for_a_load_while_another_replica_has_a_slot_free(make_stage: Any) -> None:
    stage = make_stage()
    stage.model("b", load_s=60)
    model = replicated(stage, "m", also_on=["b"])
    hold = asyncio.Event()
    holders = [asyncio.create_task(use(stage, model, hold)) for _ in range(2)]
    await soon(lambda: stage.at("m").in_flight == 2)
    leaver = asyncio.create_task(use(stage, model))
    await soon(lambda: names(stage) == ["m", "m#2"])
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    holders.pop().cancel()
    await soon(lambda: stage.at("m").in_flight == 1)
    async with asyncio.timeout(5):
        await use(stage, model)
    hold.set()
    await asyncio.gather(*holders)
