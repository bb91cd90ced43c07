"""Models that differ but in what requests say (presets of one file) share a runner: on real processes of the scripted
engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from running import soon
from test_manager import make_stage as make_stage
from test_manager import use

from llamarunner.catalog.catalog import Catalog, Model, Preset
from llamarunner.config.schema import ModelSettings
from llamarunner.events import RunnerState


def presets(base: Model) -> tuple[Model, Model, Model]:
    """The base, one with a system prompt of its own, and one that is started otherwise."""
    pirate = replace(base, name="pirate", source="library", preset=Preset({"temperature": 0.1}, system="Arr."))
    long = replace(base, name="long", source="library", settings=base.settings.model_copy(update={"context": 16384}))
    first, second, third = Catalog([base, pirate, long])
    return first, second, third


def test_those_that_are_started_alike_share_a_runner() -> None:
    base, pirate, long = presets(Model("base", Path("/a.gguf"), ModelSettings()))
    assert [model.runner_name for model in (base, pirate, long)] == ["base", "base", "long"]
    other = Model("other", Path("/b.gguf"), ModelSettings())
    tuned = replace(base, name="tuned", source="library", adapters=(Path("/lora.gguf"),))
    table = replace(base, name="table")  # of the configuration
    assert [model.runner_name for model in Catalog([base, other, tuned, table])] == ["base", "other", "tuned", "table"]


def test_a_link_to_a_file_is_the_file() -> None:
    base = Model("base", Path("/models/a.gguf"), ModelSettings(), file_id=(1, 7))
    pirate = replace(base, name="pirate", source="library", path=Path("/blobs/sha256-x"))
    other = replace(pirate, name="other", file_id=(1, 8), path=Path("/blobs/sha256-y"))
    assert [model.runner_name for model in Catalog([base, pirate, other])] == ["base", "base", "other"]
    assert pirate.has_files_of(base)
    assert base.has_files_of(replace(base, file_id=(1, 9))), "the same path stays the same file"


async def test_the_second_finds_the_first_ones_runner_loaded(make_stage: Any) -> None:
    stage = make_stage()
    base, pirate, long = presets(stage.model("base"))
    number = await use(stage, pirate)
    assert await use(stage, base) == number
    assert await use(stage, long) != number
    assert stage.spawns("base") == 1


async def test_tables_of_the_configuration_run_each_on_its_own(make_stage: Any) -> None:
    stage = make_stage(max_loaded=1)
    one = stage.model("one")
    other = replace(one, name="other")
    numbers = [await use(stage, model) for model in Catalog([one, other])]
    assert len(set(numbers)) == 2
    assert (stage.spawns("one"), stage.spawns("other")) == (1, 1)


async def test_one_of_those_that_share_a_runner_is_shown_as_loaded(make_stage: Any) -> None:
    stage = make_stage()
    base, pirate, _ = presets(stage.model("base"))
    await use(stage, pirate)
    await use(stage, base)
    assert stage.at("pirate").runner is not None
    assert stage.manager.residence("base") is None
    assert [model.name for model in stage.manager.loaded] == ["pirate"]
    await stage.manager.unload(base)
    assert stage.manager.pids == [], "it is unloaded by any of its names"


async def test_those_who_wait_for_one_runner_by_different_names_are_one_load(make_stage: Any) -> None:
    stage = make_stage()
    base, pirate, _ = presets(stage.model("base", load_s=0.2))
    numbers = await asyncio.gather(*(use(stage, model) for model in (base, pirate) * 10))
    assert len(set(numbers)) == 1
    assert stage.spawns("base") == 1
    stage.manager.expire(pirate)
    await soon(lambda: stage.states("base")[-1] is RunnerState.STOPPED)


async def test_a_model_made_beside_it_loads_nothing_again(make_stage: Any) -> None:
    stage = make_stage()
    base, pirate, _ = presets(replace(stage.model("base"), source="library"))
    number = await use(stage, pirate)
    newest = replace(base, name="aaa", runs_as="")
    catalog = Catalog([newest, base, pirate])
    stage.manager.adopt(catalog)
    assert [await use(stage, model) for model in catalog] == [number] * 3
    assert stage.spawns("base") == 1
    assert stage.at("pirate").runner is not None


async def test_a_runner_outlives_the_model_it_was_started_for(make_stage: Any) -> None:
    stage = make_stage()
    base, pirate, _ = presets(stage.model("base"))
    number = await use(stage, base, keep_alive_s=500)
    (left,) = catalog = Catalog([replace(pirate, runs_as="")])
    stage.manager.adopt(catalog)
    assert stage.at("base").runner is None
    residence = stage.at(left.name)
    assert residence.runner is not None
    assert residence.keep_alive_s == 500
    assert await use(stage, left) == number
    stage.manager.adopt(Catalog([base, left]))
    assert await use(stage, base) == number, "it is there again"
    await stage.manager.unload(left)
    assert stage.manager.pids == []


async def test_what_a_model_leaves_behind_leaves_once_it_has_answered(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    stage.manager.adopt(Catalog())
    assert stage.at("a").in_flight == 1
    assert [stray.name for stray in stage.manager.strays(Catalog())] == ["a"]
    assert stage.at("a").keep_alive_s == 0, "it is told to be leaving"
    assert stage.manager.strays(Catalog([model])) == []
    hold.set()
    await holder
    await soon(lambda: not stage.manager.pids)
    assert stage.manager.strays(Catalog()) == []


async def test_a_model_with_other_files_is_never_answered_by_the_old_ones(make_stage: Any) -> None:
    stage = make_stage()
    model, hold = stage.model("a"), asyncio.Event()
    holder = asyncio.create_task(use(stage, model, hold))
    await soon(lambda: stage.at("a").in_flight)
    (remade,) = catalog = Catalog([replace(model, path=Path("/models/other.gguf"))])
    stage.manager.adopt(catalog)
    late = asyncio.create_task(use(stage, remade))
    await soon(lambda: stage.at("a").queued)
    hold.set()
    assert await holder != await late
    assert [launched.path.name for launched in stage.engines["a"].models] == ["a.gguf", "other.gguf"]
    stage.manager.adopt(catalog)
    assert stage.at("a").runner is not None
