"""`LocalBackend`: the Backend of a front end in the same process. It reads what the others keep and changes nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llamarunner import __version__
from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.pull import Pull, Pulls
from llamarunner.control.backend import Outcome
from llamarunner.control.snapshot import (
    GpuView,
    HostView,
    LogLine,
    LogPage,
    ModelView,
    ProxyView,
    PullView,
    RequestView,
    RunnerState,
    Snapshot,
)
from llamarunner.engines.log_events import SlotPhase
from llamarunner.errors import LlamaRunnerError
from llamarunner.events import (
    Event,
    EventBus,
    ProxyChanged,
    RequestFinished,
    RequestStarted,
    RequestTrace,
    RunnerChanged,
)
from llamarunner.runners.manager import RunnerManager
from llamarunner.runners.outlook import Outlook
from llamarunner.runners.place import LOADING, Residence
from llamarunner.runners.runner import Runner
from llamarunner.telemetry.hardware import HardwareSample, HardwareSampler
from llamarunner.telemetry.logs import LogBook
from llamarunner.telemetry.requests import RequestLog
from llamarunner.units import format_duration

_MAX_REQUESTS = 200  # shown at once; the log keeps more
_MOST_TOLD, _MOST_ESTIMATED = 0.99, 0.95  # of a load that is not over


class ProxyState(Protocol):
    """What is told of a proxy."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def is_enabled(self) -> bool: ...

    @property
    def is_running(self) -> bool: ...

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    @property
    def problem(self) -> LlamaRunnerError | None: ...


@dataclass(slots=True)
class Sources:
    """Everything a snapshot is made from."""

    catalog: Callable[[], Catalog]
    manager: RunnerManager
    proxies: Sequence[ProxyState]
    hardware: HardwareSampler
    requests: RequestLog
    pulls: Pulls
    logs: LogBook
    started_at: float
    is_stopping: Callable[[], bool]
    profile: str = ""
    config_path: str = ""


class LocalBackend:
    def __init__(self, sources: Sources, bus: EventBus) -> None:
        self._sources = sources
        self._changes = {"models": 0, "proxies": 0, "pulls": 0}
        self._seen_pulls: tuple[PullView, ...] = ()
        self._seen_catalog: Catalog | None = None
        self._seen_work: list[tuple[str, float | None, tuple[str, ...], float | None]] = []
        bus.subscribe(self._note)

    def _note(self, event: Event) -> None:
        match event:
            case RunnerChanged() | RequestStarted() | RequestFinished():
                self._changes["models"] += 1
            case ProxyChanged():
                self._changes["proxies"] += 1

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        sources = self._sources
        catalog, hardware = sources.catalog(), sources.hardware.latest
        if catalog is not self._seen_catalog:
            self._seen_catalog = catalog
            self._changes["models"] += 1
        models = tuple(self._model_view(model, hardware) for model in catalog)
        work = [
            (view.name, view.progress, view.activity, view.hung_s)
            for view in models
            if view.progress or view.activity or view.hung_s
        ]
        if work != self._seen_work:
            self._seen_work = work
            self._changes["models"] += 1
        requests = sources.requests
        pulls = tuple(pull_view(pull) for pull in sources.pulls.all)
        if pulls != self._seen_pulls:
            self._seen_pulls = pulls
            self._changes["pulls"] += 1
        revisions = {
            **self._changes,
            "hardware": sources.hardware.version,
            "requests": requests.version,
            "logs": sources.logs.version,
        }
        return Snapshot(
            taken_at=time.time(),
            version=__version__,
            started_at=sources.started_at,
            stopping=sources.is_stopping(),
            profile=sources.profile,
            config_path=sources.config_path,
            proxies=tuple(proxy_view(proxy) for proxy in sources.proxies),
            models=models,
            gpus=gpu_views(hardware),
            host=host_view(hardware),
            requests=self._request_views(),
            pulls=pulls,
            log_sources=sources.logs.sources(),
            tokens_per_s=requests.tokens_per_s(),
            revisions=revisions,
        )

    def _request_views(self) -> tuple[RequestView, ...]:
        requests, outlooks = self._sources.requests, self._sources.manager.outlooks()
        live = reversed(list(requests.live.values()))
        newest = itertools.islice(itertools.chain(live, requests.finished), _MAX_REQUESTS)
        return tuple(request_view(trace, outlooks.get(trace.request_id)) for trace in newest)

    def _model_view(self, model: Model, hardware: HardwareSample) -> ModelView:
        residence = self._sources.manager.residence(model.name)
        rate = self._sources.requests.last_rate(model.name)
        return model_view(model, residence, hardware, rate)

    def logs(self, source: str, after: int = 0, limit: int = 500) -> LogPage:
        lines, missed = self._sources.logs.page(source, after, limit)
        return LogPage(tuple(LogLine(line.number, line.at, line.text, line.level) for line in lines), missed)

    # -- commands ----------------------------------------------------------------------------------------------------

    async def load(self, model: str) -> Outcome:
        try:
            found = self._sources.catalog().find(model)
            await self._sources.manager.load(found)
        except LlamaRunnerError as error:
            return Outcome(False, error.message, error.hint)
        return Outcome(True, f"{found.name} is loaded")

    async def unload(self, model: str, *, force: bool = False) -> Outcome:
        try:
            found = self._sources.catalog().find(model)
        except LlamaRunnerError as error:
            return Outcome(False, error.message, error.hint)
        await self._sources.manager.unload(found, force=force)
        return Outcome(True, f"{found.name} is unloaded")

    async def start_pull(self, model: str) -> Outcome:
        try:
            pull = self._sources.pulls.start(model)
        except LlamaRunnerError as error:
            return Outcome(False, error.message, error.hint)
        return Outcome(True, f"{pull.name.short} is being downloaded")

    async def cancel_pull(self, model: str) -> Outcome:
        try:
            pull = await self._sources.pulls.cancel(model)
        except LlamaRunnerError as error:
            return Outcome(False, error.message, error.hint)
        if pull is None:
            return Outcome(False, f"{model} is not being downloaded")
        return Outcome(True, f"the download of {pull.name.short} was cancelled; what there is of it stays")


