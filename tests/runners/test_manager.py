"""Leases, joining, swapping, draining and leaving, on real processes of the scripted engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import ListLog, ScriptedEngine, is_alive, soon

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import ModelSettings, SchedulerConfig
from llamarunner.errors import EngineError, EngineMissingError, LoadError, OverloadedError, UnsupportedError
from llamarunner.events import EventBus, RequestPhase, RequestTrace, RunnerChanged, RunnerState
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.manager import RunnerManager
from llamarunner.runners.place import Residence


class Stage:
    """A manager over scripted engines: a model's script is that of its engine."""

    def __init__(self, guardian: Guardian, session: aiohttp.ClientSession, **settings: Any) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.changes: list[RunnerChanged] = []
        bus = EventBus()
        bus.subscribe(lambda event: self.changes.append(event) if isinstance(event, RunnerChanged) else None)
        self.manager = RunnerManager(
            self.engines,
            SchedulerConfig(**{"min_residency": 0, **settings}),
            bus=bus,
            guardian=guardian,
            session=session,
            log_for=lambda _: ListLog(),
        )

    def model(
        self, name: str, *, load_timeout_s: float = 20, keep_alive: float = 300, pin: bool = False, **script: Any
    ) -> Model:
        self.engines[name] = ScriptedEngine(script, load_timeout_s, None, None)
        return Model(name, Path(f"/models/{name}.gguf"), ModelSettings(engine=name, keep_alive=keep_alive, pin=pin))

    def at(self, name: str) -> Residence:
        """The model's residence, or that of one which never had any."""
        return self.manager.residence(name) or Residence(None, 0, 0, 0.0, None, None, 0.0)

    def states(self, name: str) -> list[RunnerState]:
        return [change.new for change in self.changes if change.model == name]

    def reasons(self, name: str) -> list[str]:
        return [change.reason for change in self.changes if change.model == name]

    def spawns(self, name: str) -> int:
        return self.states(name).count(RunnerState.STARTING)


@pytest.fixture
async def make_stage(guardian: Guardian) -> AsyncIterator[Any]:
    stages: list[Stage] = []
    async with aiohttp.ClientSession() as session:

        def make(**settings: Any) -> Stage:
            stages.append(Stage(guardian, session, **settings))
            return stages[-1]

        yield make
        for stage in stages:
            await stage.manager.close(0)


async def use(stage: Stage, model: Model, hold: asyncio.Event | None = None, **more: Any) -> int:
    """A request: its runner's number."""
    async with stage.manager.acquire(model, **more) as lease:
        if hold is not None:
            await hold.wait()
        return lease.runner.runner_id


