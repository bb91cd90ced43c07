"""A model's place among the runners: its runner, who holds it, who waits for it, and how it fared. A model with
replicas has a place for each. Only the manager writes it; here is what can be read off it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llamarunner.catalog.catalog import Model
from llamarunner.errors import EngineError, LoadError
from llamarunner.events import RunnerState
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.facts import Resident
from llamarunner.runners.memory import Need
from llamarunner.runners.placement import Placement
from llamarunner.runners.restarts import OPEN_AFTER, WINDOW_S, Restarts
from llamarunner.runners.runner import Runner
from llamarunner.runners.waiters import Waiters
from llamarunner.units import format_duration

LOADING = (RunnerState.STARTING, RunnerState.LOADING)
_NEWEST_WEIGHT = 0.3  # of the newest answer in the average time of one


@dataclass(frozen=True, slots=True)
class Residence:
    """What may be told of a model's place, or of all its replicas': see `RunnerManager.residence`."""

    runner: Runner | None  # of replicas one that is ready, where there is one
    in_flight: int
    queued: int
    keep_alive_s: float
    idle_left_s: float | None  # until it is unloaded for idleness; None while it is busy or not ready
    failure: EngineError | None
    failed_s: float  # since the failure
    estimated_bytes: int | None = None  # of memory, before anything was measured
    load_s: float | None = None  # how long the newest load that succeeded took
    hung_s: float | None = None  # without a sign of life from its engine, which owes an answer; None if all is well
    pinned: bool = False
    name: str = ""  # the model's, or "NAME#2" for its second replica
    replicas: tuple[Residence, ...] = ()  # each, where there are several


@dataclass(slots=True, eq=False)
class Place:
    """Times are `time.monotonic()` seconds."""

    name: str  # the model's, or "NAME#2" for its second replica
    model: Model  # as configured, for this replica's engine
    waiters: Waiters
    base: Model | None = None  # the catalogue's, that `model` was made of
    pinned: bool = False
    apart: frozenset[str] = frozenset()  # its tags of which only one may be loaded at a time
    launched: Model | None = None  # as its runner was started: with what requests demanded
    runner: Runner | None = None
    ready_since: float | None = None
    holders: Counter[int] = field(default_factory=Counter)  # leases by priority
    unstreamed: int = 0  # leases of requests that are answered in one piece
    keep_alive_s: float = 0.0
    idle_since: float | None = None
    restarts: Restarts = field(default_factory=Restarts)
    failure: EngineError | None = None  # of the newest load or run, until the next one begins
    failed_at: float = 0.0
    stopping: bool = False
    hung_s: float | None = None  # its runner owes an answer and has given no sign of life for so long, or None
    placement: Placement | None = None  # of its runner, or of the last it had
    need: Need | None = None  # of its runner, or of the last it had
    engine_kind: str = ""
    is_local: bool = True  # its engine runs on this machine
    is_second_try: bool = False  # its load ran out of memory, and idle models were unloaded for it
    load_s: float | None = None  # of the newest load that succeeded, be it of an earlier run of the program
    answer_s: float | None = None  # average time a lease is held, the newest counting most
    strikes: int = 0  # requests in a row that got no answer from it
    ejected_until: float = 0.0  # other replicas are asked instead

    @property
    def leases(self) -> int:
        return self.holders.total()

    @property
    def outstanding(self) -> int:
        """Requests that are its to answer."""
        return self.leases + len(self.waiters)

    @property
    def is_ready(self) -> bool:
        return self.runner is not None and self.runner.state is RunnerState.READY and not self.stopping

    @property
    def is_loading(self) -> bool:
        return self.runner is not None and self.runner.state in LOADING

    @property
    def slots(self) -> int:
        """Requests it may answer side by side: as many as its engine does, or the configuration allows."""
        told = self.runner.slots if self.runner is not None else None
        slots = told or self.model.settings.parallel
        return min(slots, self.model.settings.max_requests or slots)

    def can_serve_now(self, demand: Demand = NO_DEMAND) -> bool:
        """A request that came now would not overtake one that waits."""
        return self.is_ready and not self.waiters and self.leases < self.slots and self.meets(demand)

    def meets(self, demand: Demand) -> bool:
        return self.launched is not None and demand.is_met_by(self.launched)

    def kept_alive(self, asked_s: float) -> float:
        """What a client asks, within what the configuration allows."""
        settings = self.model.settings
        longest = math.inf if settings.keep_alive_max is None else settings.keep_alive_max
        return max(min(asked_s, longest), settings.keep_alive_min)

    def note_answer(self, seconds: float) -> None:
        before = seconds if self.answer_s is None else self.answer_s
        self.answer_s = before + _NEWEST_WEIGHT * (seconds - before)

    def resident(self, held: Mapping[str, int] | None = None) -> Resident:
        """The scheduler's view of it; it has a runner. `held` is its memory."""
        assert self.runner is not None
        return Resident(
            model=self.name,
            state=RunnerState.STOPPING if self.stopping else self.runner.state,
            leases=self.leases,
            waiters=len(self.waiters),
            pinned=self.pinned,
            idle_since=self.idle_since,
            keep_alive_s=self.keep_alive_s,
            held=held or {},
            is_local=self.is_local,
            ready_since=self.ready_since,
            priority=max(self.holders, default=0),
            apart=self.apart,
        )

    def residence(self, now: float, estimated_bytes: int | None = None) -> Residence:
        idle = self.runner is not None and self.idle_since is not None
        return Residence(
            runner=self.runner,
            in_flight=self.leases,
            queued=len(self.waiters),
            keep_alive_s=math.inf if self.pinned else self.keep_alive_s,
            idle_left_s=max(0.0, self.resident().expires - now) if idle else None,
            failure=self.failure,
            failed_s=now - self.failed_at if self.failure else 0.0,
            estimated_bytes=estimated_bytes,
            load_s=self.load_s,
            hung_s=self.hung_s,
            pinned=self.pinned,
            name=self.name,
        )


def together(residences: Sequence[Residence]) -> Residence:
    """All replicas of a model as one."""
    if len(residences) == 1:
        return residences[0]
    running = [each for each in residences if each.runner is not None]
    ready = [each for each in running if each.runner is not None and each.runner.state is RunnerState.READY]
    first = (ready or running or list(residences))[0]
    return replace(
        first,
        in_flight=sum(each.in_flight for each in residences),
        queued=sum(each.queued for each in residences),
        failure=first.failure if running else next((e.failure for e in residences if e.failure is not None), None),
        replicas=tuple(residences),
    )


def not_yet(failure: EngineError, wait_s: float, is_open: bool) -> EngineError:
    """The failure again, and when the next try is."""
    if is_open:
        often = f"it failed {OPEN_AFTER} times within {format_duration(WINDOW_S)}"
        again = f"{often} and is left alone for {format_duration(wait_s)}, or until it is loaded by hand"
    else:
        again = f"the next try is in {format_duration(wait_s)}"
    hint = f"{failure.hint}; {again}" if failure.hint else again
    if isinstance(failure, LoadError):
        error: EngineError = LoadError(
            failure.message, hint=hint, cause=failure.cause, exit_code=failure.exit_code, log_tail=failure.log_tail
        )
    else:
        error = EngineError(failure.message, hint=hint)
    error.retry_after_s = wait_s
    return error
