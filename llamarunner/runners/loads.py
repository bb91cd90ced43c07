"""Brings runners up and takes them down: one place's load from its start to ready or failed, its second try, its end.

The manager says when; whose requests are served or refused by it is the manager's work too (`Desk`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Protocol

import aiohttp

from llamarunner.engines.engine import Engine
from llamarunner.errors import EngineError, EngineGoneError, EngineMissingError, LlamaRunnerError, LoadError
from llamarunner.events import EventBus, RequestPhase
from llamarunner.runners.crash import CauseKind
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.hangs import watch_for_hang
from llamarunner.runners.ledger import Ledger, placed
from llamarunner.runners.place import Place, not_yet
from llamarunner.runners.placement import Placement
from llamarunner.runners.runner import EngineLog, Runner

logger = logging.getLogger(__name__)


class Desk(Protocol):
    """Who is told of what became of a load."""

    def on_ready(self, place: Place) -> None: ...

    def on_failed(self, place: Place, error: EngineError, demand: Demand = NO_DEMAND) -> None:
        """Those who wait for `place` will not get it; where there is a `demand`, those alone who share it."""
        ...

    def on_room(self) -> None:
        """Something ended: it is worth deciding anew."""
        ...


class Loads:
    def __init__(
        self,
        engines: Mapping[str, Engine],
        desk: Desk,
        *,
        bus: EventBus,
        guardian: Guardian,
        session: aiohttp.ClientSession,
        log_for: Callable[[str], EngineLog],
        ledger: Ledger,
        places: Iterable[Place],
    ) -> None:
        self._engines = engines
        self._desk = desk
        self._bus = bus
        self._guardian = guardian
        self._session = session
        self._log_for = log_for
        self._ledger = ledger
        self._places = places
        self._tasks: set[asyncio.Task[None]] = set()
        self._learning: set[str] = set()  # places whose next load is being estimated
        self.is_closing = False

    async def close(self) -> None:
        """Stop every runner, and wait for all that is under way."""
        self.is_closing = True
        runners = [place.runner for place in self._places if place.runner is not None]
        await asyncio.gather(*(runner.stop("the server is shutting down") for runner in runners))
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _own(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- up ----------------------------------------------------------------------------------------------------------

    def learn(self, place: Place, demand: Demand) -> None:
        """Find out what a load that meets `demand` needs; that is worth deciding anew."""
        if place.name not in self._learning:
            self._learning.add(place.name)
            self._own(self._estimate(place, demand), f"estimate {place.name}")

    async def _estimate(self, place: Place, demand: Demand) -> None:
        try:
            await self._ledger.estimate(place, self._engines.get(place.model.settings.engine), demand)
        finally:
            self._learning.discard(place.name)
        # not at once: an eager task may be here in the midst of a decision
        asyncio.get_running_loop().call_soon(self._desk.on_room)

    def start(self, place: Place, placement: Placement | None, demand: Demand) -> None:
        """Load the place's model so that it meets `demand`, unless it failed a moment ago."""
        now = time.monotonic()
        model = demand.applied(place.model)
        engine = self._engines.get(model.settings.engine)
        if place.failure is not None and (wait_s := place.restarts.wait_s(now)) > 0:
            self._desk.on_failed(place, not_yet(place.failure, wait_s, place.restarts.is_open(now)))
            return
        place.failure = None
        if engine is None:
            self.fail(place, EngineMissingError(f"there is no engine '{model.settings.engine}'"))
            return
        place.launched, place.demanded = model, demand
        place.placement, place.need = placement, self._ledger.first_need(place, demand)
        if place.load_s is None:
            place.load_s = self._ledger.expected_load_s(place)
        runner = Runner(
            placed(model, placement),
            engine,
            log=self._log_for(place.name),
            bus=self._bus,
            guardian=self._guardian,
            session=self._session,
            name=place.name,
        )
        runner.on_ended = lambda ended: self._on_ended(place, ended)
        place.runner = runner
        place.idle_since = place.ready_since = None
        place.keep_alive_s = model.settings.keep_alive
        for waiter in place.waiters:
            if waiter.trace is not None:
                waiter.trace.phase = RequestPhase.LOADING
                waiter.trace.load_started = now
        self._own(self._bring_up(place, runner), f"load {place.name}")

    async def _bring_up(self, place: Place, runner: Runner) -> None:
        try:
            await runner.start()
        except EngineError as error:
            if not await self._made_room_after(place, runner, error):
                self._give_up(place, runner, error)
        except LlamaRunnerError as error:  # its configuration asks for what its engine has not
            self._give_up(place, runner, EngineError(error.message, hint=error.hint))
        except Exception:
            logger.exception("loading %s failed in an unforeseen way", place.name)
            self._give_up(place, runner, EngineError(f"loading {place.name} failed", hint="the log has the details"))
        else:
            place.load_s = runner.load_s
            place.is_second_try = False
            self._own(self._ledger.measure(place), f"measure {place.name}")
            hangs = watch_for_hang(place, runner, self._session, self._on_hung)
            self._own(hangs, f"watch for a hang of {place.name}")
            place.idle_since = place.ready_since = time.monotonic()
            self._desk.on_ready(place)
        self._desk.on_room()

    async def _made_room_after(self, place: Place, runner: Runner, error: EngineError) -> bool:
        """Out of memory: unload every idle model, once, and let the load be tried again."""
        idle = [
            other
            for other in self._places
            if other is not place and other.runner is not None and other.resident().is_evictable
        ]
        out_of_memory = isinstance(error, LoadError) and error.cause == CauseKind.OUT_OF_MEMORY
        if not out_of_memory or not idle or place.is_second_try or place.stopping or not place.waiters:
            return False
        place.is_second_try = True
        logger.warning("%s ran out of memory: unloading %d idle models and trying again", place.name, len(idle))
        leaving = [other.runner for other in idle if other.runner is not None]
        for other in idle:
            self.stop(other, f"evicted for {place.name}, which ran out of memory")
        await asyncio.gather(*(runner.wait_ended() for runner in leaving))
        if place.runner is runner and not place.stopping:  # else whoever stops it tidies up
            place.runner = None
        return True

    def _give_up(self, place: Place, runner: Runner, error: EngineError) -> None:
        if place.runner is runner and not place.stopping:  # else whoever stops it tidies up
            place.runner = None
            if place.demanded != NO_DEMAND:
                place.failed_demands.failed(place.demanded, error, time.monotonic())
            self.fail(place, error, place.demanded)

    def fail(self, place: Place, error: EngineError, demand: Demand = NO_DEMAND) -> None:
        """The place's model cannot be loaded, or not as requests `demand` it."""
        place.is_second_try = False
        if demand == NO_DEMAND:
            self._note_failure(place, error)
        self._desk.on_failed(place, error, demand)

    def _note_failure(self, place: Place, error: EngineError) -> None:
        place.failure, place.failed_at = error, time.monotonic()
        if isinstance(error, LoadError | EngineGoneError):  # others cost nothing to find out again
            place.restarts.failed(place.failed_at)

    # -- down --------------------------------------------------------------------------------------------------------

    def stop(self, place: Place, reason: str) -> None:
        """Without waiting for its answers."""
        if place.runner is not None and not place.stopping:
            place.stopping = True
            self._own(self._take_down(place, place.runner, reason), f"unload {place.name}")

    async def _take_down(self, place: Place, runner: Runner, reason: str) -> None:
        self._ledger.note_growth(place)
        held, used = self._ledger.held(place), self._ledger.used()
        try:
            await runner.stop(reason)
            if not self.is_closing:
                await self._ledger.wait_until_back(held, used)
        finally:
            place.runner = None
            place.stopping = False
            place.idle_since = None
            self._desk.on_room()

    def _on_hung(self, place: Place, runner: Runner, error: EngineGoneError) -> None:
        """Reported by now. A server elsewhere is not ours to end."""
        is_ours = runner.plan is not None and not runner.plan.url
        if place.model.settings.restart_hung and is_ours and place.runner is runner and not place.stopping:
            runner.error = error
            self._note_failure(place, error)
            self.stop(place, error.message)

    def _on_ended(self, place: Place, runner: Runner) -> None:
        """An engine ended by itself: those it was answering see their connection break; the next request loads it."""
        if place.runner is runner and not place.stopping:
            place.runner = None
            place.idle_since = None
            if runner.error is not None:
                self._note_failure(place, runner.error)
            self._desk.on_room()
