"""What each waiting request may be told: its turn, what it waits for, and for how long yet. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamarunner.runners.place import Place


@dataclass(frozen=True, slots=True)
class Outlook:
    position: int  # 1 is next
    reason: str  # "waiting for qwen3-32b: 2 answers running"
    left_s: float | None  # an estimate from what loads and answers took; None where nothing is known


def outlooks(places: Sequence[Place], now: float) -> Mapping[int, Outlook]:
    """By request id, of every waiter with a trace, in the order in which the scheduler serves their models."""
    found: dict[int, Outlook] = {}
    position = 0
    waiting = [place for place in places if place.waiters]
    waiting.sort(key=lambda place: place.waiters.first(now).turn(now, place.waiters.patience_s))
    for place in waiting:
        reason, base_s = _reason(place, places, now)
        for index, waiter in enumerate(place.waiters.in_turn(now)):
            position += 1
            if waiter.trace is not None:
                left = _left(place, index, base_s)
                found[waiter.trace.request_id] = Outlook(position, reason, left)
    return found


def _reason(place: Place, places: Sequence[Place], now: float) -> tuple[str, float | None]:
    """In words, and the seconds until its model could take the first waiter."""
    name, runner = place.name, place.runner
    if place.is_ready:
        demand = place.waiters.first(now).demand
        if not place.meets(demand):
            return f"waiting for {name} to be loaded again ({demand}): {_answers(place.leases)} running", place.load_s
        return f"waiting for {name}: {_answers(place.leases)} running", 0.0
    if runner is not None and place.is_loading:
        left = place.load_s - (now - runner.state_since) if place.load_s is not None else None
        return f"loading {name}", left if left is None else max(0.0, left)
    if runner is not None:
        return f"{name} is being unloaded: {runner.reason}", place.load_s
    busy = [other for other in places if other.runner is not None and other.leases]
    if not busy:
        return "waiting for room", place.load_s
    names = ", ".join(f"{other.name} ({_answers(other.leases)} running)" for other in busy)
    soonest = min((other.answer_s for other in busy if other.answer_s is not None), default=None)
    left = None if soonest is None or place.load_s is None else soonest + place.load_s
    return f"waiting for room: {names}", left


def _left(place: Place, index: int, base_s: float | None) -> float | None:
    """Waiters are taken `slots` at a time; each further round waits for an answer."""
    rounds = index // place.slots + (1 if place.is_ready else 0)
    if base_s is None or (rounds and place.answer_s is None):
        return None
    return base_s + rounds * (place.answer_s or 0.0)


def _answers(count: int) -> str:
    return "1 answer" if count == 1 else f"{count} answers"
