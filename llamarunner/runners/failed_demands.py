"""What requests demanded of a model's runner in vain. Pure: the clock is handed in.

A load that failed as a request demanded it says nothing of the model as it is configured: that is served as before, and
only the same demand is refused for a while, before a runner has to leave for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llamarunner.errors import EngineError
from llamarunner.runners.demand import Demand

REST_S = 60.0
"""Until a demand that failed is tried again."""
_MOST = 32


@dataclass(slots=True)
class FailedDemands:
    """Of one model. Times are seconds of one monotonic clock."""

    _failures: dict[tuple[object, ...], tuple[EngineError, float]] = field(default_factory=dict)

    def failed(self, demand: Demand, error: EngineError, now: float) -> None:
        self._failures.pop(demand.key, None)
        self._failures[demand.key] = (error, now)
        if len(self._failures) > _MOST:
            del self._failures[next(iter(self._failures))]  # the oldest

    def lately(self, demand: Demand, now: float) -> tuple[EngineError, float] | None:
        """How this demand failed, and the seconds until it is tried again."""
        error, at = self._failures.get(demand.key, (None, 0.0))
        if error is None or now - at >= REST_S:
            return None
        return error, at + REST_S - now

    def reset(self) -> None:
        """A person says that all shall be tried."""
        self._failures.clear()
