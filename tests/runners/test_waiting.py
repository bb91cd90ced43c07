"""Whose turn it is, how many may wait, and what is told to those who may not: on real processes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import soon
from test_manager import make_stage as make_stage
from test_manager import use

from llamarunner.catalog.catalog import Model
from llamarunner.errors import LoadError, OverloadedError
from llamarunner.events import RequestPhase, RequestTrace, RunnerState
from llamarunner.runners.waiters import Waiter, Waiters


def with_settings(model: Model, **changes: Any) -> Model:
    return replace(model, settings=model.settings.model_copy(update=changes))


def trace(priority: int = 0) -> RequestTrace:
    return RequestTrace("ollama", "/api/chat", "", priority=priority)


async def test_of_one_model_the_higher_priority_goes_first(make_stage: Any) -> None:
    stage = make_stage()
    model = with_settings(stage.model("a"), max_requests=1)
    hold, served = asyncio.Event(), []
    holder = asyncio.create_task(use(stage, model, hold, trace=trace()))
    await soon(lambda: stage.at("a").in_flight)

    async def request(name: str, priority: int) -> None:
        async with stage.manager.acquire(model, trace(priority)):
            served.append(name)

    waiters = []
    for number, (name, priority) in enumerate([("first", 0), ("low", -1), ("urgent", 9), ("second", 0)], 1):
        waiters.append(asyncio.create_task(request(name, priority)))
        await soon(lambda number=number: stage.at("a").queued == number)
    positions = [outlook.position for outlook in stage.manager.outlooks().values()]
    assert sorted(positions) == [1, 2, 3, 4]
    hold.set()
    await asyncio.gather(holder, *waiters)
    assert served == ["urgent", "first", "second", "low"]


async def test_who_finds_no_slot_once_the_model_is_loaded_waits_for_one(make_stage: Any) -> None:
    stage = make_stage()
    model = with_settings(stage.model("a", load_s=0.1), max_requests=1)
    hold, traces = asyncio.Event(), [trace(), trace()]
    tasks = [asyncio.create_task(use(stage, model, hold, trace=each)) for each in traces]
    await soon(lambda: traces[1].phase is RequestPhase.LOADING)
    await soon(lambda: stage.at("a").in_flight)
    assert [each.phase for each in traces] == [RequestPhase.PROMPT, RequestPhase.QUEUED]
    hold.set()
    await asyncio.gather(*tasks)


async def test_a_model_of_higher_priority_is_loaded_before_one_that_waits_longer(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    a, b, c = stage.model("a"), stage.model("b"), with_settings(stage.model("c"), priority=5)
    hold, served = asyncio.Event(), []
    holder = asyncio.create_task(use(stage, with_settings(a, priority=5), hold))
    await soon(lambda: stage.at("a").in_flight)

    async def request(model: Model) -> None:
        async with stage.manager.acquire(model, trace()):
            served.append(model.name)

    first = asyncio.create_task(request(b))
    await soon(lambda: stage.at("b").queued)
    second = asyncio.create_task(request(c))
    await soon(lambda: stage.at("c").queued)
    hold.set()
    await asyncio.gather(holder, first, second)
    assert served == ["c", "b"]


async def test_a_model_with_requests_enough_in_its_queue_refuses_more(make_stage: Any) -> None:
    stage = make_stage()
    model = with_settings(stage.model("a", load_s=60), max_queue=2)
    waiters = [asyncio.create_task(use(stage, model)) for _ in range(2)]
    await soon(lambda: stage.at("a").queued == 2)
    with pytest.raises(OverloadedError, match="too many requests are waiting for a"):
        await use(stage, model)
    other = asyncio.create_task(use(stage, stage.model("b")))
    await other
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


async def test_no_more_are_answered_side_by_side_than_allowed(make_stage: Any) -> None:
    stage = make_stage()
    model = with_settings(stage.model("a"), max_requests=1)
    most = 0

    async def request() -> None:
        nonlocal most
        async with stage.manager.acquire(model):
            most = max(most, stage.at("a").in_flight)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(request() for _ in range(5)))
    assert most == 1, "though its engine has two slots"


async def test_when_to_try_again_is_told_from_how_long_answers_took(make_stage: Any) -> None:
    stage = make_stage(max_queue=1)
    model = with_settings(stage.model("a"), max_requests=1)
    async with stage.manager.acquire(model, trace()):
        await asyncio.sleep(0.3)
    hold = asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold, trace=trace()))
    await soon(lambda: stage.at("a").in_flight)
    waiter = asyncio.create_task(use(stage, model, trace=trace()))
    await soon(lambda: stage.at("a").queued)
    with pytest.raises(OverloadedError) as refused:
        await use(stage, model)
    assert refused.value.retry_after_s == pytest.approx(0.3, abs=0.25)
    hold.set()
    await asyncio.gather(holder, waiter)


async def test_a_model_that_is_left_alone_says_until_when(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", exit={"at": "load", "code": 3})
    for _ in range(2):
        with pytest.raises(LoadError):
            await use(stage, model)
    with pytest.raises(LoadError, match="the next try is in") as refused:
        await use(stage, model)
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 1


async def test_the_configuration_bounds_what_clients_ask_of_keep_alive(make_stage: Any) -> None:
    stage = make_stage()
    model = with_settings(stage.model("a"), keep_alive_min=60.0, keep_alive_max=600.0)
    for asked, kept in ((0.0, 60.0), (300.0, 300.0), (float("inf"), 600.0)):
        await use(stage, model, keep_alive_s=asked)
        assert stage.at("a").keep_alive_s == kept
    stage.manager.expire(model)
    assert stage.at("a").keep_alive_s == 60.0
    assert stage.states("a")[-1] is RunnerState.READY


async def test_two_models_asked_in_turns_do_not_chase_each_other_out(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1, min_residency=0.5, max_wait=30)
    models = [stage.model("a"), stage.model("b")]
    loop = asyncio.get_running_loop()
    end = loop.time() + 3

    async def client(model: Model) -> int:
        answers = 0
        while loop.time() < end:
            async with stage.manager.acquire(model):
                answers += 1
                await asyncio.sleep(0.01)
        return answers

    answers = sum(await asyncio.gather(*map(client, models)))
    loads = sum(stage.spawns(model.name) for model in models)
    assert loads >= 2, "each had its turn"
    assert answers > 10 * loads, "and made use of it"


async def test_models_with_a_tag_that_stay_are_not_unloaded_for_idleness(make_stage: Any) -> None:
    stage = make_stage(always_stay=["small"])
    model = with_settings(stage.model("a", keep_alive=0.05), tags=["small"])
    await use(stage, model)
    assert (stage.at("a").pinned, stage.at("a").pinned_by) == (True, "small")
    assert stage.at("a").idle_left_s == float("inf")


waits = st.lists(st.tuples(st.floats(0, 100), st.integers(-3, 3)), min_size=1, max_size=12)


@given(waits, st.floats(0, 50))
async def test_nobody_is_overtaken_once_patience_is_over(waits: list[tuple[float, int]], patience_s: float) -> None:
    line = Waiters(patience_s)
    loop = asyncio.get_running_loop()
    for number, (since, priority) in enumerate(sorted(waits)):
        line.add(Waiter(number, since, loop.create_future(), priority=priority))
    order = line.in_turn(100)
    assert line.first(100) is order[0]
    late = [waiter for waiter in order if 100 - waiter.since >= patience_s]
    assert order[: len(late)] == late
    assert [waiter.number for waiter in late] == sorted(waiter.number for waiter in late)
    rest = order[len(late) :]
    assert rest == sorted(rest, key=lambda waiter: (-waiter.priority, waiter.number))
