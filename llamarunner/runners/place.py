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
from llamarunner.runners.facts import Resident, protected_until
from llamarunner.runners.failed_demands import FailedDemands
from llamarunner.runners.memory import Need
from llamarunner.runners.placement import Placement
from llamarunner.runners.restarts import OPEN_AFTER, WINDOW_S, Restarts
from llamarunner.runners.runner import Runner
from llamarunner.runners.waiters import Waiter, Waiters
from llamarunner.units import format_duration

LOADING = (RunnerState.STARTING, RunnerState.LOADING)
LEAVING = (RunnerState.DRAINING, RunnerState.STOPPING)
_NEWEST_WEIGHT = 0.3  # of the newest answer in the average time of one


@dataclass(frozen=True, slots=True)
class Share:
    """What a runner has of one device, or had. Bytes; None where it is not known."""

    device: str  # "ram", "gpu0", ...
    layers: int | None = None  # of the model, its output matrix counted as one
    estimated: int | None = None  # told by the header, whatever was measured since
    measured: int | None = None


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
    shares: tuple[Share, ...] = ()
    load_s: float | None = None  # how long the newest load that succeeded took
    hung_s: float | None = None  # without a sign of life from its engine, which owes an answer; None if all is well
    pinned: bool = False
    pinned_by: str = ""  # the tag that `scheduler.always_stay` has
    slots: int | None = None  # requests it answers side by side; None until its engine has told
    demanded: str = ""  # of its runner by a request, beyond the configuration: "context 16384"
    protected_s: float = 0.0  # until it may leave for another though it is idle
    retry_s: float = 0.0  # until requests have one that failed tried again
    failures: int = 0  # lately
    is_left_alone: bool = False  # for these
    ejected_s: float = 0.0  # until requests go to this replica again
    name: str = ""  # the model's, or "NAME#2" for its second replica
    engine: str = ""  # name of its engine
    replicas: tuple[Residence, ...] = ()  # each, where there are several


