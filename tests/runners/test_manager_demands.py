"""Requests that want more of a model than it was loaded with, on real processes of the scripted engine."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Any

import pytest
from running import soon
from test_manager import make_stage as make_stage
from test_manager import use

from llamarunner.errors import LoadError
from llamarunner.events import RunnerState
from llamarunner.runners.demand import Demand
from llamarunner.runners.failed_demands import REST_S, FailedDemands


def contexts(stage: Any, name: str) -> list[int]:
    return [model.context for model in stage.engines[name].models]


async def test_a_larger_context_loads_again_and_is_kept(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a")
    await use(stage, model)
    await use(stage, model, demand=Demand(context=16384))
    await use(stage, model, demand=Demand(context=12000))
    await use(stage, model)
    assert contexts(stage, "a") == [8192, 16384]
    assert stage.at("a").demanded == "context 16384"
    await stage.manager.unload(model)
    await soon(lambda: stage.at("a").demanded == "")
    assert "loaded again for a request: context 16384" in stage.reasons("a")


async def test_exact_contexts_load_again_each_time(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a")
    for context in (4096, 4096, 2048):
        await use(stage, model, demand=Demand(context=context, exact=True))
    assert contexts(stage, "a") == [4096, 2048]


async def test_a_running_answer_ends_before_the_model_is_loaded_again(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    larger = asyncio.create_task(use(stage, model, demand=Demand(context=16384)))
    await soon(lambda: stage.states("a")[-1] is RunnerState.DRAINING)
    late = asyncio.create_task(use(stage, model))
    await soon(lambda: stage.at("a").queued == 2)
    hold.set()
    await asyncio.gather(holder, larger, late)
    assert contexts(stage, "a") == [8192, 16384], "who came meanwhile is served by the larger one too"


async def test_those_who_wait_together_get_the_most_that_one_of_them_wants(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", load_s=0.1)
    wanted = [None, 16384, 9000, 32768]
    await asyncio.gather(*(use(stage, model, demand=Demand(context=context)) for context in wanted))
    assert contexts(stage, "a") == [32768]


async def test_an_engine_that_cannot_be_told_serves_as_it_is(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a")
    stage.engines["a"].is_adjustable = False
    await use(stage, model, demand=Demand(context=16384, flags={"threads": 2}))
    assert contexts(stage, "a") == [8192]


async def test_flags_of_a_request_reach_the_engine(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a")
    await use(stage, model, demand=Demand(gpu_layers=3, flags={"threads": 2}))
    launched = stage.engines["a"].models[-1].settings
    assert (launched.gpu_layers, launched.flags) == (3, {"threads": 2})


async def test_a_demand_that_fails_its_load_is_nobody_elses_failure(make_stage: Any, monkeypatch: Any) -> None:
    stage = make_stage()
    model, bad = stage.model("a", load_s=0.1), Demand(flags={"threads": 100_000})
    engine = stage.engines["a"]
    plan = engine.plan

    def picky(launched: Any, **how: Any) -> Any:
        made = plan(launched, **how)
        if "threads" not in launched.settings.flags:
            return made
        return replace(made, argv=(sys.executable, "-c", "raise SystemExit('no such threads')"))

    monkeypatch.setattr(engine, "plan", picky)
    await use(stage, model)
    refused, plain = await asyncio.gather(
        use(stage, model, demand=bad),
        use(stage, model, demand=Demand(flags={"batch-size": 64})),
        return_exceptions=True,
    )
    assert isinstance(refused, LoadError)
    assert not isinstance(plain, BaseException), "who waited for something else is served"
    starts = len(engine.models)
    for _ in range(8):
        with pytest.raises(LoadError, match="the next try is in"):
            await use(stage, model, demand=bad)
        await use(stage, model)
    assert len(engine.models) == starts, "what runs never had to leave for it again"
    assert stage.at("a").failures == 0
    assert stage.at("a").failure is None
    await stage.manager.load(model)
    with pytest.raises(LoadError):
        await use(stage, model, demand=bad)
    assert len(engine.models) == starts + 1, "a person has all tried again"


def test_a_failed_demand_is_tried_again_after_a_rest() -> None:
    failures, error = FailedDemands(), LoadError("too much")
    for context in range(100):
        failures.failed(Demand(context=context), error, 10.0)
    assert failures.lately(Demand(context=99), 30.0) == (error, REST_S - 20)
    assert failures.lately(Demand(context=99), 10.0 + REST_S) is None
    assert failures.lately(Demand(context=99, exact=True), 10.0) is None
    assert failures.lately(Demand(context=0), 10.0) is None, "the oldest are forgotten"
    failures.reset()
    assert failures.lately(Demand(context=99), 10.0) is None
