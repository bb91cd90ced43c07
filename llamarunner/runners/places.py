"""Every model's places, one for each replica, and what may be told of them all. Only the manager changes a place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.config.schema import SchedulerConfig
from llamarunner.engines.engine import Engine
from llamarunner.events import RunnerState
from llamarunner.runners.demand import Demand
from llamarunner.runners.facts import Facts, Refuse, Waiting
from llamarunner.runners.house import House
from llamarunner.runners.ledger import Ledger
from llamarunner.runners.outlook import Outlook, outlooks
from llamarunner.runners.place import Place, Residence, together
from llamarunner.runners.placement import Device, holding, summed
from llamarunner.runners.waiters import Waiter, Waiters

_RETRY_AFTER_S = 5.0  # told to clients that are turned away, where nothing better is known


class Places:
    def __init__(self, engines: Mapping[str, Engine], settings: SchedulerConfig, ledger: Ledger) -> None:
        self._engines = engines
        self._settings = settings
        self._ledger = ledger
        self._places: dict[str, Place] = {}  # by their names
        self._groups: dict[str, str] = {}  # by the names of models: whose runners serve them
        self._replicas: dict[str, list[Place]] = {}  # of each group

    def __iter__(self) -> Iterator[Place]:
        return iter(list(self._places.values()))

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def of(self, model: Model) -> list[Place]:
        """One for each replica, made where it is not there yet. Models that are started alike share theirs. The
        catalogue may have a newer model; a running engine keeps what it was started with."""
        settings = model.settings
        engines = [*[settings.engine] * settings.replicas, *settings.also_on]
        group = self._groups[model.name] = self._group_of(model)
        names = [group, *(f"{group}#{number}" for number in range(2, len(engines) + 1))]
        found = [self._at(name, model, engine) for name, engine in zip(names, engines, strict=True)]
        for place in self._replicas.get(group, ()):
            place.is_gone = place not in found
        self._replicas[group] = found
        return found

    def _group_of(self, model: Model) -> str:
        """That of the runners which serve it. They may go by the name of a model that is not the first of its like any
        more, or not there at all: what is made or deleted beside it loads nothing again."""
        own = model.runner_name
        for group in (own, *self._replicas):
            if any(place.stays and place.is_like(model) for place in self._replicas.get(group, ())):
                return group
        return own

    def _at(self, name: str, model: Model, engine: str) -> Place:
        place = self._places.get(name)
        if place is not None and (place.stays or place.base is model):
            return place
        settings = model.settings
        own = model
        if settings.engine != engine:
            own = replace(model, settings=settings.model_copy(update={"engine": engine}))
        if place is None:
            place = self._places[name] = Place(name, own, Waiters(self._settings.max_wait), model.runner_name)
        place.base, place.model = model, own
        place.pinned, place.pinned_by = self.pin_of(model)
        place.apart = frozenset(settings.tags) & frozenset(self._settings.never_together)
        if (runs_it := self._engines.get(engine)) is not None:
            place.engine_kind, place.is_local = runs_it.kind, runs_it.is_local
            place.is_adjustable = runs_it.is_adjustable
        return place

    def pin_of(self, model: Model) -> tuple[bool, str]:
        """Whether it stays once it is loaded, and by which of its tags."""
        staying = [tag for tag in model.settings.tags if tag in self._settings.always_stay]
        return model.settings.pin or bool(staying), next(iter(staying), "")

    def adopt(self, catalog: Catalog) -> list[Place]:
        """Runners whose model is gone, or has other files by now, go by the name of another that they serve. Those that
        serve none any more are noted as gone; the places of models that have other files are returned."""
        changed: list[Place] = []
        kept: set[str] = set()  # groups of runners that serve a model there is
        for place in self:
            if not place.stays or place.launched is None or place.base is None:
                continue
            known = catalog.get(place.owner)
            is_known = known is not None and known.name == place.owner
            if known is not None and is_known and known.has_files_of(place.base):
                kept.add(place.group)
            elif (heir := next((each for each in catalog if place.is_like(each)), None)) is not None:
                place.launched = replace(place.launched, name=heir.name)
                self._groups[heir.name] = place.group
                kept.add(place.group)
            elif known is not None:
                changed.append(place)
        kept |= {self._groups.get(model.name, model.runner_name) for model in catalog}
        for place in self:
            place.is_gone = place.group not in kept or place not in self._replicas.get(place.group, ())
        return changed

    def remove(self, place: Place) -> None:
        """It is gone and empty."""
        del self._places[place.name]
        if left := [other for other in self._replicas.get(place.group, ()) if other is not place]:
            self._replicas[place.group] = left
            return
        self._replicas.pop(place.group, None)
        self._groups = {name: group for name, group in self._groups.items() if group != place.group}
        self._ledger.forget(place.group)

    def replicas(self, name: str) -> list[Place]:
        """Of the model of this name, or of the one it shares its runners with; none where nobody ever asked for it."""
        return self._replicas.get(self._groups.get(name, name), [])

    def forget(self, waiter: Waiter) -> Place | None:
        """Where it still waited."""
        for place in self:
            if waiter in place.waiters:
                place.waiters.remove(waiter)
                return place
        return None

    @property
    def waiting(self) -> int:
        """Requests, for any of them."""
        return sum(len(place.waiters) for place in self)

    # -- what may be told --------------------------------------------------------------------------------------------

    def residence(self, name: str) -> Residence | None:
        places, now, kept_s = self.replicas(name), time.monotonic(), self._settings.min_residency
        if not places or all(place.owner != name for place in places):
            return None
        return together([place.residence(now, self._ledger.shares(place), kept_s) for place in places])

    def strays(self, catalog: Catalog) -> list[Model]:
        """Models that are gone, and have a runner yet."""
        names = {model.name for model in catalog}
        running = {place.owner: place.launched for place in self if place.runner is not None}
        return [model for name, model in running.items() if name not in names and model is not None]

    def devices(self) -> Sequence[Device]:
        held = summed(self._ledger.held(place) for place in self if place.runner is not None)
        return holding(self._ledger.devices(), held)

    def outlooks(self) -> Mapping[int, Outlook]:
        return outlooks(list(self), time.monotonic())

    def retry_after_s(self, place: Place) -> float:
        """When one of those who wait for this place will have been served, from how long loads and answers took."""
        told = self.outlooks()
        ids = [waiter.trace.request_id for waiter in place.waiters if waiter.trace is not None]
        left = [outlook.left_s for each in ids or told if (outlook := told.get(each)) and outlook.left_s is not None]
        return min(left, default=0.0) or place.answer_s or _RETRY_AFTER_S

    @property
    def loaded(self) -> list[Model]:
        ready = (p for p in self if p.runner is not None and p.runner.state is RunnerState.READY)
        return list({place.owner: place.model for place in ready}.values())

    @property
    def pids(self) -> list[int]:
        runners = (place.runner for place in self)
        return [runner.pid for runner in runners if runner is not None and runner.pid is not None]

    def facts(self) -> Facts:
        """For the scheduler."""
        settings, now = self._settings, time.monotonic()
        asking = [place for place in self if place.waiters and self.is_estimated(place, now)]
        waiting = sorted(asking, key=lambda place: place.waiters.oldest().number)
        return Facts(
            now=now,
            residents=[p.resident(self._ledger.held(p)) for p in self if p.runner is not None],
            waiting=[self._waiting(place, now) for place in waiting],
            max_wait_s=settings.max_wait,
            max_loaded=settings.max_loaded,
            devices=self._ledger.devices() if waiting or settings.yield_to_others else (),
            partial="offload" if settings.partial_offload else "refuse",
            spread=settings.spread,
            min_residency_s=settings.min_residency,
            yields=settings.yield_to_others,
        )

    def is_estimated(self, place: Place, now: float) -> bool:
        """Whether it is known what its next load needs: until then nothing is decided about it."""
        demand, engine = place.next_demand(now), self._engines.get(place.model.settings.engine)
        return demand is None or engine is None or self._ledger.knows(place, demand)

    def cannot_reload(self, place: Place, demand: Demand) -> Refuse | None:
        """Whether what is demanded fits nowhere: then the runner there is need not leave for it."""
        facts, need = self.facts(), self._ledger.need(place, demand)
        others = [resident for resident in facts.residents if resident.model != place.name]
        waiting = replace(self._waiting(place, facts.now), need=need)
        return House(replace(facts, residents=others), set()).hopeless(waiting)

    def _waiting(self, place: Place, now: float) -> Waiting:
        leader = place.waiters.leader(now)
        return Waiting(
            model=place.name,
            since=place.waiters.oldest().since,
            need=self._ledger.need(place, leader.demand) if place.runner is None else None,
            devices=tuple(place.model.settings.devices),
            is_local=place.is_local,
            priority=max(waiter.priority for waiter in place.waiters),
            apart=place.apart,
        )
