"""The hardware sampler as the Gauge of the runners' ledger: the one place that knows both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from llamarunner.config.schema import SchedulerConfig
from llamarunner.runners.placement import RAM, Device
from llamarunner.telemetry.gpus import GpuSample
from llamarunner.telemetry.hardware import HardwareSample, HardwareSampler

_REFRESH_S = 1.0  # waited at most: a driver that hangs must not hold up a load for ever
_POLL_S = 0.005


class HardwareGauge:
    """`pids` are our engines' processes, as far as they run now."""

    def __init__(self, sampler: HardwareSampler, settings: SchedulerConfig, pids: Callable[[], Sequence[int]]) -> None:
        self._sampler = sampler
        self._settings = settings
        self._pids = pids

    def devices(self) -> Sequence[Device]:
        sample = self._sampler.latest
        if not sample.host.memory_total_bytes:
            return ()
        return devices_of(sample, self._settings, self._pids())

    def used(self) -> Mapping[str, int]:
        sample = self._sampler.latest
        gpus = {_id(gpu): gpu.used_bytes for gpu in sample.gpus if gpu.used_bytes is not None}
        return {RAM: sample.host.memory_used_bytes, **gpus}

    def held(self, pid: int) -> Mapping[str, int]:
        sample = self._sampler.latest.processes.get(pid)
        if sample is None:
            return {}
        return {RAM: sample.memory_bytes, **{f"gpu{index}": size for index, size in sample.by_gpu.items()}}

    async def refresh(self) -> None:
        asked = time.monotonic()
        self._sampler.hurry()
        with suppress(TimeoutError):
            async with asyncio.timeout(_REFRESH_S):
                while self._sampler.latest.taken < asked:  # noqa: ASYNC110 it changes in another thread
                    await asyncio.sleep(_POLL_S)


def devices_of(sample: HardwareSample, settings: SchedulerConfig, pids: Sequence[int]) -> tuple[Device, ...]:
    """What others use is what is used less what our engines are seen to hold. A GPU that does not say how much memory
    it has, or that no longer answers, is none to put a model on."""
    ours = [sample.processes[pid] for pid in pids if pid in sample.processes]
    host = sample.host
    ram_of_others = max(host.memory_used_bytes - sum(each.private_bytes for each in ours), 0)
    ram = Device(RAM, "RAM", host.memory_total_bytes, settings.ram_reserve, ram_of_others)
    gpus = [
        Device(
            _id(gpu),
            f"GPU {gpu.index} ({gpu.name})",
            gpu.total_bytes,
            settings.gpu_reserve,
            max((gpu.used_bytes or 0) - sum(each.by_gpu.get(gpu.index, 0) for each in ours), 0),
            uuid=gpu.uuid,
        )
        for gpu in sample.gpus
        if gpu.total_bytes and not gpu.problem
    ]
    return (ram, *gpus)


def _id(gpu: GpuSample) -> str:
    return f"gpu{gpu.index}"