@dataclass(slots=True, eq=False)
class Place:
    """Times are `time.monotonic()` seconds."""

    name: str  # the model's, or "NAME#2" for its second replica
    model: Model  # as configured, for this replica's engine; of those that share the runner the one asked for last
    waiters: Waiters
    group: str = ""  # the name that all replicas go by
    base: Model | None = None  # the catalogue's, that `model` was made of
    pinned: bool = False
    pinned_by: str = ""  # the tag that says so, where the model itself does not
    apart: frozenset[str] = frozenset()  # its tags of which only one may be loaded at a time
    launched: Model | None = None  # as its runner was started: with what requests demanded
    demanded: Demand = NO_DEMAND  # that
    runner: Runner | None = None
    ready_since: float | None = None
    holders: Counter[int] = field(default_factory=Counter)  # leases by priority
    unstreamed: int = 0  # leases of requests that are answered in one piece
    keep_alive_s: float = 0.0
    idle_since: float | None = None
    restarts: Restarts = field(default_factory=Restarts)
    failure: EngineError | None = None  # of the newest load or run, until the next one begins
    failed_at: float = 0.0
    failed_demands: FailedDemands = field(default_factory=FailedDemands)
    stopping: bool = False
    hung_s: float | None = None  # its runner owes an answer and has given no sign of life for so long, or None
    placement: Placement | None = None  # of its runner, or of the last it had
    need: Need | None = None  # of its runner, or of the last it had
    engine_kind: str = ""
    is_local: bool = True  # its engine runs on this machine
    is_adjustable: bool = True  # its engine can be told what requests demand
    is_second_try: bool = False  # its load ran out of memory, and idle models were unloaded for it
    load_s: float | None = None  # of the newest load that succeeded, be it of an earlier run of the program
    answer_s: float | None = None  # average time a lease is held, the newest counting most
    strikes: int = 0  # requests in a row that got no answer from it
    ejected_until: float = 0.0  # other replicas are asked instead
    is_gone: bool = False  # there is no such model any more: it leaves once nobody uses it

    def __post_init__(self) -> None:
        self.group = self.group or self.name

    @property
    def owner(self) -> str:
        """The model its runner was started for, or would be: of those that share it one is shown as loaded."""
        return self.launched.name if self.runner is not None and self.launched is not None else self.model.name

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
    def stays(self) -> bool:
        """It has a runner that is not about to leave."""
        return self.runner is not None and not self.stopping and self.runner.state not in LEAVING

    def is_like(self, model: Model) -> bool:
        """Its runner serves this model too. A table of the configuration is meant to run on its own: it takes none but
        those that go by its name."""
        if self.base is None or self.base is model:
            return self.base is not None
        may_share = model.source != "config" or self.group == model.name
        return may_share and self.base.is_launched_like(model)

    @property
    def is_loading(self) -> bool:
        return self.runner is not None and self.runner.state in LOADING

    @property
    def is_empty(self) -> bool:
        return self.runner is None and not self.waiters and not self.leases

    def next_demand(self, now: float) -> Demand | None:
        """What its next load is to meet; None where none is to come, or one is under way."""
        if not self.waiters or self.is_loading:
            return None
        if self.is_ready:
            first = self.waiters.first(now).demand
            return None if self.meets(first) else first
        return self.waiters.leader(now).demand

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
        return self.launched is not None and (not self.is_adjustable or demand.is_met_by(self.launched))

    def kept_from(self, first: Waiter, now: float, min_residency_s: float) -> float:
        """Until when its runner is not loaded again for `first`, whom it does not do for: who takes turns with others
        that want the opposite does not have it loaded again with every request. `now` or earlier where it may be."""
        is_patient = now - first.since < self.waiters.patience_s and first.priority <= max(self.holders, default=0)
        undoes = not self.demanded.is_met_by(first.demand.applied(self.model))
        if not undoes or not is_patient or self.ready_since is None:
            return -math.inf
        if self.idle_since is None:
            return self.ready_since + min_residency_s
        return protected_until(self.resident(), min_residency_s)

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
            pinned=self.pinned and not self.is_gone,
            idle_since=self.idle_since,
            keep_alive_s=0.0 if self.is_gone else self.keep_alive_s,
            held=held or {},
            is_local=self.is_local,
            ready_since=self.ready_since,
            priority=max(self.holders, default=0),
            apart=self.apart,
        )

    def residence(self, now: float, shares: tuple[Share, ...] = (), min_residency_s: float = 0.0) -> Residence:
        resident = self.resident() if self.runner is not None and self.idle_since is not None else None
        has_failed = self.failure is not None and self.runner is None
        return Residence(
            runner=self.runner,
            in_flight=self.leases,
            queued=len(self.waiters),
            keep_alive_s=0.0 if self.is_gone else math.inf if self.pinned else self.keep_alive_s,
            idle_left_s=max(0.0, resident.expires - now) if resident is not None else None,
            failure=self.failure,
            failed_s=now - self.failed_at if self.failure else 0.0,
            shares=shares,
            load_s=self.load_s,
            hung_s=self.hung_s,
            pinned=self.pinned,
            pinned_by=self.pinned_by,
            slots=self.slots if self.runner is not None and self.runner.slots else None,
            demanded=str(self.demanded) if self.runner is not None else "",
            protected_s=max(0.0, protected_until(resident, min_residency_s) - now) if resident is not None else 0.0,
            retry_s=self.restarts.wait_s(now) if has_failed else 0.0,
            failures=self.restarts.count(now),
            is_left_alone=has_failed and self.restarts.is_open(now),
            ejected_s=max(0.0, self.ejected_until - now),
            name=self.name,
            engine=self.model.settings.engine,
        )


def together(residences: Sequence[Residence]) -> Residence:
    """All replicas of a model as one."""
    if len(residences) == 1:
        return residences[0]
    running = [each for each in residences if each.runner is not None]
    ready = [each for each in running if each.runner is not None and each.runner.state is RunnerState.READY]
    sound = [each for each in ready if each.hung_s is None]
    first = (sound or ready or running or list(residences))[0]
    in_flight = sum(each.in_flight for each in residences)
    left = [each.idle_left_s for each in residences if each.idle_left_s is not None]
    return replace(
        first,
        in_flight=in_flight,
        queued=sum(each.queued for each in residences),
        slots=sum(each.slots or 0 for each in residences) or None,
        idle_left_s=None if in_flight else max(left, default=None),
        shares=_added([share for each in residences for share in each.shares]),
        failure=first.failure if running else next((e.failure for e in residences if e.failure is not None), None),
        replicas=tuple(residences),
    )


def _added(shares: Sequence[Share]) -> tuple[Share, ...]:
    """One for each device. Layers are told of each replica: added up they would mean nothing."""
    devices = dict.fromkeys(share.device for share in shares)
    return tuple(
        Share(
            device,
            None,
            _sum([share.estimated for share in shares if share.device == device]),
            _sum([share.measured for share in shares if share.device == device]),
        )
        for device in devices
    )


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None


def not_yet(failure: EngineError, wait_s: float, is_open: bool = False) -> EngineError:
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
