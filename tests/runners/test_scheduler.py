"""The scheduler's rules, one by one. What it promises over any history: `test_scheduler_promises.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamarunner.events import RunnerState
from llamarunner.runners.facts import Decision, Drain, Facts, Load, Refuse, Resident, Unload, Waiting
from llamarunner.runners.scheduler import decide

READY, LOADING, DRAINING, STOPPING = (
    RunnerState.READY,
    RunnerState.LOADING,
    RunnerState.DRAINING,
    RunnerState.STOPPING,
)


def facts(
    residents: Sequence[Resident] = (),
    waiting: Sequence[Waiting] = (),
    *,
    now: float = 100.0,
    max_loaded: int = 1,
    max_wait_s: float = 60.0,
) -> Facts:
    return Facts(now, residents, waiting, max_wait_s, max_loaded)


def test_a_waiter_is_loaded_where_there_is_room() -> None:
    assert decide(facts(waiting=[Waiting("a", 99)])).actions == (Load("a"),)


def test_waiters_of_a_model_that_loads_cause_nothing() -> None:
    loading = Resident("a", LOADING, waiters=3)
    assert decide(facts([loading], [Waiting("a", 99)])).actions == ()


def test_models_are_loaded_in_the_order_of_their_first_waiter() -> None:
    waiting = [Waiting("b", 1), Waiting("a", 2), Waiting("c", 3)]
    assert decide(facts(waiting=waiting, max_loaded=2)).actions == (Load("b"), Load("a"))


def test_an_idle_model_makes_room() -> None:
    idle = Resident("a", READY, idle_since=90, keep_alive_s=300)
    assert decide(facts([idle], [Waiting("b", 99)])).actions == (Unload("a", "evicted for b"),)


def test_a_model_that_answers_is_not_evicted() -> None:
    busy = Resident("a", READY, leases=1)
    assert decide(facts([busy], [Waiting("b", 99)])).actions == ()


def test_a_pinned_model_is_not_evicted_and_does_not_expire() -> None:
    pinned = Resident("a", READY, idle_since=0, keep_alive_s=1, pinned=True)
    decision = decide(facts([pinned], [Waiting("b", 0)]))
    assert decision.actions == ()
    assert decide(facts([pinned])).wake_at == math.inf


def test_the_least_keep_alive_left_goes_first() -> None:
    long = Resident("long", READY, idle_since=10, keep_alive_s=1000)
    short = Resident("short", READY, idle_since=99, keep_alive_s=60)
    for_ever = Resident("for-ever", READY, idle_since=1, keep_alive_s=math.inf)
    decision = decide(facts([for_ever, long, short], [Waiting("b", 99)], max_loaded=3))
    assert decision.actions == (Unload("short", "evicted for b"),)


def test_a_load_nobody_waits_for_goes_before_an_idle_model() -> None:
    abandoned = Resident("abandoned", LOADING)
    idle = Resident("idle", READY, idle_since=99, keep_alive_s=10)
    decision = decide(facts([idle, abandoned], [Waiting("b", 99)], max_loaded=2))
    assert decision.actions == (Unload("abandoned", "evicted for b"),)


def test_a_place_that_becomes_free_is_promised_once() -> None:
    leaving = Resident("a", STOPPING)
    idle = Resident("i", READY, idle_since=90, keep_alive_s=300)
    one = decide(facts([leaving, idle], [Waiting("b", 99)], max_loaded=2))
    two = decide(facts([leaving, idle], [Waiting("b", 98), Waiting("c", 99)], max_loaded=2))
    assert one.actions == ()
    assert two.actions == (Unload("i", "evicted for c"),)


def test_a_long_waiter_closes_the_doors_of_the_least_busy_model() -> None:
    residents = [Resident("busy", READY, leases=5), Resident("busier", READY, leases=9)]
    patient = decide(facts(residents, [Waiting("b", 41)], max_loaded=2))
    assert patient.actions == ()
    assert patient.wake_at == 101
    decision = decide(facts(residents, [Waiting("b", 40)], max_loaded=2))
    assert decision.actions == (Drain("busy", "makes room for b, which waited 1m00s"),)


def test_a_model_idle_for_its_keep_alive_leaves() -> None:
    idle = Resident("a", READY, idle_since=40, keep_alive_s=60)
    assert decide(facts([idle])).actions == (Unload("a", "idle for 1m00s"),)
    assert decide(facts([idle], now=99)).wake_at == 100


def test_keep_alive_zero_leaves_at_once() -> None:
    used = Resident("a", READY, idle_since=100, keep_alive_s=0)
    assert decide(facts([used])).actions == (Unload("a", "unloaded after use: keep_alive 0"),)


def test_who_has_priority_is_loaded_first() -> None:
    waiting = [Waiting("first", 90), Waiting("second", 91), Waiting("urgent", 95, priority=3)]
    assert decide(facts(waiting=waiting, max_loaded=2)).actions == (Load("urgent"), Load("first"))


def test_who_has_waited_long_goes_before_any_priority() -> None:
    waiting = [Waiting("old", 40), Waiting("older", 39), Waiting("urgent", 95, priority=3)]
    assert decide(facts(waiting=waiting, max_loaded=2)).actions == (Load("older"), Load("old"))


def test_a_priority_higher_than_what_a_model_answers_closes_its_doors_at_once() -> None:
    busy = Resident("busy", READY, leases=1, priority=1)
    assert decide(facts([busy], [Waiting("b", 99, priority=1)])).actions == ()
    decision = decide(facts([busy], [Waiting("b", 99, priority=2)]))
    assert decision.actions == (Drain("busy", "makes room for b, which goes first: priority 2"),)


def residency(now: float, *, idle_since: float, waits_since: float = 99.0) -> Decision:
    """Of a model that became ready at 100 and a minimum residency of 10 s."""
    young = Resident("young", READY, idle_since=idle_since, keep_alive_s=300, ready_since=100)
    waiting = [Waiting("b", waits_since)]
    return decide(Facts(now, [young], waiting, 60, max_loaded=1, min_residency_s=10))


def test_a_model_just_loaded_stays_while_it_is_used() -> None:
    assert residency(105, idle_since=104).actions == ()
    assert residency(105, idle_since=104).wake_at == 106, "a fifth of the residency after it was last used"
    assert residency(109, idle_since=108.5).wake_at == 110, "its residency ends"
    assert residency(110, idle_since=109.9).actions == (Unload("young", "evicted for b"),)


def test_a_model_just_loaded_that_nobody_asks_again_may_leave() -> None:
    assert residency(103, idle_since=101).actions == (Unload("young", "evicted for b"),)


def test_residency_does_not_hold_off_one_who_waited_long() -> None:
    assert residency(105, idle_since=104.9, waits_since=40).actions == (Unload("young", "evicted for b"),)


BIG = frozenset({"big"})


def together(residents: Sequence[Resident], waiting: Sequence[Waiting], now: float = 100.0) -> tuple[object, ...]:
    return decide(Facts(now, residents, waiting, 60)).actions


def test_of_those_never_together_one_is_loaded_at_a_time() -> None:
    waiting = [Waiting("a", 98, apart=BIG), Waiting("b", 99, apart=BIG), Waiting("c", 99)]
    assert together([], waiting) == (Load("a"), Load("c"))


def test_one_never_together_with_another_makes_it_leave_first() -> None:
    idle = Resident("a", READY, idle_since=90, keep_alive_s=300, apart=BIG)
    waiting = [Waiting("b", 99, apart=BIG)]
    assert together([idle], waiting) == (Unload("a", "evicted for b: never together, by the tag 'big'"),)
    assert together([Resident("a", STOPPING, apart=BIG)], waiting) == (), "not before it is gone"
    assert together([Resident("a", READY, leases=1, apart=BIG)], waiting) == ()
    drained = Drain("a", "makes room for b, which waited 1m00s")
    assert together([Resident("a", READY, leases=1, apart=BIG)], [Waiting("b", 40, apart=BIG)]) == (drained,)


def test_one_never_together_with_a_model_that_stays_is_refused() -> None:
    stays = Resident("a", READY, idle_since=90, pinned=True, apart=BIG)
    (refused,) = together([stays], [Waiting("b", 99, apart=BIG)])
    assert isinstance(refused, Refuse)
    assert refused.message == "b is never loaded beside a, which stays (both have the tag 'big')"
