"""Who is loaded and who must leave: facts in, actions out. No I/O, no clock of its own, no asyncio.

The rules:
- A model that somebody waits for is loaded as soon as there is room; models wait their turn in the order of their first
  waiter, and all waiters of one model go together (A B A B is served A A B B).
- Room is made by unloading a model nobody uses: one whose load nobody waits for any more, then the idle one with the
  least keep_alive left. Pinned models and models that are answering never leave for another.
- A waiter that has waited `max_wait_s` closes the doors of a busy model: it takes no new requests, finishes those it
  has, and leaves. So a steady stream on one model cannot starve another.
- A model idle for its keep_alive is unloaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamarunner.events import RunnerState
from llamarunner.units import format_duration

_LEAVING = (RunnerState.DRAINING, RunnerState.STOPPING)
_COMING = (RunnerState.STARTING, RunnerState.LOADING)


@dataclass(frozen=True, slots=True)
class Resident:
    """A model with a runner. Times are seconds of one monotonic clock."""

    model: str
    state: RunnerState
    leases: int = 0
    waiters: int = 0
    pinned: bool = False
    idle_since: float | None = None  # None while it loads or answers
    keep_alive_s: float = math.inf

    @property
    def expires(self) -> float:
        return math.inf if self.idle_since is None or self.pinned else self.idle_since + self.keep_alive_s


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model somebody waits for, without a runner that could take the request now."""

    model: str
    since: float  # of its first waiter


@dataclass(frozen=True, slots=True)
class Facts:
    now: float
    residents: Sequence[Resident]
    waiting: Sequence[Waiting]  # in the order of their first waiter
    max_loaded: int
    max_wait_s: float


@dataclass(frozen=True, slots=True)
class Load:
    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Stop the runner now: it holds no lease."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Let the runner finish what it answers and take nothing new."""

    model: str
    reason: str


Action = Load | Unload | Drain


@dataclass(frozen=True, slots=True)
class Decision:
    actions: tuple[Action, ...]
    wake_at: float  # when to ask again if nothing else happens; inf for never


def decide(facts: Facts) -> Decision:
    expired = [_expiry(resident) for resident in facts.residents if _has_expired(resident, facts.now)]
    leaving = {action.model for action in expired}
    room = _make_room(facts, leaving)
    return Decision((*expired, *room), _wake_at(facts, leaving))


def _has_expired(resident: Resident, now: float) -> bool:
    return resident.state is RunnerState.READY and resident.waiters == 0 and resident.expires <= now


def _expiry(resident: Resident) -> Unload:
    if resident.keep_alive_s <= 0:
        return Unload(resident.model, "unloaded after use: keep_alive 0")
    return Unload(resident.model, f"idle for {format_duration(resident.keep_alive_s)}")


def _make_room(facts: Facts, leaving: set[str]) -> list[Action]:
    """Loads and evictions, first come first served: each place that is or becomes free is promised to one model."""
    actions: list[Action] = []
    resident_models = {resident.model for resident in facts.residents}
    queue = [waiting for waiting in facts.waiting if waiting.model not in resident_models]
    free = facts.max_loaded - len(facts.residents)
    coming_free = len(leaving) + sum(resident.state in _LEAVING for resident in facts.residents)
    candidates = [r for r in facts.residents if r.model not in leaving and r.state not in _LEAVING and not r.pinned]
    for waiting in queue:
        if free > 0:
            free -= 1
            actions.append(Load(waiting.model))
        elif coming_free > 0:
            coming_free -= 1
        elif (victim := _victim(candidates)) is not None:
            candidates.remove(victim)
            actions.append(Unload(victim.model, f"evicted for {waiting.model}"))
        elif facts.now - waiting.since >= facts.max_wait_s and (victim := _busiest_stay(candidates)) is not None:
            candidates.remove(victim)
            waited = format_duration(facts.now - waiting.since)
            actions.append(Drain(victim.model, f"makes room for {waiting.model}, which waited {waited}"))
    return actions


def _victim(candidates: Sequence[Resident]) -> Resident | None:
    """A load nobody waits for any more, else the idle model with the least keep_alive left."""
    idle = [
        resident
        for resident in candidates
        if resident.leases == 0
        and resident.waiters == 0
        and (resident.state in _COMING or resident.idle_since is not None)
    ]
    return min(idle, key=lambda r: (r.state not in _COMING, r.expires, r.idle_since or 0.0), default=None)


def _busiest_stay(candidates: Sequence[Resident]) -> Resident | None:
    """Of the models that answer, the one with the fewest answers to wait for."""
    busy = [resident for resident in candidates if resident.state is RunnerState.READY]
    return min(busy, key=lambda r: r.leases, default=None)


def _wake_at(facts: Facts, leaving: set[str]) -> float:
    idle = (r for r in facts.residents if r.state is RunnerState.READY and r.waiters == 0 and r.model not in leaving)
    expiries = (resident.expires for resident in idle)
    patience = (w.since + facts.max_wait_s for w in facts.waiting if w.since + facts.max_wait_s > facts.now)
    return min((*expiries, *patience), default=math.inf)
