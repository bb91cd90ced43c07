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
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.config.schema import SchedulerConfig
from llamarunner.engines.engine import Engine, LaunchPlan
from llamarunner.errors import DoesNotFitError, EngineError, EngineMissingError, LoadError, OverloadedError
from llamarunner.events import EventBus, RequestPhase, RequestTrace, RunnerState
from llamarunner.runners import replicas
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.facts import Drain, Load, Refuse, Unload
from llamarunner.runners.footprints import Footprints
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.ledger import Ledger, NoGauge
from llamarunner.runners.loads import Loads
from llamarunner.runners.outlook import Outlook
from llamarunner.runners.place import Place, Residence, not_yet
from llamarunner.runners.placement import Device
from llamarunner.runners.places import Places
from llamarunner.runners.runner import EngineLog, Runner
from llamarunner.runners.scheduler import decide
from llamarunner.runners.waiters import Waiter

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
    place: Place

    @property
    def name(self) -> str:
        """The model's, or its replica's."""
        return self.place.name


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
        self._ledger = ledger or Ledger(NoGauge(), Footprints(Path(os.devnull)))
        self._loop = asyncio.get_running_loop()
        self._places = Places(engines, settings, self._ledger)
        self._loads = Loads(
            engines,
            self,
            bus=bus,
            guardian=guardian,
            session=session,
            log_for=log_for,
            ledger=self._ledger,
            places=self._places,
        )
        self._numbers = itertools.count(1)
        self._wake: asyncio.TimerHandle | None = None
        self._closing = False
        self._idle = asyncio.Event()  # set while no lease is held
        self._idle.set()

    # -- leases ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def acquire(
        self,
        model: Model,
        trace: RequestTrace | None = None,
        *,
        keep_alive_s: float | None = None,
        demand: Demand = NO_DEMAND,
        avoid: Collection[str] = (),
    ) -> AsyncIterator[Lease]:
        """Hold a ready runner of `model` that meets `demand`, loading it first if need be.

        `keep_alive_s` is how long the model stays once nobody uses it; the newest one given wins, None leaves it as it
        is. Replicas named in `avoid` are asked only where there is no other. Raises OverloadedError when the queue is
        full or the program is stopping, EngineError when the model could not be loaded.
        """
        asked = time.monotonic()
        place, runner = await self._grant(model, trace, keep_alive_s, demand, avoid)
        granted, priority = time.monotonic(), _priority(model, trace)
        unstreamed = trace is None or not trace.stream
        place.unstreamed += unstreamed
        if trace is not None:
            trace.granted = granted
            trace.phase = RequestPhase.PROMPT
        try:
            if runner.plan is None:
                raise EngineMissingError(f"{model.name} has no running engine")
            plan = runner.plan
            yield Lease(runner, plan.base_url, plan.headers, plan, granted - asked, place)
            place.restarts.reset()
            replicas.answered(place)
            if trace is not None:
                place.note_answer(time.monotonic() - granted)
        finally:
            place.unstreamed -= unstreamed
            self._release(place, priority)

    async def _grant(
        self,
        model: Model,
        trace: RequestTrace | None,
        keep_alive_s: float | None,
        demand: Demand,
        avoid: Collection[str],
    ) -> tuple[Place, Runner]:
        """One lease counted in the place that is returned, now or when it is this waiter's turn."""
        self._refuse_when_closing()
        places = self._places.of(model)
        demand = self._within(demand, model)
        priority = _priority(model, trace)
        place = replicas.choose(places, demand, time.monotonic(), avoid)
        if place.can_serve_now(demand) and place.runner is not None:
            self._count_lease(place, keep_alive_s, priority)
            return place, place.runner
        if (failed := place.failed_demands.lately(demand, time.monotonic())) is not None:
            raise not_yet(*failed)
        self._refuse_when_full(place, places)
        granted: asyncio.Future[tuple[Place, Runner]] = self._loop.create_future()
        number, since = next(self._numbers), time.monotonic()
        waiter = Waiter(number, since, granted, trace, keep_alive_s, priority, demand)
        place.waiters.add(waiter)
        self._mark_waiting(place, waiter)
        try:
            self._reconsider()
        except BaseException:
            self._places.forget(waiter)  # or it would stand in the way of all who come after
            raise
        try:
            return await granted
        except asyncio.CancelledError:
            if (left := self._places.forget(waiter)) is not None:
                self._serve_waiters(left)  # it may have been the one that the others waited behind
                self._reconsider()
            elif not granted.cancelled() and granted.exception() is None:
                self._release(granted.result()[0], priority)
            raise

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise OverloadedError("the server is shutting down", retry_after_s=_RETRY_AFTER_S)

    def _refuse_when_full(self, place: Place, places: list[Place]) -> None:
        limit = place.model.settings.max_queue
        if limit and sum(len(each.waiters) for each in places) >= limit:
            message = f"too many requests are waiting for {place.model.name}"
            raise OverloadedError(message, retry_after_s=self._places.retry_after_s(place))
        if self._places.waiting >= self._settings.max_queue:
            raise OverloadedError("too many requests are waiting", retry_after_s=self._places.retry_after_s(place))

    def _within(self, demand: Demand, model: Model) -> Demand:
        """What of it this model's engine can be asked for."""
        if demand is NO_DEMAND:
            return demand
        engine = self._engines.get(model.settings.engine)
        return demand.within(model) if engine is not None and engine.is_adjustable else NO_DEMAND

    def _count_lease(self, place: Place, keep_alive_s: float | None, priority: int) -> None:
        place.holders[priority] += 1
        place.idle_since = None
        if keep_alive_s is not None:
            place.keep_alive_s = place.kept_alive(keep_alive_s)
        self._idle.clear()

    def _release(self, place: Place, priority: int) -> None:
        place.holders[priority] -= 1
        if not place.holders[priority]:
            del place.holders[priority]
        self._serve_waiters(place)
        if place.leases == 0:
            place.idle_since = time.monotonic()
            if all(other.leases == 0 for other in self._places):
                self._idle.set()
        self._reconsider()

    def _serve_waiters(self, place: Place) -> None:
        """As many as its engine answers side by side; the rest when those have ended. Where none waits here, those who
        wait for another replica are served."""
        now = time.monotonic()
        queues = [place, *(other for other in self._places.replicas(place.group) if other is not place)]
        for other in queues:
            while place.runner and place.is_ready and other.waiters and place.leases < place.slots:
                waiter = other.waiters.first(now)
                if not place.meets(waiter.demand):
                    kept = other is place and self._kept_until(place, now) > now
                    met = [each for each in other.waiters.in_turn(now) if kept and place.meets(each.demand)]
                    if not met:
                        break
                    waiter = met[0]
                other.waiters.remove(waiter)
                if not waiter.granted.done():
                    self._count_lease(place, waiter.keep_alive_s, waiter.priority)
                    waiter.granted.set_result((place, place.runner))

    def _mark_waiting(self, place: Place, waiter: Waiter) -> None:
        if waiter.trace is not None:
            waiter.trace.phase = RequestPhase.LOADING if place.is_loading else RequestPhase.QUEUED
            if place.is_loading:
                waiter.trace.load_started = time.monotonic()

    def no_answer(self, lease: Lease, tried: Collection[str] = ()) -> bool:
        """A request got none from the runner it was given; True where a replica it has not `tried` may give it one."""
        replicas.strike(lease.place, time.monotonic())
        others = {place.name for place in self._places.replicas(lease.place.group)} - {lease.name}
        return not others <= set(tried)

    # -- what became of a load (see `Desk`) --------------------------------------------------------------------------

    def on_ready(self, place: Place) -> None:
        self._serve_waiters(place)
        for waiter in place.waiters:  # for a slot, from now on
            self._mark_waiting(place, waiter)

    def on_failed(self, place: Place, error: EngineError, demand: Demand = NO_DEMAND) -> None:
        """Those who waited go to another replica that may serve them, or are told. Where it was for what one of them
        demanded, the others wait on for a load of their own."""
        now = time.monotonic()
        for waiter in place.waiters.take_all():
            if demand not in (NO_DEMAND, waiter.demand):
                place.waiters.add(waiter)
                continue
            waiter.tried.add(place.name)
            others = [p for p in self._places.replicas(place.group) if p.name not in waiter.tried]
            others = [other for other in others if not replicas.is_ejected(other, now)]
            if others:
                replicas.choose(others, waiter.demand, now).waiters.add(waiter)
            elif not waiter.granted.done():
                waiter.granted.set_exception(error)
        for other in self._places.replicas(place.group):
            self._serve_waiters(other)
        self._loop.call_soon(self._reconsider)

    def on_room(self) -> None:
        self._reconsider()

    # -- commands ----------------------------------------------------------------------------------------------------

    async def load(self, model: Model, *, keep_alive_s: float | None = None) -> None:
        """Return once `model` is ready. Raises as `acquire` does. A person asks: earlier failures do not count."""
        for place in self._places.replicas(model.name):
            place.restarts.reset()
            place.failed_demands.reset()
            replicas.answered(place)
            if place.runner is None:
                place.failure = None
        async with self.acquire(model, keep_alive_s=keep_alive_s):
            pass

    async def unload(self, model: Model, *, reason: str = "unloaded by hand", force: bool = False) -> None:
        """Stop the model's runners once they have answered what they answer now; with `force`, at once.

        Requests that come meanwhile wait, and load it again. A load in progress is given up, and those who wait for it
        are told so.
        """
        ending: list[Runner] = []
        for place in self._places.replicas(model.name):
            if place.runner is None:
                place.failure = None
                continue
            ending.append(place.runner)
            if force or place.is_loading or place.leases == 0:
                if place.is_loading:
                    self._refuse_waiters(place, LoadError(f"{place.name} was unloaded while it was loading"))
                self._loads.stop(place, reason)
            else:
                place.runner.drain(reason)
        self._reconsider()
        for runner in ending:
            await runner.wait_ended()

    def expire(self, model: Model) -> None:
        """Unload the model as soon as nobody uses it, or as soon as the configuration lets clients do so; returns at
        once, and it need not be loaded."""
        for place in self._places.replicas(model.name):
            if place.runner is not None:
                place.keep_alive_s = place.kept_alive(0.0)
        self._reconsider()

    def adopt(self, catalog: Catalog) -> None:
        """The models there are now. Runners of those that are gone leave as soon as nobody uses them, unless they serve
        another as well; those of models with other files take no new requests."""
        for place in self._places.adopt(catalog):
            if place.runner is not None:
                place.runner.drain("its model has other files now")
        self._reconsider()

    def set_keep_alive(self, model: Model, keep_alive_s: float) -> None:
        """As if a request with this keep_alive had just ended."""
        for place in self._places.replicas(model.name):
            if place.runner is not None:
                place.keep_alive_s = place.kept_alive(keep_alive_s)
                if place.idle_since is not None:
                    place.idle_since = time.monotonic()
        self._reconsider()

    async def close(self, drain_s: float) -> None:
        """Take no new requests, let running answers end within `drain_s`, then stop every engine. May be called again
        with a shorter time: the shorter one counts."""
        self._closing = True
        for place in self._places:
            self._refuse_waiters(place, OverloadedError("the server is shutting down", retry_after_s=_RETRY_AFTER_S))
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("ending the answers that are still running after %.0f s", drain_s)
        if self._wake is not None:
            self._wake.cancel()
        await self._loads.close()

    def _refuse_waiters(self, place: Place, error: Exception) -> None:
        for waiter in place.waiters.take_all():
            if not waiter.granted.done():
                waiter.granted.set_exception(error)

    # -- what may be told --------------------------------------------------------------------------------------------

    def residence(self, name: str) -> Residence | None:
        """Of the model of this name, its replicas taken together; None where it never was loaded, or is served by the
        runner of another that is started alike."""
        return self._places.residence(name)

    def pin_of(self, model: Model) -> tuple[bool, str]:
        """Whether it stays once it is loaded, and by which of its tags."""
        return self._places.pin_of(model)

    def strays(self, catalog: Catalog) -> list[Model]:
        """Models that `catalog` has no more, while their runners still answer."""
        return self._places.strays(catalog)

    def devices(self) -> Sequence[Device]:
        """With what each is used for, by ours and by others; () where nothing is measured."""
        return self._places.devices()

    def outlooks(self) -> Mapping[int, Outlook]:
        """What each waiting request may be told, by request id."""
        return self._places.outlooks()

    @property
    def pids(self) -> list[int]:
        """Of the engine processes there are."""
        return self._places.pids

    @property
    def loaded(self) -> list[Model]:
        """The models that have a runner ready to answer."""
        return self._places.loaded

    # -- acting on decisions -----------------------------------------------------------------------------------------

    def _reconsider(self) -> None:
        """Ask the scheduler, do what it says, and set the alarm for when to ask again."""
        if self._closing:
            return
        look_again = min([self._end_what_is_over(place) for place in self._places], default=math.inf)
        facts = self._places.facts()
        demands = {place.name: place.waiters.leader(facts.now).demand for place in self._places if place.waiters}
        decision = decide(facts)
        for action in decision.actions:
            place = self._places[action.model]
            match action:
                case Load(placement=placement):
                    self._loads.start(place, placement, demands[place.name])
                case Unload(reason=reason):
                    self._loads.stop(place, reason)
                case Drain(reason=reason):
                    if place.runner is not None:
                        place.runner.drain(reason)
                case Refuse() as refusal:
                    self._loads.fail(place, _as_error(refusal), demands[place.name])
        if self._wake is not None:
            self._wake.cancel()
        wake_at = min(decision.wake_at, look_again)
        if math.isinf(wake_at):
            self._wake = None
        else:
            delay = max(0.0, wake_at - time.monotonic()) + _TIMER_SLACK_S
            self._wake = self._loop.call_later(delay, self._reconsider)

    def _end_what_is_over(self, place: Place) -> float:
        """A runner that has answered all it had to, and one that does not do for who is next. When to look again, if
        nothing else happens."""
        runner, now = place.runner, time.monotonic()
        demand = place.next_demand(now)
        if demand is not None and not self._places.is_estimated(place, now):
            self._loads.learn(place, demand)
        elif demand is not None and runner is not None and place.is_ready:
            if refusal := self._places.cannot_reload(place, demand):
                self._loads.fail(place, _as_error(refusal), demand)
                self._serve_waiters(place)
            elif (until := self._kept_until(place, now)) > now:
                self._serve_waiters(place)
                return until
            else:
                runner.drain(f"loaded again for a request: {demand}")
        if place.is_gone and place.is_empty:
            self._places.remove(place)
        if runner is not None and not place.stopping and runner.state is RunnerState.DRAINING and place.leases == 0:
            self._loads.stop(place, runner.reason)
        return math.inf

    def _kept_until(self, place: Place, now: float) -> float:
        first = place.waiters.first(now)
        until = place.kept_from(first, now, self._settings.min_residency)
        return min(until, first.since + place.waiters.patience_s)


def _as_error(refusal: Refuse) -> EngineError:
    if refusal.is_wrong:
        return EngineError(refusal.message, hint=refusal.hint)
    return DoesNotFitError(refusal.message)


def _priority(model: Model, trace: RequestTrace | None) -> int:
    return model.settings.priority + (trace.priority if trace is not None else 0)
