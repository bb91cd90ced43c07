"""Lists of models in Ollama's words: what there is, and what runs."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamarunner.catalog.catalog import Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.events import RunnerState
from llamarunner.proxies.ollama.describe import running, tags
from llamarunner.runners.place import Residence

GIB = 1024**3
NOW = datetime(2026, 8, 21, 12, 0, tzinfo=UTC)
MODEL = Model("m", Path("/m.gguf"), ModelSettings(context=8192), ModelDetails(architecture="qwen3"), size_bytes=5 * GIB)


def residence(idle_left_s: float | None = 30.0, **runner: Any) -> Residence:
    facts = {"state": RunnerState.READY, "pid": 7, "context": 4096, "is_whole_on_gpu": False}
    return Residence(
        runner=SimpleNamespace(**(facts | runner)), in_flight=0, queued=0, keep_alive_s=300.0,  # type: ignore[arg-type]
        idle_left_s=idle_left_s, failure=None, failed_s=0.0,
    )  # fmt: skip


def entry(residence: Residence, memory: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    (found,) = running([(MODEL, residence)], {7: memory}, NOW)["models"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("runner", "memory", "size", "vram"),
    [
        ({}, (0, 0), 5 * GIB, 0), ({}, (3 * GIB, 0), 3 * GIB, 0), ({}, (2 * GIB, 4 * GIB), 6 * GIB, 4 * GIB),
        ({"is_whole_on_gpu": True}, (GIB, 4 * GIB), 4 * GIB, 4 * GIB),
        ({"is_whole_on_gpu": True}, (8 * GIB, 4 * GIB), 12 * GIB, 4 * GIB),
    ],
    ids=["unmeasured", "RAM", "both", "whole on the GPU", "its experts in RAM"],
)  # fmt: skip
def test_sizes(runner: dict[str, Any], memory: tuple[int, int], size: int, vram: int) -> None:
    found = entry(residence(**runner), memory)
    assert (found["size"], found["size_vram"]) == (size, vram)


def test_replicas_are_counted_together() -> None:
    first, second, third = residence(is_whole_on_gpu=True), residence(pid=8), replace(residence(), runner=None)
    whole = replace(first, replicas=(first, second, third))
    (found,) = running([(MODEL, whole)], {7: (GIB, 4 * GIB), 8: (2 * GIB, GIB)}, NOW)["models"]
    assert (found["size"], found["size_vram"]) == (7 * GIB, 5 * GIB)


@pytest.mark.parametrize(
    ("idle_left_s", "left_s"), [(30.0, 30), (None, 300), (math.inf, timedelta(days=292 * 365).total_seconds())]
)
def test_the_time_left(idle_left_s: float | None, left_s: float) -> None:
    expires = datetime.fromisoformat(entry(residence(idle_left_s))["expires_at"])
    assert (expires - NOW).total_seconds() == left_s


def test_one_that_leaves_has_no_time_left() -> None:
    assert datetime.fromisoformat(entry(residence(state=RunnerState.DRAINING))["expires_at"]) < NOW
    for state in (RunnerState.LOADING, RunnerState.STOPPING, RunnerState.FAILED):
        assert running([(MODEL, residence(state=state))], {}, NOW) == {"models": []}


def test_the_context_is_that_of_what_runs() -> None:
    assert entry(residence())["context_length"] == 4096
    assert entry(residence(context=None))["context_length"] == 8192


def test_the_longest_remaining_and_the_newest_come_first() -> None:
    others = [(replace(MODEL, name=f"m{left}"), residence(left)) for left in (10.0, 90.0, 50.0)]
    assert [each["name"] for each in running(others, {}, NOW)["models"]] == [
        "m90.0:latest", "m50.0:latest", "m10.0:latest",
    ]  # fmt: skip
    listed = [replace(MODEL, name=f"m:{at}", modified_at=at) for at in (1.0, 3.0, 2.0)]
    broken = replace(MODEL, name="broken", problem="cut short")
    assert [each["model"] for each in tags([*listed, broken])["models"]] == ["m:3.0", "m:2.0", "m:1.0"]
    assert tags([]) == {"models": []}
