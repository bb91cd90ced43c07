"""Memory as the manager sees it: what each model needs, what it holds, and when what it gave back is really free.

Measuring is another's work, handed in as a `Gauge`; deciding is the scheduler's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from llamarunner.catalog.catalog import Model
from llamarunner.engines.engine import Engine
from llamarunner.errors import LlamaRunnerError
from llamarunner.runners.demand import NO_DEMAND, Demand
from llamarunner.runners.footprints import Footprints, Measured, footprint_key
from llamarunner.runners.memory import Need, companions, estimate
from llamarunner.runners.place import Place, Share
from llamarunner.runners.placement import RAM, Device, Placement
from llamarunner.runners.runner import Runner

logger = logging.getLogger(__name__)

_AMPLE = 1.5  # of what a model needs: with so much free, no better estimate is wanted
_BACK_SHARE = 0.75  # of what a runner held on a GPU; drivers keep a little
_BACK_S = 5.0  # waited for it at most
_BACK_POLL_S = 0.05
_MOST_DEMANDS = 32  # estimates kept for one model


class Gauge(Protocol):
    """Measured memory. Bytes by device: "ram", "gpu0", ..."""

    def devices(self) -> Sequence[Device]:
        """Every device with what other programs use of it; nothing of ours. () where nothing is measured yet."""
        ...

    def used(self) -> Mapping[str, int]:
        """By anybody."""
        ...

    def held(self, pid: int) -> Mapping[str, int]:
        """By an engine's process and its children; {} where it was not seen yet."""
        ...

    async def refresh(self) -> None:
        """Measure anew, now; bounded."""
        ...


class NoGauge:
    """Nothing is known of memory, so nothing is held against it."""

    def devices(self) -> Sequence[Device]:
        return ()

    def used(self) -> Mapping[str, int]:
        return {}

    def held(self, pid: int) -> Mapping[str, int]:
        return {}

    async def refresh(self) -> None:
        return


@dataclass(slots=True)
class _Known:
    """What a model needs, by demand."""

    model: Model
    by_demand: dict[tuple[object, ...], Need | None] = field(default_factory=dict)


