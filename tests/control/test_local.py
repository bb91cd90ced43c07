"""Snapshots say what is so: of a model asleep, at work, failed and broken; of requests in each phase; of hardware."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.library import Library
from llamarunner.catalog.pull import Pulls
from llamarunner.config.schema import ModelSettings
from llamarunner.control.local import LocalBackend, Sources
from llamarunner.control.snapshot import RequestPhase, RunnerState, ShareView, UseView
from llamarunner.control.views import gpu_views, host_view, model_view, request_view
from llamarunner.engines.log_events import Activity, SlotActivity, SlotPhase
from llamarunner.errors import LoadError, PortTakenError
from llamarunner.events import EventBus, ProxyChanged, RequestFinished, RequestStarted, RequestTrace, RunnerChanged
from llamarunner.runners.outlook import Outlook
from llamarunner.runners.place import Place, Residence, Share, together
from llamarunner.runners.placement import Device
from llamarunner.runners.waiters import Waiters
from llamarunner.telemetry.gpus import GpuSample
from llamarunner.telemetry.hardware import HardwareSample, HardwareSampler, HostSample, ProcessSample
from llamarunner.telemetry.logs import LogBook
from llamarunner.telemetry.requests import RequestLog

NO_HARDWARE = HardwareSample(taken=0.0)


def a_model(**more: Any) -> Model:
    return Model("qwen", Path("/models/qwen.gguf"), ModelSettings(pin=more.pop("pin", False)), **more)


def no_pulls() -> Pulls:
    async def changed() -> None:
        raise AssertionError("nothing was pulled")

    return Pulls(Library(Path("/nonexistent")), changed)


class LoadedRunner:
    """As much of a runner as is shown."""

    progress: float | None = None
    load_begun = time.monotonic()
    activity = Activity()
    runner_id = 7
    state = RunnerState.READY
    reason = "loaded"
    pid = 4242
    plan = None
    context = 4096
    slots = 2
    load_s = 1.5
    state_since = time.monotonic()


def residence(**more: Any) -> Residence:
    known = {
        "runner": None, "in_flight": 0, "queued": 0, "keep_alive_s": 300.0, "idle_left_s": None, "failure": None,
        "failed_s": 0.0,
    }  # fmt: skip
    return Residence(**{**known, **more})


def test_a_model_that_never_ran_is_stopped() -> None:
    view = model_view(a_model(), None, NO_HARDWARE, None)
    assert (view.state, view.problem, view.pid, view.idle_left_s) == (RunnerState.STOPPED, "", None, None)


def test_a_broken_file_shows_its_problem_and_remedy() -> None:
    view = model_view(a_model(problem="not a GGUF file", hint="download it again"), None, NO_HARDWARE, None)
    assert (view.problem, view.hint) == ("not a GGUF file", "download it again")


def test_a_loaded_model_shows_what_its_runner_measured() -> None:
    hardware = HardwareSample(taken=0.0, processes={4242: ProcessSample(3_000, 5_000)})
    place = residence(runner=LoadedRunner(), in_flight=1, queued=2, slots=2)
    view = model_view(a_model(), place, hardware, 42.0)
    assert view.state is RunnerState.READY
    assert (view.memory_bytes, view.gpu_bytes, view.context, view.slots) == (3_000, 5_000, 4096, 2)
    assert (view.in_flight, view.queued, view.tokens_per_s, view.load_s) == (1, 2, 42.0, 1.5)
    assert view.state_s >= 0


class SecondRunner(LoadedRunner):
    pid, slots = 4243, 4


def test_of_replicas_the_row_is_the_sum_and_each_is_told_of() -> None:
    processes = {4242: ProcessSample(3_000, 5_000), 4243: ProcessSample(100, None)}
    failed = residence(name="qwen#3", engine="far", failure=LoadError("no such host"), failed_s=4.0, ejected_s=26.0)
    first, second = residence(name="qwen", runner=LoadedRunner()), residence(name="qwen#2", runner=SecondRunner())
    whole = together([first, second, failed])
    view = model_view(a_model(), whole, HardwareSample(taken=0.0, processes=processes), None)
    assert (view.memory_bytes, view.gpu_bytes, view.state) == (3_100, 5_000, RunnerState.READY)
    assert [(each.name, each.pid, each.memory_bytes) for each in view.replicas] == [
        ("qwen", 4242, 3_000), ("qwen#2", 4243, 100), ("qwen#3", None, None),
    ]  # fmt: skip
    last = view.replicas[-1]
    assert (last.state, last.problem, last.state_s, last.ejected_s) == (RunnerState.FAILED, "no such host", 4.0, 26.0)


def test_why_a_model_is_where_it_is() -> None:
    settings = ModelSettings(priority=3, tags=["chat"], keep_alive_min=60.0, keep_alive_max=600.0, replicas=2)
    place = residence(
        runner=LoadedRunner(), pinned=True, pinned_by="chat", demanded="context 16384", protected_s=4.0,
        keep_alive_s=120.0, shares=(Share("gpu0", 33, 90, 100), Share("ram", None, 10)),
    )  # fmt: skip
    view = model_view(Model("qwen", Path("/qwen.gguf"), settings), place, NO_HARDWARE, None)
    assert (view.priority, view.tags, view.pinned, view.pinned_by) == (3, ("chat",), True, "chat")
    assert (view.keep_alive_s, view.keep_alive_min_s, view.keep_alive_max_s) == (120.0, 60.0, 600.0)
    assert (view.demanded, view.protected_s, view.replica_count) == ("context 16384", 4.0, 2)
    assert view.shares == (ShareView("gpu0", 33, 90, 100), ShareView("ram", None, 10, None))
    asleep = model_view(Model("qwen", Path("/qwen.gguf"), settings), None, NO_HARDWARE, None)
    assert (asleep.keep_alive_s, asleep.replicas, asleep.shares) == (300.0, (), ())
    assert model_view(a_model(runs_as="qwen3"), None, NO_HARDWARE, None).runs_as == "qwen3"


class LoadingRunner(LoadedRunner):
    state = RunnerState.LOADING
    load_s = None

    def __init__(self, told: float | None = None, since_s: float = 0.0) -> None:
        self.progress = told
        self.load_begun = time.monotonic() - since_s


@pytest.mark.parametrize(
    ("told", "since_s", "last_s", "shown"),
    [
        (None, 4.0, None, None),
        (None, 4.0, 0.0, None),
        (None, 4.0, 10.0, 0.4),
        (None, 40.0, 10.0, 0.95),
        (0.4321, 40.0, 10.0, 0.43),
        (1.0, 4.0, None, 0.99),
    ],
)
def test_how_far_a_load_is(told: float | None, since_s: float, last_s: float | None, shown: float | None) -> None:
    place = residence(runner=LoadingRunner(told, since_s), load_s=last_s)
    assert model_view(a_model(), place, NO_HARDWARE, None).progress == shown


def test_a_model_that_is_not_loading_is_not_on_its_way() -> None:
    assert model_view(a_model(), residence(runner=LoadedRunner(), load_s=9.0), NO_HARDWARE, None).progress is None


def test_what_busy_slots_do() -> None:
    runner = LoadedRunner()
    runner.activity = Activity(
        (
            SlotActivity(0, 7, SlotPhase.PROMPT, fraction=0.42),
            SlotActivity(1, 3),
            SlotActivity(2, 8, SlotPhase.GENERATING),
        )
    )
    view = model_view(a_model(), residence(runner=runner), NO_HARDWARE, None)
    assert view.activity == ("slot 0: prompt 42 %", "slot 2: generating")


def test_a_hung_engine_is_a_problem_of_its_model() -> None:
    view = model_view(a_model(), residence(runner=LoadedRunner(), hung_s=130.6), NO_HARDWARE, None)
    assert (view.state, view.hung_s, view.problem) == (RunnerState.READY, 130.6, "no sign of life for 2m10s")
    assert model_view(a_model(), residence(runner=LoadedRunner()), NO_HARDWARE, None).problem == ""


def test_a_pinned_model_never_counts_down() -> None:
    place = residence(runner=LoadedRunner(), idle_left_s=12.0)
    assert model_view(a_model(), place, NO_HARDWARE, None).idle_left_s == 12.0
    waiters = Waiters(60)
    pinned = Place("qwen", a_model(), waiters, pinned=True, runner=LoadedRunner(), idle_since=0.0, keep_alive_s=5)
    view = model_view(a_model(), pinned.residence(100.0), NO_HARDWARE, None)
    assert (view.idle_left_s, view.pinned) == (math.inf, True)


def test_a_failed_load_is_told_until_the_next() -> None:
    place = residence(failure=LoadError("out of memory", hint="use a smaller context"), failed_s=3.0)
    view = model_view(a_model(), place, NO_HARDWARE, None)
    assert (view.state, view.problem, view.hint, view.state_s) == (
        RunnerState.FAILED,
        "out of memory",
        "use a smaller context",
        3.0,
    )


def test_a_request_is_timed_phase_by_phase() -> None:
    trace = RequestTrace("ollama", "/api/chat", "127.0.0.1", model="qwen", started=100.0)
    trace.load_started, trace.granted, trace.first_byte, trace.finished = 102.0, 105.0, 106.5, 110.0
    view = request_view(trace)
    assert (view.queue_s, view.load_s, view.ttft_s, view.total_s) == (2.0, 3.0, 6.5, 10.0)


def test_a_request_that_waits_counts_up() -> None:
    trace = RequestTrace("ollama", "/api/chat", "127.0.0.1", started=time.monotonic() - 5)
    view = request_view(trace)
    assert 5 <= view.queue_s < 6
    assert (view.load_s, view.ttft_s) == (None, None)
    told = request_view(trace, Outlook(3, "waiting for room: qwen (1 answer running)", 12.0))
    assert (told.position, told.waiting_for, told.left_s) == (3, "waiting for room: qwen (1 answer running)", 12.0)


def test_a_card_that_says_nothing_of_its_memory_is_shown_all_the_same() -> None:
    (view,) = gpu_views(HardwareSample(taken=0.0, host=HostSample(), gpus=(GpuSample(0, "GB10"),)))
    assert (view.name, view.used_bytes, view.total_bytes, view.use) == ("GB10", 0, 0, None)


def test_what_memory_is_used_for() -> None:
    devices = {"gpu0": Device("gpu0", "GPU 0", 100, 10, 20, 30), "ram": Device("ram", "RAM", 100, 0, 5)}
    sample = HardwareSample(taken=0.0, host=HostSample(), gpus=(GpuSample(0, "A"), GpuSample(1, "B", problem="lost")))
    assert [gpu.use for gpu in gpu_views(sample, devices)] == [UseView(30, 20, 10, 40), None]
    assert host_view(sample, devices).use == UseView(0, 5, 0, 95)


class Manager:
    place: Residence | None = None

    def residence(self, _name: str) -> Residence | None:
        return self.place

    def outlooks(self) -> dict[int, Outlook]:
        return {}

    def devices(self) -> list[Device]:
        return []

    def pin_of(self, model: Model) -> tuple[bool, str]:
        return model.settings.pin, "chat" if model.settings.pin else ""


class Proxy:
    name, title, is_enabled, is_running, host, port = "ollama", "Ollama", True, False, "127.0.0.1", 11434
    problem = PortTakenError("127.0.0.1", 11434, "ollama (pid 812)")


def test_a_snapshot_holds_all_of_it_and_counts_changes() -> None:
    bus, catalog = EventBus(), Catalog([a_model()])
    requests, logs = RequestLog(bus), LogBook(None)
    sources = Sources(
        catalog=lambda: catalog,
        manager=Manager(),
        proxies=[Proxy()],
        hardware=HardwareSampler(tuple),
        requests=requests,
        pulls=no_pulls(),
        logs=logs,
        started_at=1.0,
        is_stopping=lambda: False,
        profile="testing",
    )
    backend = LocalBackend(sources, bus)
    first = backend.snapshot()
    assert [model.name for model in first.models] == ["qwen"]
    assert first.proxies[0].problem == "127.0.0.1:11434 is taken by ollama (pid 812)"
    assert first.log_sources == ("llamarunner",)
    assert backend.snapshot().revisions == first.revisions

    trace = RequestTrace("ollama", "/api/chat", "127.0.0.1")
    bus.publish(RequestStarted(trace))
    bus.publish(RunnerChanged("qwen", 1, RunnerState.STOPPED, RunnerState.STARTING, "asked for"))
    bus.publish(ProxyChanged("ollama", running=True))
    second = backend.snapshot()
    for part in ("models", "requests", "proxies"):
        assert second.revisions[part] > first.revisions[part], part
    trace.phase = RequestPhase.DONE
    bus.publish(RequestFinished(trace))
    later = RequestTrace("lmstudio", "/v1/chat/completions", "127.0.0.1")
    bus.publish(RequestStarted(later))
    assert [request.request_id for request in backend.snapshot().requests] == [later.request_id, trace.request_id]

    log = logs.open("qwen")
    log.feed(b"one\ntwo\n")
    third = backend.snapshot()
    assert third.log_sources == ("llamarunner", "qwen")
    assert third.revisions["logs"] > second.revisions["logs"]
    assert [line.text for line in backend.logs("qwen").lines] == ["one", "two"]
    assert backend.logs("nobody").lines == ()


def test_models_that_never_ran_are_looked_at_once() -> None:
    bus, manager, catalogs = EventBus(), Manager(), [Catalog([a_model()])]
    sources = Sources(
        catalog=lambda: catalogs[-1],
        manager=manager,
        proxies=[],
        hardware=HardwareSampler(tuple),
        requests=RequestLog(bus),
        pulls=no_pulls(),
        logs=LogBook(None),
        started_at=1.0,
        is_stopping=lambda: False,
    )
    backend = LocalBackend(sources, bus)
    (first,) = backend.snapshot().models
    assert backend.snapshot().models[0] is first
    manager.place = residence(runner=LoadedRunner())
    assert backend.snapshot().models[0].state is RunnerState.READY
    manager.place = None
    catalogs.append(Catalog([a_model(pin=True)]))
    assert backend.snapshot().models[0].pinned_by == "chat", "the catalogue has another of that name now"


def test_progress_and_activity_count_as_changes_of_the_models() -> None:
    bus, manager, loading, busy = EventBus(), Manager(), LoadingRunner(0.101), LoadedRunner()
    catalog = Catalog([a_model()])
    sources = Sources(
        catalog=lambda: catalog,
        manager=manager,
        proxies=[],
        hardware=HardwareSampler(tuple),
        requests=RequestLog(bus),
        pulls=no_pulls(),
        logs=LogBook(None),
        started_at=1.0,
        is_stopping=lambda: False,
    )
    backend = LocalBackend(sources, bus)
    asleep = backend.snapshot().revisions["models"]
    manager.place = residence(runner=loading)
    begun = backend.snapshot().revisions["models"]
    loading.progress = 0.104  # still ten hundredths
    assert backend.snapshot().revisions["models"] == begun > asleep
    loading.progress = 0.2
    further = backend.snapshot().revisions["models"]
    assert backend.snapshot().revisions["models"] == further > begun
    manager.place = residence(runner=busy)
    ready = backend.snapshot().revisions["models"]
    busy.activity = Activity((SlotActivity(0, 7, SlotPhase.PROMPT, fraction=0.42),))
    working = backend.snapshot().revisions["models"]
    assert backend.snapshot().revisions["models"] == working > ready > further


async def test_commands_on_unknown_models_are_told() -> None:
    bus = EventBus()
    sources = Sources(
        catalog=lambda: Catalog([a_model()]),
        manager=Manager(),
        proxies=[],
        hardware=HardwareSampler(tuple),
        requests=RequestLog(bus),
        pulls=no_pulls(),
        logs=LogBook(None),
        started_at=1.0,
        is_stopping=lambda: False,
    )
    backend = LocalBackend(sources, bus)
    for outcome in (await backend.load("qwem"), await backend.unload("qwem")):
        assert not outcome.ok
        assert "qwem" in outcome.message
        assert "qwen" in outcome.hint
