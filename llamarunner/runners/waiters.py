"""Who waits for a model, and whose turn it is. Pure: the clock is handed in.

Higher priority goes first, then who came first. Nobody is overtaken for ever: who has waited `patience_s` goes before
all who have not, whatever their priority.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llamarunner.events import RequestTrace
from llamarunner.runners.demand import NO_DEMAND, Demand

if TYPE_CHECKING:
    from llamarunner.runners.place import Place
    from llamarunner.runners.runner import Runner

    Grant = tuple[Place, Runner]


@dataclass(slots=True, eq=False)
class Waiter:
    number: int  # rises with every request that had to wait
    since: float
    granted: asyncio.Future[Grant]
    trace: RequestTrace | None = None
    keep_alive_s: float | None = None
    priority: int = 0
    demand: Demand = NO_DEMAND
    tried: set[str] = field(default_factory=set)  # replicas that could not be loaded

    def turn(self, now: float, patience_s: float) -> tuple[int, ...]:
        """The smaller goes first."""
        if now - self.since >= patience_s:
            return (0, self.number)
        return (1, -self.priority, self.number)


@dataclass(slots=True)
class Waiters:
    """Of one place; bounded by the queue's limits, which the manager keeps."""

    patience_s: float
    _all: list[Waiter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._all)

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._all

    def add(self, waiter: Waiter) -> None:
        self._all.append(waiter)

    def remove(self, waiter: Waiter) -> None:
        self._all.remove(waiter)

    def take_all(self) -> list[Waiter]:
        taken, self._all = self._all, []
        return taken

    def first(self, now: float) -> Waiter:
        """Whose turn it is. Raises ValueError where nobody waits."""
        return min(self._all, key=lambda waiter: waiter.turn(now, self.patience_s))

    def in_turn(self, now: float) -> list[Waiter]:
        return sorted(self._all, key=lambda waiter: waiter.turn(now, self.patience_s))

    def oldest(self) -> Waiter:
        return min(self._all, key=lambda waiter: waiter.number)

    def leader(self, now: float) -> Waiter:
        """Whose demand the next load is to meet: the first one's, or of those it can share a runner with the one that
        wants most context."""
        first = self.first(now)
        joined = [waiter for waiter in self._all if waiter.demand.joins(first.demand)]
        return max(joined, key=lambda waiter: (waiter.demand.context or 0, waiter is first), default=first)