class Ledger:
    def __init__(self, gauge: Gauge, footprints: Footprints) -> None:
        self._gauge = gauge
        self._footprints = footprints
        self._needs: dict[tuple[str, str], _Known] = {}  # by the names of model and engine: replicas share them
        self._engines: dict[str, Engine] = {}  # of the models that were estimated
        self._unseen: list[tuple[Place, Runner, Mapping[str, int]]] = []  # promised, and not seen by the gauge
        self._versions: dict[str, str] = {}  # of each engine's program, as far as they are known

    def devices(self) -> Sequence[Device]:
        return [self._without_unseen(device) for device in self._gauge.devices()]

    def _without_unseen(self, device: Device) -> Device:
        """Where the driver names no processes, what ours hold there looks like others': it would count twice."""
        self._unseen = [known for known in self._unseen if known[0].runner is known[1] and known[1].pid is not None]
        ours = sum(sizes.get(device.id, 0) for _, _, sizes in self._unseen)
        return replace(device, used_by_others_bytes=max(device.used_by_others_bytes - ours, 0)) if ours else device

    async def estimate(self, place: Place, engine: Engine | None, demand: Demand = NO_DEMAND) -> None:
        """Note in `place` what its model needs under `demand`. Where that cannot be told the engine decides."""
        if engine is None or self.knows(place, demand):
            return
        model = place.model
        try:
            wanted = demand.applied(model)
            need, self._versions[engine.name] = await asyncio.to_thread(_estimate, wanted, engine)
            if need is not None and self._is_tight(need):
                need = await asyncio.to_thread(_project, need, wanted, engine)
        except LlamaRunnerError as error:
            logger.debug("%s: what it needs cannot be told: %s", model.name, error)
            need = None
        except Exception:
            logger.exception("what %s needs could not be told, in an unforeseen way", model.name)
            need = None
        key = (place.group, model.settings.engine)
        known = self._needs.get(key)
        if known is None or not _is_alike(known.model, model):
            known = self._needs[key] = _Known(model)
        if len(known.by_demand) >= _MOST_DEMANDS:
            del known.by_demand[next(iter(known.by_demand))]
        known.by_demand[demand.key] = need
        self._engines[engine.name] = engine

    def knows(self, place: Place, demand: Demand) -> bool:
        """Whether it was estimated for the model as it is now, be it that nobody could tell."""
        known = self._needs.get((place.group, place.model.settings.engine))
        return known is not None and demand.key in known.by_demand and _is_alike(known.model, place.model)

    def forget(self, group: str) -> None:
        """There is no such model any more."""
        self._needs = {key: known for key, known in self._needs.items() if key[0] != group}

    def _is_tight(self, need: Need) -> bool:
        """Whether a better figure than ours could change where it goes; asking for one takes a second."""
        devices = self._gauge.devices()
        gpus = [device for device in devices if device.id != RAM]
        free = [device.free_bytes for device in gpus or devices]
        return bool(free) and _AMPLE * need.on_cpu() > max(free)

    def need(self, place: Place, demand: Demand = NO_DEMAND) -> Need | None:
        """As estimated, put right by what was measured; None where that was not done, or cannot be."""
        need = self.first_need(place, demand)
        if need is None:
            return None
        placement = place.placement or Placement({RAM: need.on_cpu()})
        if key := self._key(demand.applied(place.model), place.engine_kind, placement):
            return self._footprints.corrected(need, key, placement)
        return need

    def first_need(self, place: Place, demand: Demand = NO_DEMAND) -> Need | None:
        """As estimated, whatever was measured since."""
        known = self._needs.get((place.group, place.model.settings.engine))
        return known.by_demand.get(demand.key) if known is not None else None

    def shares(self, place: Place) -> tuple[Share, ...]:
        """Of each device it lies on, or last lay on: GPUs first."""
        runner, placement, need = place.runner, place.placement, place.need
        is_measured = place.is_ready and runner is not None and runner.pid is not None
        measured = self._gauge.held(runner.pid) if is_measured and runner is not None and runner.pid else {}
        estimated, layers = _spread(need, placement) if need is not None and placement is not None else ({}, {})
        devices = sorted({**estimated, **measured}, key=lambda device: (device == RAM, device))
        return tuple(Share(each, layers.get(each), estimated.get(each), measured.get(each)) for each in devices)

    def expected_load_s(self, place: Place) -> float | None:
        """How long a load took where it lies or last lay, be it of an earlier run of the program; None where nobody
        knows. Looks nothing up on disk."""
        need = place.need or self.first_need(place)
        if need is None or not len(self._footprints):
            return None
        placement = place.placement or Placement({RAM: need.on_cpu()})
        measured = self._footprints.lookup(key) if (key := self._own_key(place, placement)) else None
        return measured.load_s if measured is not None else None

    def held(self, place: Place) -> Mapping[str, int]:
        """Measured once it is ready, promised before."""
        promised = place.placement.bytes_by_device if place.placement is not None else {}
        if not place.is_ready or place.runner is None or place.runner.pid is None:
            return promised
        return {**promised, **self._gauge.held(place.runner.pid)}

    async def measure(self, place: Place) -> None:
        """Write down what a runner that just became ready took. Its program is asked its version by now: a request
        does not wait for that."""
        await self._gauge.refresh()
        runner = place.runner
        if runner is None or runner.pid is None or runner.load_s is None or not place.is_ready:
            return
        held, placement = self._gauge.held(runner.pid), place.placement
        promised = placement.bytes_by_device if placement is not None else {}
        unseen = {device: size for device, size in promised.items() if device != RAM and device not in held}
        self._unseen = [known for known in self._unseen if known[1] is not runner]
        if held and unseen:
            self._unseen.append((place, runner, unseen))
        engine = self._engines.get(place.model.settings.engine)
        if engine is not None and engine.is_local:
            self._versions[engine.name] = (await asyncio.to_thread(engine.info)).version
        if held and placement is not None and (key := self._own_key(place, placement)):
            self._footprints.record(key, Measured(held, runner.load_s))
            try:
                await asyncio.to_thread(self._footprints.save)
            except OSError as error:
                logger.warning("what models need is not kept: %s", error)

    def note_growth(self, place: Place) -> None:
        """A runner about to leave may have come to take more than when it was ready."""
        runner, placement = place.runner, place.placement
        if runner is not None and runner.pid is not None and placement is not None:
            held = self._gauge.held(runner.pid)
            if held and (key := self._own_key(place, placement)):
                self._footprints.grow(key, held)

    async def wait_until_back(self, held: Mapping[str, int], used_before: Mapping[str, int]) -> None:
        """Return when GPUs have what `held` says again, or after a while without: a driver takes its time, and the next
        engine would find too little. RAM is back when the process is gone."""
        awaited = {device: size for device, size in held.items() if device != RAM and size}
        if not awaited:
            return
        try:
            async with asyncio.timeout(_BACK_S):
                while not self._is_back(awaited, used_before):
                    await self._gauge.refresh()
                    await asyncio.sleep(_BACK_POLL_S)
        except TimeoutError:
            logger.warning("memory of %s is not back after %.0f s", ", ".join(awaited), _BACK_S)

    def _is_back(self, awaited: Mapping[str, int], used_before: Mapping[str, int]) -> bool:
        used = self._gauge.used()
        return all(
            used_before.get(device, 0) - used.get(device, 0) >= _BACK_SHARE * size for device, size in awaited.items()
        )

    def used(self) -> Mapping[str, int]:
        return self._gauge.used()

    def _own_key(self, place: Place, placement: Placement) -> str:
        return self._key(place.launched or place.model, place.engine_kind, placement)

    def _key(self, model: Model, engine_kind: str, placement: Placement) -> str:
        """ "" where the model's flags are wrong, which its load will tell."""
        version = self._versions.get(model.settings.engine, "")
        try:
            return footprint_key(model, engine=engine_kind, version=version, placement=placement)
        except LlamaRunnerError:
            return ""


