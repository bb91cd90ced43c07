"""What the manager promises, over random histories: requests come, wait, leave and end, loads succeed and fail, engines
crash and are unloaded, files change and vanish. Runners are the real state machine around processes that do as the
history says; the clock is the history's too.

`LLAMARUNNER_HISTORIES=10000` runs so many of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import aiohttp
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from running import ListLog, ScriptedEngine

from llamarunner.catalog.catalog import Catalog, Model, ModelDetails, Weights
from llamarunner.config.schema import ModelSettings, SchedulerConfig
from llamarunner.engines.engine import LaunchPlan
from llamarunner.errors import EngineGoneError, LlamaRunnerError, LoadError
from llamarunner.events import EventBus, RunnerState
from llamarunner.runners import loads, manager, places, runner
from llamarunner.runners.crash import CauseKind
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.footprints import Footprints
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.health import Props
from llamarunner.runners.ledger import Ledger, NoGauge
from llamarunner.runners.manager import Lease, RunnerManager
from llamarunner.runners.placement import RAM, Device
from llamarunner.runners.runner import Runner

GIB = 1024**3
TOTAL = 10
SLOTS = 2
MAX_WAIT_S = 10.0
HISTORIES = int(os.environ.get("LLAMARUNNER_HISTORIES", "150"))


class Clock:
    now = 1000.0


class Loop(asyncio.SelectorEventLoop):
    """Its time is the history's; it never sleeps as long as something is to be done."""

    def time(self) -> float:
        return Clock.now

    @property
    def alarm(self) -> float | None:
        """When the next timer rings."""
        timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        return min(timers, default=None)


class StagedRunner(Runner):
    """The real one, without a process."""

    live: ClassVar[list[StagedRunner]] = []

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        loop = asyncio.get_running_loop()
        self.loading: asyncio.Future[Props] = loop.create_future()
        self.losing: asyncio.Future[None] = loop.create_future()
        self.ending: asyncio.Future[None] | None = None
        StagedRunner.live.append(self)

    async def _bring_up(self) -> Props:
        self.plan = LaunchPlan((), 1, "", {}, url="http://nowhere")
        self._become(RunnerState.LOADING, "staged")
        return await self.loading

    async def _watch_remote(self) -> None:
        await self.losing
        await self._lose(EngineGoneError("it crashed"))

    async def _end_process(self) -> None:
        if self.ending is None:
            self.ending = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.ending)
        if self in StagedRunner.live:
            StagedRunner.live.remove(self)


class TenGiB(NoGauge):
    def devices(self) -> Sequence[Device]:
        return [Device(RAM, "RAM", TOTAL * GIB)]


@dataclass(eq=False)
class Client:
    model: Model
    demand: Demand
    end: asyncio.Event = field(default_factory=asyncio.Event)
    lease: Lease | None = None
    is_served: bool = False
    refused: LlamaRunnerError | None = None
    task: asyncio.Task[None] | None = None


