"""Who is loaded, where, and who must leave: facts in, actions out. No I/O, no clock of its own, no asyncio.

The rules:
- A model that somebody waits for is loaded as soon as there is room on the devices; models wait their turn by priority,
  then in the order of their first waiter, and all waiters of one model go together (A B A B is served A A B B). Room
  that was promised to one is not given to another, but who needs other room need not wait.
- Room is made by unloading models nobody uses: loads nobody waits for any more first, then the idle ones, the least
  keep_alive left first, and no more of them than needed. Pinned models and models that are answering never leave.
- A model just loaded does not leave for `min_residency_s`, unless nobody has asked it for a fifth of that: models
  that are asked in turns do not chase each other out with every request.
- A waiter that has waited `max_wait_s`, or has a higher priority than what they answer, closes the doors of the busy
  models in its way: they take no new requests, finish those they have, and leave. So a steady stream on one model
  cannot starve another. Whoever has waited so long goes before all who have not, whatever their priority.
- Of models that share a tag in `apart`, one is loaded at a time.
- What cannot fit even then is refused at once, with the numbers.
- A model idle for its keep_alive is unloaded; where `yields` is set, idle models also leave for other programs.
"""

from __future__ import annotations

import math

from llamarunner.events import RunnerState
from llamarunner.runners.facts import LEAVING, Decision, Facts, Resident, Unload, Waiting
from llamarunner.runners.house import House
from llamarunner.units import format_duration, format_size

_LOOK_AT_OTHERS_S = 5.0  # how often what other programs hold is looked at


def decide(facts: Facts) -> Decision:
    expired = [_expiry(resident) for resident in facts.residents if _has_expired(resident, facts.now)]
    leaving = {action.model for action in expired}
    yielding = _give_way(facts, leaving) if facts.yields else []
    leaving |= {action.model for action in yielding}
    house = House(facts, leaving)
    resident = {resident.model for resident in facts.residents}
    for waiting in sorted(facts.waiting, key=lambda each: _turn(each, facts)):
        if waiting.model not in resident:
            house.serve(waiting)
    return Decision((*expired, *yielding, *house.actions), _wake_at(facts, leaving))


def _turn(waiting: Waiting, facts: Facts) -> tuple[float, ...]:
    """Whoever has waited long enough in the order they came, then by priority."""
    if facts.now - waiting.since >= facts.max_wait_s:
        return (0, waiting.since)
    return (1, -waiting.priority, waiting.since)


def _give_way(facts: Facts, leaving: set[str]) -> list[Unload]:
    """Idle models, in order, until every device has its reserve free again."""
    actions: list[Unload] = []
    staying = [resident for resident in facts.residents if resident.model not in leaving]
    for device in facts.devices:
        held = sum(r.held.get(device.id, 0) for r in staying if r.state not in LEAVING)
        lacking = device.reserve_bytes + device.used_by_others_bytes + held - device.total_bytes
        idle = [r for r in staying if r.is_evictable and r.state is RunnerState.READY and r.held.get(device.id)]
        for resident in sorted(idle, key=lambda resident: resident.order):
            if lacking <= 0:
                break
            others = format_size(device.used_by_others_bytes)
            actions.append(Unload(resident.model, f"gives way to other programs, which hold {others} of {device.name}"))
            lacking -= resident.held[device.id]
            staying.remove(resident)
    return actions


def _has_expired(resident: Resident, now: float) -> bool:
    return resident.state is RunnerState.READY and resident.waiters == 0 and resident.expires <= now


def _expiry(resident: Resident) -> Unload:
    if resident.keep_alive_s <= 0:
        return Unload(resident.model, "unloaded after use: keep_alive 0")
    return Unload(resident.model, f"idle for {format_duration(resident.keep_alive_s)}")


def _wake_at(facts: Facts, leaving: set[str]) -> float:
    idle = [r for r in facts.residents if r.state is RunnerState.READY and r.waiters == 0 and r.model not in leaving]
    moments = [resident.expires for resident in idle]
    if facts.waiting:
        moments += [moment for moment in map(facts.protected_until, idle) if moment > facts.now]
        moments += [w.since + facts.max_wait_s for w in facts.waiting if w.since + facts.max_wait_s > facts.now]
    if facts.yields and idle:
        moments.append(facts.now + _LOOK_AT_OTHERS_S)
    return min(moments, default=math.inf)
