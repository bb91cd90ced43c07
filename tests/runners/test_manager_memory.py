"""The manager with memory: real processes of the scripted engine on a machine whose memory the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import ListLog, ScriptedEngine, soon

from llamarunner.catalog.catalog import Model, ModelDetails, Weights
from llamarunner.config.schema import ModelSettings, SchedulerConfig
from llamarunner.errors import DoesNotFitError, LoadError
from llamarunner.events import EventBus, RunnerChanged, RunnerState
from llamarunner.runners import scheduler
from llamarunner.runners.demand import Demand
from llamarunner.runners.footprints import Footprints
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.ledger import Ledger, placed
from llamarunner.runners.manager import RunnerManager
from llamarunner.runners.placement import RAM, Device, Placement

GIB = 1024**3


class Machine:
    """A Gauge: what engines hold is as placed, by pid once they run; the rest is as the test says."""

    def __init__(self, *devices: Device) -> None:
        self.all = list(devices)
        self.manager: RunnerManager | None = None
        self.lag: dict[str, int] = {}  # given back late
        self.refreshed = 0

    def devices(self) -> Sequence[Device]:
        return [
            replace(each, used_by_others_bytes=each.used_by_others_bytes + self.lag.get(each.id, 0))
            for each in self.all
        ]

    def used(self) -> Mapping[str, int]:
        used = {each.id: each.used_by_others_bytes + self.lag.get(each.id, 0) for each in self.all}
        assert self.manager is not None
        for name in "abcdef":
            placement = self._placement(name)
            for device, size in (placement.bytes_by_device if placement else {}).items():
                used[device] += size
        return used

    def _placement(self, name: str) -> Placement | None:
        assert self.manager is not None
        residence = self.manager.residence(name)
        running = residence is not None and residence.runner is not None and residence.runner.pid is not None
        return self.manager._places[name].placement if running else None

    def held(self, pid: int) -> Mapping[str, int]:
        return {}

    async def refresh(self) -> None:
        self.refreshed += 1
        await asyncio.sleep(0)


class Stage:
    def __init__(
        self, guardian: Guardian, session: aiohttp.ClientSession, machine: Machine, folder: Path, **settings: Any
    ) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.changes: list[RunnerChanged] = []
        self.bus = bus = EventBus()
        bus.subscribe(lambda event: self.changes.append(event) if isinstance(event, RunnerChanged) else None)
        self.machine, self.footprints = machine, Footprints(folder / "footprints.json")
        scheduler_config = SchedulerConfig(**{"max_wait": 0.3, "min_residency": 0, **settings})
        self.manager = machine.manager = RunnerManager(
            self.engines, scheduler_config, bus=bus, guardian=guardian, session=session,
            log_for=lambda _: ListLog(), ledger=Ledger(machine, self.footprints),
        )  # fmt: skip

    def model(self, name: str, gib: float, **more: Any) -> Model:
        """A model whose weights alone are so large."""
        self.engines[name] = ScriptedEngine(more.pop("script", {}), 20, None, None)
        size = int(gib * GIB)
        details = ModelDetails(
            architecture="llama", context_length=512, block_count=8, embedding_length=64,
            metadata={"llama.block_count": 8, "llama.embedding_length": 64, "llama.attention.head_count": 1},
            weights=Weights(layers=(size // 8,) * 8, experts=(0,) * 8),
        )  # fmt: skip
        settings = ModelSettings(engine=name, context=512, **more)
        return Model(name, Path(f"/models/{name}.gguf"), settings, details, size_bytes=size)

    def reasons(self, name: str) -> list[str]:
        return [change.reason for change in self.changes if change.model == name]

    def spawns(self, name: str) -> int:
        return sum(change.new is RunnerState.STARTING for change in self.changes if change.model == name)

    def state(self, name: str) -> RunnerState:
        return [change.new for change in self.changes if change.model == name][-1]


@pytest.fixture
async def make_stage(guardian: Guardian, tmp_path: Path) -> AsyncIterator[Any]:
    stages: list[Stage] = []
    async with aiohttp.ClientSession() as session:

        def make(*devices: Device, **settings: Any) -> Stage:
            stages.append(Stage(guardian, session, Machine(*devices), tmp_path, **settings))
            return stages[-1]

        yield make
        for stage in stages:
            await stage.manager.close(0)


def ram(gib: float) -> Device:
    return Device(RAM, "RAM", int(gib * GIB))


def gpu(index: int, gib: float) -> Device:
    return Device(f"gpu{index}", f"GPU {index}", int(gib * GIB), uuid=f"GPU-{index}")


async def use(stage: Stage, model: Model, hold: asyncio.Event | None = None) -> None:
    async with stage.manager.acquire(model):
        if hold is not None:
            await hold.wait()


async def test_what_fits_stays_and_what_does_not_fit_makes_room(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    a, b, c = stage.model("a", 3), stage.model("b", 3), stage.model("c", 5)
    await use(stage, a)
    await use(stage, b)
    assert (stage.state("a"), stage.state("b")) == (RunnerState.READY, RunnerState.READY)
    await use(stage, c)
    assert stage.state("a") is RunnerState.STOPPED, "the one that would have left first"
    assert stage.state("b") is RunnerState.READY
    assert any(reason.startswith("evicted for c: needs 5.") for reason in stage.reasons("a"))


async def test_a_model_larger_than_the_machine_is_refused_at_once_without_a_spawn(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    async with asyncio.timeout(1):
        with pytest.raises(DoesNotFitError, match=r"huge needs 20\.\d GiB of RAM, which has 10\.0 GiB free"):
            await use(stage, replace(stage.model("a", 20), name="huge"))
    assert not stage.changes


async def test_a_busy_model_is_waited_for_and_its_memory_never_given_twice(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    a, b, hold = stage.model("a", 7), stage.model("b", 7), asyncio.Event()
    holder = asyncio.create_task(use(stage, a, hold))
    await soon(lambda: stage.changes and stage.state("a") is RunnerState.READY)
    waiter = asyncio.create_task(use(stage, b))
    await soon(lambda: stage.state("a") is RunnerState.DRAINING)  # after max_wait
    assert stage.spawns("b") == 0
    hold.set()
    await asyncio.gather(holder, waiter)


async def test_models_spread_over_gpus_and_their_engines_see_only_theirs(make_stage: Any) -> None:
    stage = make_stage(ram(64), gpu(0, 8), gpu(1, 24))
    small, large = stage.model("a", 4), stage.model("b", 18)
    await use(stage, small)
    await use(stage, large)
    seen = {name: stage.engines[name].models[-1].settings for name in "ab"}
    assert seen["a"].env["CUDA_VISIBLE_DEVICES"] == "GPU-0"
    assert seen["b"].env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert (seen["a"].gpu_layers, seen["b"].gpu_layers) == (9, 9), "eight layers and the output"


async def test_a_model_for_two_gpus_is_split(make_stage: Any) -> None:
    stage = make_stage(ram(64), gpu(0, 12), gpu(1, 12))
    await use(stage, stage.model("a", 18))
    flags = stage.engines["a"].models[-1].settings.flags
    assert sorted(map(int, str(flags["tensor-split"]).split(","))) == [4, 5]


async def test_the_next_load_waits_until_the_memory_is_back(make_stage: Any) -> None:
    stage = make_stage(ram(64), gpu(0, 12))
    a, b = stage.model("a", 9), stage.model("b", 9)
    await use(stage, a)
    used = stage.machine.used()["gpu0"]

    def late(change: RunnerChanged | Any) -> None:
        if isinstance(change, RunnerChanged) and change.model == "a" and change.new is RunnerState.STOPPED:
            stage.machine.lag["gpu0"] = used
            asyncio.get_running_loop().call_later(0.3, stage.machine.lag.clear)

    stage.bus.subscribe(late)
    async with asyncio.timeout(10):
        await use(stage, b)
    assert stage.machine.refreshed > 3, "it looked again and again"
    assert stage.spawns("b") == 1
    assert stage.engines["b"].models[-1].settings.gpu_layers == 9, "whole on the GPU, not partly in RAM"


async def test_out_of_memory_unloads_the_idle_and_tries_once_more(make_stage: Any) -> None:
    stage = make_stage(ram(100))
    idle = stage.model("a", 1)
    await use(stage, idle)
    out = {"exit": {"at": "load", "code": 1}, "log": ["ggml_cuda: cudaMalloc failed: out of memory"]}
    with pytest.raises(LoadError) as failed:
        await use(stage, stage.model("b", 1, script=out))
    assert failed.value.cause == "out_of_memory"
    assert stage.spawns("b") == 2
    assert stage.state("a") is RunnerState.STOPPED
    assert "evicted for b, which ran out of memory" in stage.reasons("a")


async def test_a_context_that_fits_nowhere_leaves_the_loaded_model_alone(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    model = stage.model("a", 3)
    trained = replace(model, details=replace(model.details, context_length=10**9))
    await use(stage, trained)
    with pytest.raises(DoesNotFitError, match="a needs"):
        async with stage.manager.acquire(trained, demand=Demand(context=10**8)):
            pass
    await use(stage, trained)
    assert stage.spawns("a") == 1


async def test_foreign_memory_counts(make_stage: Any) -> None:
    stage = make_stage(ram(10))
    stage.machine.all[0] = replace(stage.machine.all[0], used_by_others_bytes=6 * GIB)
    with pytest.raises(DoesNotFitError, match=r"6\.0 GiB other programs"):
        await use(stage, stage.model("a", 7))
    stage.machine.all[0] = replace(stage.machine.all[0], used_by_others_bytes=0)
    await use(stage, stage.model("a", 7))


async def test_idle_models_leave_when_other_programs_want_their_memory(
    make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_LOOK_AT_OTHERS_S", 0.05)
    stage = make_stage(ram(10), yield_to_others=True)
    hold = asyncio.Event()
    await use(stage, stage.model("a", 3))
    busy = asyncio.create_task(use(stage, stage.model("b", 3), hold))
    await soon(lambda: stage.spawns("b") and stage.state("b") is RunnerState.READY)
    stage.machine.all[0] = replace(stage.machine.all[0], used_by_others_bytes=6 * GIB)
    await soon(lambda: stage.state("a") is RunnerState.STOPPED)
    assert "gives way to other programs, which hold 6.0 GiB of RAM" in stage.reasons("a")
    assert stage.state("b") is RunnerState.READY, "it answers"
    hold.set()
    await busy


def test_placing_a_model_changes_only_where_it_lies() -> None:
    model = Model("a", Path("/a.gguf"), ModelSettings(flags={"mlock": True}, env={"X": "1"}))
    assert placed(model, None) is model
    assert placed(model, Placement({RAM: 5})).settings == model.settings
    put = placed(model, Placement({"gpu0": 5}, 7, (3, 4), ("gpu0", "gpu1"), {"CUDA_VISIBLE_DEVICES": "0,1"}))
    assert put.settings.gpu_layers == 7
    assert put.settings.flags == {"mlock": True, "tensor-split": "3,4"}
    assert put.settings.env == {"X": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert put.name == "a"
