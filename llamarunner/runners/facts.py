"""What the scheduler is told, and what it says: facts and actions, as plain immutable data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llamarunner.events import RunnerState
from llamarunner.runners.memory import Need
from llamarunner.runners.placement import Device, Partial, Placement

LEAVING = (RunnerState.DRAINING, RunnerState.STOPPING)
COMING = (RunnerState.STARTING, RunnerState.LOADING)

_LINGER_SHARE = 0.2  # of the minimum residency: idle for so long, a model is not in use


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
    held: Mapping[str, int] = field(default_factory=dict)  # bytes of each device it has, or was promised
    is_local: bool = True  # it takes a place of this machine
    ready_since: float | None = None
    priority: int = 0  # the highest of those it answers
    apart: frozenset[str] = frozenset()

    @property
    def expires(self) -> float:
        return math.inf if self.idle_since is None or self.pinned else self.idle_since + self.keep_alive_s

    @property
    def is_abandoned(self) -> bool:
        """A load nobody waits for any more."""
        return self.state in COMING and self.leases == 0 and self.waiters == 0

    @property
    def order(self) -> tuple[float, float]:
        """The smaller leaves first."""
        return (-math.inf if self.is_abandoned else self.expires, self.idle_since or 0.0)

    @property
    def is_evictable(self) -> bool:
        is_idle = self.state is RunnerState.READY and self.leases == 0 and self.idle_since is not None
        return not self.pinned and self.waiters == 0 and (self.is_abandoned or is_idle)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model somebody waits for, without a runner that could take the request now."""

    model: str
    since: float  # of its first waiter
    need: Need | None = None  # None: it takes no memory here, or nobody knows how much
    devices: tuple[str, ...] = ()  # the only ones it may use; () for any
    is_local: bool = True
    priority: int = 0  # the highest of its waiters
    apart: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    now: float
    residents: Sequence[Resident]
    waiting: Sequence[Waiting]  # in the order of their first waiter
    max_wait_s: float
    max_loaded: int = 0  # models at once; 0 for as many as fit
    devices: Sequence[Device] = ()  # without what our residents hold; () where memory is not known
    partial: Partial = "offload"
    spread: bool = False  # over all GPUs, though one would hold it
    min_residency_s: float = 0.0
    yields: bool = False  # idle models leave where other programs take the reserve

    def is_protected(self, resident: Resident) -> bool:
        """Too new to leave for another."""
        return self.now < self.protected_until(resident)

    def protected_until(self, resident: Resident) -> float:
        return protected_until(resident, self.min_residency_s)


def protected_until(resident: Resident, min_residency_s: float) -> float:
    if resident.ready_since is None or resident.idle_since is None:
        return -math.inf
    linger = resident.idle_since + _LINGER_SHARE * min_residency_s
    return min(resident.ready_since + min_residency_s, linger)


@dataclass(frozen=True, slots=True)
class Load:
    model: str
    placement: Placement | None = None  # None where the engine may decide


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


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing that may leave makes room for it."""

    model: str
    message: str
    hint: str = ""
    is_wrong: bool = False  # what is configured for it is impossible on this machine, full or empty


Action = Load | Unload | Drain | Refuse


@dataclass(frozen=True, slots=True)
class Decision:
    actions: tuple[Action, ...]
    wake_at: float  # when to ask again if nothing else happens; inf for never