def a_model(name: str, gib: float, file: str = "", **more: Any) -> Model:
    """One whose weights alone are so large; 128 KiB for each token of its context."""
    size = int(gib * GIB)
    details = ModelDetails(
        architecture="llama", context_length=65536, block_count=8, embedding_length=4096,
        metadata={"llama.block_count": 8, "llama.embedding_length": 4096, "llama.attention.head_count": 32},
        weights=Weights(layers=(size // 8,) * 8, experts=(0,) * 8),
    )  # fmt: skip
    wanted = ModelSettings(**{"engine": "one", "context": 512, "parallel": SLOTS, "hang_timeout": 0, **more})
    return Model(name, Path(f"/models/{file or name}.gguf"), wanted, details, size_bytes=size)


ALL = (
    lambda: a_model("a", 3),
    lambda: a_model("alias-of-a", 3, file="a"),
    lambda: a_model("b", 4, keep_alive=0.0),
    lambda: a_model("c", 2, also_on=["two"], max_queue=3),
    lambda: a_model("d", 5, priority=-1, max_requests=5),
    lambda: a_model("e", 1, pin=True, keep_alive_min=20.0),
    lambda: a_model("huge", 40),
)
NAMES = [make().name for make in ALL]


class History(RuleBasedStateMachine):
    names = st.sampled_from([*NAMES, "a", "a", "c", "e"])
    demands = st.sampled_from([
        NO_DEMAND, NO_DEMAND, NO_DEMAND, Demand(context=1024), Demand(context=4096), Demand(context=60000),
        Demand(context=256, exact=True), Demand(context=512, exact=True), Demand(flags={"threads": 2}),
    ])  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        Clock.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: Clock.now)
        for module in (manager, places, loads, runner):
            self.patch.setattr(module, "time", clock)
        self.patch.setattr(loads, "Runner", StagedRunner)
        self.patch.setattr(asyncio, "to_thread", self.in_thread)
        StagedRunner.live = []
        self.loop = Loop()
        self.problems: list[Mapping[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self.threads: list[asyncio.Future[None]] = []
        self.threads_are_quick = False
        self.clients: list[Client] = []
        self.calls: list[asyncio.Task[Any]] = []
        self.catalog = Catalog(make() for make in ALL)
        self.run(self.begin())

    async def begin(self) -> None:
        engines = {name: ScriptedEngine({}, 20, None, None) for name in ("one", "two")}
        for name, engine in engines.items():
            engine.name = name
        self.manager = RunnerManager(
            engines, SchedulerConfig(max_wait=MAX_WAIT_S, max_queue=20), bus=EventBus(),
            guardian=cast(Guardian, None), session=cast(aiohttp.ClientSession, None), log_for=lambda _: ListLog(),
            ledger=Ledger(TenGiB(), Footprints(Path(os.devnull))),
        )  # fmt: skip

    @initialize(threads_are_quick=st.booleans())
    def configure(self, threads_are_quick: bool) -> None:
        self.threads_are_quick = threads_are_quick

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.threads_are_quick:
            await asyncio.sleep(0)
        else:
            done = self.loop.create_future()
            self.threads.append(done)
            await done
        return function(*args)

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(30):
                await asyncio.sleep(0)

        self.run(turns())

    # -- what may happen ---------------------------------------------------------------------------------------------

    async def ask(self, client: Client) -> None:
        try:
            async with self.manager.acquire(client.model, demand=client.demand) as lease:
                assert lease.place.runner is lease.runner or lease.runner.error is not None
                client.lease = lease
                try:
                    await client.end.wait()
                finally:
                    client.lease = None
            client.is_served = True
        except LlamaRunnerError as error:
            client.refused = error

    @rule(name=names, demand=demands, turns=st.booleans())
    def request(self, name: str, demand: Demand, turns: bool) -> None:
        if (model := self.catalog.get(name)) is None:
            return
        client = Client(model, demand)
        client.task = self.loop.create_task(self.ask(client))
        self.clients.append(client)
        if turns:
            self.turn()

    def pick(self, number: int, among: Sequence[Any]) -> Any:
        return among[number % len(among)] if among else None

    @rule(number=st.integers(0, 20), turns=st.booleans())
    def client_leaves(self, number: int, turns: bool) -> None:
        if client := self.pick(number, [c for c in self.clients if c.task and not c.task.done()]):
            client.task.cancel()
        if turns:
            self.turn()

    @rule(number=st.integers(0, 20), turns=st.booleans())
    def answer_ends(self, number: int, turns: bool) -> None:
        if client := self.pick(number, [c for c in self.clients if c.lease]):
            client.end.set()
        if turns:
            self.turn()

    @property
    def loading(self) -> list[StagedRunner]:
        return [r for r in StagedRunner.live if r.state is RunnerState.LOADING and not r.loading.done()]

    @precondition(lambda self: self.loading)
    @rule(number=st.integers(0, 5), turns=st.booleans())
    def load_ends(self, number: int, turns: bool) -> None:
        self.pick(number, self.loading).loading.set_result(Props(slots=SLOTS))
        if turns:
            self.turn()

    @precondition(lambda self: self.loading)
    @rule(number=st.integers(0, 5), cause=st.sampled_from([CauseKind.OUT_OF_MEMORY, "stalled"]))
    def load_fails(self, number: int, cause: str) -> None:
        """Its process has ended by itself, or hangs."""
        one = self.pick(number, self.loading)
        if cause == CauseKind.OUT_OF_MEMORY:
            one.ending = self.loop.create_future()
            one.ending.set_result(None)
        one.loading.set_exception(LoadError("it failed", cause=cause))
        self.turn()

    @rule(number=st.integers(0, 5), turns=st.booleans())
    def engine_crashes(self, number: int, turns: bool) -> None:
        ready = [r for r in StagedRunner.live if r.state is RunnerState.READY and not r.losing.done()]
        if (one := self.pick(number, ready)) is not None:
            one.losing.set_result(None)
        if turns:
            self.turn()

    @rule(number=st.integers(0, 5), turns=st.booleans())
    def process_ends(self, number: int, turns: bool) -> None:
        ending = [r for r in StagedRunner.live if r.ending is not None and not r.ending.done()]
        if (one := self.pick(number, ending)) is not None:
            one.ending.set_result(None)
        if turns:
            self.turn()

    @precondition(lambda self: any(not thread.done() for thread in self.threads))
    @rule(number=st.integers(0, 5))
    def thread_ends(self, number: int) -> None:
        self.pick(number, [thread for thread in self.threads if not thread.done()]).set_result(None)
        self.turn()

    def call(self, work: Any) -> None:
        async def outcome() -> None:
            try:
                await work
            except LlamaRunnerError:
                return

        self.calls.append(self.loop.create_task(outcome()))
        self.turn()

    @rule(name=names, force=st.booleans())
    def unload(self, name: str, force: bool) -> None:
        if model := self.catalog.get(name):
            self.call(self.manager.unload(model, force=force))

    @rule(name=names)
    def load(self, name: str) -> None:
        if model := self.catalog.get(name):
            self.call(self.manager.load(model))

    @rule(name=names, seconds=st.sampled_from([0.0, 5.0, 1000.0]))
    def keep(self, name: str, seconds: float) -> None:
        async def keep() -> None:
            if model := self.catalog.get(name):
                self.manager.set_keep_alive(model, seconds)

        self.call(keep())

    @rule(seconds=st.floats(0.1, 20))
    def time_passes(self, seconds: float) -> None:
        end, rings = Clock.now + seconds, 0
        self.turn()
        while (alarm := self.loop.alarm) is not None and alarm <= end:
            Clock.now, rings = max(Clock.now, alarm), rings + 1
            self.turn()
            assert rings < 200, "it rings for ever"
        Clock.now = end
        self.turn()

    @rule(gone=st.sets(names, max_size=2))
    def files_change(self, gone: set[str]) -> None:
        """What is there is read anew."""
        self.catalog = Catalog(model for make in ALL if (model := make()).name not in gone)

        async def adopt() -> None:
            self.manager.adopt(self.catalog)

        self.call(adopt())

    # -- what is promised --------------------------------------------------------------------------------------------

    @property
    def all_places(self) -> list[Any]:
        return list(self.manager._places)

    @invariant()
    def promises(self) -> None:
        self.turn()
        assert not self.problems, self.problems
        held = [place.runner for place in self.all_places if place.runner is not None]
        assert len(held) == len(set(map(id, held)))
        for live in StagedRunner.live:
            assert live in held, f"{live.name} runs and nobody knows of it"
        leases = [client.lease for client in self.clients if client.lease is not None]
        for place in self.all_places:
            mine = [lease for lease in leases if lease.place is place]
            assert place.leases >= len(mine), "a lease is not counted"
            assert place.unstreamed == place.leases
            assert all(count > 0 for count in place.holders.values())
            if place.is_ready:
                assert place.leases <= max(place.slots, 1)
                free = place.leases < place.slots
                if place.waiters and free and not self.is_learning:
                    assert not place.meets(place.waiters.first(Clock.now).demand), "nobody serves who waits"
        sizes = [place.placement for place in self.all_places if place.runner is not None]
        assert all(size is not None for size in sizes), "loaded without asking what it needs"
        assert sum(size.bytes_by_device[RAM] for size in sizes) <= TOTAL * GIB
        for client in self.clients:
            assert client.task is not None
            if client.task.done() and not client.task.cancelled():
                client.task.result()
            if client.lease is not None:
                launched = replace(client.lease.runner.model, settings=client.lease.runner.model.settings)
                assert client.demand.within(client.model).is_met_by(launched), "it has not what it asked for"

    @property
    def is_learning(self) -> bool:
        return any(not thread.done() for thread in self.threads)

    def go_on(self) -> None:
        """All that has begun comes to its end, and a second passes."""
        for thread in self.threads:
            if not thread.done():
                thread.set_result(None)
        self.turn()
        for each in self.loading:
            each.loading.set_result(Props(slots=SLOTS))
        for each in list(StagedRunner.live):
            if each.ending is not None and not each.ending.done():
                each.ending.set_result(None)
        self.turn()
        for client in self.clients:
            client.end.set()
        self.turn()
        self.time_passes(1.0)
        self.promises()

    def teardown(self) -> None:
        try:
            begun = Clock.now
            asked = [*self.calls, *(client.task for client in self.clients if client.task is not None)]
            while not all(task.done() for task in asked):
                waiting = {place.name: len(place.waiters) for place in self.all_places if place.waiters}
                assert Clock.now - begun < (MAX_WAIT_S + 10) * len(ALL), f"still waiting: {waiting}"
                self.go_on()
            for place in self.all_places:
                assert (place.leases, len(place.waiters), place.unstreamed) == (0, 0, 0)
            closing = self.loop.create_task(self.manager.close(0))
            for _ in range(5):
                self.go_on()
            assert closing.done(), "it does not close"
            assert not StagedRunner.live, "an engine is left"
            left = asyncio.all_tasks(self.loop)
            assert not left, f"tasks are left: {left}"
            assert self.loop.alarm is None, "an alarm is left"
            assert not self.problems, self.problems
        finally:
            self.patch.undo()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.run(asyncio.sleep(0))
            self.loop.close()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=HISTORIES, stateful_step_count=40, deadline=None)
