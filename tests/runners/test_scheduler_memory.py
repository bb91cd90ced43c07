"""The scheduler with memory: what fits goes side by side, what must leaves, nothing is ever given twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamarunner.events import RunnerState
from llamarunner.runners.memory import Layer, Need
from llamarunner.runners.placement import RAM, Device, Placement
from llamarunner.runners.scheduler import Drain, Facts, Load, Refuse, Resident, Unload, Waiting, decide

GIB = 1024**3
READY, LOADING, DRAINING, STOPPING = (
    RunnerState.READY,
    RunnerState.LOADING,
    RunnerState.DRAINING,
    RunnerState.STOPPING,
)


def need(model: str, gib: float) -> Need:
    """A model of so much weight, in eight layers, and nothing beside it."""
    size = int(gib * GIB)
    return Need(
        model=model, layers=(Layer(size // 8, 0, 0),) * 8, input=0, output=0, cpu_weights=size, compute=0,
        host_compute=0, logits=0, process=0, snapshots=0, gpu_correction=-500 * 1024**2, ram_correction=0,
    )  # fmt: skip


def ram(total_gib: float, others_gib: float = 0.0) -> Device:
    return Device(RAM, "RAM", int(total_gib * GIB), used_by_others_bytes=int(others_gib * GIB))


def gpu(index: int, total_gib: float) -> Device:
    return Device(f"gpu{index}", f"GPU {index}", int(total_gib * GIB), uuid=f"GPU-{index}")


def resident(model: str, gib: float, *, device: str = RAM, idle_since: float | None = 90, leases: int = 0) -> Resident:
    return Resident(
        model, READY, leases, idle_since=None if leases else idle_since, keep_alive_s=300, held={device: int(gib * GIB)}
    )


def actions(residents: Sequence[Resident], waiting: Sequence[Waiting], devices: Sequence[Device]) -> list[object]:
    return list(decide(Facts(100, residents, waiting, 60, devices=devices)).actions)


def loads(found: Sequence[object]) -> dict[str, Mapping[str, int]]:
    return {
        action.model: {device: size for device, size in action.placement.bytes_by_device.items() if size}
        for action in found
        if isinstance(action, Load) and action.placement is not None
    }


def test_what_fits_together_is_loaded_together() -> None:
    waiting = [Waiting("a", 98, need("a", 4)), Waiting("b", 99, need("b", 4))]
    assert loads(actions([], waiting, [ram(10)])) == {"a": {RAM: 4 * GIB}, "b": {RAM: 4 * GIB}}


def test_memory_given_to_the_first_is_not_given_to_the_second() -> None:
    waiting = [Waiting("a", 98, need("a", 6)), Waiting("b", 99, need("b", 6))]
    assert loads(actions([], waiting, [ram(10)])) == {"a": {RAM: 6 * GIB}}


def test_no_more_leave_than_needed_the_least_keep_alive_first() -> None:
    residents = [resident("old", 4, idle_since=10), resident("new", 4, idle_since=90)]
    found = actions(residents, [Waiting("b", 99, need("b", 4))], [ram(10)])
    assert found == [Unload("old", "evicted for b: needs 4.0 GiB on ram")]


def test_room_that_is_being_cleared_is_waited_for() -> None:
    leaving = replace(resident("old", 4), state=STOPPING)
    idle = resident("idle", 4)
    assert actions([leaving, idle], [Waiting("b", 99, need("b", 4))], [ram(10)]) == []


def test_who_needs_other_room_does_not_wait_for_it() -> None:
    busy = resident("busy", 9, leases=1)
    waiting = [Waiting("large", 98, need("large", 8)), Waiting("small", 99, need("small", 0.5))]
    assert loads(actions([busy], waiting, [ram(10)])) == {"small": {RAM: GIB // 2}}


def test_a_busy_model_in_the_way_is_drained_when_patience_ends() -> None:
    busy, other = resident("busy", 9, leases=1), resident("other", 0.5, leases=1)
    waiting = [Waiting("large", 40, need("large", 8))]
    found = actions([busy, other], waiting, [ram(10)])
    assert found == [Drain("busy", "makes room for large, which waited 1m00s")]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    (refused,) = actions([], [Waiting("huge", 99, need("huge", 20))], [ram(10, others_gib=3)])
    assert isinstance(refused, Refuse)
    assert refused.model == "huge"
    for part in ("20.0 GiB", "7.0 GiB free", "10.0 GiB", "other programs"):
        assert part in refused.message


def test_nobody_leaves_for_what_can_never_fit() -> None:
    idle = resident("idle", 2)
    facts = Facts(100, [idle], [Waiting("huge", 99, need("huge", 50))], 60, max_loaded=1, devices=[ram(10)])
    (refused,) = decide(facts).actions
    assert isinstance(refused, Refuse)


def test_a_wish_for_a_device_that_is_not_there_is_refused_as_wrong() -> None:
    waiting = [Waiting("a", 98, need("a", 1), devices=("gpu7",)), Waiting("b", 99, need("b", 1))]
    refused, load = actions([], waiting, [ram(10), gpu(0, 8)])
    assert isinstance(refused, Refuse)
    assert refused.is_wrong
    assert "gpu7" in refused.message
    assert isinstance(load, Load), "it stands in nobody's way"


def test_a_model_elsewhere_waits_for_no_room() -> None:
    busy = resident("busy", 9, leases=1)
    waiting = [Waiting(name, 90, need(name, 8)) for name in "abcdef"]
    waiting.append(Waiting("remote", 99, is_local=False))
    assert actions([busy], waiting, [ram(10)]) == [Load("remote")]


def test_models_go_to_the_gpu_that_has_room() -> None:
    devices = [ram(64), gpu(0, 8), gpu(1, 24)]
    waiting = [Waiting("small", 97, need("small", 6)), Waiting("large", 98, need("large", 20))]
    found = loads(actions([], waiting, devices))
    assert {model: set(where) - {RAM} for model, where in found.items()} == {"small": {"gpu0"}, "large": {"gpu1"}}


def test_a_model_pinned_to_a_device_goes_nowhere_else() -> None:
    devices = [ram(64), gpu(0, 24), gpu(1, 24)]
    (load,) = actions([], [Waiting("a", 99, need("a", 6), devices=("gpu1",))], devices)
    assert isinstance(load, Load)
    assert load.placement is not None
    assert load.placement.devices == ("gpu1",)
    assert load.placement.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_without_knowledge_of_memory_it_loads() -> None:
    assert actions([], [Waiting("a", 99, need("a", 99))], []) == [Load("a")]
    assert actions([], [Waiting("remote", 99, None)], [ram(1)]) == [Load("remote")]


class Machine(RuleBasedStateMachine):
    """Memory for some of six models of different sizes, beside a foreign program that takes and gives back."""

    sizes: ClassVar = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 7, "f": 20}
    models = st.sampled_from(sorted(sizes))

    def __init__(self) -> None:
        super().__init__()
        self.now, self.others = 0.0, 0
        self.runners: dict[str, Resident] = {}
        self.waiters: dict[str, list[float]] = {}
        self.refused = 0

    def devices(self) -> list[Device]:
        return [ram(10, self.others)]

    def act(self) -> None:
        waiting = sorted(
            (Waiting(m, since[0], need(m, self.sizes[m])) for m, since in self.waiters.items() if since),
            key=lambda each: each.since,
        )
        residents = [replace(r, waiters=len(self.waiters.get(r.model, ()))) for r in self.runners.values()]
        for action in decide(Facts(self.now, residents, waiting, 30, devices=self.devices())).actions:
            match action:
                case Load(model, placement):
                    assert model not in self.runners, "spawned twice"
                    assert isinstance(placement, Placement)
                    held = sum(sum(r.held.values()) for r in self.runners.values())
                    free = 10 * GIB - self.others * GIB - held
                    assert sum(placement.bytes_by_device.values()) <= free, "more was given than there is"
                    self.runners[model] = Resident(model, LOADING, held=placement.bytes_by_device)
                case Unload(model):
                    runner = self.runners[model]
                    assert runner.leases == 0, "an answer was cut"
                    self.runners[model] = replace(runner, state=STOPPING)
                case Drain(model):
                    self.runners[model] = replace(self.runners[model], state=DRAINING)
                case Refuse(model):
                    assert self.sizes[model] > 10 - self.others, "it would have fitted"
                    self.waiters.pop(model)
                    self.refused += 1
        for model, runner in self.runners.items():
            if runner.state is DRAINING and runner.leases == 0:
                self.runners[model] = replace(runner, state=STOPPING)

    @rule(model=models)
    def request(self, model: str) -> None:
        runner = self.runners.get(model)
        if runner is not None and runner.state is READY:
            self.runners[model] = replace(runner, leases=runner.leases + 1, idle_since=None)
        else:
            self.waiters.setdefault(model, []).append(self.now)
        self.act()

    @rule(gib=st.integers(0, 6))
    def others_take(self, gib: int) -> None:
        """No more than is free: the kernel would not give it either."""
        held = sum(sum(r.held.values()) for r in self.runners.values()) // GIB
        self.others = min(gib, 10 - held)
        self.act()

    @precondition(lambda self: any(r.state is LOADING for r in self.runners.values()))
    @rule()
    def load_ends(self) -> None:
        model, runner = next((m, r) for m, r in self.runners.items() if r.state is LOADING)
        leases = len(self.waiters.pop(model, []))
        idle_since = None if leases else self.now
        self.runners[model] = replace(runner, state=READY, leases=leases, keep_alive_s=60.0, idle_since=idle_since)
        self.act()

    @precondition(lambda self: any(r.leases for r in self.runners.values()))
    @rule()
    def answer_ends(self) -> None:
        model, runner = next((m, r) for m, r in self.runners.items() if r.leases)
        idle_since = self.now if runner.leases == 1 else None
        self.runners[model] = replace(runner, leases=runner.leases - 1, idle_since=idle_since)
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
    def everybody_is_served_or_refused_in_the_end(self) -> None:
        copy = Machine()
        copy.now, copy.others, copy.runners = self.now, self.others, dict(self.runners)
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
        raise AssertionError(f"still waiting: {copy.waiters}, {copy.runners}")


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