def _spread(need: Need, placement: Placement) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes, and layers, by device."""
    if placement.gpu_layers is None:
        return {RAM: need.on_cpu()}, {RAM: need.units}
    split = placement.tensor_split or (placement.gpu_layers,)
    allocation = need.on_gpus(split)
    layers = dict(zip(placement.devices, split, strict=False))
    if rest := need.units - sum(split):
        layers[RAM] = rest
    return {RAM: allocation.ram, **dict(zip(placement.devices, allocation.gpus, strict=False))}, layers


def _is_alike(one: Model, other: Model) -> bool:
    """Whether both need the same: a newer catalogue has new models of the same files."""
    if one is other:
        return True
    is_same_file = (one.size_bytes, one.modified_at) == (other.size_bytes, other.modified_at)
    return is_same_file and one.is_launched_like(other) and one.details == other.details


def _estimate(model: Model, engine: Engine) -> tuple[Need | None, str]:
    """Blocks: reads the headers of what is loaded beside the model. And the engine's version, if that is known."""
    version = engine.known_version
    if model.problem or not engine.is_local or not model.details.weights.total:
        return None, version
    return estimate(model, companions(model)), version


def _project(need: Need, model: Model, engine: Engine) -> Need:
    """Blocks for some seconds, once for each file, flags and build of the engine."""
    projection = engine.project(model)
    return need.projected(projection.context, projection.compute) if projection is not None else need


def placed(model: Model, placement: Placement | None) -> Model:
    """`model` with settings that put it where `placement` says."""
    if placement is None:
        return model
    settings = model.settings
    changes: dict[str, object] = {"env": {**settings.env, **placement.env}}
    if placement.gpu_layers is not None:
        changes["gpu_layers"] = placement.gpu_layers
    if placement.tensor_split:
        changes["flags"] = {**settings.flags, "tensor-split": ",".join(map(str, placement.tensor_split))}
    return replace(model, settings=settings.model_copy(update=changes))
