from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarunner.errors import UnsupportedError
from llamarunner.runners.memory import GPU_CONTEXT_BYTES, MIB, Layer, Need, Wishes
from llamarunner.runners.placement import RAM, Device, Partial, Placement, Refusal, place, split_layers
from llamarunner.runners.room import Holder, Room, plan_room, without

GIB = 1024 * MIB


def needs(layers: int = 10, each: int = GIB, output: int = GIB, compute: int = 100 * MIB, **more: object) -> Need:
    made = Need(
        model="m",
        layers=(Layer(each // 2, 0, each // 2),) * layers,
        input=GIB // 2,
        output=output,
        cpu_weights=layers * each // 2 + output + GIB // 2,
        compute=compute,
        host_compute=10 * MIB,
        logits=MIB,
        process=50 * MIB,
        snapshots=0,
    )
    return replace(made, **more)  # type: ignore[arg-type]  # names of its fields


def gpu(number: int, free: int, total: int | None = None) -> Device:
    total = total or max(free, 24 * GIB)
    used = total - free
    return Device(f"gpu{number}", f"GPU {number}", total, 0, used, 0, uuid=f"GPU-{number}{number}{number}{number}")


def ram(free: int = 64 * GIB) -> Device:
    return Device(RAM, "RAM", 64 * GIB, used_by_others_bytes=64 * GIB - free)


def placed(found: Placement | Refusal) -> Placement:
    assert isinstance(found, Placement), found
    return found


def refused(found: Placement | Refusal | Room) -> Refusal:
    assert isinstance(found, Refusal), found
    return found


WHOLE = needs().on_gpus((11,)).gpus[0]  # 11 GiB and what every GPU takes


# --- the order of preference ------------------------------------------------------------------------------------------


def test_without_gpus_it_goes_to_ram() -> None:
    found = placed(place(needs(), [ram()]))
    assert found == Placement({RAM: needs().on_cpu()})


def test_the_fullest_gpu_that_has_room() -> None:
    found = placed(place(needs(), [ram(), gpu(0, 24 * GIB), gpu(1, 12 * GIB), gpu(2, 8 * GIB)]))
    assert found.devices == ("gpu1",)
    assert (found.gpu_layers, found.tensor_split) == (11, ())
    assert found.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-1111"}
    assert found.bytes_by_device == {RAM: needs().ram_beside(11), "gpu1": WHOLE}


def test_exactly_enough_is_enough() -> None:
    assert placed(place(needs(), [ram(), gpu(0, WHOLE)])).gpu_layers == 11
    assert refused(place(needs(), [ram(), gpu(0, WHOLE - 1)], partial="refuse")).needed_bytes == WHOLE


def test_the_fewest_gpus_share_it_by_their_memory() -> None:
    found = placed(place(needs(), [ram(), gpu(0, 4 * GIB), gpu(1, 10 * GIB), gpu(2, 6 * GIB), gpu(3, 5 * GIB)]))
    assert found.devices == ("gpu1", "gpu2")
    assert found.tensor_split == (7, 4)
    assert found.env["CUDA_VISIBLE_DEVICES"] == "GPU-1111,GPU-2222"  # in the order of the split
    assert split_layers(found.tensor_split, 11) == (7, 4)


def test_eight_unequal_gpus() -> None:
    free = [3, 7, 2, 5, 4, 6, 3, 2]
    gpus = [gpu(number, size * GIB) for number, size in enumerate(free)]
    need = needs(layers=22)  # 23 times 1 GiB, and each GPU keeps 600 MiB for itself: 6 + 5 + 4 + 3 + 2 + 2 + 1
    found = placed(place(need, [ram(), *gpus], partial="refuse"))
    assert found.devices == ("gpu1", "gpu5", "gpu3", "gpu4", "gpu0", "gpu6", "gpu2")
    assert sum(found.tensor_split) == 23
    assert list(found.tensor_split) == sorted(found.tensor_split, reverse=True)


def test_spread_uses_all_of_them() -> None:
    found = placed(place(needs(), [ram(), gpu(0, 24 * GIB), gpu(1, 24 * GIB), gpu(2, 12 * GIB)], spread=True))
    assert found.tensor_split == (5, 5, 1)  # no GPU is fuller than it must be: the last has what is over


def test_part_of_it_in_ram() -> None:
    devices = [ram(), gpu(0, 6 * GIB)]
    found = placed(place(needs(), devices))
    assert found.gpu_layers == 5  # 6 GiB less what every GPU takes
    assert found.bytes_by_device[RAM] == needs().ram_beside(5)
    assert "6.0 GiB free" in refused(place(needs(), devices, partial="refuse")).message
    assert refused(place(needs(), [ram(GIB), gpu(0, 6 * GIB)])).device == RAM


def test_full_gpus_leave_it_to_ram_which_hides_them() -> None:
    found = placed(place(needs(), [ram(), gpu(0, 300 * MIB)]))
    assert (found.gpu_layers, found.devices) == (None, ())
    assert found.env["CUDA_VISIBLE_DEVICES"] == ""


def test_a_refusal_says_who_holds_the_memory() -> None:
    card = Device("gpu0", "RTX 3090", 24 * GIB, GIB, used_by_others_bytes=3 * GIB, used_by_ours_bytes=12 * GIB)
    found = refused(place(needs(), [ram(), card, gpu(1, GIB)], partial="refuse"))
    assert found.message == (
        "m needs 11.6 GiB of RTX 3090, which has 8.0 GiB free of 24.0 GiB (12.0 GiB loaded models, 3.0 GiB other"
        " programs, 1.0 GiB the reserve), and 1 more GPU has too little for the rest"
    )
    assert (found.device, found.needed_bytes, found.free_bytes) == ("gpu0", WHOLE, 8 * GIB)


def test_a_projector_and_a_draft_model_take_the_first() -> None:
    need = needs(projector=3 * GIB, draft=needs(layers=1, output=0, each=GIB))
    found = placed(place(need, [ram(), gpu(0, 9 * GIB), gpu(1, 9 * GIB)]))
    assert found.tensor_split == (4, 7)
    assert refused(place(need, [ram(), gpu(0, 7 * GIB), gpu(1, 8 * GIB)], partial="refuse"))


# --- what the configuration wants -------------------------------------------------------------------------------------


def test_pinned_to_devices() -> None:
    devices = [ram(), gpu(0, 24 * GIB), gpu(1, 13 * GIB), gpu(2, 20 * GIB)]
    assert placed(place(needs(), devices, pinned=["gpu2"])).devices == ("gpu2",)
    assert placed(place(needs(), devices, pinned=["GPU-0000", "gpu2"])).devices == ("gpu2",)
    assert placed(place(needs(), devices, pinned=[RAM])).devices == ()
    with pytest.raises(UnsupportedError, match="no device 'gpu7'") as caught:
        place(needs(), devices, pinned=["gpu7"])
    assert "gpu2 (GPU 2)" in caught.value.hint


def test_numbers_of_layers_are_obeyed() -> None:
    devices = [ram(), gpu(0, 24 * GIB)]
    assert placed(place(needs(wishes=Wishes(gpu_layers=4)), devices)).gpu_layers == 4
    assert placed(place(needs(wishes=Wishes(gpu_layers=0)), devices)).env["CUDA_VISIBLE_DEVICES"] == ""
    assert placed(place(needs(wishes=Wishes(gpu_layers=999)), devices)).gpu_layers == 11
    assert refused(place(needs(wishes=Wishes(gpu_layers=999)), [ram(), gpu(0, 6 * GIB)]))  # not in part: it was told


def test_a_tensor_split_is_obeyed_and_counted() -> None:
    devices = [ram(), gpu(0, 8 * GIB), gpu(1, 24 * GIB)]
    found = placed(place(needs(wishes=Wishes(tensor_split=(1, 3))), devices))
    assert found.bytes_by_device == {RAM: needs().ram_beside(11)} | dict(
        zip(("gpu0", "gpu1"), needs().on_gpus((3, 8)).gpus, strict=True)
    )
    assert found.tensor_split == ()  # the flag is there already
    assert found.env["CUDA_VISIBLE_DEVICES"] == "GPU-0000,GPU-1111"  # as NVML lists them, not by size
    assert refused(place(needs(wishes=Wishes(tensor_split=(3, 1))), devices, partial="refuse")).device == "gpu0"
    assert placed(place(needs(wishes=Wishes(tensor_split=(0, 1))), devices)).devices == ("gpu1",)
    for split in ((1.0,), (1.0, 1.0, 1.0)):
        with pytest.raises(UnsupportedError, match=r"tensor-split has \d shares?, and the GPUs it may use are 2"):
            place(needs(wishes=Wishes(tensor_split=split)), devices)


def test_named_gpus_keep_their_numbers() -> None:
    devices = [ram(), gpu(0, 24 * GIB), gpu(1, 24 * GIB), gpu(2, 24 * GIB)]
    for wishes in (Wishes(devices=("CUDA1",)), Wishes(main_gpu=1, split_mode="none")):
        found = placed(place(needs(wishes=wishes), devices))
        assert found.devices == ("gpu1",)
        assert found.env["CUDA_VISIBLE_DEVICES"] == "GPU-0000,GPU-1111,GPU-2222"
    assert placed(place(needs(wishes=Wishes(devices=())), devices)).devices == ()
    for wishes in (Wishes(devices=("CUDA3",)), Wishes(main_gpu=3, split_mode="none"), Wishes(devices=("x",))):
        with pytest.raises(UnsupportedError, match="there are 3"):
            place(needs(wishes=wishes), devices)


def test_a_visible_devices_variable_narrows_the_choice() -> None:
    devices = [ram(), gpu(0, 24 * GIB), gpu(1, 24 * GIB), gpu(2, 24 * GIB)]

    def seen(variable: str) -> tuple[str, ...]:
        return placed(place(needs(wishes=Wishes(visible=variable)), devices, spread=True)).devices

    assert seen("1,0") == ("gpu1", "gpu0")
    assert seen("GPU-22") == ("gpu2",)
    assert seen("2,9,0") == ("gpu2",)  # CUDA stops reading at what it does not know
    assert seen("") == seen("-1") == ()


# --- what holds for any machine ---------------------------------------------------------------------------------------

sizes = st.integers(0, 24).map(lambda half_gib: half_gib * GIB // 2)


@st.composite
def any_need(draw: st.DrawFn) -> Need:
    layers = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
    made = needs(output=draw(st.integers(0, 3000)) * MIB, compute=draw(st.integers(1, 900)) * MIB)
    return replace(
        made,
        layers=tuple(
            Layer(size * MIB // 2, draw(st.sampled_from((0, size * MIB))), size * MIB // 3) for size in layers
        ),
        cpu_weights=sum(layers) * MIB,
        projector=draw(st.sampled_from((0, GIB))),
        projector_on_gpu=draw(st.booleans()),
        cache_on_gpu=draw(st.booleans()),
        cpu_experts=draw(st.integers(0, 3)),
        gpu_correction=draw(st.sampled_from((0, -200 * MIB, 200 * MIB))),
        wishes=draw(st.sampled_from((Wishes(), Wishes(gpu_layers=3), Wishes(gpu_layers=999)))),
    )


machines = st.tuples(sizes.map(lambda size: ram(4 * size)), st.lists(sizes, max_size=8)).map(
    lambda parts: [parts[0], *(gpu(number, size) for number, size in enumerate(parts[1]))]
)
partials = st.sampled_from(("offload", "refuse"))


@settings(max_examples=120, deadline=None)
@given(any_need(), machines, partials, st.booleans())
def test_no_device_is_overcommitted(need: Need, devices: list[Device], partial: Partial, spread: bool) -> None:
    found = place(need, devices, partial=partial, spread=spread)
    free = {device.id: device.free_bytes for device in devices}
    if isinstance(found, Refusal):
        assert found.needed_bytes > found.free_bytes or len(devices) > 2
        return
    assert all(size <= free[device] for device, size in found.bytes_by_device.items())
    if found.gpu_layers is None:
        assert found.bytes_by_device == {RAM: need.on_cpu()}
        return
    shares = found.tensor_split or (found.gpu_layers,)
    allocation = need.on_gpus(shares)
    assert (allocation.ram, *allocation.gpus) == tuple(found.bytes_by_device[d] for d in (RAM, *found.devices))
    assert split_layers(shares, found.gpu_layers) == shares  # the engine deals them out as we do
    if need.wishes.gpu_layers is None and partial == "refuse":
        assert found.gpu_layers == need.units


@settings(max_examples=120, deadline=None)
@given(any_need(), machines, partials, st.booleans(), st.integers(0, 8), st.integers(1, 5 * GIB))
def test_more_memory_never_makes_it_worse(
    need: Need, devices: list[Device], partial: Partial, spread: bool, which: int, more: int
) -> None:
    before = place(need, devices, partial=partial, spread=spread)
    at = which % len(devices)
    grown = [*devices[:at], replace(devices[at], total_bytes=devices[at].total_bytes + more), *devices[at + 1 :]]
    after = place(need, grown, partial=partial, spread=spread)
    if isinstance(before, Placement):
        assert isinstance(after, Placement)
        assert (after.gpu_layers or 0) >= (before.gpu_layers or 0)
        if not spread:
            assert len(after.devices) <= len(before.devices) or (after.gpu_layers or 0) > (before.gpu_layers or 0)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_split_in_layers_is_dealt_out_exactly(shares: list[int]) -> None:
    assert split_layers([float(share) for share in shares], sum(shares)) == tuple(shares)


# --- making room ------------------------------------------------------------------------------------------------------


def held(name: str, device: str, gib: float, order: float = 0, **more: bool) -> Holder:
    return Holder(name, {device: int(gib * GIB)}, order=order, **more)


def full(number: int, ours: float, total: float = 24) -> Device:
    return Device(f"gpu{number}", f"GPU {number}", int(total * GIB), used_by_ours_bytes=int(ours * GIB))


def room(found: Room | Refusal) -> Room:
    assert isinstance(found, Room), found
    return found


def test_nobody_leaves_where_there_is_room() -> None:
    found = room(plan_room(needs(), [ram(), full(0, 5)], [held("a", "gpu0", 5)]))
    assert found == Room((), placed(place(needs(), [ram(), full(0, 5)])))


def test_the_first_in_order_leave_and_no_more() -> None:
    holders = [held("late", "gpu0", 10, 9), held("soon", "gpu0", 6, 1), held("next", "gpu0", 8, 2)]
    found = room(plan_room(needs(), [ram(), full(0, 24)], holders))
    assert found.evict == ("soon", "next")
    assert found.placement.devices == ("gpu0",)


def test_who_leaves_for_nothing_stays() -> None:
    holders = [held("elsewhere", "gpu1", 4, 1), held("here", "gpu0", 20, 2)]
    found = room(plan_room(needs(), [ram(), full(0, 20), full(1, 4, total=4)], holders))
    assert found.evict == ("here",)


def test_the_busy_and_the_pinned_never_leave() -> None:
    devices = [ram(), full(0, 24)]
    busy, pinned = held("busy", "gpu0", 20, evictable=False), held("kept", "gpu0", 20, pinned=True)
    found = refused(plan_room(needs(), devices, [busy, held("idle", "gpu0", 4, 1)]))
    assert found.blockers == ("busy",)
    assert refused(plan_room(needs(), devices, [pinned, held("idle", "gpu0", 4)], partial="refuse")).blockers == ()
    in_part = room(plan_room(needs(), devices, [pinned, held("idle", "gpu0", 4)]))
    assert (in_part.evict, in_part.placement.gpu_layers) == (("idle",), 3)


def test_ram_is_made_room_in_with_the_same_words() -> None:
    device = Device(RAM, "RAM", 16 * GIB, used_by_ours_bytes=12 * GIB)
    holders = [held("a", RAM, 5, 1), held("b", RAM, 7, 2)]
    assert room(plan_room(needs(), [device], holders)).evict == ("a", "b")
    small = needs(layers=4)
    assert room(plan_room(small, [device], holders)).evict == ("a",)
    assert refused(plan_room(needs(layers=40), [device], holders)).blockers == ()


@settings(max_examples=60, deadline=None)
@given(
    any_need(),
    st.sampled_from((1, 2, 8)),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40), st.booleans(), st.booleans()), max_size=5),
    partials,
    st.data(),
)
def test_nobody_leaves_who_need_not(
    need: Need, count: int, held_by: list[tuple[int, int, bool, bool]], partial: Partial, data: st.DataObject
) -> None:
    totals = [64, *(data.draw(st.integers(2, 24)) for _ in range(count))]
    ids = [RAM, *(f"gpu{number}" for number in range(count))]
    holders = [
        Holder(f"h{n}", {ids[at % len(ids)]: size * GIB // 2}, evictable, float(n % 3), pinned)
        for n, (at, size, evictable, pinned) in enumerate(held_by)
    ]
    used = {device: sum(h.bytes_by_device.get(device, 0) for h in holders) for device in ids}
    devices = [
        Device(device, device, max(total * GIB, used[device]), used_by_ours_bytes=used[device])
        for device, total in zip(ids, totals, strict=True)
    ]
    found = plan_room(need, devices, holders, partial=partial)
    by_name = {holder.name: holder for holder in holders}
    if isinstance(found, Refusal):
        gone = [holder for holder in holders if holder.evictable and not holder.pinned]
        if not found.blockers:
            assert isinstance(place(need, without(devices, gone), partial=partial), Refusal)
        return
    leaving = [by_name[name] for name in found.evict]
    assert all(holder.evictable and not holder.pinned for holder in leaving)
    assert place(need, without(devices, leaving), partial=partial) == found.placement
    layers = found.placement.gpu_layers or 0
    for length in range(len(leaving)):
        for fewer in combinations(leaving, length):
            again = place(need, without(devices, fewer), partial=partial)
            assert isinstance(again, Refusal) or (again.gpu_layers or 0) < layers


def test_it_is_quick() -> None:
    need = needs(layers=94, each=GIB // 4)
    gpus = [full(number, 23.5) for number in range(8)]
    holders = [held(f"h{number}", f"gpu{number % 8}", 2.5, number) for number in range(64)]
    took = []
    for _ in range(3):
        start = time.perf_counter()
        found = room(plan_room(need, [ram(), *gpus], holders))
        assert len(found.evict) > 5
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1  # 5 ms on an idle core, in a case far worse than any machine's


def test_what_every_gpu_takes_is_counted_for_each() -> None:
    found = placed(place(needs(), [ram(), gpu(0, 7 * GIB), gpu(1, 7 * GIB)]))
    assert sum(found.bytes_by_device[name] for name in found.devices) == 11 * GIB + 2 * (GPU_CONTEXT_BYTES + 100 * MIB)
