"""Many loads and many requests on real processes of the scripted engine: nothing is left behind, nobody is lost.

LLAMARUNNER_SOAK=1 makes them longer: 500 cycles and 1,000 requests, some minutes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import aiohttp
import psutil
import pytest
from running import ListLog, ScriptedEngine, children, open_files, soon

from llamarunner.catalog.catalog import Model, ModelDetails, Weights
from llamarunner.config.schema import ModelSettings, SchedulerConfig
from llamarunner.events import EventBus, RunnerChanged, RunnerState
from llamarunner.runners.footprints import Footprints
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.ledger import Ledger
from llamarunner.runners.manager import RunnerManager
from llamarunner.runners.placement import RAM, Device

GIB, MB = 1024**3, 10**6
IS_LONG = bool(os.environ.get("LLAMARUNNER_SOAK"))
CYCLES, REQUESTS = (500, 1000) if IS_LONG else (50, 300)
AT_ONCE = 5  # cycles side by side
MAX_WAIT_S = 0.5
LOAD_S = 10.0  # allowed for one load, and for the engine before it to leave, on a busy machine

pytestmark = pytest.mark.timeout(1800 if IS_LONG else 90)


class TenGiB:
    """A Gauge of a machine with RAM alone and nobody else on it; what is placed is what is held."""

    def devices(self) -> Sequence[Device]:
        return [Device(RAM, "RAM", 10 * GIB)]

    def used(self) -> Mapping[str, int]:
        return {}

    def held(self, pid: int) -> Mapping[str, int]:
        return {}

    async def refresh(self) -> None:
        return


class Stage:
    """A manager of models each of which takes its engine by its name."""

    def __init__(self, guardian: Guardian, session: aiohttp.ClientSession, footprints: Path) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.bus = EventBus()
        self.manager = RunnerManager(
            self.engines, SchedulerConfig(max_wait=MAX_WAIT_S, max_queue=REQUESTS), bus=self.bus, guardian=guardian,
            session=session, log_for=lambda _: ListLog(), ledger=Ledger(TenGiB(), Footprints(footprints)),
        )  # fmt: skip

    def model(self, name: str, gib: float) -> Model:
        self.engines[name] = ScriptedEngine({"load_s": 0}, 30, None, None)
        size = int(gib * GIB)
        details = ModelDetails(
            architecture="llama", context_length=512, block_count=8, embedding_length=64,
            metadata={"llama.block_count": 8, "llama.embedding_length": 64, "llama.attention.head_count": 1},
            weights=Weights(layers=(size // 8,) * 8, experts=(0,) * 8),
        )  # fmt: skip
        return Model(
            name, Path(f"/models/{name}.gguf"), ModelSettings(engine=name, context=512), details, size_bytes=size
        )

    @property
    def keys(self) -> set[str]:
        """Of all engines there ever were."""
        return {plan.api_key for engine in self.engines.values() for plan in engine.plans}


@pytest.fixture
async def stage(guardian: Guardian, tmp_path: Path) -> AsyncIterator[Stage]:
    await guardian.start()
    async with aiohttp.ClientSession() as session:
        made = Stage(guardian, session, tmp_path / "footprints.json")
        yield made
        await made.manager.close(0)


def engines_alive(keys: set[str]) -> list[int]:
    """Processes that were given one of the keys, wherever they went."""
    alive = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LLAMA_API_KEY") in keys:
                alive.append(process.pid)
        except psutil.Error:  # it has ended, or is another user's
            continue
    return alive


def left_behind() -> tuple[int, set[int], int, int]:
    """Descriptors, children (zombies too), tasks and sockets."""
    return open_files(), children(), len(asyncio.all_tasks()), len(psutil.Process().net_connections())


async def test_loading_again_and_again_leaves_nothing(stage: Stage) -> None:
    models = [stage.model(f"m{number}", 0.5) for number in range(AT_ONCE)]

    async def cycle(model: Model) -> None:
        async with stage.manager.acquire(model) as lease:
            assert lease.runner.state is RunnerState.READY
        await stage.manager.unload(model)
        assert lease.runner.state is RunnerState.STOPPED

    for model in models:  # what is made once is made here: the pool of threads, the guardian, buffers
        await cycle(model)
    await soon(lambda: len(asyncio.all_tasks()) == 1)
    gc.collect()
    before, rss, threads = left_behind(), psutil.Process().memory_info().rss, threading.active_count()
    for _ in range(CYCLES // AT_ONCE):
        await asyncio.gather(*(cycle(model) for model in models))
    starts = sum(len(engine.plans) for engine in stage.engines.values())
    assert starts >= CYCLES + AT_ONCE, "more only where another program took a port first"
    await soon(lambda: left_behind() == before)
    assert threading.active_count() <= threads + 8, "the pool that asyncio.to_thread keeps"
    assert engines_alive(stage.keys) == []
    gc.collect()
    grown = psutil.Process().memory_info().rss - rss
    print(f"{CYCLES} cycles: RSS grew by {grown / MB:.1f} MB")
    assert grown < 10 * MB


async def test_more_models_than_fit_and_every_request_is_answered_once(stage: Stage) -> None:
    """Clients that go on asking for any of five models, of which two fit."""
    models = [stage.model(f"m{number}", 4) for number in range(5)]
    dice = random.Random(5)
    wanted = [dice.choice(models) for _ in range(REQUESTS)]
    answers: list[str] = []
    waits: list[float] = []
    there: dict[str, RunnerState] = {}
    most, loads = 0, 0

    def note(change: RunnerChanged) -> None:
        nonlocal most, loads
        there[change.model] = change.new
        loads += change.new is RunnerState.READY
        most = max(most, sum(state is not RunnerState.STOPPED for state in there.values()))

    stage.bus.subscribe(lambda event: note(event) if isinstance(event, RunnerChanged) else None)

    async def one_client(session: aiohttp.ClientSession) -> None:
        while wanted:
            model, asked = wanted.pop(), time.monotonic()
            async with stage.manager.acquire(model) as lease:
                waits.append(time.monotonic() - asked)
                body = {"messages": [], "max_tokens": 3}
                url = f"{lease.base_url}/v1/chat/completions"
                async with session.post(url, json=body, headers=lease.headers) as response:
                    assert response.status == 200
                    answer = await response.json()
                assert answer["choices"][0]["message"]["content"] == "Hello there!"
                assert there[model.name] in (RunnerState.READY, RunnerState.DRAINING), "its engine left before the end"
                answers.append(model.name)

    expected = sorted(model.name for model in wanted)
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one_client(session) for _ in range(30)))
    assert sorted(answers) == expected
    assert most <= 2, "more were loaded than fit"
    waits.sort()
    figures = (
        f"p50 {waits[len(waits) // 2]:.2f} s, p99 {waits[len(waits) * 99 // 100]:.2f} s, longest {waits[-1]:.2f} s"
    )
    print(f"{REQUESTS} requests, {loads} loads: waited {figures}")
    # before it, two of the other four at a time: each keeps its place for the longest wait, and then makes room
    assert waits[-1] <= 2 * (MAX_WAIT_S + LOAD_S)
    assert loads > len(models), "nothing was ever evicted"
