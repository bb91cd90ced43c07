"""The scheduler with memory: what fits goes side by side, what must leaves, nothing is ever given twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llamarunner.events import RunnerState
from llamarunner.runners.facts import Decision, Drain, Facts, Load, Refuse, Resident, Unload, Waiting
from llamarunner.runners.memory import Layer, Need
from llamarunner.runners.placement import RAM, Device
from llamarunner.runners.scheduler import decide

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


def yielding(residents: Sequence[Resident], others_gib: float, *, yields: bool = True) -> Decision:
    device = replace(ram(10, others_gib), reserve_bytes=GIB)
    return decide(Facts(100, residents, [], 60, devices=[device], yields=yields))


def test_idle_models_give_way_to_other_programs_as_far_as_they_must() -> None:
    residents = [resident("old", 3, idle_since=10), resident("new", 3, idle_since=90), resident("busy", 1, leases=1)]
    assert yielding(residents, 2).actions == ()
    decision = yielding(residents, 4)
    assert decision.actions == (Unload("old", "gives way to other programs, which hold 4.0 GiB of RAM"),)
    assert decision.wake_at == 105, "it looks again"
    both = [action.model for action in yielding(residents, 9.5).actions]
    assert both == ["old", "new"], "and never the one that answers"
    assert yielding(residents, 9.5, yields=False).actions == ()


def test_a_small_model_behind_many_that_wait_for_room_takes_what_is_free() -> None:
    busy = resident("busy", 7, leases=1)
    blocked = [Waiting(name, 90, need(name, 6)) for name in "abcdef"]
    found = loads(actions([busy], [*blocked, Waiting("small", 99, need("small", 1))], [ram(10)]))
    assert found == {"small": {RAM: GIB}}
    two = [Waiting("small", 98, need("small", 2)), Waiting("smaller", 99, need("smaller", 2))]
    assert loads(actions([busy], [*blocked, *two], [ram(10)])) == {"small": {RAM: 2 * GIB}}


def test_a_model_that_lies_partly_in_ram_waits_for_one_that_answers() -> None:
    """It would fit but for that: no reason to refuse it."""
    devices = [gpu(0, 4), ram(5)]
    busy = resident("busy", 3, device="gpu0", leases=1)
    waiting = Waiting("a", 98, need("a", 8))
    assert actions([busy], [waiting], devices) == []
    (drain,) = actions([busy], [replace(waiting, since=10)], devices)
    assert isinstance(drain, Drain)
    assert set(loads(actions([], [waiting], devices))["a"]) == {"gpu0", RAM}
