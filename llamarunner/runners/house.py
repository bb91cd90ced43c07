"""The machine as one decision goes on: the room there is now, and once those who leave have left. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamarunner.errors import UnsupportedError
from llamarunner.events import RunnerState
from llamarunner.runners.facts import LEAVING, Action, Drain, Facts, Load, Refuse, Resident, Unload, Waiting
from llamarunner.runners.placement import Device, Partial, Placement, Refusal, holding, place, summed
from llamarunner.runners.room import Holder, plan_room, without
from llamarunner.units import format_duration, format_size

_CLEARED_AT_ONCE = 4  # models that room is sought for and cannot be had yet; who comes after takes what is free
_FITTED_AT_ONCE = 4  # of those; the rest is seen to when something changes


class House:
    """The room there is, now and once those who leave have left, as waiters are served one after the other."""

    def __init__(self, facts: Facts, leaving: set[str]) -> None:
        self.actions: list[Action] = []
        self.waiting_for_room = 0
        self._fitted = 0  # who were tried where nobody leaves for them
        self._facts = facts
        self._going = {r.model for r in facts.residents if r.model in leaving or r.state in LEAVING}
        self._staying = [resident for resident in facts.residents if resident.model not in self._going]
        self._freed = [_freed(resident) for resident in facts.residents if resident.model in self._going]
        # what is taken now, and once those who leave have left and those it was promised to have come
        self._now = self._then = holding(facts.devices, summed(resident.held for resident in facts.residents))
        self._free_bytes = sum(device.free_bytes for device in self._now)
        local = [resident for resident in facts.residents if resident.is_local]
        self._empty = holding(facts.devices, summed(resident.held for resident in facts.residents if resident.pinned))
        self._places = facts.max_loaded - len(local) if facts.max_loaded else math.inf
        self._places_coming = sum(resident.model in self._going for resident in local)

    def serve(self, waiting: Waiting) -> None:
        """Load it, or clear the way for it and keep the room for when it is cleared."""
        if not waiting.is_local:
            self.actions.append(Load(waiting.model))
            return
        if self._take_what_is_free(waiting) or self.waiting_for_room >= _CLEARED_AT_ONCE:
            return
        has_place = self._places > 0
        if refusal := self.hopeless(waiting) or self._never_beside(waiting):
            self.actions.append(refusal)
            return
        is_clear = self._part(waiting)
        if not has_place and not self._find_place(waiting):
            self.waiting_for_room += 1
            return
        plan = self._plan(waiting)
        if isinstance(plan, Refusal):
            self._refused(waiting, plan)
            return
        evict, placement = plan
        for name in evict:
            self._evict(name, waiting, placement)
        is_loaded = False
        if has_place:
            self._places -= 1
            if not evict and is_clear:
                placement, is_loaded = self._load(waiting, placement)
        if not is_loaded:
            self.waiting_for_room += 1
        if placement is not None:
            self._then = without(self._then, self._among(evict))
            self._freed = [holder for holder in self._freed if holder.name not in evict]
        self._promise(waiting, placement)

    def _take_what_is_free(self, waiting: Waiting) -> bool:
        """Whether it is whole where nobody need leave for it."""
        if self._places <= 0 or waiting.need is None or not self._then:
            return False
        if waiting.apart and any(waiting.apart & r.apart for r in (*self._staying, *self._facts.residents)):
            return False
        if waiting.need.least > self._free_bytes:
            return False
        if self.waiting_for_room >= _CLEARED_AT_ONCE:
            if self._fitted == _FITTED_AT_ONCE:
                return False
            self._fitted += 1
        try:
            fits = self._place(waiting, _fuller(self._now, self._then), partial="refuse")
        except UnsupportedError:
            return False  # what is wrong is told when its turn comes
        if isinstance(fits, Refusal):
            return False
        self._places -= 1
        self._give(waiting, fits)
        self._promise(waiting, fits)
        return True

    def _promise(self, waiting: Waiting, placement: Placement | None) -> None:
        """Theirs from now on, though it may take a while until it is free."""
        held = placement.bytes_by_device if placement is not None else {}
        self._then = holding(self._then, held)
        if held or waiting.apart:  # whoever comes after may wait for it to leave again
            coming = Resident(waiting.model, RunnerState.LOADING, waiters=1, held=held, apart=waiting.apart)
            self._staying.append(coming)

    def _is_patient(self, waiting: Waiting, resident: Resident) -> bool:
        """Whether it lets the resident go on taking requests."""
        waited = self._facts.now - waiting.since
        return waited < self._facts.max_wait_s and waiting.priority <= resident.priority

    def _may_leave(self, resident: Resident, waiting: Waiting) -> bool:
        is_kept = self._facts.is_protected(resident) and self._is_patient(waiting, resident)
        return resident.is_evictable and not is_kept

    def _never_beside(self, waiting: Waiting) -> Refuse | None:
        for resident in self._staying if waiting.apart else ():
            if resident.pinned and (shared := waiting.apart & resident.apart):
                tag = min(shared)
                message = (
                    f"{waiting.model} is never loaded beside {resident.model}, which stays (both have the tag '{tag}')"
                )
                return Refuse(waiting.model, message, "see scheduler.never_together", is_wrong=True)
        return None

    def _part(self, waiting: Waiting) -> bool:
        """See to it that those leave that it is never together with; True once they have."""
        if not waiting.apart:
            return True
        for resident in [resident for resident in self._staying if waiting.apart & resident.apart]:
            tag = min(waiting.apart & resident.apart)
            if self._may_leave(resident, waiting):
                self._unload(resident.model, f"evicted for {waiting.model}: never together, by the tag '{tag}'")
                self._places_coming += 1
            elif resident.state is RunnerState.READY and not self._is_patient(waiting, resident):
                self._drain(resident, waiting)
        return not any(waiting.apart & resident.apart for resident in (*self._staying, *self._facts.residents))

    def hopeless(self, waiting: Waiting) -> Refuse | None:
        """Before anybody leaves for it: one that would not fit if all of ours left, or asks for what is not there."""
        if waiting.need is None or not self._empty:
            return None
        try:
            found = self._place(waiting, self._empty)
        except UnsupportedError as error:
            return Refuse(waiting.model, error.message, error.hint, is_wrong=True)
        return Refuse(waiting.model, found.message) if isinstance(found, Refusal) and not self._freed else None

    def _place(
        self, waiting: Waiting, devices: Sequence[Device], partial: Partial | None = None
    ) -> Placement | Refusal:
        assert waiting.need is not None
        how, spread = partial or self._facts.partial, self._facts.spread
        return place(waiting.need, devices, pinned=waiting.devices, spread=spread, partial=how)

    def _load(self, waiting: Waiting, planned: Placement | None) -> tuple[Placement | None, bool]:
        """Now, where there is room that nobody who leaves must give back first; otherwise it waits as planned."""
        if waiting.need is None or planned is None:
            self.actions.append(Load(waiting.model))
            return None, True
        fits = self._place(waiting, _fuller(self._now, self._then))
        if isinstance(fits, Refusal) or (fits.gpu_layers or 0) < (planned.gpu_layers or 0):
            return planned, False
        self._give(waiting, fits)
        return fits, True

    def _give(self, waiting: Waiting, placement: Placement) -> None:
        self.actions.append(Load(waiting.model, placement))
        self._now = holding(self._now, placement.bytes_by_device)
        self._free_bytes = sum(device.free_bytes for device in self._now)

    def _plan(self, waiting: Waiting) -> tuple[tuple[str, ...], Placement | None] | Refusal:
        if waiting.need is None or not self._then:
            return (), None
        holders = [*self._freed, *(_holder(r, evictable=self._may_leave(r, waiting)) for r in self._staying)]
        how, spread = self._facts.partial, self._facts.spread
        found = plan_room(waiting.need, self._then, holders, pinned=waiting.devices, spread=spread, partial=how)
        return found if isinstance(found, Refusal) else (found.evict, found.placement)

    def _find_place(self, waiting: Waiting) -> bool:
        """Where only so many may be loaded: the place of one that leaves."""
        if self._places_coming > 0:
            self._places_coming -= 1
            return True
        idle = [resident for resident in self._staying if self._may_leave(resident, waiting) and resident.is_local]
        if idle:
            victim = min(idle, key=lambda resident: resident.order)
            self._unload(victim.model, f"evicted for {waiting.model}")
            return True
        busy = [
            resident
            for resident in self._staying
            if resident.state is RunnerState.READY
            and resident.is_local
            and not resident.pinned
            and not self._is_patient(waiting, resident)
        ]
        self._drain(min(busy, key=lambda r: r.leases, default=None), waiting)
        return False

    def _refused(self, waiting: Waiting, refusal: Refusal) -> None:
        if not refusal.blockers:
            if not self._freed:  # what leaves now may give back more than is known
                self.actions.append(Refuse(waiting.model, refusal.message))
            return
        self.waiting_for_room += 1
        for resident in [resident for resident in self._staying if resident.model in refusal.blockers]:
            if resident.state is RunnerState.READY and not self._is_patient(waiting, resident):
                self._drain(resident, waiting)

    def _evict(self, name: str, waiting: Waiting, placement: Placement | None) -> None:
        if name not in self._going:
            needed = ", ".join(
                f"{format_size(size)} on {device}"
                for device, size in (placement.bytes_by_device if placement is not None else {}).items()
                if size
            )
            self._unload(name, f"evicted for {waiting.model}: needs {needed}")

    def _unload(self, name: str, reason: str) -> None:
        self.actions.append(Unload(name, reason))
        self._leave(name)

    def _drain(self, resident: Resident | None, waiting: Waiting) -> None:
        if resident is not None:
            waited = self._facts.now - waiting.since
            goes_first = waited < self._facts.max_wait_s
            why = f"goes first: priority {waiting.priority}" if goes_first else f"waited {format_duration(waited)}"
            self.actions.append(Drain(resident.model, f"makes room for {waiting.model}, which {why}"))
            self._leave(resident.model)

    def _leave(self, name: str) -> None:
        self._going.add(name)
        self._freed += [_freed(resident) for resident in self._staying if resident.model == name]
        self._staying = [resident for resident in self._staying if resident.model != name]

    def _among(self, names: Sequence[str]) -> list[Holder]:
        return [holder for holder in self._freed if holder.name in names]


def _holder(resident: Resident, *, evictable: bool) -> Holder:
    return Holder(resident.model, resident.held, evictable, order=resident.order[0], pinned=resident.pinned)


def _freed(resident: Resident) -> Holder:
    return Holder(resident.model, resident.held, order=-math.inf)


def _fuller(now: Sequence[Device], then: Sequence[Device]) -> tuple[Device, ...]:
    """Of each device the time with less room."""
    return tuple(
        one if one.used_by_ours_bytes >= other.used_by_ours_bytes else other
        for one, other in zip(now, then, strict=True)
    )
