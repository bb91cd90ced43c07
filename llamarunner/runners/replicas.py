"""To which replica of a model a request goes. Pure: the clock is handed in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llamarunner.runners.demand import Demand
from llamarunner.runners.place import Place

STRIKES = 3
"""Requests in a row that a replica left without an answer, and it is ejected."""
EJECTED_S = 30.0


def choose(places: Sequence[Place], demand: Demand, now: float, avoid: Collection[str] = ()) -> Place:
    """The one with the fewest requests for its slots, of those with a slot free: of those that run, or else of those
    that are or will be loaded anyway; else one that is not loaded yet; else the one with the shortest queue. A replica
    that failed a moment ago, or is in `avoid`, is asked only where there is no other."""
    if len(places) == 1:
        return places[0]
    sound = [place for place in places if place.name not in avoid and not is_ejected(place, now)]
    able = sound or [place for place in places if place.name not in avoid] or list(places)
    absent = [place for place in able if place.runner is None and not place.waiters]
    ready = [place for place in able if place.is_ready and place.meets(demand)]
    coming = [place for place in able if place.is_loading or (place.runner is None and place.waiters)]
    free = _free(ready) or _free(coming)
    return min(free or absent or [*ready, *coming] or able, key=_load)


def _free(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place.outstanding < place.slots]


def is_ejected(place: Place, now: float) -> bool:
    """Where no person and no configuration has said so: it has just failed, and may again."""
    failed_lately = place.failure is not None and now - place.failed_at < EJECTED_S
    return (place.runner is None and failed_lately) or now < place.ejected_until


def strike(place: Place, now: float) -> None:
    """A request got no answer from it."""
    place.strikes += 1
    if place.strikes >= STRIKES:
        place.ejected_until = now + EJECTED_S


def answered(place: Place) -> None:
    place.strikes, place.ejected_until = 0, 0.0


def _load(place: Place) -> float:
    return place.outstanding / place.slots
