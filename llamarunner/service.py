"""Service: everything but the screen, made of one configuration. A part that cannot start leaves the others going."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

import aiohttp

from llamarunner import paths
from llamarunner.catalog.catalog import Catalog
from llamarunner.catalog.librarian import Librarian
from llamarunner.catalog.library import open_library
from llamarunner.catalog.pull import Pulls
from llamarunner.catalog.stores import Discovery, kept_headers
from llamarunner.config.load import LoadedConfig
from llamarunner.config.ollama_environment import PREFIX as OLLAMA_PREFIX
from llamarunner.config.schema import EngineConfig
from llamarunner.control.backend import Backend
from llamarunner.control.local import LocalBackend, Sources
from llamarunner.engines.engine import Engine
from llamarunner.engines.registry import make_engines
from llamarunner.engines.remote import UnreachableError, list_models, models_of
from llamarunner.errors import LlamaRunnerError
from llamarunner.events import Event, EventBus, RunnerChanged, RunnerState
from llamarunner.gauge import HardwareGauge
from llamarunner.instance import InstanceFile
from llamarunner.proxies.clients import Clients
from llamarunner.proxies.lmstudio.dialect import LMStudioDialect
from llamarunner.proxies.ollama.dialect import OllamaDialect
from llamarunner.proxies.proxy import HttpProxy
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.upstream import upstream_session
from llamarunner.runners.footprints import Footprints
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.ledger import Ledger
from llamarunner.runners.manager import RunnerManager
from llamarunner.runners.orphans import EngineList
from llamarunner.telemetry.hardware import HardwareSampler
from llamarunner.telemetry.logs import LogBook
from llamarunner.telemetry.requests import RequestLog

logger = logging.getLogger(__name__)

_ASK_REMOTE_S = 60.0
_RESCAN_S = 5.0  # a model file put into a folder is there within this time


class NothingServedError(LlamaRunnerError):
    """Not one proxy could start."""

    code = "nothing_served"


class Service:
    """`start`, then `stop` once; both on the same event loop. `logs` belongs to the caller, who may outlive us."""

    def __init__(self, loaded: LoadedConfig, logs: LogBook, *, is_announced: bool = True) -> None:
        """`is_announced`: whether other commands shall find this program."""
        self._loaded = loaded
        self._config = loaded.config
        self._logs = logs
        self._bus = EventBus()
        self._requests = RequestLog(self._bus)
        self._clients = Clients(self._config.clients)
        self._guardian = Guardian()
        self._engine_list = EngineList(paths.state_dir() / "engines", self._guardian)
        self._hardware = HardwareSampler(self._engine_pids)
        self._discovery = Discovery(self._config, headers=kept_headers())
        self._library = open_library(self._config)
        self._pulls = Pulls(self._library, self._rescan)
        self._catalog = Catalog()
        self._pids: tuple[int, ...] = ()
        self._started_at = time.time()
        self._stopping = False
        self._watching: list[asyncio.Task[None]] = []
        self._on_disk = Catalog()
        self._looking = asyncio.Lock()
        self._elsewhere: dict[str, tuple[str, ...]] = {}  # what each remote engine calls its models
        self._instance = InstanceFile()
        self._is_announced = is_announced
        self._session: aiohttp.ClientSession | None = None
        self._manager: RunnerManager | None = None
        self._backend: LocalBackend | None = None
        self.proxies: list[HttpProxy] = []

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("the service has not started")
        return self._backend

    @property
    def bus(self) -> EventBus:
        return self._bus

    @property
    def manager(self) -> RunnerManager:
        if self._manager is None:
            raise RuntimeError("the service has not started")
        return self._manager

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    @property
    def in_flight(self) -> int:
        """Requests being served now."""
        return len(self._requests.live)

    async def start(self) -> None:
        """Find the models, and listen. Raises NothingServedError where no proxy can; nothing is left running then."""
        config = self._config
        engines, self._on_disk = await asyncio.gather(
            asyncio.to_thread(make_engines, config), asyncio.to_thread(self._discovery.look)
        )
        self._catalog = self._on_disk
        self._session = upstream_session()
        self._hardware.start()
        footprints = Footprints(paths.state_dir() / "footprints.json")
        await asyncio.to_thread(footprints.load)
        await self._engine_list.start()
        self._manager = RunnerManager(
            engines,
            config.scheduler,
            bus=self._bus,
            guardian=self._guardian,
            session=self._session,
            log_for=self._logs.open,
            ledger=Ledger(HardwareGauge(self._hardware, config.scheduler, self._engine_pids), footprints),
        )
        relay = Relay(self._manager, lambda: self._catalog, bus=self._bus, session=self._session, clients=self._clients)
        librarian = Librarian(
            self._library,
            self._pulls,
            catalog=lambda: self._catalog,
            rescan=self._rescan,
        )
        self.proxies = [
            self._proxy(
                OllamaDialect(
                    relay, self._memory_by_pid, librarian, client_context=config.proxies.ollama.client_num_ctx
                )
            ),
            self._proxy(LMStudioDialect(relay)),
        ]
        self._backend = LocalBackend(self._sources(self._manager), self._bus)
        self._bus.subscribe(self._note_runner)
        await self._start_proxies()
        self._watching = [
            asyncio.create_task(self._watch_folders(), name="watch folders"),
            asyncio.create_task(self._prune(), name="prune the library"),
            asyncio.create_task(_get_to_know(engines), name="get to know engines"),
        ]
        for name, engine in config.engines.items():
            if engine.is_remote:
                self._watching.append(asyncio.create_task(self._watch_remote(name, engine), name=f"watch {name}"))
        if self._is_announced:
            await asyncio.to_thread(self._instance.write, self._started_at, self._addresses())
        if heeded := sorted({o.name for o in self._loaded.origins.values() if o.name.startswith(OLLAMA_PREFIX)}):
            logger.info("heeded of Ollama's variables: %s", ", ".join(heeded))
        logger.info("ready: %d models, profile %s", len(self._catalog), self._loaded.profile or "none")

    def _proxy(self, dialect: OllamaDialect | LMStudioDialect) -> HttpProxy:
        settings = self._config.proxies.ollama if dialect.name == "ollama" else self._config.proxies.lmstudio
        return HttpProxy(
            dialect,
            settings,
            host=self._config.proxy_host(settings),
            max_body=self._config.server.max_body,
            request_timeout_s=self._config.server.request_timeout,
            bus=self._bus,
            client_keys=self._clients.keys,
        )

    def _sources(self, manager: RunnerManager) -> Sources:
        return Sources(
            catalog=lambda: self._catalog,
            manager=manager,
            proxies=self.proxies,
            hardware=self._hardware,
            requests=self._requests,
            pulls=self._pulls,
            logs=self._logs,
            started_at=self._started_at,
            is_stopping=lambda: self._stopping,
            profile=self._loaded.profile,
            config_path=str(self._loaded.path or ""),
        )

    async def _start_proxies(self) -> None:
        problems: list[LlamaRunnerError] = []
        for proxy in self.proxies:
            if proxy.is_enabled:
                try:
                    await proxy.start()
                except LlamaRunnerError as error:
                    logger.error("%s cannot be served: %s", proxy.title, error)
                    problems.append(error)
        if not any(proxy.is_running for proxy in self.proxies):
            await self.stop(0)
            reasons = "; ".join(map(str, problems)) or "every proxy is disabled in the configuration"
            raise NothingServedError(f"nothing can be served: {reasons}")

    async def stop(self, drain_s: float | None = None) -> None:
        """Refuse new requests, let answers end for `drain_s` (the configured time if None), then end everything.

        Calling it again while it runs, with less time, hurries it.
        """
        if self._stopping:
            if self._manager is not None:
                await self._manager.close(drain_s or 0)
            return
        self._stopping = True
        self._instance.remove()
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._pulls.close()
        if self._manager is not None:
            await self._manager.close(self._config.server.drain if drain_s is None else drain_s)
        await asyncio.gather(*(proxy.stop() for proxy in self.proxies))
        if self._session is not None:
            await self._session.close()
        await self._guardian.close()
        await self._engine_list.close()
        await asyncio.to_thread(self._hardware.stop)
        self._requests.close()

    async def _watch_folders(self) -> None:
        while True:
            await asyncio.sleep(_RESCAN_S)
            try:
                await self._rescan()
            except Exception:  # of one look; without the next one no model would be found any more
                logger.exception("the models on disk could not be looked for; trying again in %.0f s", _RESCAN_S)

    async def _rescan(self) -> None:
        """See what changed on the disk."""
        async with self._looking:
            found = await asyncio.to_thread(self._discovery.look)
            if found is not self._on_disk:
                logger.info("the models on disk changed: %d now", len(found))
                self._on_disk = found
                self._merge()

    async def _prune(self) -> None:
        try:
            count = await asyncio.to_thread(self._library.prune)
        except LlamaRunnerError as error:
            logger.warning("what no model needs stays: %s", error)
            return
        if count:
            logger.info("%d files that no model needs were removed from %s", count, self._library.root)

    async def _watch_remote(self, name: str, engine: EngineConfig) -> None:
        """Keep up with what another server has; while it is out of reach, with what it had."""
        session, problem = self._session, ""
        assert session is not None
        while True:
            try:
                ids = await list_models(session, engine)
            except UnreachableError as error:
                if str(error) != problem:  # once, not every minute
                    logger.warning("the models of %s are not known: %s", name, error)
                problem = str(error)
            else:
                problem = ""
                if ids != self._elsewhere.get(name):
                    logger.info("%s has %d models", name, len(ids))
                    self._elsewhere[name] = ids
                    self._merge()
            await asyncio.sleep(_ASK_REMOTE_S)

    def _merge(self) -> None:
        models = list(self._on_disk)
        for name, ids in self._elsewhere.items():
            taken = [each for model in models for each in (model.name, *model.aliases)]
            models += models_of(name, ids, self._config.defaults, taken)
        self._catalog = Catalog(models)
        if self._manager is not None:
            self._manager.adopt(self._catalog)

    def _addresses(self) -> dict[str, tuple[str, int]]:
        return {proxy.name: (proxy.host, proxy.port) for proxy in self.proxies if proxy.is_running}

    def _note_runner(self, event: Event) -> None:
        if isinstance(event, RunnerChanged):
            self._pids = tuple(self.manager.pids)
            level = logging.WARNING if event.new is RunnerState.FAILED else logging.INFO
            logger.log(level, "%s: %s → %s: %s", event.model, event.old, event.new, event.reason)

    def _engine_pids(self) -> tuple[int, ...]:
        """Called in the hardware thread, so it reads one tuple that the loop replaces whole."""
        return self._pids

    def _memory_by_pid(self) -> Mapping[int, tuple[int, int]]:
        processes = self._hardware.latest.processes
        return {pid: (sample.memory_bytes, sample.gpu_bytes or 0) for pid, sample in processes.items()}


async def _get_to_know(engines: Mapping[str, Engine]) -> None:
    """Ask each program its version and flags before a request needs them."""
    for engine in engines.values():
        if engine.is_local:
            info = await asyncio.to_thread(engine.info)
            if info.problem:
                logger.warning("engine '%s': %s", engine.name, info.problem)
