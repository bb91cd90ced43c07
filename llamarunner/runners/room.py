"""Who must leave so that a model fits: `plan_room`. Pure; it decides whether, the scheduler when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llamarunner.runners.memory import Need
from llamarunner.runners.placement import RAM, Device, Partial, Placement, Refusal, holding, place, summed


@dataclass(frozen=True, slots=True)
class Holder:
    """A runner that holds memory. Those with a smaller `order` leave first."""

    name: str
    bytes_by_device: Mapping[str, int]
    evictable: bool = True  # now: nobody uses it
    order: float = 0.0
    pinned: bool = False  # never leaves for another


@dataclass(frozen=True, slots=True)
class Room:
    """Once `evict` have left, the model goes where `placement` says. Place it again then: figures change."""

    evict: tuple[str, ...]
    placement: Placement


def plan_room(
    need: Need,
    devices: Sequence[Device],
    holders: Iterable[Holder],
    *,
    pinned: Sequence[str] = (),
    spread: bool = False,
    partial: Partial = "offload",
) -> Room | Refusal:
    """Who must leave for `need`: nobody if it fits, else those first in order, and none whose leaving is not needed.

    A whole model on GPUs goes before a partial one: only where not even the leaving of those that answer now would make
    it whole is it offloaded in part, as far as those that may leave make possible. What would fit but for those that
    answer now is refused with them as blockers."""
    in_order = sorted(holders, key=lambda holder: holder.order)
    going = [holder for holder in in_order if holder.evictable and not holder.pinned]
    later = [holder for holder in in_order if not holder.pinned]

    def attempt(leaving: Sequence[Holder], how: Partial) -> Placement | Refusal:
        return place(need, without(devices, leaving), pinned=pinned, spread=spread, partial=how)

    def least(candidates: Sequence[Holder], how: Partial, layers: int | None) -> Room | None:
        # more memory never makes it worse, so that the number of those who must leave can be found by halving
        fewest = _fewest(need, devices, candidates) if how == "refuse" else 0
        if fewest > len(candidates):
            return None
        low, high, found = fewest - 1, fewest, attempt(candidates[:fewest], how)
        if not _is_as_good(found, layers):
            low, high, found = fewest, len(candidates), attempt(candidates, how)
            if not _is_as_good(found, layers):
                return None
        while high - low > 1:
            middle = (low + high) // 2
            if _is_as_good(tried := attempt(candidates[:middle], how), layers):
                high, found = middle, tried
            else:
                low = middle
        assert isinstance(found, Placement)
        leaving = list(candidates[:high])
        # mostly they are in the way on one or two of the devices
        there = [holder for holder in leaving if not found.bytes_by_device.keys().isdisjoint(_held(holder))]
        if len(there) < len(leaving) - 1 and _is_as_good(again := attempt(there, how), layers):
            assert isinstance(again, Placement)
            leaving, found = there, again
        for holder in reversed(leaving[:-1]):  # the last was needed; of the others the most precious may stay first
            fewer = [other for other in leaving if other is not holder]
            if _is_as_good(again := attempt(fewer, how), layers) and not isinstance(again, Refusal):
                leaving, found = fewer, again
        return Room(tuple(holder.name for holder in leaving), found)

    def in_the_way(how: Partial) -> tuple[str, ...]:
        """Who answers now, and would have to leave."""
        waiting = least(later, how, None) if len(later) > len(going) else None
        evict = waiting.evict if waiting is not None else ()
        return tuple(holder.name for holder in later if holder.name in evict and not holder.evictable)

    if room := least(going, "refuse", None):
        return room
    refused = attempt(going, "refuse")
    assert isinstance(refused, Refusal)
    if blockers := in_the_way("refuse"):
        return replace(refused, blockers=blockers)
    if partial == "offload":
        best = attempt(going, "offload")
        if isinstance(best, Placement):
            return least(going, "offload", best.gpu_layers or 0) or Room(tuple(h.name for h in going), best)
        return replace(refused, blockers=in_the_way("offload"))
    return refused


def _fewest(need: Need, devices: Sequence[Device], candidates: Sequence[Holder]) -> int:
    """How many of them must leave at the least before there are bytes enough, wherever they are; one more than there
    are where that is never."""
    if need.wishes.gpu_layers is not None:
        return 0
    gpus = {device.id: device.free_bytes for device in devices if device.id != RAM}
    places, size = (gpus, need.least) if gpus else ({d.id: d.free_bytes for d in devices}, need.on_cpu())
    room = sum(places.values())
    for count, holder in enumerate(candidates):
        if room >= size:
            return count
        room += sum(held for device, held in holder.bytes_by_device.items() if device in places)
    return len(candidates) + (room < size)


def _held(holder: Holder) -> list[str]:
    """The devices it holds anything of, but RAM where it has a GPU: there is mostly enough of that."""
    devices = [device for device, size in holder.bytes_by_device.items() if size]
    return [device for device in devices if device != RAM] or devices


def _is_as_good(found: Placement | Refusal, layers: int | None) -> bool:
    if isinstance(found, Refusal):
        return False
    return layers is None or (found.gpu_layers or 0) >= layers


def without(devices: Sequence[Device], leaving: Iterable[Holder]) -> tuple[Device, ...]:
    """The devices once `leaving` have given back what they hold."""
    held = summed(holder.bytes_by_device for holder in leaving)
    return holding(devices, {device: -size for device, size in held.items()})
