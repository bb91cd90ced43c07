"""The ledger alone: what it makes of an engine's own projection, and what it remembers of earlier runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from running import ScriptedEngine

from llamarunner.catalog.catalog import Model, ModelDetails, Weights
from llamarunner.config.schema import ModelSettings
from llamarunner.engines.projection import Projection
from llamarunner.events import RunnerState
from llamarunner.runners.footprints import Footprints, Measured, footprint_key
from llamarunner.runners.ledger import Ledger, NoGauge
from llamarunner.runners.memory import estimate
from llamarunner.runners.place import Place
from llamarunner.runners.placement import RAM, Device, Placement
from llamarunner.runners.runner import Runner
from llamarunner.runners.waiters import Waiters

GIB = 1024**3
DETAILS = ModelDetails(
    architecture="llama",
    block_count=4,
    vocabulary=100,
    weights=Weights(layers=(GIB,) * 4, experts=(0,) * 4),
    metadata={
        "llama.block_count": 4,
        "llama.embedding_length": 256,
        "llama.attention.head_count": 4,
        "llama.feed_forward_length": 512,
        "llama.context_length": 4096,
    },
)


@dataclass
class Machine(NoGauge):
    found: Sequence[Device] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def devices(self) -> Sequence[Device]:
        return self.found

    def held(self, pid: int) -> Mapping[str, int]:
        return self.sizes


class Knowing(ScriptedEngine):
    """An engine with a tool that projects."""

    def __init__(self) -> None:
        super().__init__({}, 20, None, None)
        self.projected = 0
        self.known_version = "1"

    def project(self, model: Model) -> Projection | None:
        self.projected += 1
        return Projection(context=3 * GIB, compute=GIB)


def model() -> Model:
    return Model("m", Path("/m.gguf"), ModelSettings(), DETAILS, size_bytes=4 * GIB)


def a_place() -> Place:
    return Place("m", model(), Waiters(60), engine_kind="llama-server")


def ledger(tmp_path: Path, *devices: Device) -> tuple[Ledger, Footprints]:
    footprints = Footprints(tmp_path / "footprints.json")
    return Ledger(Machine(devices), footprints), footprints


@pytest.mark.parametrize(
    ("devices", "asked"),
    [
        ((), 0),
        ((Device(RAM, "RAM", 64 * GIB),), 0),
        ((Device(RAM, "RAM", 5 * GIB),), 1),
        ((Device(RAM, "RAM", 64 * GIB), Device("gpu0", "GPU 0", 5 * GIB)), 1),
        ((Device(RAM, "RAM", 5 * GIB), Device("gpu0", "GPU 0", 64 * GIB)), 0),
    ],
)
def test_the_engines_tool_is_asked_where_it_could_matter(
    tmp_path: Path, devices: tuple[Device, ...], asked: int
) -> None:
    book, _ = ledger(tmp_path, *devices)
    place, engine = a_place(), Knowing()
    asyncio.run(book.estimate(place, engine))
    asyncio.run(book.estimate(place, engine))
    assert engine.projected == asked
    need, plain = book.need(place), estimate(model())
    assert need is not None
    if asked:
        assert (need.cache, need.compute) == (pytest.approx(3 * GIB, rel=0.001), GIB)
        assert need.on_cpu() - plain.on_cpu() == need.cache - plain.cache + GIB - plain.compute
    else:
        assert need == plain


def test_how_long_a_load_takes_is_known_after_a_restart(tmp_path: Path) -> None:
    book, footprints = ledger(tmp_path)
    place, engine = a_place(), Knowing()
    assert book.expected_load_s(place) is None
    asyncio.run(book.estimate(place, engine))
    assert book.expected_load_s(place) is None
    key = footprint_key(model(), engine="llama-server", version="1", placement=Placement({RAM: 1}))
    for seconds in (2.0, 7.0, 3.0):
        footprints.record(key, Measured({RAM: GIB}, seconds))
    footprints.save()
    again = Footprints(tmp_path / "footprints.json")
    again.load()
    book = Ledger(Machine(), again)
    assert book.expected_load_s(a_place()) is None  # nothing is known of the model yet
    asyncio.run(book.estimate(place := a_place(), engine))
    assert book.expected_load_s(place) == 3.0
    place.placement = Placement({"gpu0": 1}, 5, devices=("gpu0",))
    assert book.expected_load_s(place) is None  # there it was never loaded


async def test_what_a_silent_driver_shows_of_ours_does_not_count_as_others(tmp_path: Path) -> None:
    """In WSL and in containers the driver names no processes."""
    machine = Machine((Device(RAM, "RAM", 64 * GIB), Device("gpu0", "GPU 0", 8 * GIB, used_by_others_bytes=5 * GIB)))
    book = Ledger(machine, Footprints(tmp_path / "footprints.json"))
    place = a_place()
    place.placement = Placement({"gpu0": 4 * GIB, RAM: GIB}, 5, devices=("gpu0",))
    runner = SimpleNamespace(pid=1, load_s=1.0, state=RunnerState.READY)
    place.runner = cast(Runner, runner)
    await book.measure(place)
    assert book.devices()[1].used_by_others_bytes == 5 * GIB  # nothing of it was seen yet, nor said
    machine.sizes = {RAM: GIB}
    await book.measure(place)
    assert book.devices()[1].used_by_others_bytes == GIB
    machine.sizes = {RAM: GIB, "gpu0": 3 * GIB}
    await book.measure(place)  # the driver has learnt to tell
    assert book.devices()[1].used_by_others_bytes == 5 * GIB
    machine.sizes = {RAM: GIB}
    await book.measure(place)
    runner.pid = None  # it has ended
    assert book.devices()[1].used_by_others_bytes == 5 * GIB


async def test_what_lies_where_is_told_by_device(tmp_path: Path) -> None:
    machine = Machine((Device(RAM, "RAM", 64 * GIB), Device("gpu0", "GPU 0", 8 * GIB)))
    book, place = Ledger(machine, Footprints(tmp_path / "footprints.json")), a_place()
    assert book.shares(place) == ()
    await book.estimate(place, Knowing())
    place.need = book.first_need(place)
    place.placement = Placement({"gpu0": 3 * GIB, RAM: 2 * GIB}, 3, devices=("gpu0",))
    gpu, ram = book.shares(place)
    assert (gpu.device, gpu.layers, gpu.measured) == ("gpu0", 3, None)
    assert (ram.device, ram.layers, ram.measured) == (RAM, 2, None)
    assert gpu.estimated is not None
    assert 2 * GIB < gpu.estimated < 4 * GIB
    machine.sizes = {"gpu0": 3 * GIB}
    place.runner = cast(Runner, SimpleNamespace(pid=1, state=RunnerState.READY))
    assert [(share.device, share.measured) for share in book.shares(place)] == [("gpu0", 3 * GIB), (RAM, None)]
    place.placement = Placement({RAM: 5 * GIB})
    assert [(share.device, share.layers) for share in book.shares(place)] == [("gpu0", None), (RAM, 5)]
