"""Between two awaits anything may happen: histories that once went wrong, on real processes of the scripted engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from running import soon
from test_manager import use
from test_manager_memory import make_stage as make_stage
from test_manager_memory import ram
from test_replicas import names

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.errors import DoesNotFitError, LoadError
from llamarunner.events import RunnerState
from llamarunner.runners.demand import Demand

OUT_OF_MEMORY = {
    "exit": {"at": "load", "code": 1},
    "log": [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9 MiB on device 0: cudaMalloc failed: out of memory"
    ],
}


async def test_a_model_unloaded_between_its_first_and_second_try_is_not_lost(make_stage: Any) -> None:
    """It ran out of memory and waits for an idle model to leave, which takes its time; unloaded meanwhile, it is loaded
    again for the one who waits."""
    stage = make_stage(ram(10))
    slow = stage.model("b", 1, script={"ignore_sigterm": True})
    model = stage.model("a", 1, script=OUT_OF_MEMORY)
    await use(stage, slow)
    stage.manager.residence("b").runner._stop_grace_s = 1.0
    waiter = asyncio.create_task(use(stage, model))
    await soon(lambda: stage.changes and stage.changes[-1].reason.startswith("evicted for a, which ran out"))
    stage.model("a", 1)
    await stage.manager.unload(model)
    await waiter
    assert stage.spawns("a") == 2
    await soon(lambda: not any(task.get_name() == "load a" for task in asyncio.all_tasks()), 20)
    assert stage.state("b") is RunnerState.STOPPED
    assert stage.manager.residence("a").runner is not None, "its engine runs, and is known"


async def test_who_demands_too_much_is_refused_alone(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    model = stage.model("a", 9.8)
    model = replace(model, details=replace(model.details, context_length=2**24))
    asked = [use(stage, model, demand=demand) for demand in (Demand(), Demand(context=2**24), Demand(context=600))]
    plain, large, small = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(large, DoesNotFitError)
    assert isinstance(plain, int)
    assert isinstance(small, int)
    assert stage.manager.residence("a").failure is None


async def test_a_demand_that_cannot_be_loaded_fails_alone(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    model = stage.model("a", 1)
    engine = stage.engines["a"]
    plan = engine.plan

    def plan_that_dies(asked: Model, **more: Any) -> Any:
        argv, engine.argv = engine.argv, ("/bin/false",) if "threads" in asked.settings.flags else engine.argv
        try:
            return plan(asked, **more)
        finally:
            engine.argv = argv

    engine.plan = plan_that_dies
    asked = [use(stage, model, demand=demand) for demand in (Demand(flags={"threads": -7}), Demand(), Demand())]
    broken, *plain = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(broken, LoadError)
    assert len(set(plain)) == 1
    assert isinstance(plain[0], int)


async def test_a_catalogue_read_anew_while_a_request_waits_loads_nothing_unmeasured(make_stage: Any) -> None:
    """What a model needs was estimated for the model as it was; for the new one that takes a moment."""
    stage = make_stage(ram(10), max_wait=60)
    busy, model, hold = stage.model("b", 6), stage.model("a", 6), asyncio.Event()
    holder = asyncio.create_task(use(stage, busy, hold))
    await soon(lambda: stage.changes and stage.state("b") is RunnerState.READY)
    waiters = [asyncio.create_task(use(stage, model))]
    await soon(lambda: stage.manager.residence("a") is not None)
    changed = replace(model, size_bytes=model.size_bytes + 1)
    waiters += [asyncio.create_task(use(stage, each)) for each in (changed, model, changed)]
    await asyncio.sleep(0)
    assert stage.spawns("a") == 0, "there is no room for both"
    hold.set()
    await asyncio.gather(holder, *waiters)
    assert stage.manager._places["a"].placement is not None


async def test_a_model_that_is_gone_leaves_once_nobody_uses_it(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    pinned, used, kept = stage.model("a", 1, pin=True), stage.model("b", 1), stage.model("c", 1)
    hold = asyncio.Event()
    await use(stage, pinned)
    await use(stage, kept)
    user = asyncio.create_task(use(stage, used, hold, keep_alive_s=1000.0))
    await soon(lambda: stage.manager.residence("b") and stage.manager.residence("b").in_flight)
    stage.manager.adopt(Catalog([kept]))
    await soon(lambda: stage.state("a") is RunnerState.STOPPED)
    assert stage.state("b") is RunnerState.READY, "it answers"
    hold.set()
    await user
    await soon(lambda: [place.name for place in stage.manager._places] == ["c"])
    assert stage.manager.residence("a") is None
    await use(stage, pinned)
    assert stage.state("a") is RunnerState.READY, "somebody who asked before is served"
    stage.manager.adopt(Catalog([pinned, kept]))
    assert stage.manager.residence("a").pinned


async def test_a_replica_taken_out_of_the_configuration_leaves(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    two = stage.model("a", 1, replicas=2)
    one = replace(two, settings=two.settings.model_copy(update={"replicas": 1}))
    hold = asyncio.Event()
    users = [asyncio.create_task(use(stage, two, hold)) for _ in range(4)]
    await soon(lambda: names(stage) == ["a", "a#2"] and stage.manager.residence("a").in_flight == 4)
    hold.set()
    await asyncio.gather(*users)
    await use(stage, one)
    await soon(lambda: [place.name for place in stage.manager._places] == ["a"])
    await use(stage, one)


async def test_who_waits_behind_one_that_leaves_is_served(make_stage: Any) -> None:
    """The first wants what takes a while to estimate, and leaves meanwhile."""
    stage = make_stage(ram(10))
    model = stage.model("a", 1)
    await use(stage, model)
    first = asyncio.create_task(use(stage, model, demand=Demand(flags={"threads": 2})))
    await asyncio.sleep(0)
    behind = asyncio.create_task(use(stage, model))
    await asyncio.sleep(0)
    assert stage.manager.residence("a").queued == 2
    first.cancel()
    async with asyncio.timeout(5):
        await behind
    with pytest.raises(asyncio.CancelledError):
        await first
    assert stage.spawns("a") == 1


async def test_two_clients_that_want_opposite_contexts_take_turns_and_not_a_load_each(make_stage: Any) -> None:
    stage = make_stage(ram(10), min_residency=0.6, max_wait=30)
    model = stage.model("a", 1)
    served = [0, 0]
    end = time.monotonic() + 2.5

    async def client(number: int, context: int) -> None:
        while time.monotonic() < end:
            async with stage.manager.acquire(model, demand=Demand(context=context, exact=True)):
                served[number] += 1
                await asyncio.sleep(0.01)

    await asyncio.gather(client(0, 256), client(1, 128))
    assert min(served) >= 10, served
    assert 2 <= stage.spawns("a") <= 6, f"{stage.spawns('a')} loads"


async def test_who_alone_wants_something_else_waits_for_no_residency_of_others(make_stage: Any) -> None:
    """What it is loaded with before contradicts nobody."""
    stage = make_stage(ram(10), min_residency=60)
    model = stage.model("a", 1)
    async with asyncio.timeout(10):
        await use(stage, model)
        await use(stage, model, demand=Demand(context=256, exact=True))
        await use(stage, model)
    assert stage.spawns("a") == 2
