"""When a model that failed may be tried again. Pure: the clock is handed in.

The first failure costs nothing: the next request tries at once. After each further one the wait doubles, so that a
broken model does not cost a whole load attempt for each request. After several in a short time the circuit opens: the
model is left alone until a person says so, or the failures are long ago.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

FIRST_WAIT_S = 1.0  # after the second failure
OPEN_AFTER = 6
"""Failures within the window that open the circuit."""
WINDOW_S = 600.0


@dataclass(slots=True)
class Restarts:
    """Of one model. Times are seconds of one monotonic clock."""

    _failures: deque[float] = field(default_factory=lambda: deque(maxlen=OPEN_AFTER))

    def failed(self, now: float) -> None:
        self._failures.append(now)

    def reset(self) -> None:
        """It works, or a person says it shall be tried."""
        self._failures.clear()

    def count(self, now: float) -> int:
        """Failures lately, `OPEN_AFTER` at most."""
        return len(self._recent(now))

    def is_open(self, now: float) -> bool:
        return self.count(now) >= OPEN_AFTER

    def wait_s(self, now: float) -> float:
        """Until the next try; 0 where there is nothing to wait for."""
        recent = self._recent(now)
        if len(recent) < 2:
            return 0.0
        if len(recent) >= OPEN_AFTER:
            return recent[0] + WINDOW_S - now
        wait = FIRST_WAIT_S * math.exp2(len(recent) - 2)
        return max(0.0, recent[-1] + wait - now)

    def _recent(self, now: float) -> list[float]:
        return [at for at in self._failures if now - at < WINDOW_S]
