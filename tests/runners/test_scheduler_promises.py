"""What the scheduler promises, over random histories of a simulated machine.

`LLAMARUNNER_HISTORIES=10000` runs so many of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_scheduler_memory import GIB, gpu, need

from llamarunner.events import RunnerState
from llamarunner.runners.facts import Drain, Facts, Load, Refuse, Resident, Unload, Waiting
from llamarunner.runners.placement import RAM, Device, Partial, Placement
from llamarunner.runners.scheduler import decide

READY, LOADING, DRAINING, STOPPING = (
    RunnerState.READY,
    RunnerState.LOADING,
    RunnerState.DRAINING,
    RunnerState.STOPPING,
)
ENGINE_GIB = 0.5  # of RAM, at most, where the layers are on GPUs
MAX_WAIT_S = 30.0
HISTORIES = int(os.environ.get("LLAMARUNNER_HISTORIES", "200"))


@dataclass(frozen=True)
class Kind:
    gib: int
    priority: int = 0
    apart: frozenset[str] = frozenset()
    keep_alive_s: float = 60.0
    devices: tuple[str, ...] = ()


@dataclass
class Waiter:
    since: float
    priority: int = 0


@dataclass
class Rules:
    """What the configuration may say."""

    max_loaded: int = 0
    min_residency_s: float = 0.0
    yields: bool = False
    partial: Partial = "offload"
    spread: bool = False


RULES = st.builds(
    Rules,
    max_loaded=st.sampled_from([0, 1, 2]),
    min_residency_s=st.sampled_from([0.0, 5.0, 100.0]),
    yields=st.booleans(),
    partial=st.sampled_from(["offload", "refuse"]),
    spread=st.booleans(),
)


class Machine(RuleBasedStateMachine):
    """Memory for some of seven models, beside a foreign program that takes and gives back; requests come, end and give
    up at any moment."""

    totals: ClassVar = {RAM: 10}  # GiB
    kinds: ClassVar = {
        "a": Kind(1),
        "b": Kind(2, apart=frozenset({"big"})),
        "c": Kind(3, priority=2),
        "d": Kind(5, apart=frozenset({"big", "odd"})),
        "e": Kind(7, keep_alive_s=0.0),
        "f": Kind(20),
        "g": Kind(1, apart=frozenset({"odd"}), priority=-1),
    }
    models = st.sampled_from(sorted(kinds))

    def __init__(self) -> None:
        super().__init__()
        self.now, self.alarm = 0.0, 0.0
        self.others = dict.fromkeys(self.totals, 0)
        self.rules = Rules()
        self.runners: dict[str, Resident] = {}
        self.waiters: dict[str, list[Waiter]] = {}

    @initialize(rules=RULES)
    def configure(self, rules: Rules) -> None:
        self.rules = rules

    def act(self) -> None:
        decision = decide(self._facts())
        self.alarm = decision.wake_at
        for action in decision.actions:
            match action:
                case Load(model, placement):
                    self._load(model, placement)
                case Unload(model):
                    assert self.runners[model].leases == 0, "an answer was cut"
                    self.runners[model] = replace(self.runners[model], state=STOPPING)
                case Drain(model):
                    assert self.runners[model].state is READY
                    self.runners[model] = replace(self.runners[model], state=DRAINING)
                case Refuse(model):
                    assert not self._would_fit(self.kinds[model]), "it would have fitted"
                    self.waiters.pop(model)
        for model, runner in self.runners.items():
            if runner.state is DRAINING and runner.leases == 0:
                self.runners[model] = replace(runner, state=STOPPING)

    def _facts(self) -> Facts:
        waiting = [
            Waiting(
                model,
                min(waiter.since for waiter in waiters),
                need(model, self.kinds[model].gib),
                priority=max(waiter.priority for waiter in waiters),
                apart=self.kinds[model].apart,
                devices=self.kinds[model].devices,
            )
            for model, waiters in self.waiters.items()
            if waiters
        ]
        return Facts(
            self.now,
            [replace(r, waiters=len(self.waiters.get(r.model, ()))) for r in self.runners.values()],
            sorted(waiting, key=lambda each: each.since),
            MAX_WAIT_S,
            max_loaded=self.rules.max_loaded,
            devices=self._devices(),
            partial=self.rules.partial,
            spread=self.rules.spread,
            min_residency_s=self.rules.min_residency_s,
            yields=self.rules.yields,
        )

    def _devices(self) -> list[Device]:
        bare = [gpu(int(name.removeprefix("gpu")), 0) if name != RAM else Device(RAM, "RAM", 0) for name in self.totals]
        return [
            replace(each, total_bytes=self.totals[each.id] * GIB, used_by_others_bytes=self.others[each.id] * GIB)
            for each in bare
        ]

    def _would_fit(self, kind: Kind) -> bool:
        """For certain, if all of ours left: eight layers of one size, of which the RAM has what no GPU takes, and a
        little for the engine itself."""
        free = {device: total - self.others[device] for device, total in self.totals.items()}
        allowed = [device for device in self.totals if device != RAM and (not kind.devices or device in kind.devices)]
        on_gpus = min(sum(free[device] * 8 // kind.gib for device in allowed), 8)
        may_be_partial = not allowed or self.rules.partial == "offload"
        in_ram = kind.gib * (8 - on_gpus) / 8 + (ENGINE_GIB if allowed else 0)
        return in_ram <= free[RAM] and (on_gpus == 8 or may_be_partial)

    def _load(self, model: str, placement: Placement | None) -> None:
        kind = self.kinds[model]
        assert model not in self.runners, "spawned twice"
        assert self.waiters.get(model), "nobody asked for it"
        assert placement is not None
        for device, size in placement.bytes_by_device.items():
            free = (self.totals[device] - self.others[device]) * GIB - self._held(device)
            assert size <= free, f"more was given than {device} has"
        assert sum(placement.bytes_by_device.values()) >= kind.gib * GIB, "less was given than it takes"
        beside = [other for other, runner in self.runners.items() if kind.apart & runner.apart]
        assert not beside, "never together"
        self.runners[model] = Resident(
            model, LOADING, held=placement.bytes_by_device, apart=kind.apart, keep_alive_s=kind.keep_alive_s
        )

    def _held(self, device: str) -> int:
        return sum(runner.held.get(device, 0) for runner in self.runners.values())

    @rule(model=models, priority=st.sampled_from([0, 0, 0, 5]))
    def request(self, model: str, priority: int) -> None:
        runner, priority = self.runners.get(model), priority + self.kinds[model].priority
        if runner is not None and runner.state is READY:
            highest = max(runner.priority, priority)
            self.runners[model] = replace(runner, leases=runner.leases + 1, idle_since=None, priority=highest)
        else:
            self.waiters.setdefault(model, []).append(Waiter(self.now, priority))
        self.act()

    @rule(model=models)
    def give_up(self, model: str) -> None:
        if self.waiters.get(model):
            self.waiters[model].pop()
        self.act()

    @rule(gib=st.integers(0, 6), number=st.integers(0, 2))
    def others_take(self, gib: int, number: int) -> None:
        """No more than is free: the kernel would not give it either."""
        device = list(self.totals)[number % len(self.totals)]
        self.others[device] = max(min(gib, self.totals[device] - -(-self._held(device) // GIB)), 0)
        self.act()

    @precondition(lambda self: any(r.state is LOADING for r in self.runners.values()))
    @rule()
    def load_ends(self) -> None:
        model, runner = next((m, r) for m, r in self.runners.items() if r.state is LOADING)
        waiters = self.waiters.pop(model, [])
        self.runners[model] = replace(
            runner,
            state=READY,
            leases=len(waiters),
            ready_since=self.now,
            idle_since=None if waiters else self.now,
            priority=max((waiter.priority for waiter in waiters), default=0),
        )
        self.act()

    @precondition(lambda self: any(r.leases for r in self.runners.values()))
    @rule()
    def answer_ends(self) -> None:
        model, runner = next((m, r) for m, r in self.runners.items() if r.leases)
        left = runner.leases - 1
        idle_since, priority = (None, runner.priority) if left else (self.now, 0)
        self.runners[model] = replace(runner, leases=left, idle_since=idle_since, priority=priority)
        self.act()

    @precondition(lambda self: any(r.state is STOPPING for r in self.runners.values()))
    @rule()
    def stop_ends(self) -> None:
        del self.runners[next(m for m, r in self.runners.items() if r.state is STOPPING)]
        self.act()

    @rule(seconds=st.floats(0.1, 50))
    def time_passes(self, seconds: float) -> None:
        """Time alone changes nothing but that the alarm rings, which it does as often as it was set."""
        end = self.now + seconds
        while self.alarm <= end:
            self.now = max(self.now, self.alarm)
            self.act()
            assert self.alarm > self.now, "it would ring for ever"
        self.now = end

    @invariant()
    def no_more_than_allowed(self) -> None:
        if self.rules.max_loaded:
            assert len(self.runners) <= self.rules.max_loaded

    @invariant()
    def everybody_is_served_or_refused_in_the_end(self) -> None:
        """From any moment on, if loads, answers and stops come to their end, those who wait now wait no longer than
        their patience and the turns of those before them: also where every model is asked again and again."""
        copy = type(self)()
        copy.now, copy.alarm, copy.others = self.now, self.alarm, dict(self.others)
        copy.runners, copy.rules = dict(self.runners), self.rules
        copy.waiters = {model: list(waiters) for model, waiters in self.waiters.items()}
        latest = self.now + (MAX_WAIT_S + 20) * len(self.kinds)
        waiting = {id(waiter) for waiters in copy.waiters.values() for waiter in waiters}
        while waiting & {id(waiter) for waiters in copy.waiters.values() for waiter in waiters}:
            assert copy.now <= latest, f"still waiting: {copy.waiters}, {copy.runners}"
            if any(r.state is LOADING for r in copy.runners.values()):
                copy.load_ends()
            elif any(r.state is STOPPING for r in copy.runners.values()):
                copy.stop_ends()
            for model in [m for m, r in copy.runners.items() if r.state is READY and r.leases]:
                copy.request(model, 0)
            for _ in range(2):
                if any(r.leases for r in copy.runners.values()):
                    copy.answer_ends()
            copy.time_passes(1.0)


class MachineWithGpus(Machine):
    """Two GPUs of unequal size: models that fit either, one, both together, or lie partly in RAM; some may use but one
    of them, or none."""

    totals: ClassVar = {RAM: 8, "gpu0": 4, "gpu1": 7}
    kinds: ClassVar = {
        "a": Kind(1),
        "b": Kind(3, apart=frozenset({"big"})),
        "c": Kind(5, priority=2),
        "d": Kind(9, apart=frozenset({"big"})),
        "e": Kind(14, keep_alive_s=0.0),
        "f": Kind(30),
        "g": Kind(3, devices=("gpu0",)),
        "h": Kind(4, devices=(RAM,), priority=-1),
    }
    models = st.sampled_from(sorted(kinds))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=HISTORIES, stateful_step_count=25, deadline=None)
TestMachineWithGpus = MachineWithGpus.TestCase
TestMachineWithGpus.settings = settings(max_examples=max(HISTORIES // 4, 1), stateful_step_count=25, deadline=None)
