"""When a ready engine is hung: it owes an answer and gives no sign of life, whatever /health says. Pure: what is seen
of it, and when, is handed in."""

from __future__ import annotations

from dataclasses import dataclass

_ASK_SHARE = 0.5  # of the timeout without a sign of life, after which the engine is asked what its slots do
_LEAST_LOOKS = 2  # at its slots: one alone shows no change
_MOST_LOOKS_MISSED = 3  # longer between two calls: we did not run ourselves, so nothing could be seen


@dataclass(frozen=True, slots=True)
class Signs:
    """What is seen of an engine from outside."""

    at: float
    owes: bool  # a request waits for bytes of its answer
    all_streamed: bool  # and each such request is one whose answer comes piece by piece
    received: int = 0  # bytes of answers, ever
    spoke_at: float = 0.0  # its newest log line


@dataclass(frozen=True, slots=True)
class SlotsLook:
    """The answer to one question for the engine's slots. Of two that differ, something has moved between them."""

    has_slots: bool = True  # false: it answered that it tells nothing of them
    fingerprint: int | None = None  # None: it did not answer


class Watch:
    """Of one runner while it is ready. `has_slots`: it can be asked what its slots do. Of others only bytes and log
    lines are seen, which tells nothing while an answer is made in one piece.

    Time in which it owes nothing does not count. Where its slots can be seen it does not begin anew either, or clients
    that give up before the timeout and try again would hide a hung engine for ever; nor does a hang end with them.
    """

    def __init__(self, timeout_s: float, *, has_slots: bool) -> None:
        self.look_s = min(timeout_s / 10, 5.0)
        """How often to `see`, and to `hear` where `wants_slots`."""
        self._timeout_s = timeout_s
        self._has_slots = has_slots
        self._quiet_s = 0.0
        self._signs: Signs | None = None
        self._fingerprint: int | None = None
        self._looks = 0

    @property
    def wants_slots(self) -> bool:
        if not self._has_slots or self._quiet_s < self._timeout_s * _ASK_SHARE:
            return False
        return self._owes or self.hung_s is not None

    @property
    def hung_s(self) -> float | None:
        """How long without a sign of life; None where that is not too long, or cannot be told."""
        if self._quiet_s < self._timeout_s or self._signs is None:
            return None
        told = self._looks >= _LEAST_LOOKS if self._has_slots else self._signs.all_streamed
        return self._quiet_s if told else None

    @property
    def _owes(self) -> bool:
        return self._signs is not None and self._signs.owes

    def see(self, signs: Signs) -> None:
        before, self._signs = self._signs, signs
        if before is None or (signs.received, signs.spoke_at) != (before.received, before.spoke_at):
            self._alive()
        elif signs.owes and before.owes:
            self._quiet_s += min(signs.at - before.at, self.look_s * _MOST_LOOKS_MISSED)
        elif not self._has_slots:
            self._alive()

    def hear(self, look: SlotsLook) -> None:
        self._has_slots = look.has_slots
        if self._looks and look.fingerprint not in (None, self._fingerprint):
            self._alive()
        self._fingerprint = look.fingerprint
        self._looks += 1

    def _alive(self) -> None:
        self._quiet_s, self._looks, self._fingerprint = 0.0, 0, None
