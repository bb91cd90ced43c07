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


async def test_the_second_finds_the_first_ones_runner_loaded(make_stage: Any) -> None:
    stage = make_stage()
    base, pirate, long = presets(stage.model("base"))
    number = await use(stage, pirate)
    assert await use(stage, base) == number
    assert await use(stage, long) != number
    assert stage.spawns("base") == 1


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
