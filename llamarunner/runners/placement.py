"""Where a model fits: `place` puts a `Need` on devices. Pure; bytes throughout. Who must leave first: `room.py`.

The order of preference: one GPU, the fewest GPUs that hold it together, as many layers as fit on GPUs with the rest in
RAM (where that is allowed), RAM alone where there is no GPU. What the configuration wishes goes before all that."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from llamarunner.errors import UnsupportedError
from llamarunner.runners.memory import Need
from llamarunner.units import format_size

RAM = "ram"
Partial = Literal["offload", "refuse"]

_FREE = attrgetter("free_bytes")
_HALVINGS = 16  # of the search for the evenest split: finer than any layer


@dataclass(frozen=True, slots=True)
class Device:
    """`used_by_ours` is what our runners hold or have been promised, `used_by_others` what else cannot be had."""

    id: str  # "ram", "gpu0", ...
    name: str
    total_bytes: int
    reserve_bytes: int = 0
    used_by_others_bytes: int = 0
    used_by_ours_bytes: int = 0
    uuid: str = ""  # as CUDA_VISIBLE_DEVICES takes it
    free_bytes: int = field(init=False, compare=False)  # asked for again and again

    def __post_init__(self) -> None:
        taken = self.reserve_bytes + self.used_by_others_bytes + self.used_by_ours_bytes
        object.__setattr__(self, "free_bytes", max(self.total_bytes - taken, 0))

    def holding(self, size: int) -> Device:
        """With `size` bytes more of ours on it, or less."""
        ours = max(self.used_by_ours_bytes + size, 0)
        return Device(
            self.id, self.name, self.total_bytes, self.reserve_bytes, self.used_by_others_bytes, ours, self.uuid
        )

    @property
    def selector(self) -> str:
        return self.uuid or self.id.removeprefix("gpu")


@dataclass(frozen=True, slots=True)
class Placement:
    bytes_by_device: Mapping[str, int]
    gpu_layers: int | None = None  # for --n-gpu-layers, the output counted; None in RAM
    tensor_split: tuple[int, ...] = ()  # for --tensor-split, layers of each of `devices`; () where none was computed
    devices: tuple[str, ...] = ()  # ids of the GPUs the engine may see, in its order
    env: Mapping[str, str] = field(default_factory=dict)  # for the child, over all else

    @property
    def key(self) -> str:
        """Tells placements apart whose footprints differ."""
        return f"{','.join(self.devices) or RAM} {self.gpu_layers} {','.join(map(str, self.tensor_split))}".strip()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing fits: `on`, the device that comes nearest, has too little. `blockers` are those whose leaving would help,
    as far as it is known."""

    model: str
    on: Device
    needed_bytes: int
    others: int = 0  # further GPUs that would have to take part, and have too little too
    blockers: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return self.on.id

    @property
    def free_bytes(self) -> int:
        return self.on.free_bytes

    @property
    def message(self) -> str:
        """With the numbers, and who holds the memory."""
        device = self.on
        held = (
            (device.used_by_ours_bytes, "loaded models"),
            (device.used_by_others_bytes, "other programs"),
            (device.reserve_bytes, "the reserve"),
        )
        parts = ", ".join(f"{format_size(amount)} {who}" for amount, who in held if amount)
        message = (
            f"{self.model} needs {format_size(self.needed_bytes)} of {device.name}, which has "
            f"{format_size(device.free_bytes)} free of {format_size(device.total_bytes)}"
            + (f" ({parts})" if parts else "")
        )
        if self.others:
            has = "GPUs have" if self.others > 1 else "GPU has"
            message += f", and {self.others} more {has} too little for the rest"
        return message


def place(
    need: Need,
    devices: Sequence[Device],
    *,
    pinned: Sequence[str] = (),
    spread: bool = False,
    partial: Partial = "offload",
) -> Placement | Refusal:
    """`pinned` are the only GPUs it may use (ids or UUIDs; "ram" for none), `spread` uses all of them at once.

    Raises UnsupportedError where the model's own flags name GPUs that are not there."""
    listed = [device for device in devices if device.id != RAM]
    ram = next((device for device in devices if device.id == RAM), None)
    seen = _visible(need, listed, pinned)
    gpus = _named(need, seen)
    board = _Board(need, ram, seen, gpus, hides=bool(listed))
    wished = need.wishes.gpu_layers
    if not gpus or wished == 0:
        return board.in_ram()
    layers = need.units if wished is None else min(wished, need.units)
    in_part = wished is None and partial == "offload"
    if need.wishes.tensor_split or _counts_gpus(need):
        return board.as_told(layers, 1 if in_part else layers)
    if spread:
        found = board.over(len(gpus), layers, fewest=len(gpus))
    else:
        found = board.on_one(layers) or board.over(len(gpus), layers)
    if found is None and in_part:
        return board.in_part()
    return found or board.refusal(layers)


# -- what the configuration says -----------------------------------------------------------------------------------


