"""The scheduler's rules, one by one, and its promises over random histories of a simulated machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamarunner.events import RunnerState
from llamarunner.runners.scheduler import Drain, Facts, Load, Resident, Unload, Waiting, decide

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


class Machine(RuleBasedStateMachine):
    """A machine with room for two, six models, and requests that come, end and give up at any moment."""

    models = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.runners: dict[str, Resident] = {}
        self.waiters: dict[str, list[float]] = {}
        self.max_loaded, self.max_wait_s = 2, 30.0

    def act(self) -> None:
        waiting = sorted((Waiting(m, since[0]) for m, since in self.waiters.items() if since), key=lambda w: w.since)
        residents = [self._with_waiters(r) for r in self.runners.values()]
        decision = decide(Facts(self.now, residents, waiting, self.max_wait_s, self.max_loaded))
        for action in decision.actions:
            match action:
                case Load(model):
                    assert model not in self.runners, "spawned twice"
                    self.runners[model] = Resident(model, LOADING)
                case Unload(model):
                    runner = self.runners[model]
                    assert runner.leases == 0, "an answer was cut"
                    assert not runner.pinned, "a pinned model was unloaded"
                    self._set(model, state=STOPPING)
                case Drain(model):
                    self._set(model, state=DRAINING)
        for model, runner in list(self.runners.items()):
            if runner.state is DRAINING and runner.leases == 0:
                self._set(model, state=STOPPING)

    def _with_waiters(self, runner: Resident) -> Resident:
        return self._changed(runner, waiters=len(self.waiters.get(runner.model, ())))

    @staticmethod
    def _changed(runner: Resident, **changes: object) -> Resident:
        names = ("model", "state", "leases", "waiters", "pinned", "idle_since", "keep_alive_s")
        return Resident(**{name: changes.get(name, getattr(runner, name)) for name in names})

    def _set(self, model: str, **changes: object) -> None:
        self.runners[model] = self._changed(self.runners[model], **changes)

    @rule(model=models)
    def request(self, model: str) -> None:
        runner = self.runners.get(model)
        if runner is not None and runner.state is READY:
            self._set(model, leases=runner.leases + 1, idle_since=None)
        else:
            self.waiters.setdefault(model, []).append(self.now)
        self.act()

    @rule(model=models)
    def give_up(self, model: str) -> None:
        if self.waiters.get(model):
            self.waiters[model].pop()
        self.act()

    @precondition(lambda self: any(r.state is LOADING for r in self.runners.values()))
    @rule()
    def load_ends(self) -> None:
        model = next(m for m, r in self.runners.items() if r.state is LOADING)
        waiters = self.waiters.pop(model, [])
        self._set(model, state=READY, leases=len(waiters), keep_alive_s=60.0, idle_since=None if waiters else self.now)
        self.act()

    @precondition(lambda self: any(r.leases for r in self.runners.values()))
    @rule()
    def answer_ends(self) -> None:
        model, runner = next((m, r) for m, r in self.runners.items() if r.leases)
        self._set(model, leases=runner.leases - 1, idle_since=self.now if runner.leases == 1 else None)
        self.act()

    @precondition(lambda self: any(r.state is STOPPING for r in self.runners.values()))
    @rule()
    def stop_ends(self) -> None:
        del self.runners[next(m for m, r in self.runners.items() if r.state is STOPPING)]
        self.act()

    @rule(seconds=st.floats(0.1, 50))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.act()

    @invariant()
    def no_more_than_fit(self) -> None:
        assert len(self.runners) <= self.max_loaded

    @invariant()
    def every_waiter_is_served_in_the_end(self) -> None:
        """From any moment on, if loads, answers and stops come to their end, nobody waits for ever."""
        copy = Machine()
        copy.now, copy.runners = self.now, dict(self.runners)
        copy.waiters = {model: list(since) for model, since in self.waiters.items()}
        for _ in range(200):
            if not any(copy.waiters.values()):
                return
            if any(r.state is LOADING for r in copy.runners.values()):
                copy.load_ends()
            elif any(r.state is STOPPING for r in copy.runners.values()):
                copy.stop_ends()
            elif any(r.leases for r in copy.runners.values()):
                copy.answer_ends()
            else:
                copy.time_passes(1.0)
        raise AssertionError(f"still waiting: {copy.waiters}")


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
