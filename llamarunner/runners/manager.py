"""Which models run now: `acquire` gives a request its lease on a ready runner, loading and unloading as needed.

The scheduler decides, the manager acts. Everything happens on the event loop between two awaits, so that readiness and
the lease are one step: a waiter is granted by whoever sees the runner ready, and a lease counts only if its waiter is
still there to take it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import SchedulerConfig
from llamarunner.engines.engine import Engine, LaunchPlan
from llamarunner.errors import (
    DoesNotFitError,
    EngineError,
    EngineGoneError,
    EngineMissingError,
    LlamaRunnerError,
    LoadError,
    OverloadedError,
)
from llamarunner.events import EventBus, RequestPhase, RequestTrace, RunnerState
from llamarunner.runners.crash import CauseKind
from llamarunner.runners.footprints import Footprints
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.hangs import watch_for_hang
from llamarunner.runners.ledger import Ledger, NoGauge, placed
from llamarunner.runners.outlook import Outlook, outlooks
from llamarunner.runners.place import Place, Residence, Waiter, not_yet
from llamarunner.runners.placement import Placement
from llamarunner.runners.runner import EngineLog, Runner
from llamarunner.runners.scheduler import Drain, Facts, Load, Refuse, Unload, Waiting, decide

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0  # told to clients that are turned away, where nothing better is known
_TIMER_SLACK_S = 0.002  # loops round timers to a millisecond; waking early would only mean waking again


@dataclass(frozen=True, slots=True)
class Lease:
    """One request's hold on a ready runner, for as long as the `acquire` block lasts."""

    runner: Runner
    base_url: str
    headers: Mapping[str, str]  # what the engine wants to see on each request
    plan: LaunchPlan
    waited_s: float  # from asking to having it: queueing and loading