async def test_a_hundred_first_requests_are_one_spawn(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", load_s=0.3)
    numbers = await asyncio.gather(*(use(stage, model) for _ in range(100)))
    assert len(set(numbers)) == 1
    assert stage.spawns("a") == 1
    assert stage.states("a") == [RunnerState.STARTING, RunnerState.LOADING, RunnerState.READY]


async def test_the_lease_leads_to_an_engine_that_answers(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a")
    trace = RequestTrace("ollama", "/api/chat", "")
    async with stage.manager.acquire(model, trace) as lease, aiohttp.ClientSession() as session:
        async with session.get(f"{lease.base_url}/props", headers=lease.headers) as answer:
            assert answer.status == 200
        assert trace.phase is RequestPhase.PROMPT
        assert trace.granted is not None
        assert trace.load_started is not None
        assert trace.started <= trace.load_started <= trace.granted
        assert lease.waited_s > 0
        assert stage.at("a").in_flight == 1
        assert stage.at("a").idle_left_s is None
    assert stage.at("a").in_flight == 0
    assert 299 < stage.at("a").idle_left_s <= 300


async def test_models_take_turns_and_none_is_cut(make_stage: Any) -> None:
    """A B A B is served A A B B, each model loaded once."""
    stage = make_stage(max_loaded=1)
    a, b = stage.model("a", load_s=0.2), stage.model("b", load_s=0.2)
    served: list[str] = []

    async def request(model: Model) -> None:
        async with stage.manager.acquire(model):
            served.append(model.name)

    async with asyncio.TaskGroup() as group:
        for model in (a, b, a, b):
            group.create_task(request(model))
            await asyncio.sleep(0)  # in this order
    assert served == ["a", "a", "b", "b"]
    assert (stage.spawns("a"), stage.spawns("b")) == (1, 1)
    assert "evicted for b" in stage.reasons("a")


async def test_a_model_that_answers_stays_until_it_has(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    a, b = stage.model("a"), stage.model("b")
    hold = asyncio.Event()
    first = asyncio.create_task(use(stage, a, hold))
    await soon(lambda: stage.at("a").in_flight)
    second = asyncio.create_task(use(stage, b))
    await soon(lambda: stage.at("b").queued)
    assert stage.states("a")[-1] is RunnerState.READY
    hold.set()
    await first
    await second
    assert stage.states("a")[-1] is RunnerState.STOPPED


async def test_a_steady_stream_on_one_model_does_not_starve_another(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1, max_wait=0.3)
    a, b = stage.model("a"), stage.model("b")
    stop = asyncio.Event()

    async def stream() -> None:
        while not stop.is_set():
            async with stage.manager.acquire(a):
                await asyncio.sleep(0.05)

    await use(stage, a)
    streams = [asyncio.create_task(stream()) for _ in range(3)]
    await soon(lambda: (stage.at("a").in_flight, stage.at("a").queued) == (2, 1))  # its engine has two slots
    async with asyncio.timeout(10):
        await use(stage, b)
    assert any(reason.startswith("makes room for b") for reason in stage.reasons("a"))
    stop.set()
    await asyncio.gather(*streams)
    assert stage.spawns("a") >= 2, "a was loaded again for those who came meanwhile"


async def test_who_leaves_while_waiting_costs_nothing(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    a, b, c = stage.model("a"), stage.model("b"), stage.model("c")
    hold = asyncio.Event()
    holder = asyncio.create_task(use(stage, a, hold))
    await soon(lambda: stage.at("a").in_flight)
    leaver, stayer = asyncio.create_task(use(stage, b)), asyncio.create_task(use(stage, c))
    await soon(lambda: stage.at("c").queued)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    assert stage.at("b").queued == 0
    hold.set()
    await asyncio.gather(holder, stayer)
    assert stage.spawns("b") == 0


async def test_a_grant_nobody_takes_is_given_back(make_stage: Any) -> None:
    """The waiter is cancelled in the very turn of the loop in which it is granted."""
    stage = make_stage()
    model = stage.model("a", keep_alive=math.inf)
    task = asyncio.create_task(use(stage, model))
    await soon(lambda: RunnerState.STARTING in stage.states("a"))
    while stage.states("a")[-1] is not RunnerState.READY:  # noqa: ASYNC110 the point is to hit that very turn of the loop
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await soon(lambda: stage.at("a").in_flight == 0)
    assert stage.at("a").idle_left_s == math.inf


async def test_an_abandoned_load_makes_room(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    slow, quick = stage.model("slow", load_s=60), stage.model("quick")
    waiter = asyncio.create_task(use(stage, slow))
    await soon(lambda: RunnerState.LOADING in stage.states("slow"))
    waiter.cancel()
    async with asyncio.timeout(10):
        await use(stage, quick)
    assert stage.states("slow")[-1] in (RunnerState.STOPPED, RunnerState.FAILED)


async def test_idle_models_leave_after_their_keep_alive(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", keep_alive=0.2)
    await use(stage, model)
    await soon(lambda: stage.states("a")[-1] is RunnerState.STOPPED)
    assert "idle for 200ms" in stage.reasons("a")


async def test_the_newest_keep_alive_counts(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a")
    await use(stage, model, keep_alive_s=math.inf)
    assert stage.at("a").idle_left_s == math.inf
    await use(stage, model)
    assert stage.at("a").idle_left_s == math.inf, "none given: as it was"
    await use(stage, model, keep_alive_s=0)
    await soon(lambda: stage.states("a")[-1] is RunnerState.STOPPED)


async def test_expire_waits_for_the_answer(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    stage.manager.expire(model)  # not loaded: no harm
    task = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    stage.manager.expire(model)
    assert stage.states("a")[-1] is RunnerState.READY
    hold.set()
    await task
    await soon(lambda: stage.states("a")[-1] is RunnerState.STOPPED)


async def test_a_pinned_model_stays(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    pinned, other = stage.model("pinned", keep_alive=0.05, pin=True), stage.model("other")
    await use(stage, pinned)
    waiter = asyncio.create_task(use(stage, other))
    await asyncio.sleep(0.3)
    assert stage.states("pinned")[-1] is RunnerState.READY
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)


async def test_unload_waits_for_answers_and_force_does_not(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    unloading = asyncio.create_task(stage.manager.unload(model))
    await soon(lambda: stage.states("a")[-1] is RunnerState.DRAINING)
    late = asyncio.create_task(use(stage, model))
    await soon(lambda: stage.at("a").queued)
    hold.set()
    await asyncio.gather(holder, unloading)
    await late
    assert stage.spawns("a") == 2, "who came while it drained loaded it again"

    hold.clear()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    async with asyncio.timeout(5):
        await stage.manager.unload(model, force=True)
    assert stage.states("a")[-1] is RunnerState.STOPPED
    hold.set()
    await holder


async def test_unload_during_a_load_tells_those_who_wait(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", load_s=60)
    waiters = [asyncio.create_task(use(stage, model)) for _ in range(5)]
    await soon(lambda: RunnerState.LOADING in stage.states("a"))
    await stage.manager.unload(model)
    errors = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(isinstance(error, LoadError) and "unloaded" in error.message for error in errors), errors


async def test_a_load_that_fails_fails_for_all_and_the_next_request_tries_again(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", exit={"at": "load", "code": 3})
    errors = await asyncio.gather(*(use(stage, model) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(error, LoadError) and error.exit_code == 3 for error in errors), errors
    assert stage.spawns("a") == 1
    residence = stage.at("a")
    assert residence.runner is None
    assert residence.failure is errors[0]
    stage.model("a")
    await use(stage, model)
    assert stage.at("a").failure is None


async def test_a_model_that_keeps_failing_is_left_alone_until_a_person_loads_it(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", exit={"at": "load", "code": 3})
    for spawns in (1, 2):
        with pytest.raises(LoadError):
            await use(stage, model)
        assert stage.spawns("a") == spawns
    with pytest.raises(LoadError, match="the next try is in") as refused:
        await use(stage, model)
    assert refused.value.exit_code == 3
    assert stage.spawns("a") == 2, "no attempt was made"
    stage.model("a")
    await stage.manager.load(model)
    assert stage.spawns("a") == 3
    await use(stage, model)


async def test_an_unknown_engine_is_told(make_stage: Any) -> None:
    stage = make_stage()
    model = Model("a", Path("/models/a.gguf"), ModelSettings(engine="nonesuch"))
    with pytest.raises(EngineMissingError, match="nonesuch"):
        await use(stage, model)


async def test_a_plan_that_cannot_be_made_is_told_as_the_engines_fault(make_stage: Any) -> None:
    """A flag in the configuration that the engine does not have: no client's mistake."""
    stage = make_stage()
    model = stage.model("a")
    stage.engines["a"].error = UnsupportedError("unknown flag --x", hint="did you mean --y?")
    with pytest.raises(EngineError, match="unknown flag --x") as failed:
        await use(stage, model)
    assert (failed.value.status, failed.value.hint) == (500, "did you mean --y?")
    assert stage.at("a").failure is failed.value


async def test_an_engine_that_dies_is_loaded_again_by_the_next_request(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", exit={"at": "ready", "after_s": 0.1, "signal": 11})
    await use(stage, model)
    await soon(lambda: stage.at("a").failure)
    assert stage.at("a").runner is None
    await use(stage, model)
    assert stage.spawns("a") == 2


async def test_no_more_go_to_an_engine_than_it_has_slots(make_stage: Any) -> None:
    """And those who came first go first, also before one that comes when a slot is just free."""
    stage = make_stage()
    model = stage.model("a")
    order: list[int] = []
    most = 0

    async def request(number: int) -> None:
        nonlocal most
        async with stage.manager.acquire(model, RequestTrace("ollama", "/api/chat", "")):
            order.append(number)
            most = max(most, stage.at("a").in_flight)
            await asyncio.sleep(0.02)

    await stage.manager.load(model)
    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(request(number))
            await asyncio.sleep(0)
    assert most == 2
    assert order == list(range(10))


async def test_who_waits_is_told_for_what_and_how_long(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    a, b = stage.model("a", load_s=0.1), stage.model("b", load_s=0.1)
    async with stage.manager.acquire(a, RequestTrace("ollama", "/api/chat", "")):
        pass
    hold = asyncio.Event()
    traces = [RequestTrace("ollama", "/api/chat", "") for _ in range(4)]
    holders = [asyncio.create_task(use(stage, a, hold, trace=trace)) for trace in traces[:3]]
    other = asyncio.create_task(use(stage, b, trace=traces[3]))
    await soon(lambda: len(stage.manager.outlooks()) == 2)
    found = stage.manager.outlooks()
    third, fourth = found[traces[2].request_id], found[traces[3].request_id]
    assert (third.position, third.reason) == (1, "waiting for a: 2 answers running")
    assert third.left_s is not None
    assert (fourth.position, fourth.reason) == (2, "waiting for room: a (2 answers running)")
    assert fourth.left_s is None, "b was never loaded: nobody knows how long that takes"
    hold.set()
    await asyncio.gather(*holders, other)
    assert stage.manager.outlooks() == {}


async def test_a_full_queue_refuses(make_stage: Any) -> None:
    stage = make_stage(max_queue=3)
    model = stage.model("a", load_s=60)
    waiters = [asyncio.create_task(use(stage, model)) for _ in range(3)]
    await soon(lambda: stage.at("a").queued == 3)
    with pytest.raises(OverloadedError):
        await use(stage, model)
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


async def test_close_lets_answers_end_and_refuses_new_ones(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    pid = stage.at("a").runner.pid
    closing = asyncio.create_task(stage.manager.close(30))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="shutting down"):
        await use(stage, model)
    assert is_alive(pid)
    hold.set()
    await asyncio.gather(holder, closing)
    assert not is_alive(pid)


async def test_close_ends_answers_that_take_too_long_and_can_be_hurried(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    pid = stage.at("a").runner.pid
    patient = asyncio.create_task(stage.manager.close(60))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await stage.manager.close(0)
    assert not is_alive(pid)
    hold.set()
    await asyncio.gather(holder, patient)


async def test_random_traffic_keeps_every_promise(make_stage: Any) -> None:
    """Three models, room for two, a hundred requests of which some leave: each is answered once, never too many run."""
    import random

    dice = random.Random(7)
    stage = make_stage(max_loaded=2, max_wait=1)
    models = [stage.model(name, load_s=0.05, keep_alive=0.3) for name in "abc"]
    most = 0

    async def request(model: Model) -> None:
        nonlocal most
        await asyncio.sleep(dice.random())
        async with asyncio.timeout(dice.choice([0.02, 30, 30, 30])), stage.manager.acquire(model):
            alive = [m for m in "abc" if stage.at(m).runner]
            most = max(most, len(alive))
            await asyncio.sleep(dice.random() / 20)

    results = await asyncio.gather(*(request(dice.choice(models)) for _ in range(100)), return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), TimeoutError}
    assert results.count(None) >= 60
    assert most <= 2
    for name in "abc":
        residence = stage.at(name)
        assert (residence.in_flight, residence.queued) == (0, 0)


async def test_how_long_a_load_took_is_known_when_the_next_begins(make_stage: Any) -> None:
    stage = make_stage()
    model = stage.model("a", load_s=0.2)
    assert stage.at("a").load_s is None
    await use(stage, model)
    took = stage.at("a").load_s
    assert took is not None
    assert took >= 0.2
    await stage.manager.unload(model)
    again = asyncio.create_task(use(stage, model))
    await soon(lambda: stage.spawns("a") == 2)
    runner = stage.at("a").runner
    assert runner is not None
    assert runner.load_s is None
    assert runner.load_begun is not None
    assert stage.at("a").load_s == took
    await again