def holding(devices: Sequence[Device], sizes: Mapping[str, int]) -> tuple[Device, ...]:
    """The devices with so many bytes more of ours on each, or less."""
    return tuple(device.holding(sizes[device.id]) if sizes.get(device.id) else device for device in devices)


def summed(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Bytes by device, of all of them together."""
    total: dict[str, int] = {}
    for sizes in several:
        for device, size in sizes.items():
            total[device] = total.get(device, 0) + size
    return total


def _counts_gpus(need: Need) -> bool:
    """Whether its flags number GPUs: then the engine must see them as the person who wrote the flags does."""
    wishes = need.wishes
    return wishes.devices is not None or wishes.main_gpu is not None or wishes.split_mode in ("row", "tensor")


def _visible(need: Need, gpus: list[Device], pinned: Sequence[str]) -> list[Device]:
    if not pinned and need.wishes.visible is None:
        return gpus
    known = {RAM} | {gpu.id for gpu in gpus} | {gpu.uuid for gpu in gpus}
    if unknown := [name for name in pinned if name not in known]:
        raise _unsupported(need, f"there is no device '{unknown[0]}'", _listed(gpus))
    allowed = [gpu for gpu in gpus if not pinned or gpu.id in pinned or (gpu.uuid and gpu.uuid in pinned)]
    if need.wishes.visible is None:
        return allowed
    found: list[Device] = []
    for name in (part.strip() for part in need.wishes.visible.split(",")):
        match = next((gpu for gpu in gpus if _is_called(gpu, name)), None)
        if match is None:
            break  # CUDA too reads no further than the first that names nothing
        if match in allowed and match not in found:
            found.append(match)
    return found


def _is_called(gpu: Device, name: str) -> bool:
    """By number or by UUID, of which the beginning will do."""
    return name == gpu.id.removeprefix("gpu") or (len(name) > 4 and gpu.uuid.startswith(name))


def _named(need: Need, seen: list[Device]) -> list[Device]:
    """Those of the GPUs the engine sees that its flags let it use."""
    wishes, gpus = need.wishes, seen
    if wishes.devices is not None:
        gpus = [_numbered(need, "device", name, seen) for name in wishes.devices]
    if wishes.main_gpu is not None and gpus:
        gpus = [_numbered(need, "main-gpu", str(wishes.main_gpu), gpus)]
    if wishes.tensor_split and gpus and len(wishes.tensor_split) != len(gpus):
        shares = len(wishes.tensor_split)
        raise _unsupported(
            need,
            f"tensor-split has {shares} share{'s' if shares > 1 else ''}, and the GPUs it may use are {len(gpus)}",
            "give one share for each GPU, or leave the flag out: the split is computed",
        )
    return gpus


def _numbered(need: Need, flag: str, name: str, gpus: Sequence[Device]) -> Device:
    """The engine's own number among the GPUs it sees: "CUDA1", or "1"."""
    number = name.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    if not number.isdecimal() or int(number) >= len(gpus):
        raise _unsupported(need, f"{flag} names the GPU '{name}', and there are {len(gpus)}", _listed(gpus))
    return gpus[int(number)]


def _unsupported(need: Need, what: str, hint: str) -> UnsupportedError:
    return UnsupportedError(f"model '{need.model}': {what}", hint=hint)


def _listed(gpus: Sequence[Device]) -> str:
    return "there are: " + (", ".join(f"{gpu.id} ({gpu.name})" for gpu in gpus) or "no GPUs")


# -- trying it out ---------------------------------------------------------------------------------------------------


class _Board:
    """One need on the GPUs it may use."""

    def __init__(
        self, need: Need, ram: Device | None, seen: Sequence[Device], gpus: Sequence[Device], *, hides: bool
    ) -> None:
        self._need = need
        self._ram = ram
        self._seen = seen
        # With the most free memory first, so that more memory anywhere never makes a split worse. The engine is shown
        # them in this order too.
        self._gpus = sorted(gpus, key=_FREE, reverse=True)
        self._as_listed = gpus
        self._hides = hides
        self._ends = need.ends
        # for layers, of each GPU that takes part
        each = need.on_each_gpu
        self._rooms = [gpu.free_bytes - each for gpu in self._gpus]
        if self._rooms:
            self._rooms[0] -= need.on_first_gpu

    def in_ram(self) -> Placement | Refusal:
        """The engine sees no GPU, or it would take some memory of each for its own ends."""
        size = self._need.on_cpu()
        if self._ram is not None and size > self._ram.free_bytes:
            return Refusal(self._need.model, self._ram, size)
        return self._placement([], [], (), size, None)

    def on_one(self, layers: int) -> Placement | None:
        """The fullest GPU that still has room, so that the emptier ones stay free for larger models."""
        (size,) = self._need.on_gpus((layers,)).gpus
        for gpu in reversed(self._gpus):
            if size <= gpu.free_bytes:
                return self._try([gpu], (layers,))
        return None

    def over(self, most: int, layers: int, *, fewest: int = 2) -> Placement | None:
        size, room = self._ends[-1] - self._ends[self._need.units - layers], 0
        for count in range(1, most + 1):
            room += max(self._rooms[count - 1], 0)
            if count < fewest or room < size:
                continue
            shares = self._even_shares(count, layers)
            if shares and (found := self._try(self._gpus[:count], shares)):
                return found
        return None

    def in_part(self) -> Placement | Refusal:
        """As many layers as go on GPUs, on as few of them as take that many, and the rest in RAM."""
        low, high = 0, self._need.units
        while high - low > 1:  # `low` layers fit
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(self._rooms, middle) else (low, middle)
        if not low:
            return self.in_ram()
        fewest = next(n for n in range(1, len(self._gpus) + 1) if self._fits(self._rooms[:n], low))
        return self.over(len(self._gpus), low, fewest=fewest) or self.in_ram()

    def as_told(self, layers: int, least: int) -> Placement | Refusal:
        """Flags number the GPUs: those, in their own order, with the flags' shares or else by their free memory."""
        gpus = self._as_listed
        weights = self._need.wishes.tensor_split or tuple(float(gpu.free_bytes) for gpu in gpus)
        for number in range(layers, least - 1, -1):
            if found := self._try(gpus, split_layers(weights, number), as_told=True):
                return found
        allocation = self._need.on_gpus(split_layers(weights, layers))
        for gpu, size in zip(gpus, allocation.gpus, strict=True):
            if size > gpu.free_bytes:
                return Refusal(self._need.model, gpu, size)
        assert self._ram is not None
        return Refusal(self._need.model, self._ram, allocation.ram)

    def refusal(self, layers: int) -> Refusal:
        """For the GPU that comes nearest, or RAM where that is what lacks."""
        alone = self._need.on_gpus((layers,))
        if self._ram is not None and alone.ram > self._ram.free_bytes:
            return Refusal(self._need.model, self._ram, alone.ram)
        return Refusal(self._need.model, self._gpus[0], alone.gpus[0], len(self._gpus) - 1)

    def _fits(self, rooms: Sequence[int], layers: int) -> bool:
        """Layers lie one after the other, so filling each GPU in turn fits whenever anything does."""
        size = self._ends[-1] - self._ends[self._need.units - layers]
        return sum(room for room in rooms if room > 0) >= size and self._fill(rooms, layers) is not None

    def _even_shares(self, count: int, layers: int) -> tuple[int, ...] | None:
        """Layers for each of the first `count` GPUs in proportion to its free memory, as nearly as whole layers allow;
        None if they do not fit."""
        rooms = self._rooms[:count]
        if not self._fits(rooms, layers):
            return None
        best = self._fill(rooms, layers)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS if best else 0):
            middle = (low + high) / 2
            if found := self._fill([math.floor(room * middle) for room in rooms], layers):
                best, high = found, middle
            else:
                low = middle
        return best

    def _fill(self, rooms: Sequence[int], layers: int) -> tuple[int, ...] | None:
        """How many of the last `layers` go into each room, in turn."""
        at, end, shares = self._need.units - layers, self._need.units, []
        for room in rooms:
            reached = bisect_right(self._ends, self._ends[at] + room, at, end + 1) - 1 if room > 0 else at
            shares.append(reached - at)
            at = reached
        return tuple(shares) if at == end else None

    def _try(self, gpus: Sequence[Device], shares: tuple[int, ...], *, as_told: bool = False) -> Placement | None:
        allocation = self._need.on_gpus(shares)
        if any(size > gpu.free_bytes for gpu, size in zip(gpus, allocation.gpus, strict=True)):
            return None
        if self._ram is not None and allocation.ram > self._ram.free_bytes:
            return None
        used = [gpu for gpu, share in zip(gpus, shares, strict=True) if share]
        sizes = [size for size, share in zip(allocation.gpus, shares, strict=True) if share]
        split = tuple(share for share in shares if share) if len(used) > 1 and not as_told else ()
        return self._placement(self._seen if as_told else used, used, sizes, allocation.ram, sum(shares), split)

    def _placement(
        self,
        seen: Sequence[Device],
        used: Sequence[Device],
        sizes: Sequence[int],
        ram: int,
        layers: int | None,
        split: tuple[int, ...] = (),
    ) -> Placement:
        env: dict[str, str] = {}
        if self._hides:
            # by bus, as NVML counts them: CUDA's own order is the fastest first
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.selector for gpu in seen)
        sizes_by_id = {RAM: ram} | {gpu.id: size for gpu, size in zip(used, sizes, strict=True)}
        return Placement(sizes_by_id, layers, split, tuple(gpu.id for gpu in used), env)


def split_layers(weights: Sequence[float], layers: int) -> tuple[int, ...]:
    """How llama.cpp deals out layers by --tensor-split: the n-th goes to the first GPU whose part of the sum is beyond
    n / layers."""
    total, ends, sum_ = sum(weights) or 1.0, [], 0.0
    for weight in weights:
        sum_ += weight
        ends.append(sum_ / total)
    shares = [0] * len(weights)
    for number in range(layers):
        shares[next((i for i, end in enumerate(ends) if end > number / layers), len(weights) - 1)] += 1
    return tuple(shares)