class RunnerManager:
    """`engines` by name; `log_for` opens the log of a model's engine; `session` is used for health checks only."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        settings: SchedulerConfig,
        *,
        bus: EventBus,
        guardian: Guardian,
        session: aiohttp.ClientSession,
        log_for: Callable[[str], EngineLog],
        ledger: Ledger | None = None,
    ) -> None:
        """Without a `ledger` nothing is known of memory, and only `max_loaded` limits what is loaded."""
        self._engines = engines
        self._settings = settings
        self._bus = bus
        self._guardian = guardian
        self._session = session
        self._log_for = log_for
        self._ledger = ledger or Ledger(NoGauge(), Footprints(Path(os.devnull)))
        self._loop = asyncio.get_running_loop()
        self._places: dict[str, Place] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake: asyncio.TimerHandle | None = None
        self._closing = False
        self._idle = asyncio.Event()  # set while no lease is held
        self._idle.set()

    # -- leases ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def acquire(
        self, model: Model, trace: RequestTrace | None = None, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[Lease]:
        """Hold a ready runner of `model`, loading it first if need be.

        `keep_alive_s` is how long the model stays once nobody uses it; the newest one given wins, None leaves it as it
        is. Raises OverloadedError when the queue is full or the program is stopping, EngineError when the model could
        not be loaded.
        """
        asked = time.monotonic()
        place = self._place(model)
        runner = await self._grant(place, trace, keep_alive_s)
        granted = time.monotonic()
        unstreamed = trace is None or not trace.stream
        place.unstreamed += unstreamed
        if trace is not None:
            trace.granted = granted
            trace.phase = RequestPhase.PROMPT
        try:
            plan = runner.plan
            if plan is None:
                raise EngineMissingError(f"{model.name} has no running engine")
            yield Lease(runner, plan.base_url, plan.headers, plan, granted - asked)
            if trace is not None:
                place.note_answer(time.monotonic() - granted)
        finally:
            place.unstreamed -= unstreamed
            self._release(place)

    async def _grant(self, place: Place, trace: RequestTrace | None, keep_alive_s: float | None) -> Runner:
        """One lease counted in `place`, now or when it is this waiter's turn."""
        if self._closing:
            raise OverloadedError("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
        if not place.can_serve_now:
            await self._ledger.estimate(place, self._engines.get(place.model.settings.engine))
            if self._closing:
                raise OverloadedError("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
        if place.can_serve_now and place.runner is not None:
            self._count_lease(place, keep_alive_s)
            return place.runner
        if sum(len(other.waiters) for other in self._places.values()) >= self._settings.max_queue:
            raise OverloadedError("too many requests are waiting", retry_after_s=self._retry_after_s())
        waiter = Waiter(next(self._numbers), time.monotonic(), self._loop.create_future(), trace, keep_alive_s)
        place.waiters.append(waiter)
        self._mark_waiting(place, waiter)
        try:
            self._reconsider()
        except BaseException:
            if waiter in place.waiters:
                place.waiters.remove(waiter)  # or it would stand in the way of all who come after
            raise
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter in place.waiters:
                place.waiters.remove(waiter)
                self._reconsider()
            elif not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._release(place)
            raise

    def _count_lease(self, place: Place, keep_alive_s: float | None) -> None:
        place.leases += 1
        place.idle_since = None
        if keep_alive_s is not None:
            place.keep_alive_s = keep_alive_s
        self._idle.clear()

    def _release(self, place: Place) -> None:
        place.leases -= 1
        if place.is_ready and place.runner is not None:
            place.restarts.reset()
            self._serve_waiters(place, place.runner)
        if place.leases == 0:
            place.idle_since = time.monotonic()
            if all(other.leases == 0 for other in self._places.values()):
                self._idle.set()
        self._reconsider()

    def _serve_waiters(self, place: Place, runner: Runner) -> None:
        """As many as its engine answers side by side; the rest when those have ended."""
        while place.waiters and place.leases < place.slots:
            waiter = place.waiters.popleft()
            if not waiter.granted.done():
                self._count_lease(place, waiter.keep_alive_s)
                waiter.granted.set_result(runner)

    def _refuse_waiters(self, place: Place, error: Exception) -> None:
        while place.waiters:
            waiter = place.waiters.popleft()
            if not waiter.granted.done():
                waiter.granted.set_exception(error)

    def _mark_waiting(self, place: Place, waiter: Waiter) -> None:
        if waiter.trace is not None:
            waiter.trace.phase = RequestPhase.LOADING if place.is_loading else RequestPhase.QUEUED
            if place.is_loading:
                waiter.trace.load_started = time.monotonic()

    # -- commands ----------------------------------------------------------------------------------------------------

    async def load(self, model: Model, *, keep_alive_s: float | None = None) -> None:
        """Return once `model` is ready. Raises as `acquire` does. A person asks: earlier failures do not count."""
        if place := self._places.get(model.name):
            place.restarts.reset()
        async with self.acquire(model, keep_alive_s=keep_alive_s):
            pass

    async def unload(self, model: Model, *, reason: str = "unloaded by hand", force: bool = False) -> None:
        """Stop the model's runner once it has answered what it answers now; with `force`, at once.

        Requests that come meanwhile wait, and load it again. A load in progress is given up, and those who wait for it
        are told so.
        """
        place = self._places.get(model.name)
        if place is None:
            return
        if place.runner is None:
            place.failure = None
            return
        runner = place.runner
        if force or place.is_loading or place.leases == 0:
            if place.is_loading:
                self._refuse_waiters(place, LoadError(f"{model.name} was unloaded while it was loading"))
            self._stop(place, reason)
        else:
            runner.drain(reason)
        self._reconsider()
        await runner.wait_ended()

    def expire(self, model: Model) -> None:
        """Unload the model as soon as nobody uses it; returns at once, and it need not be loaded."""
        place = self._places.get(model.name)
        if place is not None and place.runner is not None:
            place.keep_alive_s = 0.0
            self._reconsider()

    def set_keep_alive(self, model: Model, keep_alive_s: float) -> None:
        """As if a request with this keep_alive had just ended."""
        place = self._places.get(model.name)
        if place is not None and place.runner is not None:
            place.keep_alive_s = keep_alive_s
            if place.idle_since is not None:
                place.idle_since = time.monotonic()
            self._reconsider()

    async def close(self, drain_s: float) -> None:
        """Take no new requests, let running answers end within `drain_s`, then stop every engine. May be called again
        with a shorter time: the shorter one counts."""
        self._closing = True
        for place in self._places.values():
            self._refuse_waiters(place, OverloadedError("the server is shutting down", retry_after_s=_RETRY_AFTER_S))
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("ending the answers that are still running after %.0f s", drain_s)
        if self._wake is not None:
            self._wake.cancel()
        runners = [place.runner for place in self._places.values() if place.runner is not None]
        await asyncio.gather(*(runner.stop("the server is shutting down") for runner in runners))
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what may be told --------------------------------------------------------------------------------------------

    def residence(self, name: str) -> Residence | None:
        """Of the model of this name; None where it never was loaded."""
        place = self._places.get(name)
        return None if place is None else place.residence(time.monotonic(), self._ledger.estimated(place))

    def outlooks(self) -> Mapping[int, Outlook]:
        """What each waiting request may be told, by request id."""
        return outlooks(list(self._places.values()), time.monotonic())

    def _retry_after_s(self) -> float:
        known = [outlook.left_s for outlook in self.outlooks().values() if outlook.left_s is not None]
        return max(known, default=_RETRY_AFTER_S) or _RETRY_AFTER_S

    @property
    def pids(self) -> list[int]:
        """Of the engine processes there are."""
        runners = (place.runner for place in self._places.values())
        return [runner.pid for runner in runners if runner is not None and runner.pid is not None]

    @property
    def loaded(self) -> list[Model]:
        """The models whose runner is ready to answer."""
        return [
            place.model
            for place in self._places.values()
            if place.runner is not None and place.runner.state is RunnerState.READY
        ]

    # -- acting on decisions -----------------------------------------------------------------------------------------

    def _place(self, model: Model) -> Place:
        place = self._places.get(model.name)
        if place is None:
            place = self._places[model.name] = Place(model)
        elif place.runner is None:
            place.model = model  # the catalogue may have a newer one; a running engine keeps what it was started with
        return place

    def _facts(self) -> Facts:
        waiting = sorted((p for p in self._places.values() if p.waiters), key=lambda p: p.waiters[0].number)
        return Facts(
            now=time.monotonic(),
            residents=[p.resident(self._ledger.held(p)) for p in self._places.values() if p.runner is not None],
            waiting=[self._waiting(place) for place in waiting],
            max_wait_s=self._settings.max_wait,
            max_loaded=self._settings.max_loaded,
            devices=self._ledger.devices() if waiting else (),
            partial="offload" if self._settings.partial_offload else "refuse",
        )

    def _waiting(self, place: Place) -> Waiting:
        need = self._ledger.need(place) if place.runner is None else None
        first, devices = place.waiters[0], tuple(place.model.settings.devices)
        return Waiting(place.model.name, first.since, need, devices, is_local=place.is_local)

    def _reconsider(self) -> None:
        """Ask the scheduler, do what it says, and set the alarm for when to ask again."""
        if self._closing:
            return
        for place in self._places.values():
            drained = place.runner is not None and place.runner.state is RunnerState.DRAINING and place.leases == 0
            if drained and not place.stopping:
                self._stop(place, place.runner.reason if place.runner else "")
        decision = decide(self._facts())
        for action in decision.actions:
            place = self._places[action.model]
            match action:
                case Load(placement=placement):
                    self._start(place, placement)
                case Unload(reason=reason):
                    self._stop(place, reason)
                case Drain(reason=reason):
                    if place.runner is not None:
                        place.runner.drain(reason)
                case Refuse(message=message, hint=hint, is_wrong=is_wrong):
                    self._fail(place, EngineError(message, hint=hint) if is_wrong else DoesNotFitError(message))
        if self._wake is not None:
            self._wake.cancel()
        if math.isinf(decision.wake_at):
            self._wake = None
        else:
            delay = max(0.0, decision.wake_at - time.monotonic()) + _TIMER_SLACK_S
            self._wake = self._loop.call_later(delay, self._reconsider)

    def _own(self, work: Coroutine[None, None, None], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self, place: Place, placement: Placement | None) -> None:
        model = place.model
        engine = self._engines.get(model.settings.engine)
        if place.failure is not None and (wait_s := place.restarts.wait_s(time.monotonic())) > 0:
            self._refuse_waiters(place, not_yet(place.failure, wait_s, place.restarts.is_open(time.monotonic())))
            return
        place.failure = None
        if engine is None:
            self._fail(place, EngineMissingError(f"there is no engine '{model.settings.engine}'"))
            return
        place.placement = placement
        runner = Runner(
            placed(model, placement),
            engine,
            log=self._log_for(model.name),
            bus=self._bus,
            guardian=self._guardian,
            session=self._session,
        )
        runner.on_ended = self._on_ended
        place.runner = runner
        place.idle_since = None
        place.keep_alive_s = model.settings.keep_alive
        now = time.monotonic()
        for waiter in place.waiters:
            if waiter.trace is not None:
                waiter.trace.phase = RequestPhase.LOADING
                waiter.trace.load_started = now
        self._own(self._bring_up(place, runner), f"load {model.name}")

    async def _bring_up(self, place: Place, runner: Runner) -> None:
        try:
            await runner.start()
        except EngineError as error:
            if not await self._made_room_after(place, error):
                self._give_up(place, runner, error)
        except LlamaRunnerError as error:  # its configuration asks for what its engine has not
            self._give_up(place, runner, EngineError(error.message, hint=error.hint))
        except Exception:
            logger.exception("loading %s failed in an unforeseen way", place.model.name)
            self._give_up(
                place, runner, EngineError(f"loading {place.model.name} failed", hint="the log has the details")
            )
        else:
            place.load_s = runner.load_s
            place.is_second_try = False
            self._own(self._ledger.measure(place), f"measure {place.model.name}")
            hangs = watch_for_hang(place, runner, self._session, self._on_hung)
            self._own(hangs, f"watch for a hang of {place.model.name}")
            place.idle_since = time.monotonic()
            self._serve_waiters(place, runner)
        self._reconsider()

    async def _made_room_after(self, place: Place, error: EngineError) -> bool:
        """Out of memory: unload every idle model, once, and let the load be tried again."""
        idle = [
            other
            for other in self._places.values()
            if other is not place and other.runner is not None and other.resident().is_evictable
        ]
        out_of_memory = isinstance(error, LoadError) and error.cause == CauseKind.OUT_OF_MEMORY
        if not out_of_memory or not idle or place.is_second_try or place.stopping or not place.waiters:
            return False
        place.is_second_try = True
        logger.warning("%s ran out of memory: unloading %d idle models and trying again", place.model.name, len(idle))
        leaving = [other.runner for other in idle if other.runner is not None]
        for other in idle:
            self._stop(other, f"evicted for {place.model.name}, which ran out of memory")
        await asyncio.gather(*(runner.wait_ended() for runner in leaving))
        place.runner = None
        return True

    def _give_up(self, place: Place, runner: Runner, error: EngineError) -> None:
        if place.runner is runner and not place.stopping:  # else whoever stops it tidies up
            place.runner = None
            self._fail(place, error)

    def _fail(self, place: Place, error: EngineError) -> None:
        place.is_second_try = False
        place.failure = error
        place.failed_at = time.monotonic()
        if isinstance(error, LoadError | EngineGoneError):  # others cost nothing to find out again
            place.restarts.failed(place.failed_at)
        self._refuse_waiters(place, error)

    def _stop(self, place: Place, reason: str) -> None:
        if place.runner is not None and not place.stopping:
            place.stopping = True
            self._own(self._take_down(place, place.runner, reason), f"unload {place.model.name}")

    async def _take_down(self, place: Place, runner: Runner, reason: str) -> None:
        self._ledger.note_growth(place)
        held, used = self._ledger.held(place), self._ledger.used()
        try:
            await runner.stop(reason)
            if not self._closing:
                await self._ledger.wait_until_back(held, used)
        finally:
            place.runner = None
            place.stopping = False
            place.idle_since = None
            self._reconsider()

    def _on_hung(self, place: Place, runner: Runner, error: EngineGoneError) -> None:
        """Reported by now. A server elsewhere is not ours to end."""
        is_ours = runner.plan is not None and not runner.plan.url
        if place.model.settings.restart_hung and is_ours and place.runner is runner and not place.stopping:
            runner.error = place.failure = error
            place.failed_at = time.monotonic()
            place.restarts.failed(place.failed_at)
            self._stop(place, error.message)

    def _on_ended(self, runner: Runner) -> None:
        """An engine ended by itself: those it was answering see their connection break; the next request loads it."""
        place = self._places.get(runner.model.name)
        if place is not None and place.runner is runner and not place.stopping:
            place.runner = None
            place.idle_since = None
            if runner.error is not None:
                place.failure = runner.error
                place.failed_at = time.monotonic()
                place.restarts.failed(place.failed_at)
            self._reconsider()
