"""A model's place among the runners: its runner, who holds it, who waits for it, and how it fared. Only the manager
writes it; here is what can be read off it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from llamarunner.catalog.catalog import Model
from llamarunner.errors import EngineError, LoadError
from llamarunner.events import RequestTrace, RunnerState
from llamarunner.runners.memory import Need
from llamarunner.runners.placement import Placement
from llamarunner.runners.restarts import OPEN_AFTER, WINDOW_S, Restarts
from llamarunner.runners.runner import Runner
from llamarunner.runners.scheduler import Resident
from llamarunner.units import format_duration

LOADING = (RunnerState.STARTING, RunnerState.LOADING)
_NEWEST_WEIGHT = 0.3  # of the newest answer in the average time of one


@dataclass(slots=True, eq=False)
class Waiter:
    number: int  # rises with every request that had to wait
    since: float
    granted: asyncio.Future[Runner]
    trace: RequestTrace | None
    keep_alive_s: float | None


@dataclass(frozen=True, slots=True)
class Residence:
    """What may be told of a model's place: see `RunnerManager.residence`."""

    runner: Runner | None
    in_flight: int
    queued: int
    keep_alive_s: float
    idle_left_s: float | None  # until it is unloaded for idleness; None while it is busy or not ready
    failure: EngineError | None
    failed_s: float  # since the failure
    estimated_bytes: int | None = None  # of memory, before anything was measured
    load_s: float | None = None  # how long the newest load that succeeded took
    hung_s: float | None = None  # without a sign of life from its engine, which owes an answer; None if all is well


@dataclass(slots=True, eq=False)
class Place:
    """Times are `time.monotonic()` seconds."""

    model: Model
    runner: Runner | None = None
    leases: int = 0
    unstreamed: int = 0  # leases of requests that are answered in one piece
    waiters: deque[Waiter] = field(default_factory=deque)
    keep_alive_s: float = 0.0
    idle_since: float | None = None
    restarts: Restarts = field(default_factory=Restarts)
    failure: EngineError | None = None  # of the newest load or run, until the next one begins
    failed_at: float = 0.0
    stopping: bool = False
    hung_s: float | None = None  # its runner owes an answer and has given no sign of life for so long, or None
    placement: Placement | None = None  # of its runner, or of the last it had
    need: Need | None = None  # as estimated; see `ledger.py`
    need_of: Model | None = None  # the model it was estimated of
    engine_kind: str = ""
    is_local: bool = True  # its engine runs on this machine
    is_second_try: bool = False  # its load ran out of memory, and idle models were unloaded for it
    load_s: float | None = None  # of the newest load that succeeded
    answer_s: float | None = None  # average time a lease is held, the newest counting most

    @property
    def is_ready(self) -> bool:
        return self.runner is not None and self.runner.state is RunnerState.READY and not self.stopping

    @property
    def is_loading(self) -> bool:
        return self.runner is not None and self.runner.state in LOADING

    @property
    def slots(self) -> int:
        """Requests its engine answers side by side."""
        told = self.runner.slots if self.runner is not None else None
        return told or self.model.settings.parallel

    @property
    def can_serve_now(self) -> bool:
        """A request that came now would not overtake one that waits."""
        return self.is_ready and not self.waiters and self.leases < self.slots

    def note_answer(self, seconds: float) -> None:
        before = seconds if self.answer_s is None else self.answer_s
        self.answer_s = before + _NEWEST_WEIGHT * (seconds - before)

    def resident(self, held: Mapping[str, int] | None = None) -> Resident:
        """The scheduler's view of it; it has a runner. `held` is its memory."""
        assert self.runner is not None
        return Resident(
            model=self.model.name,
            state=RunnerState.STOPPING if self.stopping else self.runner.state,
            leases=self.leases,
            waiters=len(self.waiters),
            pinned=self.model.settings.pin,
            idle_since=self.idle_since,
            keep_alive_s=self.keep_alive_s,
            held=held or {},
            is_local=self.is_local,
        )

    def residence(self, now: float, estimated_bytes: int | None = None) -> Residence:
        idle = self.runner is not None and self.idle_since is not None
        return Residence(
            runner=self.runner,
            in_flight=self.leases,
            queued=len(self.waiters),
            keep_alive_s=math.inf if self.model.settings.pin else self.keep_alive_s,
            idle_left_s=max(0.0, self.resident().expires - now) if idle else None,
            failure=self.failure,
            failed_s=now - self.failed_at if self.failure else 0.0,
            estimated_bytes=estimated_bytes,
            load_s=self.load_s,
            hung_s=self.hung_s,
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
        return LoadError(
            failure.message, hint=hint, cause=failure.cause, exit_code=failure.exit_code, log_tail=failure.log_tail
        )
    return EngineError(failure.message, hint=hint)
