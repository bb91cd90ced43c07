"""`LocalBackend`: the Backend of a front end in the same process. It reads what the others keep and changes nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llamarunner import __version__
from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.pull import Pulls
from llamarunner.control.backend import Outcome
from llamarunner.control.snapshot import LogLine, LogPage, ModelView, PullView, RequestView, Snapshot
from llamarunner.control.views import (
    ProxyState,
    gpu_views,
    host_view,
    model_view,
    proxy_view,
    pull_view,
    request_view,
)
from llamarunner.errors import LlamaRunnerError
from llamarunner.events import Event, EventBus, ProxyChanged, RequestFinished, RequestStarted, RunnerChanged
from llamarunner.runners.manager import RunnerManager
from llamarunner.telemetry.hardware import HardwareSample, HardwareSampler
from llamarunner.telemetry.logs import LogBook
from llamarunner.telemetry.requests import RequestLog

_MAX_REQUESTS = 200  # shown at once; the log keeps more


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
        self._asleep: dict[str, ModelView] = {}  # of models that never ran: there may be thousands, and they stay so
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
            self._asleep.clear()
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
        devices = {device.id: device for device in sources.manager.devices()}
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
            gpus=gpu_views(hardware, devices),
            host=host_view(hardware, devices),
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
        if residence is not None or rate is not None:
            self._asleep.pop(model.name, None)
            return model_view(model, residence, hardware, rate)
        view = self._asleep.get(model.name)
        if view is None:
            pinned, by = self._sources.manager.pin_of(model)
            view = replace(model_view(model, None, hardware, None), pinned=pinned, pinned_by=by)
            self._asleep[model.name] = view
        return view

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