def model_view(model: Model, residence: Residence | None, hardware: HardwareSample, rate: float | None) -> ModelView:
    details, runner = model.details, residence.runner if residence is not None else None
    failure = residence.failure if residence is not None else None
    state = runner.state if runner is not None else RunnerState.FAILED if failure is not None else RunnerState.STOPPED
    measured = hardware.processes.get(runner.pid) if runner is not None and runner.pid is not None else None
    if runner is not None:
        state_s = time.monotonic() - runner.state_since
    else:
        state_s = residence.failed_s if residence is not None else 0.0
    idle_left = residence.idle_left_s if residence is not None else None
    return ModelView(
        name=model.name,
        state=state,
        reason=runner.reason if runner is not None else failure.message if failure is not None else "",
        path=str(model.path),
        engine=model.settings.engine,
        aliases=model.aliases,
        source=model.source,
        architecture=details.architecture,
        parameter_size=details.parameter_size,
        quantization=details.quantization,
        file_bytes=model.size_bytes,
        capabilities=tuple(sorted(model.capabilities)),
        problem=model.problem or (failure.message if failure is not None else _hung_text(residence)),
        hint=model.hint or (failure.hint if failure is not None else ""),
        pinned=residence.pinned if residence is not None else model.settings.pin,
        runner_id=runner.runner_id if runner is not None else None,
        pid=runner.pid if runner is not None else None,
        port=runner.plan.port if runner is not None and runner.plan is not None else None,
        argv=runner.plan.argv if runner is not None and runner.plan is not None else (),
        memory_bytes=measured.memory_bytes if measured is not None else None,
        gpu_bytes=measured.gpu_bytes if measured is not None else None,
        estimated_bytes=residence.estimated_bytes if residence is not None else None,
        context=runner.context if runner is not None else None,
        slots=runner.slots if runner is not None else None,
        in_flight=residence.in_flight if residence is not None else 0,
        queued=residence.queued if residence is not None else 0,
        tokens_per_s=rate,
        state_s=state_s,
        load_s=runner.load_s if runner is not None else None,
        progress=load_progress(runner, residence.load_s) if runner is not None and residence is not None else None,
        activity=activity_of(runner) if runner is not None else (),
        idle_left_s=idle_left,
        hung_s=residence.hung_s if residence is not None else None,
    )


def _hung_text(residence: Residence | None) -> str:
    if residence is None or residence.hung_s is None:
        return ""
    return f"no sign of life for {format_duration(float(int(residence.hung_s)))}"


def load_progress(runner: Runner, last_s: float | None) -> float | None:
    """By the engine's own word, else by the time the last load took; None where neither is known."""
    if runner.state not in LOADING:
        return None
    if runner.progress is not None:
        return round(min(runner.progress, _MOST_TOLD), 2)
    if not last_s or runner.load_begun is None:
        return None
    return round(min((time.monotonic() - runner.load_begun) / last_s, _MOST_ESTIMATED), 2)


def activity_of(runner: Runner) -> tuple[str, ...]:
    busy = (slot for slot in runner.activity.slots if slot.phase is not SlotPhase.IDLE)
    return tuple(f"slot {slot.slot}: {slot.label}" for slot in busy)


def gpu_views(hardware: HardwareSample) -> tuple[GpuView, ...]:
    return tuple(
        GpuView(
            index=gpu.index,
            name=gpu.name,
            used_bytes=gpu.used_bytes or 0,
            total_bytes=gpu.total_bytes or 0,
            utilization=gpu.utilization,
            temperature_c=gpu.temperature_c,
            power_w=gpu.power_w,
            power_limit_w=gpu.power_limit_w,
            stale=gpu.stale,
        )
        for gpu in hardware.gpus
    )


def host_view(hardware: HardwareSample) -> HostView:
    host = hardware.host
    return HostView(
        cpu=host.cpu,
        cores=host.cores,
        load_1m=host.load_1m,
        memory_used_bytes=host.memory_used_bytes,
        memory_total_bytes=host.memory_total_bytes,
        own_memory_bytes=host.own_memory_bytes,
        gpu_note=hardware.gpu_note,
    )


def request_view(trace: RequestTrace, outlook: Outlook | None = None) -> RequestView:
    now = trace.finished if trace.finished is not None else time.monotonic()
    granted = trace.granted if trace.granted is not None else now
    load_started = trace.load_started
    return RequestView(
        request_id=trace.request_id,
        dialect=trace.dialect,
        endpoint=trace.endpoint,
        client=trace.client,
        model=trace.model,
        phase=trace.phase,
        started_at=trace.started_at,
        stream=trace.stream,
        user_agent=trace.user_agent,
        client_name=trace.client_name,
        priority=trace.priority,
        status=trace.status,
        error=trace.error,
        queue_s=(load_started if load_started is not None else granted) - trace.started,
        load_s=granted - load_started if load_started is not None else None,
        ttft_s=trace.first_byte - trace.started if trace.first_byte is not None else None,
        total_s=now - trace.started,
        prompt_tokens=trace.prompt_tokens,
        cached_tokens=trace.cached_tokens,
        output_tokens=trace.output_tokens,
        prompt_tokens_per_s=trace.prompt_tokens_per_s,
        output_tokens_per_s=trace.output_tokens_per_s,
        bytes_out=trace.bytes_out,
        stripped=trace.stripped,
        truncated=trace.truncated,
        ignored=trace.ignored,
        position=outlook.position if outlook is not None else None,
        waiting_for=outlook.reason if outlook is not None else "",
        left_s=outlook.left_s if outlook is not None else None,
    )


def pull_view(pull: Pull) -> PullView:
    rate, left = pull.bytes_per_s, pull.total - pull.completed
    return PullView(
        name=pull.name.short,
        state=pull.state,
        status=pull.status,
        completed=pull.completed,
        total=pull.total,
        bytes_per_s=rate,
        left_s=left / rate if rate and pull.total else None,
        ended_at=pull.ended_at,
        problem=pull.error.message if pull.error is not None else "",
        hint=pull.error.hint if pull.error is not None else "",
    )


def proxy_view(proxy: ProxyState) -> ProxyView:
    problem = proxy.problem
    return ProxyView(
        name=proxy.name,
        title=proxy.title,
        enabled=proxy.is_enabled,
        running=proxy.is_running,
        host=proxy.host,
        port=proxy.port,
        problem=problem.message if problem is not None else "",
        hint=problem.hint if problem is not None else "",
    )
